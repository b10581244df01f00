"""DDIM (Song et al., arXiv 2010.02502): one update between two levels, which sampling walks down and inversion up.

alpha-bar here is the paper's alpha. Coefficients are float64; the state x is float32 at least, whatever the network
runs in. x is [B, C, H, W] with pixels in [-1, 1] at the clean end.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from palindrome.model.condition import Condition
from palindrome.model.schedule import CLEAN, NoiseSchedule

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
Network = Callable[..., Tensor]
"""(x [B, C, H, W], timestep), and for a conditional one (x, timestep, condition) -> the network's output
[B, C, H, W]."""


def to_epsilon(prediction_type: str, output: Tensor, x: Tensor, alpha_bar: float) -> Tensor:
    """The noise that a network's output stands for, x being sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) epsilon.

    `v_prediction` is sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x0 (Salimans & Ho, section 4); `sample` is x0.
    """
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return sqrt(alpha_bar) * output + sqrt(1 - alpha_bar) * x
    if prediction_type == "sample":
        return (x - sqrt(alpha_bar) * output) / sqrt(1 - alpha_bar)
    raise ValueError(f"prediction_type is {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")


def epsilon_of(
    network: Network,
    x: Tensor,
    timestep: int,
    schedule: NoiseSchedule,
    prediction_type: str,
    condition: Condition | None = None,
) -> Tensor:
    """One network evaluation as epsilon, in the state's dtype. The output is read at the alpha-bar of the timestep
    the network was told: so it stays finite at the clean end, where the network is told the first timestep."""
    output = network(x, timestep) if condition is None else network(x, timestep, condition)
    output = output.to(x.dtype)
    return to_epsilon(prediction_type, output, x, schedule.alpha_bar(timestep))


def coefficients(alpha_from: float, alpha_to: float, sigma: float = 0.0) -> tuple[float, float]:
    """What eq. 12 multiplies x and epsilon by, with eq. 9's predicted x0 put in: gathered so that x is never divided by
    a small sqrt(alpha_from) and multiplied back.

    sqrt(alpha_to) (x - sqrt(1 - alpha_from) epsilon) / sqrt(alpha_from) + sqrt(1 - alpha_to - sigma^2) epsilon
    """
    scale = sqrt(alpha_to / alpha_from)
    direction = sqrt(max(1 - alpha_to - sigma**2, 0.0))
    return scale, direction - scale * sqrt(1 - alpha_from)


def move(x: Tensor, epsilon: Tensor, alpha_from: float, alpha_to: float, sigma: float = 0.0) -> Tensor:
    """The deterministic part of eq. 12, in either direction along the ladder."""
    scale, gain = coefficients(alpha_from, alpha_to, sigma)
    return (scale * x).add_(epsilon, alpha=gain)


def sigma_eta(alpha_from: float, alpha_to: float, eta: float) -> float:
    """Eq. 16: the noise added in a step down. eta = 0 is DDIM, eta = 1 DDPM's posterior deviation."""
    return eta * sqrt((1 - alpha_to) / (1 - alpha_from)) * sqrt(1 - alpha_from / alpha_to)


def sigma_hat(alpha_from: float, alpha_to: float) -> float:
    """The larger deviation of section 5, which Ho et al. used for CIFAR-10."""
    return sqrt(1 - alpha_from / alpha_to)


@torch.no_grad()
def sample(
    network: Network,
    x: Tensor,
    levels: Sequence[int],
    schedule: NoiseSchedule,
    *,
    prediction_type: str = "epsilon",
    condition: Condition | None = None,
    eta: float = 0.0,
    use_sigma_hat: bool = False,
    noise: Iterator[Tensor] | None = None,
    clip: bool = False,
) -> Tensor:
    """x at the ladder's top -> x0: eq. 12 from each level to the one below; NFE is len(levels) - 1.

    `eta` in [0, 1] sets sigma by eq. 16. `use_sigma_hat` adds noise of deviation sigma-hat while the direction keeps
    the sigma of eta = 1 (appendix D.3). Where a step is stochastic, `noise` gives one standard normal [B, C, H, W] a
    step, the first for the top; the last step, to the clean end, adds none. `clip` bounds the predicted x0 to [-1, 1],
    as Ho et al. do; it is refused on the deterministic path, whose inverse it would break. Raises ValueError.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it lies between 0 and 1")
    stochastic = eta > 0 or use_sigma_hat
    if clip and not stochastic:
        raise ValueError("clip goes with stochastic sampling only: it breaks the deterministic round trip")
    if stochastic and noise is None:
        raise ValueError("stochastic sampling needs noise")
    x = as_state(x)
    for low, high in reversed(list(pairwise(levels))):
        a_from, a_to = schedule.alpha_bar(high), schedule.alpha_bar(low)
        epsilon = epsilon_of(network, x, high, schedule, prediction_type, condition)
        if clip:
            x0 = ((x - sqrt(1 - a_from) * epsilon) / sqrt(a_from)).clamp(-1, 1)
            epsilon = (x - sqrt(a_from) * x0) / sqrt(1 - a_from)
        sigma = sigma_eta(a_from, a_to, 1.0 if use_sigma_hat else eta)
        x = move(x, epsilon, a_from, a_to, sigma)
        if noise is not None and stochastic and low != CLEAN:
            x = x + (sigma_hat(a_from, a_to) if use_sigma_hat else sigma) * next(noise).to(x)
    return x


@torch.no_grad()
def invert(
    network: Network,
    x: Tensor,
    levels: Sequence[int],
    schedule: NoiseSchedule,
    *,
    prediction_type: str = "epsilon",
    condition: Condition | None = None,
    told: str = "source",
) -> Tensor:
    """x0 -> x at the ladder's top, the paper's inversion: eq. 14 reversed, an Euler step of the ODE of eq. 13.

    Each step up uses epsilon at the level it leaves, and NFE is len(levels) - 1. `told` is the timestep the network
    is told: that `source` level, as in the paper (the first timestep at the clean end, which has none of its own), or
    the `target` level with x still at the source, as the usual loop over diffusers' DDIMInverseScheduler does.
    """
    if told not in ("source", "target"):
        raise ValueError(f"told is {told!r}; known: source, target")
    x = as_state(x)
    for low, high in pairwise(levels):
        timestep = max(low, levels[1]) if told == "source" else high
        epsilon = epsilon_of(network, x, timestep, schedule, prediction_type, condition)
        x = move(x, epsilon, schedule.alpha_bar(low), schedule.alpha_bar(high))
    return x


def as_state(x: Tensor) -> Tensor:
    """x in float32 at least: stored latents may be float16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sample_noise(seed: int, index: int, shape: Sequence[int], count: int = 1) -> Tensor:
    """`count` standard normal draws [count, *shape], float32, that depend on (seed, index) alone: not on the batch,
    the shard or the worker. Draw 0 is x_T; a longer count continues the same stream (Philox, counter-based)."""
    return torch.from_numpy(_stream(seed, index).standard_normal((count, *shape), dtype=np.float32))


def noise_stream(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Iterator[Tensor]:
    """One draw after another [len(indices), *shape], float32, of the samples with those indices: of each what
    `sample_noise` gives, without end, a draw at a time in memory."""
    streams = [_stream(seed, index) for index in indices]
    while True:
        yield torch.from_numpy(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams]))


def _stream(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, index], np.uint64)))


def noise_index(name: str) -> int:
    """The index of the noise of what is named so: from the name alone, as no shard or batch may change it."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
