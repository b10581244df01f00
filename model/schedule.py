"""Noise schedules (beta -> float64 alpha-bar) and ladders, the levels a sampler visits.

A *level* is a timestep in 0 .. num_train_timesteps-1, or `CLEAN` (-1), the image, where alpha-bar is 1.
A *ladder* is an increasing tuple of levels that begins with `CLEAN`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

CLEAN = -1
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
LADDERS = ("linear", "quadratic")
Ladder = tuple[int, ...]


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) (DDIM paper, eq. 4).

    Field names and values are those of diffusers' `scheduler_config.json`. `linear` is DDPM's (Ho et al., section 4);
    `scaled_linear` is linear in sqrt(beta); `squaredcos_cap_v2` is the cosine schedule of Nichol & Dhariwal (eq. 17).
    `trained_betas`, where given, replaces the named schedule. `set_alpha_to_one` says whether alpha-bar is 1 at the
    clean end, or that of timestep 0: an image is then taken as x_0 of the schedule. Raises ValueError for values out of
    range.
    """

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    trained_betas: tuple[float, ...] | None = field(default=None, repr=False)
    set_alpha_to_one: bool = True

    def __post_init__(self) -> None:
        if self.beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"beta_schedule is {self.beta_schedule!r}; known: {', '.join(BETA_SCHEDULES)}")
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}; at least 1 is needed")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start {self.beta_start} and beta_end {self.beta_end} must rise within 0 and 1")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(
                f"trained_betas has {len(self.trained_betas)} values for {self.num_train_timesteps} timesteps"
            )
        if not (np.all(self.betas > 0) and np.all(self.betas < 1)):
            raise ValueError("every beta must lie between 0 and 1, both excluded")

    @cached_property
    def betas(self) -> np.ndarray:
        """float64 [num_train_timesteps]."""
        T = self.num_train_timesteps
        if self.trained_betas is not None:
            return np.asarray(self.trained_betas, dtype=np.float64)
        if self.beta_schedule == "linear":
            return np.linspace(self.beta_start, self.beta_end, T, dtype=np.float64)
        if self.beta_schedule == "scaled_linear":
            return np.linspace(self.beta_start**0.5, self.beta_end**0.5, T, dtype=np.float64) ** 2

        def f(t: np.ndarray) -> np.ndarray:
            return np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        t = np.arange(T, dtype=np.float64)
        return np.minimum(1 - f((t + 1) / T) / f(t / T), 0.999)

    @cached_property
    def log_snr(self) -> np.ndarray:
        """log(alpha-bar / (1 - alpha-bar)), float64 [num_train_timesteps]: falling."""
        return np.log(self.alphas_cumprod) - np.log1p(-self.alphas_cumprod)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """alpha-bar, float64 [num_train_timesteps]; the paper's alpha_t."""
        return np.cumprod(1 - self.betas)

    def alpha_bar(self, level: int) -> float:
        """alpha-bar at a level; at `CLEAN` 1, or that of timestep 0. Raises IndexError outside the schedule."""
        if level == CLEAN:
            return 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod[0])
        if not 0 <= level < self.num_train_timesteps:
            raise IndexError(f"level {level} is not in -1 .. {self.num_train_timesteps - 1}")
        return float(self.alphas_cumprod[level])


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


def logsnr_ladder(schedule: NoiseSchedule, steps: int, top: int | None = None) -> Ladder:
    """Clean end, then the `steps` timesteps from 0 to `top` (default: 0.8 T) nearest to equal steps of the log-SNR,
    log(alpha-bar / (1 - alpha-bar)): the fixed point of model.inversion then contracts alike in every step. Where a
    level repeats, the later ones move up by one. Raises ValueError when `steps` distinct levels do not fit."""
    T = schedule.num_train_timesteps
    if top is None:
        top = max(T * 4 // 5, steps - 1)
    if not 1 <= steps <= top + 1 <= T:
        raise ValueError(f"{steps} steps do not fit between timestep 0 and {top} of {T}")
    falling = schedule.log_snr[: top + 1]
    levels = [CLEAN]
    for i, wanted in enumerate(np.linspace(falling[0], falling[-1], steps)):
        nearest = int(np.abs(falling - wanted).argmin())
        levels.append(min(max(nearest, levels[-1] + 1), top - (steps - 1 - i)))
    if steps == 1:
        levels = [CLEAN, 0]
    return tuple(levels)


def check_ladder(levels: Sequence[int], num_train_timesteps: int) -> Ladder:
    """The levels as a ladder; raises ValueError unless they rise from `CLEAN` and stay below num_train_timesteps."""
    if len(levels) < 2 or levels[0] != CLEAN:
        raise ValueError(f"a ladder begins with {CLEAN} and has at least one timestep, not {list(levels)[:4]}")
    if any(b <= a for a, b in pairwise(levels)) or levels[-1] >= num_train_timesteps:
        raise ValueError(f"a ladder increases strictly and stays below {num_train_timesteps}")
    return tuple(int(level) for level in levels)
