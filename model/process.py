"""Noise processes: alpha and sigma at each level, and what a network's output at a level says of x0 and of epsilon.

A state is z = alpha x0 + sigma epsilon. All states have unit scale here, alpha^2 + sigma^2 = 1: flow matching's
(1 - t) x0 + t epsilon and EDM's x0 + sigma epsilon are divided by sqrt(alpha^2 + sigma^2). That changes no trajectory:
the DDIM update holds x0 and epsilon fixed, whatever scale the state is written in (DDIM paper, section 4.3; Karras et
al., arXiv 2206.00364, section 4). So one sampler, one inversion and one noise serve all processes.

A *level* is a number from 0 to num_train_timesteps - 1, fractions included, or `CLEAN` (-1), the image. Noise rises
with the level.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from typing import Any, NamedTuple, Self

import numpy as np

CLEAN = -1
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Marginal(NamedTuple):
    """q(z | x0) = N(alpha x0, sigma^2 I) at a level; alpha^2 + sigma^2 = 1."""

    alpha: float
    sigma: float


class Affine(NamedTuple):
    """A z + B output, of a state and the network's output for it."""

    of_state: float
    of_output: float


@dataclass(frozen=True)
class Reading:
    """A network at a level: it is given `scale` times the state, and told `told` (a timestep, or its noise level in
    the network's own terms). Its output is read as `x0` and as `epsilon`; the first is None where an output says
    nothing of x0: that of an epsilon network at alpha 0."""

    told: float
    scale: float
    x0: Affine | None
    epsilon: Affine

    def combine(self, of_x0: float, of_epsilon: float) -> Affine:
        """of_x0 * x0 + of_epsilon * epsilon. Raises ValueError where the output says nothing of x0."""
        if self.x0 is None:
            raise ValueError("at alpha 0 the state has no signal, and a network that predicts epsilon can't add one")
        return Affine(*(of_x0 * a + of_epsilon * b for a, b in zip(self.x0, self.epsilon, strict=True)))


class Process(ABC):
    """A table of levels, and how the outputs of networks that were trained on it are read."""

    num_train_timesteps: int

    @property
    @abstractmethod
    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma at the whole levels, float64 [num_train_timesteps] each, alpha^2 + sigma^2 = 1."""

    @abstractmethod
    def reading(self, level: float) -> Reading:
        """How the network is evaluated at a level above `CLEAN`. Raises IndexError outside the table."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What another program needs besides the weights to walk a ladder with the network, as JSON's types."""

    def as_described(self, found: Mapping[str, Any]) -> Self:
        """This process as a run's `describe` has it, where versions before read a scheduler differently."""
        return self

    @property
    def clean(self) -> Marginal:
        """At the image."""
        return Marginal(1.0, 0.0)

    def marginal(self, level: float) -> Marginal:
        """At a level; at a fraction, the angle atan2(sigma, alpha) is interpolated, which is regular at both ends.
        Raises IndexError outside the table."""
        if level == CLEAN:
            return self.clean
        if not 0 <= level <= self.num_train_timesteps - 1:
            raise IndexError(f"level {level} is not in -1 .. {self.num_train_timesteps - 1}")
        below = math.floor(level)
        (alpha, sigma), part = (values[below : below + 2] for values in self.table), level - below
        if not part:
            return Marginal(float(alpha[0]), float(sigma[0]))
        angle = float(np.arctan2(sigma, alpha) @ (1 - part, part))
        return Marginal(math.cos(angle), math.sin(angle))

    def alpha_bar(self, level: float) -> float:
        """alpha^2, the DDIM paper's alpha_t."""
        return self.marginal(level).alpha ** 2

    @cached_property
    def log_snr(self) -> np.ndarray:
        """log(alpha^2 / sigma^2), float64 [num_train_timesteps]: falling, -inf where alpha is 0."""
        alphas, sigmas = self.table
        with np.errstate(divide="ignore"):
            return 2 * (np.log(alphas) - np.log(sigmas))


