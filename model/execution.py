"""How a network is evaluated, whichever it is."""

from dataclasses import dataclass

import torch

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = ("float32", "tf32", *HALVES)


@dataclass(frozen=True)
class Execution:
    """How a network is evaluated. `precision` is one of PRECISIONS: `tf32` is float32 whose products a GPU's tensor
    cores round to 10 bits, and float32 elsewhere. `compiled` has torch.compile make its kernels at the first
    evaluation, once for batches of every size, which takes most of a minute, less where they are in its cache.
    `batch_size` is how many images are on the device at once.

    Raises ValueError for another precision.
    """

    precision: str = "float32"
    compiled: bool = False
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; known: {', '.join(PRECISIONS)}")


FLOAT32 = Execution()
