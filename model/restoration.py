"""DDNM (Wang, Yu, Zhang, arXiv 2212.00490): a whole image from an observation y = A x of it, by a model that was not
trained for that. What y says replaces its part of every predicted x0; the model fills the null space of A:

    x0 = (z_b - sigma_b epsilon) / alpha_b                                                     (eq. 12)
    x0' = x0 - A⁺ (A x0 - y)                                                                   (eq. 13)
    z_a = alpha_a x0' + sigma_a (sqrt(1 - eta^2) epsilon + eta n)                              (their code's)

The paper draws z_a from DDPM's posterior (eq. 14); the authors' code, which this follows, steps as DDIM does. For a
consistent y, A x0' = y: the result agrees with the observation, whatever the model makes up. Images are [B, C, H, W],
with pixels in [-1, 1].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from palindrome.model.condition import Condition
from palindrome.model.ddim import Network, apply, as_state, evaluate
from palindrome.model.process import CLEAN, Process


class Operator(Protocol):
    """A linear A of images with A A⁺ A = A, of each image its own."""

    def observe(self, x: Tensor) -> Tensor:
        """A x, the observation [B, ...] of images [B, C, H, W]."""

    def invert(self, y: Tensor) -> Tensor:
        """A⁺ y, images [B, C, H, W] again: what an observation says without a model."""

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """x - A⁺ (A x - y), the image nearest to x whose observation is y."""

    def of(self, rows: Tensor, device: torch.device | str) -> Self:
        """The operator of the images at those rows of the batch, int [N], on a device."""


class Linear(Operator):
    """An operator that is the same for all images."""

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        return x - self.invert(self.observe(x) - y)

    def of(self, rows: Tensor, device: torch.device | str) -> Self:
        return self


@dataclass(frozen=True)
class Masked(Operator):
    """Pixels that are known, bool [B, 1, H, W]: the observation is the image with 0, a mid-gray, in place of others."""

    known: Tensor

    def observe(self, x: Tensor) -> Tensor:
        return torch.where(self.known, x, 0.0)

    def invert(self, y: Tensor) -> Tensor:
        return self.observe(y)

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """As x - A⁺ (A x - y), but without its rounding: known pixels are those of y to the bit."""
        return torch.where(self.known, y, x)

    def of(self, rows: Tensor, device: torch.device | str) -> Self:
        return type(self)(self.known[rows].to(device))

    def shrunk(self, height: int, width: int) -> "Masked":
        """Of a state of that size, in which a value is known where all of its pixels are. Raises ValueError where the
        state is no part of the image's size."""
        factors = self.known.shape[-2] // height, self.known.shape[-1] // width
        if (height * factors[0], width * factors[1]) != self.known.shape[-2:]:
            raise ValueError(f"a mask of {list(self.known.shape[-2:])} does not divide into {height} x {width}")
        return Masked(~F.max_pool2d((~self.known).float(), factors).bool())


@dataclass(frozen=True)
class Pooled(Linear):
    """The mean of each square of `factor` x `factor` pixels, which divide the image: [B, C, H / factor, W / factor]."""

    factor: int

    def observe(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.factor)

    def invert(self, y: Tensor) -> Tensor:
        return F.interpolate(y, scale_factor=self.factor, mode="nearest")


@dataclass(frozen=True)
class Gray(Linear):
    """The mean of the channels, [B, 1, H, W]."""

    channels: int = 3

    def observe(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)

    def invert(self, y: Tensor) -> Tensor:
        return y.expand(-1, self.channels, -1, -1)


@dataclass(frozen=True)
class Separable(Linear):
    """R x Cᵀ of each channel, by matrices R [h, H] and C [w, W] of full row rank, whose pseudo-inverses [H, h] and
    [W, w] are `up` and `across`."""

    rows: Tensor
    columns: Tensor
    up: Tensor
    across: Tensor

    @classmethod
    def bicubic(cls, factor: int, height: int, width: int) -> Self:
        """Each side divided by `factor` by Pillow's bicubic filter, which averages where it shrinks (a = -1/2). Raises
        ValueError where the factor divides no side."""
        rows, columns = (_shrinking(side, factor) for side in (height, width))
        return cls(rows, columns, *(torch.linalg.pinv(matrix.double()).float() for matrix in (rows, columns)))

    def observe(self, x: Tensor) -> Tensor:
        return self.rows @ x @ self.columns.T

    def invert(self, y: Tensor) -> Tensor:
        return self.up @ y @ self.across.T

    def of(self, rows: Tensor, device: torch.device | str) -> Self:
        return type(self)(*(matrix.to(device) for matrix in (self.rows, self.columns, self.up, self.across)))


def _shrinking(side: int, factor: int) -> Tensor:
    """The matrix [side / factor, side] of torch's bicubic filter, float32."""
    if side % factor:
        raise ValueError(f"{side} pixels are no multiple of {factor}")
    each = torch.eye(side, dtype=torch.float64)[None, None]  # a column is a pixel
    return F.interpolate(each, (side // factor, side), mode="bicubic", antialias=True)[0, 0].float()


@torch.no_grad()
def restore(
    network: Network,
    y: Tensor,
    operator: Operator,
    levels: Sequence[float],
    process: Process,
    *,
    noise: Iterator[Tensor],
    condition: Condition | None = None,
    eta: float = 0.85,
) -> Tensor:
    """Observations y -> images [B, C, H, W] with A x = y: to rounding, and for `Masked` to the bit; not clipped. NFE is
    len(levels) - 1.

    `noise` gives standard normal draws [B, C, H, W]: x_T, and then one a step, but for the last. `eta` in [0, 1] is the
    part of each step's noise that is new, where `ddim.sample` has eq. 16 of the DDIM paper. The last step ends at the
    projected x0, also where the process has its clean end at another level. Raises ValueError for another eta, and
    where the top is at alpha 0 and the network predicts epsilon.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it lies between 0 and 1")
    y = as_state(y)
    z = next(noise).to(y)
    for low, high in reversed(list(pairwise(levels))):
        reading = process.reading(high)
        output = evaluate(network, z, reading, condition)
        x0 = operator.project(apply(reading.combine(1, 0), z, output), y)
        if low == CLEAN:
            return x0
        alpha, sigma = process.marginal(low)
        epsilon = apply(reading.epsilon, z, output)
        z = alpha * x0 + sigma * (sqrt(1 - eta**2) * epsilon + eta * next(noise).to(z))
    raise ValueError("a ladder begins with the clean end")