@dataclass(frozen=True)
class VP(Process):
    """The variance-preserving process of a table of betas: q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0,
    (1 - alpha_bar_t) I) (DDIM paper, eq. 4), and a network that predicts epsilon, v or x0 (`sample`).

    Field names and values are those of diffusers' `scheduler_config.json`. `linear` is DDPM's (Ho et al., section 4);
    `scaled_linear` is linear in sqrt(beta); `squaredcos_cap_v2` is the cosine schedule of Nichol & Dhariwal (eq. 17).
    `trained_betas`, where given, replaces the named schedule. `set_alpha_to_one` says whether alpha-bar is 1 at the
    clean end, or that of timestep 0: an image is then taken as x_0 of the schedule. `rescale_betas_zero_snr` scales
    sqrt(alpha_bar) to end at 0 (Lin et al., arXiv 2305.08891, algorithm 1). Raises ValueError for values out of range.
    """

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    trained_betas: tuple[float, ...] | None = field(default=None, repr=False)
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        if self.beta_schedule not in BETA_SCHEDULES:
            raise ValueError(f"beta_schedule is {self.beta_schedule!r}; known: {', '.join(BETA_SCHEDULES)}")
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {self.prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")
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
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError("rescale_betas_zero_snr ends at alpha 0, where epsilon says nothing of the image")

    @cached_property
    def betas(self) -> np.ndarray:
        """Before any rescaling, float64 [num_train_timesteps]."""
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
    def alphas_cumprod(self) -> np.ndarray:
        """alpha-bar, float64 [num_train_timesteps]; the paper's alpha_t."""
        alphas_cumprod = np.cumprod(1 - self.betas)
        if not self.rescale_betas_zero_snr:
            return alphas_cumprod
        first, last = np.sqrt(alphas_cumprod[[0, -1]])
        return ((np.sqrt(alphas_cumprod) - last) * first / (first - last)) ** 2

    @cached_property
    def table(self) -> tuple[np.ndarray, np.ndarray]:
        return np.sqrt(self.alphas_cumprod), np.sqrt(1 - self.alphas_cumprod)

    @property
    def clean(self) -> Marginal:
        return super().clean if self.set_alpha_to_one else self.marginal(0)

    def reading(self, level: float) -> Reading:
        alpha, sigma = self.marginal(level)
        if self.prediction_type == "epsilon":
            x0 = Affine(1 / alpha, -sigma / alpha) if alpha else None
            return Reading(level, 1.0, x0, Affine(0.0, 1.0))
        if self.prediction_type == "sample":
            return Reading(level, 1.0, Affine(0.0, 1.0), Affine(1 / sigma, -alpha / sigma))
        # v = alpha epsilon - sigma x0 (Salimans & Ho, arXiv 2202.00512, section 4)
        return Reading(level, 1.0, Affine(alpha, -sigma), Affine(sigma, alpha))

    def describe(self) -> dict[str, Any]:
        """`trained_betas`, `set_alpha_to_one` and `rescale_betas_zero_snr` are left out at diffusers' defaults."""
        found = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        defaults = {"trained_betas": None, "set_alpha_to_one": True, "rescale_betas_zero_snr": False}
        return {name: value for name, value in found.items() if name not in defaults or value != defaults[name]}

    def as_described(self, found: Mapping[str, Any]) -> Self:
        """Versions before `set_alpha_to_one` was read took the clean end to be at 1."""
        return dataclasses.replace(self, set_alpha_to_one=bool(found.get("set_alpha_to_one", True)))


@dataclass(frozen=True)
class Flow(Process):
    """Flow matching on straight lines, z_t = (1 - t) x0 + t epsilon, and a network that predicts u = epsilon - x0
    (Lipman et al., arXiv 2210.02747; Liu et al., 2209.03003). It is told num_train_timesteps * t.

    Level i is at t = shift s / (1 + (shift - 1) s) with s = (i + 1) / num_train_timesteps, as in diffusers'
    FlowMatchEulerDiscreteScheduler, whose names the fields have. In z_t, a DDIM step is Euler's step of the flow.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 1 or not 0 < self.shift < math.inf:
            raise ValueError(f"num_train_timesteps {self.num_train_timesteps} and shift {self.shift} must be above 0")

    @cached_property
    def table(self) -> tuple[np.ndarray, np.ndarray]:
        s = np.arange(1, self.num_train_timesteps + 1) / self.num_train_timesteps
        t = self.shift * s / (1 + (self.shift - 1) * s)
        norm = np.hypot(1 - t, t)
        return (1 - t) / norm, t / norm

    def reading(self, level: float) -> Reading:
        alpha, sigma = self.marginal(level)
        scale = 1 / (alpha + sigma)  # z_t of a state at unit scale; t = scale sigma
        x0, epsilon = Affine(scale, -scale * sigma), Affine(scale, scale * alpha)
        return Reading(self.num_train_timesteps * scale * sigma, scale, x0, epsilon)

    def level_of(self, t: float) -> float:
        """The level, a fraction, whose marginal is that of the time t."""
        alphas, sigmas = self.table
        return float(np.interp(math.atan2(t, 1 - t), np.arctan2(sigmas, alphas), np.arange(len(alphas))))

    def describe(self) -> dict[str, Any]:
        return {"process": "flow", **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Sigmas(Process):
    """x0 + s epsilon for s from sigma_min to sigma_max. Level i is the i-th of the steps of Karras et al. (arXiv
    2206.00364, eq. 5), from the clean end: s^(1 / rho) rises evenly."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if not (0 < self.sigma_min < self.sigma_max < math.inf and self.rho > 0):
            raise ValueError(f"{self}: 0 < sigma_min < sigma_max, and rho above 0 are needed")
        if self.num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}; at least 2 are needed")

    @cached_property
    def table(self) -> tuple[np.ndarray, np.ndarray]:
        ends = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        s = np.linspace(*ends, self.num_train_timesteps) ** self.rho
        norm = np.hypot(1, s)
        return 1 / norm, s / norm


