"""Scores of images from DDIM paths: statistics of a plain path, and how a network's way back differs from the way up.

DiffPath (Heng et al., arXiv 2405.11881), InvAD (Sakai et al., 2504.05662), SecMI (Duan et al., 2302.01316) and DIRE
(Wang et al., 2303.09295) follow their authors' code: a path's first level is where the image is taken to be, and the
step from its last one goes to alpha 0, where epsilon alone is left. That is another path than the one of
`model.ddim.invert`, which begins at the clean end and ends at the ladder's top.

States are [B, C, H, W], with pixels in [-1, 1] at the clean end; scores are float64 [B].
"""

import math
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from palindrome.model.condition import Condition
from palindrome.model.ddim import Network, apply, as_state, evaluate
from palindrome.model.ladder import Ladder
from palindrome.model.process import Marginal, Process

IMAGE, NOISE = Marginal(1.0, 0.0), Marginal(0.0, 1.0)
SECMI_TIMESTEPS = tuple(range(0, 101, 10))  # of 1,000: t_sec = 100 and k = 10 in SecMI's code


def spaced(steps: int, num_train_timesteps: int) -> Ladder:
    """`ddimN` of improved- and guided-diffusion: every s-th timestep from 0 on, N of them, with the smallest s that
    gives so many. Raises ValueError where none does."""
    levels = tuple(range(0, num_train_timesteps, -(-num_train_timesteps // steps)))
    if len(levels) != steps:
        raise ValueError(f"no spacing of {num_train_timesteps} timesteps has {steps} of them")
    return levels


def sectioned(steps: int, num_train_timesteps: int) -> Ladder:
    """N of those repositories: N timesteps from 0 to the last one. Raises ValueError where there are fewer."""
    if not 1 <= steps <= num_train_timesteps:
        raise ValueError(f"{steps} steps do not fit in {num_train_timesteps} timesteps")
    return tuple(round(i * ((num_train_timesteps - 1) / max(steps - 1, 1))) for i in range(steps))


def secmi_levels(num_train_timesteps: int) -> Ladder:
    """SECMI_TIMESTEPS at the same fractions of a schedule of another length."""
    levels = (t * num_train_timesteps / 1000 for t in SECMI_TIMESTEPS)
    return tuple(int(level) if level == int(level) else level for level in levels)


def step(
    network: Network,
    x: Tensor,
    level: float,
    end: Marginal,
    process: Process,
    condition: Condition | None = None,
    clip: bool = False,
) -> tuple[Tensor, Tensor]:
    """x at a level -> x at `end`, above or below it, and epsilon: the DDIM paper's eq. 12 with eta = 0.

    `clip` bounds the predicted x0 to [-1, 1] and takes epsilon from it anew, as guided-diffusion's `clip_denoised`.
    What is not finite in x0 stays so. Raises ValueError where the output says nothing of the x0 that is asked for.
    """
    reading = process.reading(level)
    output = evaluate(network, x, reading, condition)
    if clip:
        start, x0 = process.marginal(level), apply(reading.combine(1, 0), x, output)
        x0 = torch.where(x0.isfinite(), x0.clamp(-1, 1), torch.nan)
        epsilon = (x - start.alpha * x0) / start.sigma
        return end.alpha * x0 + end.sigma * epsilon, epsilon
    epsilon = apply(reading.epsilon, x, output)
    return (apply(reading.combine(*end), x, output) if end.alpha else end.sigma * epsilon), epsilon


def path(
    network: Network,
    x: Tensor,
    levels: Ladder,
    process: Process,
    condition: Condition | None = None,
    clip: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The steps up from an image that is taken to be at the first level: x after each, the last at alpha 0, and the
    epsilon that it took."""
    x = as_state(x)
    ends = [*(process.marginal(level) for level in levels[1:]), NOISE]
    for level, end in zip(levels, ends, strict=True):
        x, epsilon = step(network, x, level, end, process, condition, clip)
        yield x, epsilon


def top(*args: Any) -> Tensor:
    """x_T at the end of a `path`."""
    [(x, _)] = deque(path(*args), maxlen=1)
    return x


@torch.no_grad()
def diffpath(
    network: Network, x: Tensor, levels: Ladder, process: Process, condition: Condition | None = None
) -> dict[str, Tensor]:
    """DiffPath's six statistics: the sums over all steps and values of epsilon and of its differences, to the powers of
    1, 2 and 3, named as in its code. With S steps of length 1 / S, the rate of change is S times the difference of two
    steps. `deps_dt_sq_sqrt` is the one of DiffPath-1D. Each `NAME_steps` has NAME's S or S - 1 parts, float64 [B, S].

    x0 is clipped, as the code's configs say; the paper writes of the network's own epsilon.
    """
    sums: dict[str, list[Tensor]] = {name: [] for name in (*_powers("eps_sum"), *_powers("deps_dt"))}
    before = None
    for state, epsilon in path(network, x, levels, process, condition, clip=True):
        x, epsilon = state, epsilon.double().flatten(1)
        for power, name in enumerate(_powers("eps_sum"), 1):
            sums[name].append(epsilon.pow(power).sum(1))
        if before is not None:
            for power, name in enumerate(_powers("deps_dt"), 1):
                sums[name].append((len(levels) * (epsilon - before)).pow(power).sum(1))
        before = epsilon
    parts = {name: torch.stack(each, 1) if each else x.new_zeros(len(x), 0).double() for name, each in sums.items()}
    whole = {name: each.sum(1) for name, each in parts.items()}
    by_step = {f"{name}_steps": each for name, each in parts.items()}
    return {**whole, "deps_dt_sq_sqrt": whole["deps_dt_sq"].sqrt(), **by_step, "latent": x}


def _powers(name: str) -> tuple[str, str, str]:
    return name, f"{name}_sq", f"{name}_cb"


def gaussian(latent: Tensor) -> dict[str, Tensor]:
    """Of x_T: `nats`, -log N(x_T; 0, I), and its norm. No likelihood of the image: that would take the path's change of
    volume too."""
    squared = latent.double().flatten(1).square().sum(1)
    dimensions = latent[0].numel() if len(latent) else 0
    return {"nats": (squared + dimensions * math.log(2 * math.pi)) / 2, "norm": squared.sqrt()}


@torch.no_grad()
def invad(
    network: Network, x: Tensor, levels: Ladder, process: Process, condition: Condition | None = None
) -> dict[str, Tensor]:
    """InvAD's two statistics of x_T: `nll`, -log N(x_T; 0, I), and `norm_range`, how far the largest norm of a
    position, over the channels, is above the smallest. The code adds them after bringing each to [0, 1] over all images
    of a test set: no number of one image."""
    latent = top(network, x, levels, process, condition)
    norms = latent.double().square().sum(1).sqrt().flatten(1)
    return {"nll": gaussian(latent)["nats"], "norm_range": norms.amax(1) - norms.amin(1), "latent": latent}


@torch.no_grad()
def secmi(
    network: Network, x: Tensor, levels: Ladder, process: Process, condition: Condition | None = None
) -> dict[str, Tensor]:
    """SecMI's t-error: up to the last level but one, from there one step up and one down, and the squared distance that
    they leave. The paper writes it at t_sec, the last level; its code, which this follows, a step below."""
    x = as_state(x)
    for level, end in pairwise(levels[:-1]):
        x, _ = step(network, x, level, process.marginal(end), process, condition)
    level, t_sec = levels[-2:]
    up, _ = step(network, x, level, process.marginal(t_sec), process, condition)
    again, _ = step(network, up, t_sec, process.marginal(level), process, condition)
    return {"t_error": (again - x).double().square().flatten(1).sum(1)}


@torch.no_grad()
def dire(
    network: Network, x: Tensor, levels: Ladder, process: Process, condition: Condition | None = None
) -> dict[str, Tensor]:
    """DIRE: how far the image is from what its x_T is decoded to. x_T, at alpha 0, is taken to be at the last level,
    and the last step down ends at alpha 1, where the way up did not begin; x0 is clipped both ways."""
    latent = again = top(network, x, levels, process, condition, True)
    ends = [*(process.marginal(level) for level in levels[-2::-1]), IMAGE]
    for level, end in zip(reversed(levels), ends, strict=True):
        again, _ = step(network, again, level, end, process, condition, clip=True)
    return {**distance(x, again), "latent": latent}


def distance(x: Tensor, again: Tensor) -> dict[str, Tensor]:
    """Of images in [-1, 1] and their reconstructions, neither rounded nor clipped: `map`, the absolute difference
    [B, C, H, W] of pixels in [0, 1], and `l1`, its mean."""
    difference = (x.float() - again.float()).abs() / 2
    return {"l1": difference.double().flatten(1).mean(1), "map": difference}
