"""Autoencoders of diffusers: images to the states of latent diffusion, and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palindrome.model.families.latent.parts import Part

REFINEMENT_RATE = 0.05  # of Adam, where states have unit variance; it falls to 0 as a cosine
PIXELS = 1 << 20  # at once: the activations of 512 x 512 pixels in float32 take some 2 GB


@dataclass(frozen=True)
class Vae:
    """State = (z - shift) * scaling of the code z: the mean of an AutoencoderKL, not a sample; what a VQModel has
    before it is quantised; what an AutoencoderTiny gives. It computes in float32, whatever the network does: in
    float16 the activations of SDXL's overflow."""

    module: Any
    """Of diffusers."""
    scaling: float
    shift: float
    factor: int
    """Pixels of an image for one value of its state, across."""
    refinements: int = 0
    """Steps of gradient descent on what a state decodes to, which begin at the encoder's (Hong et al., "On exact
    inversion of DPM-solvers", arXiv 2311.18387, section 4.1)."""

    @classmethod
    def of(cls, part: Part, device: torch.device | str, tiled: bool = False, refinements: int = 0) -> "Vae":
        convention = cls.convention(part)
        module: Any = part.module(device)
        if tiled:
            module.enable_tiling()
        return cls(module, convention["scaling_factor"], convention["shift_factor"], factor(part), refinements)

    @staticmethod
    def convention(part: Part) -> dict[str, float]:
        """diffusers' factors, where its pipelines apply them; of a config that has none, the module's default."""
        config = part.config
        default = {"AutoencoderKL": 0.18215, "VQModel": 0.18215, "AutoencoderTiny": 1.0}[part.name]
        scaling, shift = config.get("scaling_factor"), config.get("shift_factor")
        return {"scaling_factor": default if scaling is None else scaling, "shift_factor": shift or 0.0}

    @torch.no_grad()
    def to_state(self, images: Tensor) -> Tensor:
        return self._by_part(self._state, images, images.shape[-1])

    @torch.no_grad()
    def to_images(self, state: Tensor) -> Tensor:
        return self._by_part(self._decode, state, state.shape[-1] * self.factor)

    def _state(self, images: Tensor) -> Tensor:
        state = (self._encode(images) - self.shift) * self.scaling
        return self._refined(state, images) if self.refinements else state

    def _refined(self, state: Tensor, images: Tensor) -> Tensor:
        """Of each image the state, of all steps, that decodes with the smallest error."""
        best, least = state, state.new_full((len(state),), float("inf"))
        with torch.enable_grad():
            moved = state.clone().requires_grad_()
            optimizer = torch.optim.Adam([moved], REFINEMENT_RATE)
            rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.refinements)
            for step in range(self.refinements + 1):
                error = (self._decode(moved) - images).square().flatten(1).mean(1)
                better = error.detach() < least
                best = torch.where(better[:, None, None, None], moved.detach(), best)
                least = torch.where(better, error.detach(), least)
                if step < self.refinements:
                    optimizer.zero_grad()
                    error.sum().backward()
                    optimizer.step()
                    rates.step()
        return best

    def _decode(self, state: Tensor) -> Tensor:
        image: Tensor = self.module.decode(state / self.scaling + self.shift).sample
        return image

    def _encode(self, images: Tensor) -> Tensor:
        found: Any = self.module.encode(images)
        return found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents

    def _by_part(self, compute: Callable[[Tensor], Tensor], batch: Tensor, size: int) -> Tensor:
        """Computes as many at once as have PIXELS; `size` is that of their images."""
        return torch.cat([compute(part) for part in batch.split(max(1, PIXELS // size**2))])


def factor(part: Part) -> int:
    """Pixels of an image for one value of its state, across."""
    config: Mapping[str, Any] = part.config
    blocks = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return 2 ** (len(blocks) - 1)
