"""What a network is told of each sample besides its state and the level: a class, or the encoding of a text."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor


class TextEncoder(Protocol):
    """What tells a network of texts."""

    def __call__(self, texts: Sequence[str | None]) -> Mapping[str, Tensor]:
        """Tensors [B, ...] by name, on the CPU; None is no text, as the model was trained with it."""

    def leave(self) -> None:
        """Makes room on the device, to which the next texts bring it back."""

    def is_cut(self, text: str) -> bool:
        """Whether the text is longer than the network can be told."""


@dataclass(frozen=True)
class Condition:
    """Tensors [B, ...] by name, one row per sample. The family that makes them knows what they mean.

    With `dropped`, the same tensors of a prediction without a condition, the network is guided by `weight`.
    """

    values: Mapping[str, Tensor]
    dropped: Mapping[str, Tensor] | None = None
    weight: float = 1.0

    def __getitem__(self, rows: Tensor | slice) -> "Condition":
        """Of some of the samples."""
        return self._map(lambda value: value[rows])

    def to(self, device: torch.device) -> "Condition":
        return self._map(lambda value: value.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Condition":
        def changed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: change(value) for name, value in tensors.items()}

        dropped = None if self.dropped is None else changed(self.dropped)
        return Condition(changed(self.values), dropped, self.weight)

    @cached_property
    def both(self) -> "Condition":
        """`dropped` followed by `values`, for 2 B samples. It is made once, as an engine looks for the very tensors of
        its last call."""
        dropped = self.dropped or {}
        return Condition({name: torch.cat([dropped[name], value]) for name, value in self.values.items()})


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


@dataclass(frozen=True)
class TextOf:
    """The text that an image is taken to be described by: the one in a `column` that is kept with it; where that has
    none, or there is no column, `text`, and None for none."""

    column: str | None = None
    text: str | None = None

    def __call__(self, row: Mapping[str, Any]) -> Any:
        """The text of an image with these columns, None where it has none."""
        found = None if self.column is None else row.get(self.column)
        return self.text if found is None else found

    def record(self) -> dict[str, Any]:
        """The key `prompts` of run.json."""
        return {"column": self.column, "prompt": self.text}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "TextOf":
        return cls(record["column"], record["prompt"])


EMPTY = TextOf(text="")  # of every image


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: u + weight (c - u) of the network's outputs c under a condition and u without. Weight 1
    is no guidance (Ho & Salimans, arXiv 2207.12598, eq. 6, where it is 1 + w). What stands for no condition is the
    class `null_class`, or the text `negative_prompt`, where None is what the model was trained with.

    Raises ValueError for a weight that is negative or not finite.
    """

    weight: float
    null_class: int | None = None
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"the weight is {self.weight}, not a number of at least 0")

    def record(self) -> dict[str, Any]:
        """The key `guidance` of run.json."""
        return {name: value for name, value in asdict(self).items() if value is not None}
