"""Exact DDIM inversion: the latent that the plain DDIM sampler decodes to the very image.

Decoding from level b to the lower a takes x_b to A x_b + B output(x_b), which is x_a (eq. 12, eta = 0; process.Reading
has A and B). Encoding must solve that for x_b, a fixed point of

    G(x_b) = x_b + s (x_a - A x_b - B output(x_b)),  s = alpha_b / alpha_a

which in terms of epsilon is s x_a + (sigma_b - s sigma_a) epsilon(x_b, b). The paper's inversion puts epsilon(x_a, a)
in place of epsilon(x_b, b) and leaves it at that. Here the epsilons of the steps below predict it at no cost, and each
correction is one evaluation at (x_b, b). Weights are each sample's own, and in it each band's of spatial frequency
(model.bands).

By Tweedie's formula the ideal epsilon's Jacobian is (I - alpha_b^2 / sigma_b^2 Cov[x_0 | x_b]) / sigma_b: symmetric,
its eigenvalues near 0 along the images and near 1 / sigma_b across them. So those of G lie between 0 and kappa =
1 - s sigma_a / sigma_b, for which 2 / (2 - kappa) is the best relaxation. Where alpha_b is 0, s is sigma_b / sigma_a
instead, and kappa 0: nothing of x_b lies along the images.

Guidance by W > 1 combines two such epsilons to u + W (c - u): the eigenvalues of G then lie between -(W - 1) kappa and
W kappa, whose middle is that of 0 and kappa. So the relaxation remains the best one, but what it leaves is up to
2 W - 1 times as much, and below 1 only where kappa < 1 / W: in steps that are short enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite, log

import torch
from torch import Tensor

from palindrome.model.bands import Bands
from palindrome.model.condition import Condition
from palindrome.model.ddim import Network, as_state, coefficients, evaluate, invert, move
from palindrome.model.process import Marginal, Process, Reading

DEPTH = 2  # of the Anderson mixing: differences of residuals kept
SLOW = 0.8  # of a residual, left by a correction: more says that what happens in one band depends on another
MIXING_LIMIT = 5.0  # of an Anderson weight: two nearly equal residuals must not throw an iterate far away
SMALL = 1e-4  # of the square of a change of epsilon: one of nothing but rounding, below it, predicts nothing
RIDGE = 1e-6  # of what changes of residuals have in common: in a band of few values nothing but rounding may be left


def evaluations(steps: int, corrections: int) -> int:
    """Network evaluations an image: the paper's inversion takes one a step, the corrected one a first one more."""
    return steps if corrections == 0 else 1 + steps * corrections


