"""What a network is told of each sample besides its state and the level: a class, or the encoding of a text."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Tensors [B, ...] by name, one row per sample. The family that makes them knows what they mean."""

    values: Mapping[str, Tensor]

    def __getitem__(self, rows: Tensor | slice) -> "Condition":
        """Of some of the samples."""
        return Condition({name: value[rows] for name, value in self.values.items()})

    def to(self, device: torch.device) -> "Condition":
        return Condition({name: value.to(device) for name, value in self.values.items()})
