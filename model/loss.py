"""The DDPM objective L_simple (Ho et al., eq. 14), which DDIM leaves unchanged (DDIM paper, theorem 1)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from palindrome.model.process import VP


class DiffusionLoss:
    """Mean squared error of the network's prediction at a random timestep.

    Called with x0, float [B, C, H, W] in [-1, 1], and with their classes, int [B], where the network is told these, it
    draws t uniformly and epsilon normally from `generator` and returns a 0-d float32 tensor: the error against epsilon,
    v or x0, as the process's `prediction_type` says, averaged over all values.
    """

    def __init__(self, process: VP, device: torch.device | str = "cpu") -> None:
        self.prediction_type = process.prediction_type
        self.alpha_bar = torch.from_numpy(process.alphas_cumprod).to(device)

    def __call__(
        self,
        network: Callable[..., Tensor],
        x0: Tensor,
        generator: torch.Generator | None = None,
        classes: Tensor | None = None,
    ) -> Tensor:
        t = torch.randint(len(self.alpha_bar), (len(x0),), device=x0.device, generator=generator)
        epsilon = torch.randn(x0.shape, device=x0.device, generator=generator)
        signal = self.alpha_bar[t].sqrt().float()[:, None, None, None]
        noise = (1 - self.alpha_bar[t]).sqrt().float()[:, None, None, None]
        target = {"epsilon": epsilon, "v_prediction": signal * epsilon - noise * x0, "sample": x0}
        told = (t,) if classes is None else (t, classes)
        return F.mse_loss(network(signal * x0 + noise * epsilon, *told).float(), target[self.prediction_type])