@torch.no_grad()
def invert_exactly(
    network: Network,
    x: Tensor,
    levels: Sequence[float],
    process: Process,
    *,
    condition: Condition | None = None,
    corrections: int = 3,
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """x0 [B, C, H, W] -> x at the ladder's top, each sample's residual, float [B], and its evaluations, int32 [B].

    A step predicts epsilon by extrapolation of the steps below, then corrects `corrections` times by the relaxed fixed
    point with Anderson mixing. The first step, which has none below, starts from the image and corrects once more. With
    `tolerance` > 0 a sample leaves a step as soon as its next residual is expected to be below it, and `corrections` is
    the most a step may take.

    A sample for which the network has no finite output becomes NaN. One whose residual does not fall keeps the iterate
    with the smallest one: at worst the prediction. The residual is the root mean square of G(x_b) - x_b of that
    iterate, the largest over the steps: of the last one evaluated, before the update that follows from it, so the true
    one is smaller where the fixed point contracts.
    `corrections` = 0 is the paper's inversion, residual NaN. Raises ValueError where the top is at alpha 0 and the
    network predicts epsilon, or the ladder has no other step.
    """
    if corrections == 0:
        paper = invert(network, x, levels, process, condition=condition)
        spent = torch.full((len(x),), len(levels) - 1, dtype=torch.int32, device=x.device)
        return paper, paper.new_full((len(x),), float("nan")), spent
    x = as_state(x)
    worst = x.new_zeros(len(x))
    spent = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    below: list[tuple[float, Tensor]] = []  # log-SNR and epsilon of the steps below, the last three
    for low, high in pairwise(levels):
        a, b = process.marginal(low), process.marginal(high)
        if a == b:  # timestep 0 where the clean end is at its alpha: the sampler's step from it changes nothing
            continue
        if below:
            y, most = move(x, _predicted(below, _log_snr(b)), a, b), corrections
        else:
            y, most = x, corrections + 1
        step = _Step.between(a, b, process.reading(high))
        y, residual, count = _solve(network, step, x, y, most, tolerance, condition)
        worst, spent = torch.maximum(worst, residual), spent + count
        scale, gain = coefficients(a, b)
        below = [*below[-2:], (_log_snr(b), (y - scale * x) / gain)]
        x = y
    return x, worst, spent


def _log_snr(at: Marginal) -> float:
    return 2 * log(at.alpha / at.sigma) if at.alpha else -inf


def _predicted(below: Sequence[tuple[float, Tensor]], log_snr: float) -> Tensor:
    """epsilon where the log-SNR is that, from those below: extrapolated linearly, by the part, in [0, 1] for each band,
    that would have done best for the last one known. Fine detail turns around where smooth parts go on."""
    *_, (at, epsilon) = below
    changes = [(low - high, its - before) for (low, before), (high, its) in pairwise(below)]
    if not changes:
        return epsilon
    width, change = changes[-1]
    further = (at - log_snr) / width
    if not isfinite(further):  # to alpha 0
        further = 1.0
    if len(changes) == 1:
        return epsilon + min(further, 1.0) * change
    bands = Bands.of(epsilon.shape[1:], epsilon.dtype, epsilon.device)
    (width_before, change_before), last = changes[0], bands.forward(change)
    before = bands.forward(change_before)
    square = bands.products(before, before) + SMALL * bands.products(last, last)
    part = _quotient(bands.products(last, before), square) * (width_before / width)
    return epsilon + bands.inverse(bands.spread((further * part).clamp(0, 1)) * last)


@dataclass(frozen=True)
class _Step:
    """G(x_b) = of_start x_a + of_state x_b + of_output output(x_b), and its kappa."""

    reading: Reading
    of_start: float
    of_state: float
    of_output: float
    kappa: float

    @classmethod
    def between(cls, a: Marginal, b: Marginal, reading: Reading) -> "_Step":
        if b.alpha:
            scale, gain = coefficients(a, b)
            of_state, of_output = (gain * coefficient for coefficient in reading.epsilon)
            return cls(reading, scale, of_state, of_output, gain / b.sigma)
        if not a.sigma:
            raise ValueError("a step from the image to alpha 0 has no inverse: the ladder needs a level between them")
        scale, (A, B) = b.sigma / a.sigma, reading.combine(*a)
        return cls(reading, scale, 1 - scale * A, -scale * B, 0.0)

    def residual(self, network: Network, x: Tensor, y: Tensor, condition: Condition | None) -> Tensor:
        """G(y) - y."""
        output = evaluate(network, y, self.reading, condition)
        return (self.of_start * x).add_(output, alpha=self.of_output).add_(y, alpha=self.of_state - 1)


def _solve(
    network: Network,
    step: _Step,
    x: Tensor,
    y: Tensor,
    most: int,
    tolerance: float,
    condition: Condition | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The y with y = G(y), from a first one; its residual, float [B], and the evaluations, int32 [B]. Samples that are
    done leave the batch."""
    kappa = step.kappa
    weight = 1.0 if condition is None else condition.weight
    left = min(1.0, max(2 * weight - 1, 1.0) * kappa / (2 - kappa))  # the relaxed fixed point leaves at most so much
    solved, least = y.clone(), x.new_full((len(x),), float("inf"))
    count = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    active = torch.arange(len(x), device=x.device)
    least_at, bands = y, Bands.of(x.shape[1:], x.dtype, x.device)
    changes: list[tuple[Tensor, Tensor]] = []  # of the iterate and of its residual by the last updates, in coordinates
    previous: tuple[Tensor, Tensor, Tensor] | None = None  # the last update; the residual before it, and its size
    whole = torch.zeros(len(x), dtype=torch.bool, device=x.device)  # samples that are mixed by one weight for all bands
    for _ in range(most):
        residual = step.residual(network, x, y, condition)
        size = residual.square().flatten(1).mean(1).sqrt()
        # The iterate is never transformed, only what is added to it: what rounding, or TF32, does to that, the next
        # residual sees.
        here = bands.forward(residual)
        if previous:
            moved, last, before = previous
            changes = [*changes[1 - DEPTH :], (moved, here - last)]
            whole = whole | (size > SLOW * before)
        moved = _mixed(changes, here, 2 / (2 - kappa), bands, whole)
        previous = moved, here, size
        update = y + bands.inverse(moved)
        falls = size < least[active]
        # Where the residual rises, what followed from the smallest one is known to be worse than its origin.
        least_at = _choose(falls, y, least_at)
        solved[active] = _choose(falls, update, least_at)
        least[active] = torch.where(falls, size, least[active])
        count[active] += 1
        if not tolerance:  # nobody leaves, and to ask would have a GPU waited for
            y = update
            continue
        going = size * left > tolerance
        if not going.any():
            break
        y = update
        if not going.all():
            active, x, y, least_at = active[going], x[going], y[going], least_at[going]
            previous, whole = (moved[going], here[going], size[going]), whole[going]
            changes = [(of_iterate[going], of_residual[going]) for of_iterate, of_residual in changes]
            condition = None if condition is None else condition[going]
    # Without one finite residual, the network had no finite output: the prediction that is kept is no solution.
    return _choose(least.isfinite(), solved, torch.full_like(solved, float("nan"))), least, count


def _mixed(
    changes: Sequence[tuple[Tensor, Tensor]], residual: Tensor, relaxation: float, bands: Bands, whole: Tensor
) -> Tensor:
    """Anderson mixing: the way to the combination of the iterates whose residuals, combined alike, are smallest, and on
    along that residual. Of changes of the iterate and of its residual, the newest last, orthogonalised by Gram and
    Schmidt; all in the bands' coordinates, and with a weight for each band, or one for samples that are `whole`."""
    basis: list[tuple[Tensor, Tensor, Tensor]] = []

    def projected(y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """r less its components along the basis' residuals, and y less the same parts of the basis' iterates."""
        for y_basis, r_basis, square in basis:
            weight = _quotient(bands.products(r, r_basis), square, whole).clamp(-MIXING_LIMIT, MIXING_LIMIT)
            part = bands.spread(weight)
            y, r = y - part * y_basis, r - part * r_basis
        return y, r

    for of_iterate, of_residual in reversed(changes):
        y, r = projected(of_iterate, of_residual)
        square = bands.products(r, r)
        if basis:
            square = torch.lerp(square, bands.products(of_residual, of_residual), RIDGE)
        basis.append((y, r, square))
    move, left = projected(torch.zeros_like(residual), residual)
    return move + relaxation * left


def _quotient(over: Tensor, under: Tensor, whole: Tensor | None = None) -> Tensor:
    """Of products of the bands, or of their sums in samples that are `whole`; 0 where it is no number."""
    if whole is not None:
        over, under = (torch.where(whole[:, None, None], p.sum((1, 2), keepdim=True), p) for p in (over, under))
    return (over / under).nan_to_num(0.0, 0.0, 0.0)


def _choose(where: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(where[:, None, None, None], one, other)
