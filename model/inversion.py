"""Exact DDIM inversion: the latent that the plain DDIM sampler decodes to the very image.

Decoding from level b to the lower a computes x_a from x_b and epsilon(x_b, b) (eq. 12, eta = 0). Encoding must
solve that for x_b, a fixed point of

    G(x_b) = s x_a + (sqrt(1 - alpha_b) - s sqrt(1 - alpha_a)) epsilon(x_b, b),  s = sqrt(alpha_b / alpha_a)

where the paper's inversion puts epsilon(x_a, a) in place of epsilon(x_b, b) and leaves it at that. Here the epsilons of
the steps below predict it at no cost, and each correction is one evaluation at (x_b, b).
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from model.ddim import Network, as_state, coefficients, epsilon_of, invert, move
from model.schedule import NoiseSchedule

MIXING_LIMIT = 2.0  # of the Anderson weight: two nearly equal residuals must not throw an iterate far away


def evaluations(steps: int, corrections: int) -> int:
    """Network evaluations an image: the paper's inversion takes one a step, the corrected one a first one more."""
    return steps if corrections == 0 else 1 + steps * corrections


@torch.no_grad()
def invert_exactly(
    network: Network,
    x: Tensor,
    levels: Sequence[int],
    schedule: NoiseSchedule,
    *,
    prediction_type: str = "epsilon",
    corrections: int = 3,
) -> tuple[Tensor, Tensor]:
    """x0 [B, C, H, W] -> x at the ladder's top, and each sample's residual, float [B].

    A step predicts epsilon by linear extrapolation of the two steps below, then corrects `corrections` times by a fixed
    point with Anderson mixing of depth 1, each sample with its own weight. A sample whose residual does not fall keeps
    the iterate with the smallest one: at worst the prediction. The residual is the root mean square of G(x_b) - x_b of
    that iterate, the largest over the steps: of the last one evaluated, before the update that follows from it, so the
    true one is smaller where the fixed point contracts. `corrections` = 0 is the paper's inversion, residual NaN.
    """
    if corrections == 0:
        paper = invert(network, x, levels, schedule, prediction_type=prediction_type)
        return paper, paper.new_full((len(x),), float("nan"))
    x = as_state(x)
    worst = x.new_zeros(len(x))
    below: list[Tensor] = []  # epsilon of the steps below, the last two
    for low, high in pairwise(levels):
        a, b = schedule.alpha_bar(low), schedule.alpha_bar(high)
        if len(below) == 2:
            guess = 2 * below[1] - below[0]
        else:
            guess = below[0] if below else epsilon_of(network, x, high, schedule, prediction_type)
        at_high = partial(epsilon_of, network, timestep=high, schedule=schedule, prediction_type=prediction_type)
        y, residual = _solve(at_high, x, guess, a, b, corrections)
        worst = torch.maximum(worst, residual)
        scale, gain = coefficients(a, b)
        below = [*below[-1:], (y - scale * x) / gain]
        x = y
    return x, worst


def _solve(
    epsilon_at: Callable[[Tensor], Tensor], x: Tensor, guess: Tensor, a: float, b: float, corrections: int
) -> tuple[Tensor, Tensor]:
    """y with y = G(y) = move(x, epsilon_at(y), a, b), from the y that `guess` gives; and its residual, float [B]."""
    y = move(x, guess, a, b)
    kept, least, least_at = y, x.new_full((len(x),), float("inf")), y
    before: tuple[Tensor, Tensor] | None = None
    for _ in range(corrections):
        image = move(x, epsilon_at(y), a, b)
        residual = image - y
        size = residual.square().flatten(1).mean(1).sqrt()
        update = image if before is None else _mix(image, residual, *before)
        falls = size < least
        # Where the residual rises, what followed from the smallest one is known to be worse than its origin.
        kept = _choose(falls, update, least_at)
        least_at, least = _choose(falls, y, least_at), torch.where(falls, size, least)
        before, y = (image, residual), update
    return kept, least


def _mix(image: Tensor, residual: Tensor, image_before: Tensor, residual_before: Tensor) -> Tensor:
    """Anderson mixing of depth 1: the combination of two images whose residuals, combined alike, are smallest."""
    change = residual - residual_before
    weight = (residual * change).flatten(1).sum(1) / change.square().flatten(1).sum(1)
    weight = weight.nan_to_num(0.0).clamp(-MIXING_LIMIT, MIXING_LIMIT)  # NaN: the residual did not change
    return image - weight[:, None, None, None] * (image - image_before)


def _choose(where: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(where[:, None, None, None], one, other)
