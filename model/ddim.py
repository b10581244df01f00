"""DDIM (Song et al., arXiv 2010.02502): one update between two levels, which sampling walks down and inversion up.

alpha^2 here is the paper's alpha. Coefficients are float64; the state x = alpha x0 + sigma epsilon is float32 at least,
whatever the network runs in. States are [B, C, H, W], with pixels in [-1, 1] at the clean end.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from palindrome.model.condition import Condition
from palindrome.model.process import CLEAN, Affine, Marginal, Process, Reading

Network = Callable[..., Tensor]
"""(x [B, C, H, W] times its reading's `scale`, `told`), and for a conditional one (x, told, condition) -> the network's
output [B, C, H, W]."""


def evaluate(network: Network, x: Tensor, reading: Reading, condition: Condition | None = None) -> Tensor:
    """One network evaluation, in the state's dtype; with guidance, one of a batch of two, whose outputs are combined as
    epsilon would be: at one state, both are affine."""
    given = x if reading.scale == 1 else reading.scale * x
    if condition is None:
        output = network(given, reading.told)
    elif condition.dropped is None:
        output = network(given, reading.told, condition)
    else:
        without, with_it = network(torch.cat([given, given]), reading.told, condition.both).chunk(2)
        output = torch.lerp(without, with_it, condition.weight)
    return output.to(x.dtype)


def apply(affine: Affine, x: Tensor, output: Tensor) -> Tensor:
    """A x + B output."""
    if not affine.of_state:
        return affine.of_output * output
    return (affine.of_state * x).add_(output, alpha=affine.of_output)


def coefficients(start: Marginal, end: Marginal, deviation: float = 0.0) -> tuple[float, float]:
    """What eq. 12 multiplies x and epsilon by, with eq. 9's predicted x0 put in: gathered so that x is never divided by
    a small alpha and multiplied back. alpha must not be 0 at the start.

    alpha_end (x - sigma_start epsilon) / alpha_start + sqrt(sigma_end^2 - deviation^2) epsilon
    """
    scale = end.alpha / start.alpha
    return scale, direction(end, deviation) - scale * start.sigma


def direction(end: Marginal, deviation: float) -> float:
    """What eq. 12 multiplies epsilon by in "the direction pointing to x_t", next to noise of that deviation."""
    return sqrt(max(end.sigma**2 - deviation**2, 0.0))


def move(x: Tensor, epsilon: Tensor, start: Marginal, end: Marginal, deviation: float = 0.0) -> Tensor:
    """The deterministic part of eq. 12, in either direction along the ladder."""
    return apply(Affine(*coefficients(start, end, deviation)), x, epsilon)


def sigma_eta(start: Marginal, end: Marginal, eta: float) -> float:
    """Eq. 16: the noise added in a step down. eta = 0 is DDIM, eta = 1 DDPM's posterior deviation."""
    return eta * end.sigma / start.sigma * sigma_hat(start, end)


def sigma_hat(start: Marginal, end: Marginal) -> float:
    """The larger deviation of section 5, which Ho et al. used for CIFAR-10."""
    return sqrt(1 - (start.alpha / end.alpha) ** 2)


def step(
    network: Network,
    x: Tensor,
    process: Process,
    high: float,
    low: float,
    *,
    condition: Condition | None = None,
    deviation: float = 0.0,
    clip: bool = False,
) -> Tensor:
    """Eq. 12 from level `high` to `low`, but for its noise, of that deviation: one network evaluation. `clip` bounds
    the predicted x0 to [-1, 1]. Raises ValueError where alpha is 0 at `high` and the network predicts epsilon."""
    start, end, reading = process.marginal(high), process.marginal(low), process.reading(high)
    output = evaluate(network, x, reading, condition)
    of_epsilon = direction(end, deviation)
    if clip:
        x0 = apply(reading.combine(1, 0), x, output).clamp(-1, 1)
        return end.alpha * x0 + of_epsilon / start.sigma * (x - start.alpha * x0)
    return apply(reading.combine(end.alpha, of_epsilon), x, output)


@torch.no_grad()
def sample(
    network: Network,
    x: Tensor,
    levels: Sequence[float],
    process: Process,
    *,
    condition: Condition | None = None,
    eta: float = 0.0,
    use_sigma_hat: bool = False,
    noise: Iterator[Tensor] | None = None,
    clip: bool = False,
) -> Tensor:
    """x at the ladder's top -> x0: eq. 12 from each level to the one below; NFE is len(levels) - 1.

    `eta` in [0, 1] sets the deviation of the noise by eq. 16. `use_sigma_hat` adds noise of deviation sigma-hat while
    the direction keeps that of eta = 1 (appendix D.3). Where a step is stochastic, `noise` gives one standard normal
    [B, C, H, W] a step, the first for the top; the last step, to the clean end, adds none. `clip` bounds the predicted
    x0 to [-1, 1], as Ho et al. do; it is refused on the deterministic path, whose inverse it would break. Raises
    ValueError, also where the top is at alpha 0 and the network predicts epsilon.
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
        start, end = process.marginal(high), process.marginal(low)
        deviation = sigma_eta(start, end, 1.0 if use_sigma_hat else eta)
        x = step(network, x, process, high, low, condition=condition, deviation=deviation, clip=clip)
        if noise is not None and stochastic and low != CLEAN:
            x = x + (sigma_hat(start, end) if use_sigma_hat else deviation) * next(noise).to(x)
    return x


@torch.no_grad()
def invert(
    network: Network,
    x: Tensor,
    levels: Sequence[float],
    process: Process,
    *,
    condition: Condition | None = None,
    told: str = "source",
) -> Tensor:
    """x0 -> x at the ladder's top, the paper's inversion: eq. 14 reversed, an Euler step of the ODE of eq. 13.

    Each step up uses epsilon at the level it leaves, and NFE is len(levels) - 1. `told` is the level the network is
    told: that `source` level, as in the paper (the first one above the clean end there, which has none of its own), or
    the `target` level with x still at the source, as the usual loop over diffusers' DDIMInverseScheduler does. The
    output is read at the level the network is told.
    """
    if told not in ("source", "target"):
        raise ValueError(f"told is {told!r}; known: source, target")
    x = as_state(x)
    for low, high in pairwise(levels):
        reading = process.reading(max(low, levels[1]) if told == "source" else high)
        output = evaluate(network, x, reading, condition)
        scale, gain = coefficients(process.marginal(low), process.marginal(high))
        of_state, of_output = reading.epsilon
        x = apply(Affine(scale + gain * of_state, gain * of_output), x, output)
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
