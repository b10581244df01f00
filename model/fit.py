"""Ladders fitted to a model: the levels at which model.inversion leaves the least round-trip error.

A step from level a to b starts from an epsilon that is off by about epsilon_b - epsilon_a, and each correction leaves
kappa / (2 - kappa) of what it found (model.inversion). So a step adds to the decoded image's squared error about

    ((sigma_b - s sigma_a) / s)^2  E|epsilon_b - epsilon_a|^2  (kappa / (2 - kappa))^(2 K),  s = alpha_b / alpha_a

which needs the epsilons' inner products along one finely walked trajectory and nothing else; a dynamic programme over
pairs of levels finds the ladder with the smallest sum.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from palindrome.model.condition import Condition
from palindrome.model.ddim import Network, apply, as_state, evaluate, move
from palindrome.model.ladder import Ladder, ladder, logsnr_ladder
from palindrome.model.process import CLEAN, Process

FINE = 96  # levels of each kind among the candidates, at least
FIRST = 0.5  # what a correction leaves in the first step, where kappa is 1 and bounds nothing: as measured


def candidates(process: Process, steps: int, top: int) -> Ladder:
    """The levels a fitted ladder may visit: dense in log-SNR and in t. Raises ValueError when steps do not fit."""
    count = min(top + 1, max(FINE, 2 * steps))
    if not 1 <= steps <= top + 1 <= process.num_train_timesteps:
        raise ValueError(f"{steps} steps do not fit between timestep 0 and {top} of {process.num_train_timesteps}")
    fine = {*logsnr_ladder(process, count, top), *ladder("linear", count, process.num_train_timesteps, top)}
    return tuple(sorted(fine))


@torch.no_grad()
def epsilon_products(
    network: Network,
    x: Tensor,
    levels: Sequence[float],
    process: Process,
    *,
    condition: Condition | None = None,
) -> Tensor:
    """x0 [B, C, H, W] -> the epsilons' mean inner products <epsilon_i, epsilon_j> / (C H W) along the images' way up a
    fine ladder, float64 [B, S, S]; one evaluation a level."""
    x = as_state(x)
    found: list[Tensor] = []
    for low, high in pairwise(levels):
        a, b, reading = process.marginal(low), process.marginal(high), process.reading(high)
        guess = 2 * found[-1] - found[-2] if len(found) > 1 else found[-1] if found else torch.zeros_like(x)
        y = move(x, guess, a, b)
        found.append(apply(reading.epsilon, y, evaluate(network, y, reading, condition)))
        x = move(x, found[-1], a, b)
    flat = torch.stack([epsilon.flatten(1) for epsilon in found], 1).double()
    return flat @ flat.transpose(1, 2) / flat.shape[-1]


def fit_ladder(products: np.ndarray, levels: Sequence[float], process: Process, steps: int, corrections: int) -> Ladder:
    """The ladder of `steps` steps among candidate `levels`, from the clean end to the last of them, that minimises the
    sum above. `products`: epsilon_products, averaged over images, float64 [S, S]. `corrections` = 0 fits the paper's
    plain inversion. Raises ValueError when there are fewer levels than steps."""
    tau = np.asarray(levels[1:], int)
    if not 1 <= steps <= len(tau):
        raise ValueError(f"{steps} steps do not fit on {len(tau)} levels")
    alpha, sigma = (values[tau] for values in process.table)
    s = alpha[None, :] / alpha[:, None]
    gain = sigma[None, :] - s * sigma[:, None]
    kappa = gain / sigma[None, :]
    size = np.diag(products)
    apart = np.maximum(size[:, None] + size[None, :] - 2 * products, 0)
    rising = np.triu(np.ones_like(products), 1) > 0
    error = (gain / s) ** 2 * apart * np.clip(kappa / (2 - kappa), 0, 1) ** (2 * corrections)
    error = np.where(rising, error, np.inf)
    first = (sigma / alpha) ** 2 * size * FIRST ** (2 * (corrections + 1 if corrections else 0))
    total, origins = first, []
    for _ in range(steps - 1):
        sums = total[:, None] + error
        origins.append(sums.argmin(0))
        total = sums.min(0)
    way = [len(tau) - 1]
    for origin in reversed(origins):
        way.append(int(origin[way[-1]]))
    return (CLEAN, *(int(tau[i]) for i in reversed(way)))
