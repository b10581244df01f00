"""Watermarks in x_T, which inversion finds again: Tree-Ring (Wen et al., arXiv 2305.20030) and Gaussian Shading (Yang
et al., 2404.04956).

Latents are [B, C, H, W] and, without a watermark, standard normal. A key is a secret of some bytes, from which all else
is derived by SHAKE-256, on any machine alike. Needs scipy.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TreeRing:
    """A pattern in the low frequencies of x_T: in a disc of this radius about frequency 0, in some channels.

    `rand` has a value for each frequency. `ring` has one for each ring, which rotations leave as they are: few numbers,
    which a random key soon fits as well, and which meet in one large value at the corner of x_T. The values have the
    variance that noise has there.

    The Fourier transform of a real x_T is Hermitian, F(-k) = conj(F(k)), and so are these patterns. The rings
    of the released code are not, and its disc is a row off frequency 0: a part is lost as the real part is taken.
    """

    METHOD: ClassVar[str] = "tree-ring"
    shape: tuple[int, int, int]
    radius: int = 10
    channels: tuple[int, ...] = (-1,)
    pattern: Literal["rand", "ring"] = "rand"

    def __post_init__(self) -> None:
        """Raises ValueError for what the shape has no room for."""
        channels, *sides = self.shape
        if not 1 <= self.radius < min(sides) / 2:
            raise ValueError(f"a radius of {self.radius} does not fit in latents of {_times(self.shape)}")
        if not all(-channels <= channel < channels for channel in self.channels):
            raise ValueError(f"latents of {_times(self.shape)} have the channels 0 to {channels - 1}")
        if self.pattern == "ring" and self.radius * len(self.channels) == 1:
            raise ValueError("a single ring is no pattern")
        object.__setattr__(self, "channels", tuple(sorted({channel % channels for channel in self.channels})))

    @cached_property
    def _distance(self) -> Tensor:
        """Of each frequency from frequency 0, [H, W]."""
        rows, columns = (torch.fft.fftfreq(side, 1 / side, dtype=torch.float64) for side in self.shape[1:])
        return torch.hypot(rows[:, None], columns[None])

    @cached_property
    def inside(self) -> Tensor:
        """Whether a frequency belongs to the pattern, [H, W]."""
        return self._distance <= self.radius

    def _values(self, secret: bytes) -> Tensor:
        """The independent values of the pattern: [channels, radius], or [channels, frequencies inside], complex. Those
        of a random secret have no preferred direction."""
        of_noise = prod(self.shape[1:]) ** 0.5  # the standard deviation of a transform of noise
        if self.pattern == "ring":
            return of_noise * _normal(secret, len(self.channels) * self.radius).view(len(self.channels), -1)
        noise = _normal(secret, len(self.channels) * prod(self.shape[1:])).view(-1, *self.shape[1:])
        return torch.fft.fft2(noise)[:, self.inside]

    def _spread(self, values: Tensor) -> Tensor:
        """Independent values -> the pattern inside, [channels, frequencies], complex."""
        return values[:, self._rings].to(torch.complex128) if self.pattern == "ring" else values

    def _gathered(self, inside: Tensor) -> Tensor:
        """What [B, channels, frequencies] say of the independent values: of white noise with no preferred direction."""
        if self.pattern == "rand":
            return inside
        sums = inside.real.new_zeros(*inside.shape[:2], self.radius).index_add_(2, self._rings, inside.real)
        return sums / self._rings.bincount().sqrt()

    @cached_property
    def _rings(self) -> Tensor:
        """The ring of each frequency inside, from 0 on: the innermost one has frequency 0 as well."""
        return (self._distance[self.inside].ceil().long() - 1).clamp(min=0)

    def mark(self, noise: Tensor, secret: bytes) -> Tensor:
        """Standard normal x_T -> x_T with the watermark."""
        transformed = torch.fft.fft2(noise[:, self.channels].double())
        transformed[:, :, self.inside] = self._spread(self._values(secret))
        marked = noise.clone()
        marked[:, self.channels] = torch.fft.ifft2(transformed).real.to(noise.dtype)
        return marked

    def find(self, latent: Tensor, secret: bytes) -> dict[str, Tensor]:
        """What x_T says of a secret, float64 [B], the less the surer.

        `p`: that the pattern of a secret drawn at random points as nearly in the direction of this x_T, by the angle
        of a random direction to a fixed one. It holds for any x_T, as it rests on the secret being random.

        `noise_p`, the one of the paper: that white noise comes as near to the pattern. With the variance of
        the frequencies outside, the squared distance is noncentral chi-squared, with as many degrees of freedom as
        there are frequencies inside: half of them are the conjugates of others. The x_T of an image is no white noise,
        and may have small values of it without a watermark.

        `distance`: the mean absolute difference inside, as the released code has it.
        """
        from scipy.stats import ncx2, t  # of an extra

        transformed = torch.fft.fft2(latent[:, self.channels].double())
        inside, outside = transformed[:, :, self.inside], transformed[:, :, ~self.inside]
        values = self._values(secret)
        pattern, found, free = self._spread(values), self._gathered(inside), values.numel() - 1
        cosine = (found * values.conj()).real.sum((1, 2)) / (_energy(found) * _energy(values[None])).sqrt()
        ratio = cosine * (free / (1 - cosine.square()).clamp(min=1e-300)).sqrt()  # of Student's t
        variance = outside.abs().square().mean((1, 2))
        squared, strength = _energy(inside - pattern) / variance, _energy(pattern[None]) / variance
        noise_p = ncx2.cdf(squared.numpy(), pattern.numel(), strength.numpy())
        return {
            "p": torch.from_numpy(t.sf(ratio.numpy(), free)),
            "noise_p": torch.from_numpy(noise_p),
            "distance": (inside - pattern).abs().mean((1, 2)),
        }


def _energy(values: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return values.abs().square().sum((1, 2))


@dataclass(frozen=True)
class GaussianShading:
    """The signs of x_T: a message of bits, each repeated over `channel_copies` channels and `copies` x `copies`
    positions, and encrypted by a stream of bits; the absolute values stay those of the noise. Every x_T with one key
    has the same signs."""

    METHOD: ClassVar[str] = "gaussian-shading"
    shape: tuple[int, int, int]
    copies: int = 8
    channel_copies: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for what the shape has no room for."""
        if any(side % times for side, times in zip(self.shape, self._times, strict=True)):
            raise ValueError(f"latents of {_times(self.shape)} can't be divided by {_times(self._times)} copies")

    @property
    def _times(self) -> tuple[int, int, int]:
        return self.channel_copies, self.copies, self.copies

    def signs(self, secret: bytes) -> tuple[Tensor, Tensor]:
        """The message's bits at every value, and those of the stream, bool [C, H, W]."""
        sides = [side // times for side, times in zip(self.shape, self._times, strict=True)]
        message = _bits(b"message" + secret, prod(sides)).view(sides)
        return message.repeat(self._times), _bits(b"stream" + secret, prod(self.shape)).view(self.shape)

    def mark(self, noise: Tensor, secret: bytes) -> Tensor:
        """Standard normal x_T -> x_T with the watermark."""
        message, stream = self.signs(secret)
        return torch.where(message ^ stream, noise.abs(), -noise.abs())

    def find(self, latent: Tensor, secret: bytes) -> dict[str, Tensor]:
        """What x_T says of a secret, float64 [B], the less the surer.

        `p`: that so many signs agree by chance with those of a secret drawn at random, whatever the x_T is.
        `sign_errors` is the fraction that does not agree, `bit_errors` that of the message's bits by the majority of
        their copies, half a one where there is none."""
        from scipy.stats import binom  # of an extra

        message, stream = self.signs(secret)
        agree = ((latent > 0) ^ stream) == message
        right = agree.flatten(1).sum(1)
        p = binom.sf(right.numpy() - 1, prod(self.shape), 0.5)
        channels, height, width = self.shape
        rows, columns = height // self.copies, width // self.copies
        copies = agree.view(len(agree), self.channel_copies, -1, self.copies, rows, self.copies, columns)
        share = copies.double().mean((1, 3, 5)).flatten(1)
        lost = (share < 0.5).double() + (share == 0.5).double() / 2
        return {
            "p": torch.from_numpy(p),
            "sign_errors": 1 - right.double() / (channels * height * width),
            "bit_errors": lost.mean(1),
        }


Watermark = TreeRing | GaussianShading
KINDS: Mapping[str, type[Watermark]] = {TreeRing.METHOD: TreeRing, GaussianShading.METHOD: GaussianShading}


@dataclass(frozen=True)
class Keys:
    """Secrets of one kind of watermark, by their names."""

    watermark: Watermark
    secrets: Mapping[str, bytes]

    def check(self, shape: Sequence[int]) -> None:
        """Raises ValueError if the keys are not for latents of this shape."""
        if tuple(shape) != self.watermark.shape:
            wanted, has = _times(self.watermark.shape), _times(shape)
            raise ValueError(f"its keys are for latents of {wanted}, and those of the model are {has}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.secrets)

    def of(self, index: int) -> str:
        """The name of the key of a sample: each in turn."""
        return self.names[index % len(self.names)]

    def mark(self, noise: Tensor, indices: Sequence[int]) -> Tensor:
        """x_T [B, C, H, W] of the samples with these indices -> the same with the watermark of each one's key."""
        each = [self.watermark.mark(x[None], self.secrets[self.of(i)]) for x, i in zip(noise, indices, strict=True)]
        return torch.cat(each)

    def find(self, latent: Tensor) -> dict[str, Tensor]:
        """What the watermark says of x_T and the nearest key, the one with the smallest `p`, and that key's number,
        `key`. Each p-value is the smallest one times the number of keys: Bonferroni's bound on one of them being so
        small by chance."""
        each = [self.watermark.find(latent, secret) for secret in self.secrets.values()]
        found = {name: torch.stack([values[name] for values in each]) for name in each[0]}
        nearest = found["p"].argmin(0)
        chosen = {name: values.gather(0, nearest[None])[0] for name, values in found.items()}
        p = {name: (values.amin(0) * len(each)).clamp(max=1) for name, values in found.items() if name.endswith("p")}
        return {**chosen, **p, "key": nearest}


def _times(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


def _bits(secret: bytes, count: int) -> Tensor:
    stream = hashlib.shake_256(secret).digest(-(-count // 8))
    return torch.from_numpy(np.unpackbits(np.frombuffer(stream, np.uint8))[:count].astype(bool))


def _normal(secret: bytes, count: int) -> Tensor:
    """Standard normal values, float64."""
    whole = np.frombuffer(hashlib.shake_256(secret).digest(8 * count), "<u8") >> 11
    return torch.special.ndtri(torch.from_numpy((whole + 0.5) / 2**53))