@dataclass(frozen=True, kw_only=True)
class EDM(Sigmas):
    """The raw network F of D = c_skip z + c_out F(c_in z, ln(s) / 4) (Karras et al., table 1)."""

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data is {self.sigma_data}, not a number above 0")

    def reading(self, level: float) -> Reading:
        alpha, sigma = self.marginal(level)
        data = self.sigma_data
        total = sqrt(sigma**2 + (data * alpha) ** 2)  # alpha sqrt(s^2 + sigma_data^2), so that c_in z is state / total
        x0 = Affine(alpha * (data / total) ** 2, sigma * data / total)
        epsilon = Affine(sigma / total**2, -alpha * data / total)
        return Reading(math.log(sigma / alpha) / 4, 1 / total, x0, epsilon)

    def describe(self) -> dict[str, Any]:
        return {"process": "edm", **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class SongVP(Sigmas):
    """The network of Song et al.'s continuous VP process (arXiv 2011.13456), D = z - s F(z / sqrt(s^2 + 1), (M - 1) t),
    with s^2 = exp(beta_d t^2 / 2 + beta_min t) - 1 (Karras et al., table 1). F predicts epsilon."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    M: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.beta_d > 0 and self.beta_min > 0 and self.M > 1):
            raise ValueError(f"beta_d {self.beta_d} and beta_min {self.beta_min} must be above 0, M {self.M} above 1")

    def reading(self, level: float) -> Reading:
        alpha, sigma = self.marginal(level)
        of_t = sqrt(self.beta_min**2 - 4 * self.beta_d * math.log(alpha))  # 1 + s^2 = 1 / alpha^2
        told = (self.M - 1) * (of_t - self.beta_min) / self.beta_d
        return Reading(told, 1.0, Affine(1 / alpha, -sigma / alpha), Affine(0.0, 1.0))

    def describe(self) -> dict[str, Any]:
        return {"process": "song_vp", **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class SongVE(Sigmas):
    """The network of Song et al.'s VE process, D = z + s F(z, ln(s / 2)) (Karras et al., table 1). F predicts
    -epsilon."""

    def reading(self, level: float) -> Reading:
        alpha, sigma = self.marginal(level)
        x0, epsilon = Affine(1 / alpha, sigma / alpha), Affine(0.0, -1.0)
        return Reading(math.log(sigma / alpha / 2), 1 / alpha, x0, epsilon)

    def describe(self) -> dict[str, Any]:
        return {"process": "song_ve", **dataclasses.asdict(self)}
