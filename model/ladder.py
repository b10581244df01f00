"""Ladders: the levels a sampler visits, an increasing tuple of levels that begins with `CLEAN`."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from palindrome.model.process import CLEAN, Process

LADDERS = ("linear", "quadratic")
# log(alpha^2 / sigma^2) where the image is taken to be gone: that of DDPM's linear schedule at 0.8 T, where the paper's
# code ends. At 0.8 T of a cosine schedule 9 % of the image's variance is left.
TOP_LOG_SNR = -6.5
Ladder = tuple[float, ...]


def default_top(process: Process, steps: int) -> int:
    """The level nearest to TOP_LOG_SNR, which is the last one where the process ends before it; at least steps - 1."""
    return max(int(np.abs(process.log_snr - TOP_LOG_SNR).argmin()), steps - 1)


def ladder(kind: str, steps: int, num_train_timesteps: int = 1000, top: int | None = None) -> Ladder:
    """`steps` timesteps from 0 to `top` after the clean end (DDIM paper, appendix D.2), so steps + 1 levels.

    `linear` is tau_i = floor(c i), `quadratic` tau_i = floor(c i^2), in integers so that no rounding shifts a level.
    Without `top`, linear ends at floor((steps - 1) T / steps), where diffusers' leading spacing ends too when steps
    divides T, and quadratic at 0.8 T, as in the paper's code. Where floor(c i^2) repeats a level, the later ones move
    up by one: a ladder is strictly increasing. Raises ValueError when `steps` distinct levels do not fit.
    """
    T = num_train_timesteps
    if kind not in LADDERS:
        raise ValueError(f"ladder is {kind!r}; known: {', '.join(LADDERS)}")
    if not 1 <= steps <= T:
        raise ValueError(f"steps is {steps}; a schedule of {T} timesteps takes 1 to {T}")
    if top is None:
        top = (steps - 1) * T // steps if kind == "linear" else max(T * 4 // 5, steps - 1)
    if not steps - 1 <= top < T:
        raise ValueError(f"{steps} steps do not fit between timestep 0 and {top} of {T}")
    levels = [CLEAN]
    power, span = (1, steps - 1) if kind == "linear" else (2, (steps - 1) ** 2)
    for i in range(steps):
        levels.append(max(top * i**power // max(span, 1), levels[-1] + 1))
    return tuple(levels)


def logsnr_ladder(process: Process, steps: int, top: int | None = None) -> Ladder:
    """Clean end, then the `steps` levels from 0 to `top` (default: default_top) nearest to equal steps of the log-SNR:
    the fixed point of model.inversion then contracts alike in every step. Where a level repeats, the later ones move up
    by one. Raises ValueError when `steps` distinct levels do not fit, or alpha is 0 at `top`."""
    T = process.num_train_timesteps
    top = default_top(process, steps) if top is None else top
    if not 1 <= steps <= top + 1 <= T:
        raise ValueError(f"{steps} steps do not fit between timestep 0 and {top} of {T}")
    falling = process.log_snr[: top + 1]
    if np.isinf(falling[-1]):
        raise ValueError(f"the log-SNR is not finite at timestep {top}, where alpha is 0")
    levels: list[int] = [CLEAN]
    for i, wanted in enumerate(np.linspace(falling[0], falling[-1], steps)):
        nearest = int(np.abs(falling - wanted).argmin())
        levels.append(min(max(nearest, levels[-1] + 1), top - (steps - 1 - i)))
    if steps == 1:
        levels = [CLEAN, 0]
    return tuple(levels)


def check_ladder(levels: Sequence[float], num_train_timesteps: int) -> Ladder:
    """The levels as a ladder, whole ones as int; raises ValueError unless they rise from `CLEAN` and stay below
    num_train_timesteps."""
    if len(levels) < 2 or levels[0] != CLEAN:
        raise ValueError(f"a ladder begins with {CLEAN} and has at least one timestep, not {list(levels)[:4]}")
    if any(not b > a for a, b in pairwise(levels)) or levels[1] < 0 or levels[-1] > num_train_timesteps - 1:
        raise ValueError(f"a ladder increases strictly and stays below {num_train_timesteps}")
    return tuple(int(level) if level == int(level) else float(level) for level in levels)
