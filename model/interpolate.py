"""Between two latents: spherically (DDIM, eq. 67), which keeps to the shell where Gaussian noise lies, or linearly."""

import math

import torch
from torch import Tensor

OPPOSITE = 1e-6  # radians from pi, below which rounding decides which way around the sphere is taken


def angle(a: Tensor, b: Tensor) -> Tensor:
    """The angles theta [B] between latents [B, ...], in [0, pi], float64. Eq. 67's arccos of the cosine loses half of
    its digits where a and b are nearly parallel; this form (Kahan) loses none."""
    a, b = _unit(a), _unit(b)
    return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))


def has_arc(a: Tensor, b: Tensor) -> Tensor:
    """Whether one arc leads from a to b, bool [B]: not where they are opposite, or one is 0 or not finite."""
    return _is_one(angle(a, b))


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Eq. 67: sin((1 - t) theta) / sin(theta) a + sin(t theta) / sin(theta) b, [B, ...], in the dtype of a and b.

    a, b: latents [B, ...], of one another's dtype; t [B] in [0, 1]: 0 gives a and 1 gives b, to the bit. Parallel
    latents, for which sin(theta) is 0, are interpolated as by `lerp`. Raises ValueError where two are opposite, or one
    is 0 or not finite: no arc leads from one to the other, or any does.
    """
    theta, t = angle(a, b), t.double()
    if not bool(_is_one(theta).all()):
        raise ValueError("the latents are opposite, 0 or not finite: no one arc leads from one to the other")
    share = torch.sinc(theta / math.pi)  # sin(x) / x: the quotients of eq. 67 without the 0 / 0 at theta = 0
    of_a = (1 - t) * torch.sinc((1 - t) * theta / math.pi) / share
    of_b = t * torch.sinc(t * theta / math.pi) / share
    return _weighted(a, b, of_a, of_b)


def lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """(1 - t) a + t b, as `slerp` has them: for comparison. Halfway between two independent latents the norm is
    sqrt(1/2) of theirs, where the model has seen no noise."""
    return _weighted(a, b, 1 - t.double(), t.double())


def _weighted(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor:
    shape = (-1, *[1] * (a.ndim - 1))
    return (of_a.view(shape) * a.double() + of_b.view(shape) * b.double()).to(a.dtype)


def _is_one(theta: Tensor) -> Tensor:
    return theta < math.pi - OPPOSITE


def _unit(x: Tensor) -> Tensor:
    x = x.double().flatten(1)
    return x / x.norm(dim=1, keepdim=True)
