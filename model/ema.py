"""Exponential moving average of a network's parameters."""

import torch
from torch import Tensor, nn


class EMA:
    """shadow <- d shadow + (1 - d) parameter, d rising to `decay` as min(decay, (1 + n) / (10 + n)) over n updates,
    so that the average of a short training does not remember the initial values."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {k: v.detach().clone().float() for k, v in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        values = network.state_dict()
        torch._foreach_lerp_(list(self.shadow.values()), [values[k].float() for k in self.shadow], weight)

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"updates": self.updates, **{f"shadow.{k}": v for k, v in self.shadow.items()}}

    def load_state_dict(self, state: dict) -> None:
        self.updates = int(state["updates"])
        for k, v in self.shadow.items():
            v.copy_(state[f"shadow.{k}"])
