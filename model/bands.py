"""Bands of spatial frequency, over each of which a weight is taken of its own.

A network's Jacobian is not the same in all directions: what it keeps of an image is mostly smooth, and what it takes
for noise is mostly fine and coloured. One weight for a whole sample, as Anderson mixing has it, suits neither.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

OCTAVES = 6  # bands: up to 1/32 of the highest frequency, 1/16, 1/8, 1/4, 1/2, and above
COLOURS = torch.tensor([[1, 1, 1], [1, -1, 0], [1, 1, -2]], dtype=torch.float64)  # luma, and two of chroma


@dataclass(frozen=True, eq=False)
class Bands:
    """Orthonormal coordinates of samples [B, C, H, W]: the DCT-II of each channel, of luma and chroma where there are
    three of them; and their bands, by radial frequency, of luma and of chroma, or of all channels together.

    Products are a sample's own, not of the whole batch as one matrix: what becomes of one does not depend on others.
    """

    colours: Tensor
    rows: Tensor
    columns: Tensor
    octaves: Tensor
    """0 or 1, [bands, H W]."""
    kinds: Tensor
    """0 or 1, [C, 1 or 2]: luma, chroma."""

    @classmethod
    @lru_cache(maxsize=8)
    def of(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Self:
        """Of samples of shape [C, H, W]."""
        channels, height, width = shape
        lumachroma = COLOURS / COLOURS.norm(dim=1, keepdim=True)
        colours = lumachroma if channels == 3 else torch.eye(channels, dtype=torch.float64)
        down, across = (torch.arange(side, dtype=torch.float64) / side for side in (height, width))
        edges = 2.0 ** torch.arange(1 - OCTAVES, 0, dtype=torch.float64)
        band = torch.bucketize(torch.hypot(down[:, None], across[None]), edges).flatten()
        octaves = torch.nn.functional.one_hot(band, OCTAVES).T
        kinds = torch.tensor([[1, 0], [0, 1], [0, 1]]) if channels == 3 else torch.ones(channels, 1)
        return cls(*(t.to(device, dtype) for t in (colours, _dct(height), _dct(width), octaves, kinds)))

    def forward(self, x: Tensor) -> Tensor:
        """Samples -> coordinates, [B, C, H, W] both."""
        return self._turned(self.colours, self._lines(self.rows, self.columns, x))

    def inverse(self, x: Tensor) -> Tensor:
        """Coordinates -> samples."""
        return self._lines(self.rows.T, self.columns.T, self._turned(self.colours.T, x))

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        """The inner products of coordinates, [B, bands, 1 or 2]."""
        of_channels = torch.bmm((a * b).flatten(2), self.octaves.T.expand(len(a), -1, -1))
        return of_channels.mT @ self.kinds

    def spread(self, weights: Tensor) -> Tensor:
        """The weight of each coordinate's band, [B, C, H, W]."""
        of_channels = self.kinds @ weights.mT
        return (of_channels @ self.octaves).unflatten(2, (len(self.rows), len(self.columns)))

    def _turned(self, colours: Tensor, x: Tensor) -> Tensor:
        return (colours @ x.flatten(2)).reshape(x.shape)

    def _lines(self, rows: Tensor, columns: Tensor, x: Tensor) -> Tensor:
        return (columns @ (rows @ x).mT).mT


def _dct(side: int) -> Tensor:
    """The orthonormal DCT-II as a matrix, float64 [side, side]."""
    k = torch.arange(side, dtype=torch.float64)
    matrix = math.sqrt(2 / side) * torch.cos(math.pi / side * (k + 0.5) * k[:, None])
    matrix[0] /= math.sqrt(2)
    return matrix
