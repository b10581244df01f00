"""What a network is told of each sample besides its state and the level: a class, or the encoding of a text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class ClassOf:
    """The class that an image is taken to be of: the one in a `column` that is kept with it, or one for all."""

    column: str | None = None
    value: int | None = None

    def __call__(self, row: Mapping[str, Any]) -> Any:
        """The class of an image with these columns, None where it has none."""
        if self.value is not None:
            return self.value
        return None if self.column is None else row.get(self.column)

    def record(self) -> dict[str, Any]:
        """The key `classes` of run.json."""
        return {"column": self.column, "class": self.value}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "ClassOf":
        return cls(record["column"], record["class"])
