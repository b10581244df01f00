"""Round trips by other ODE solvers and ours: error against network evaluations for encoding (up) and decoding (down).

python -m benchmarks.solvers [--ladders logsnr] [--budgets 61] [--methods Heun O-BELM] [--limit 32] [--json FILE]

One process, no Ray. In y = x / sqrt(alpha) and sigma = sqrt((1 - alpha) / alpha), DDIM is Euler's method for
dy = epsilon d sigma (eq. 13, 14), and every method here is a formula for the next y. Each method uses one ladder in
both directions; ours encodes by model.inversion and decodes by plain DDIM. BDIA and O-BELM are algebraically exact if
the last two states are stored: `2 float32`, `2 float16`; for `1 float32` the second is computed by a step of plain
DDIM.

At the clean level, which has no timestep, the network gets the ladder's first timestep. There Heun takes an Euler step,
in both directions, and the two-state methods start with one. DPM-Solver++ is of first order in the steps whose formula
would need the log-SNR of the clean level, which is infinite.

`noise recovery` is the mean squared difference between x_T and the result of sampling from it and inverting the image
(two states: the second by a step of plain DDIM; only the image is inverted). For x_T ~ N(0, I), std, kurtosis and
correlation of neighbours are 1, 3 and 0.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palindrome.model import families
from palindrome.model.ddim import Network, apply, evaluate, sample, sample_noise
from palindrome.model.inversion import invert_exactly
from palindrome.model.ladder import Ladder
from palindrome.model.process import CLEAN, Process
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.metrics import moments, round_trip_error, statistics, to_model, to_pixels
from palindrome.pipeline.images.read import first_images
from palindrome.pipeline.images.sources import open_collection
from palindrome.pipeline.runs.ladders import resolve
from palindrome.pipeline.storage.folder import absolute

ROOT = Path(__file__).parent.parent


@dataclass
class Flow:
    """dy / d sigma = epsilon on a ladder, y [B, C, H, W]; `spent` counts network evaluations of one image each."""

    network: Network
    levels: Ladder
    process: Process
    spent: int = 0

    def scale(self, level: int) -> float:
        """x / y."""
        return self.process.marginal(level).alpha

    def sigma(self, level: int) -> float:
        alpha, sigma = self.process.marginal(level)
        return sigma / alpha

    def epsilon(self, y: Tensor, level: int) -> Tensor:
        x, reading = self.scale(level) * y, self.process.reading(max(level, self.levels[1]))
        return apply(reading.epsilon, x, evaluate(self.counted, x, reading))

    def counted(self, x: Tensor, timestep: int) -> Tensor:
        self.spent += len(x)
        return self.network(x, timestep)


Solver = Callable[[Flow, Tensor, Sequence[int]], Tensor]
"""(flow, y at the path's first level, path: levels in either direction) -> y at its last."""


def euler(flow: Flow, y: Tensor, path: Sequence[int]) -> Tensor:
    """Plain DDIM (eq. 14)."""
    for here, there in pairwise(path):
        y = y + (flow.sigma(there) - flow.sigma(here)) * flow.epsilon(y, here)
    return y


def heun(flow: Flow, y: Tensor, path: Sequence[int]) -> Tensor:
    """The trapezoidal rule, with the end point predicted by Euler: two evaluations per step, one at the clean level."""
    for here, there in pairwise(path):
        h, e = flow.sigma(there) - flow.sigma(here), flow.epsilon(y, here)
        if CLEAN not in (here, there):
            e = (e + flow.epsilon(y + h * e, there)) / 2
        y = y + h * e
    return y


def adams_bashforth(flow: Flow, y: Tensor, path: Sequence[int]) -> Tensor:
    """Second order: epsilon is extrapolated linearly in sigma to the middle of the step; the first step is Euler's."""
    e_before, h_before = None, 0.0
    for here, there in pairwise(path):
        h, e = flow.sigma(there) - flow.sigma(here), flow.epsilon(y, here)
        y = y + h * (e if e_before is None else e + h / (2 * h_before) * (e - e_before))
        e_before, h_before = e, h
    return y


def dpm_solver(flow: Flow, y: Tensor, path: Sequence[int]) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., 2211.01095, algorithm 2) with lambda = -log sigma and the predicted image m:
    y_t = (sigma_t / sigma_s) y_s + (1 - sigma_t / sigma_s) (m_s + h / (2 h_before) (m_s - m_before))."""
    m_before, before = None, path[0]
    for here, there in pairwise(path):
        e, h = flow.epsilon(y, here), flow.sigma(there) - flow.sigma(here)
        m = y - flow.sigma(here) * e
        y = y + h * e  # the first order
        if m_before is not None and CLEAN not in (before, here, there):
            step, step_before = (np.log(flow.sigma(a) / flow.sigma(b)) for a, b in ((here, there), (before, here)))
            y = y - h / flow.sigma(here) * float(step / step_before) / 2 * (m - m_before)
        m_before, before = m, here
    return y


def bdia(flow: Flow, before: int, here: int, there: int) -> float:
    """gamma = 1 (Zhang et al., 2307.10829): x_next = x_before + D(here -> next) - D(here -> before), D being
    the step of DDIM."""
    return flow.scale(before) / flow.scale(there)


def o_belm(flow: Flow, before: int, here: int, there: int) -> float:
    """The only weight of second order, with local error O(h^3) (Wang et al., 2410.07273)."""
    return ((flow.sigma(there) - flow.sigma(here)) / (flow.sigma(here) - flow.sigma(before))) ** 2


Weight = Callable[[Flow, int, int, int], float]


def two_states(weight: Weight, flow: Flow, y_before: Tensor, y: Tensor, path: Sequence[int]) -> tuple[Tensor, Tensor]:
    """y at the path's first two levels -> y at its last two. Each step is Euler's, plus `weight` times the error of
    Euler's step back to the previous state. The weight of the reverse step is the reciprocal, so it is its exact
    inverse.

    y_next = y + h epsilon + w (y_before - y + h_before epsilon)
    """
    for before, here, there in zip(path, path[1:], path[2:], strict=False):
        e = flow.epsilon(y, here)
        h_before, h = flow.sigma(here) - flow.sigma(before), flow.sigma(there) - flow.sigma(here)
        y_before, y = y, y + h * e + weight(flow, before, here, there) * (y_before - y + h_before * e)
    return y_before, y


States = list[Tensor]
"""The stored states: x at the top level, and for two-state methods also x one level below."""


BUDGETS = (31, 61, 81)
Steps = tuple[tuple[int, ...], ...]
"""The numbers of steps for each of `BUDGETS`, which are network evaluations up + down."""


@dataclass(frozen=True)
class Method:
    name: str
    up: Callable[[Flow, Tensor], States]
    down: Callable[[Flow, States], Tensor]
    steps: Steps
    stored: tuple[tuple[int, str], ...] = ((1, "float32"),)


def one_state(name: str, solve: Solver, steps: Steps) -> Method:
    def up(flow: Flow, x: Tensor) -> States:
        return [flow.scale(flow.levels[-1]) * solve(flow, x, flow.levels)]

    def down(flow: Flow, states: States) -> Tensor:
        return solve(flow, states[0] / flow.scale(flow.levels[-1]), flow.levels[::-1])

    return Method(name, up, down, steps)


def exact(name: str, weight: Weight, steps: Steps) -> Method:
    def up(flow: Flow, x: Tensor) -> States:
        first = euler(flow, x, flow.levels[:2])
        ys = two_states(weight, flow, x, first, flow.levels)
        return [flow.scale(level) * y for level, y in zip(flow.levels[:-3:-1], ys[::-1], strict=True)]

    def down(flow: Flow, states: States) -> Tensor:
        path = flow.levels[::-1]
        y, *below = (state / flow.scale(level) for level, state in zip(path, states, strict=False))
        y_below = below[0] if below else euler(flow, y, path[:2])
        return two_states(weight, flow, y, y_below, path)[1]

    return Method(name, up, down, steps, ((2, "float32"), (1, "float32"), (2, "float16")))


def ours(corrections: int, steps: Steps) -> Method:
    def settings(flow: Flow) -> dict[str, Any]:
        return {"levels": flow.levels, "process": flow.process}

    def up(flow: Flow, x: Tensor) -> States:
        return [invert_exactly(flow.counted, x, corrections=corrections, **settings(flow))[0]]

    def down(flow: Flow, states: States) -> Tensor:
        return sample(flow.counted, states[0], **settings(flow))

    name = f"ours, {corrections} correction{'s' * (corrections > 1)}"
    return Method(name, up, down, steps, ((1, "float32"), (1, "float16")))


METHODS = (
    one_state("plain DDIM", euler, ((10,), (20,), (40,))),
    one_state("Heun", heun, ((8,), (16,), (20,))),
    one_state("Adams-Bashforth 2", adams_bashforth, ((15,), (30,), (40,))),
    one_state("DPM-Solver++(2M)", dpm_solver, ((15,), (30,), (40,))),
    exact("BDIA", bdia, ((16,), (31,), (41,))),
    exact("O-BELM", o_belm, ((16,), (31,), (41,))),
    ours(1, ((10, 15), (20, 30), (40,))),
    ours(2, ((10,), (20,), (27,))),
    ours(3, ((8,), (10, 15), (20,))),
)
COLUMNS = "method|ladder|S|NFE up + down|stored|MSE mean|p99|8-bit values identical|images identical|latent std|"
COLUMNS += "kurtosis|correlation|noise recovery MSE"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints/cifar10-32"))
    parser.add_argument("--images", default=str(ROOT / "samples/cifar10-test-256.parquet"))
    parser.add_argument("--ladders", nargs="+", default=["logsnr", "quadratic"])
    parser.add_argument("--budgets", type=int, nargs="+", choices=BUDGETS, default=BUDGETS, help="approximate NFE")
    parser.add_argument("--methods", nargs="+", default=[""], help="prefixes of the methods' names")
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--noises", type=int, default=4, help="number of samples for noise recovery")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()

    model = families.load(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = model.denoiser(device)
    channels, size, _ = model.image_shape
    pixels = first_images(
        open_collection(absolute(args.images)),
        Preprocess(size, channels),
        args.limit,
    )
    x0 = to_model(pixels).to(device)
    x_T = torch.cat([sample_noise(0, i, x0.shape[1:]) for i in range(args.noises)]).to(device)
    print(f"{len(pixels)} images, {device}, model {model.digest[:12]}\n")
    columns = COLUMNS.split("|")
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    rows = []
    for ladder in args.ladders:
        for method in (m for m in METHODS if m.name.startswith(tuple(args.methods))):
            for steps in (S for budget in args.budgets for S in method.steps[BUDGETS.index(budget)]):
                flow_on = partial(Flow, network, resolve(ladder, steps, model.process), model.process)
                for row in measure(method, flow_on, x0, pixels, x_T):
                    rows.append({"method": method.name, "ladder": ladder, "S": steps, **row})
                    print(line(rows[-1]), flush=True)
    if args.json:
        figures = {"model_digest": model.digest, "images": len(pixels), "device": device, "rows": rows}
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


@torch.no_grad()
def measure(
    method: Method, flow_of: Callable[[], Flow], x0: Tensor, pixels: np.ndarray, x_T: Tensor
) -> list[dict[str, Any]]:
    """One row per way to store the latents."""
    encoding = flow_of()
    states = method.up(encoding, x0)
    latents = {name: float(values.mean()) for name, values in moments(states[0]).items()}
    recovered = method.up(flow_of(), method.down(flow_of(), [x_T]))[0]
    rows = []
    for count, dtype in method.stored:
        flow = flow_of()
        decoded = method.down(flow, [state.to(getattr(torch, dtype)).float() for state in states[:count]])
        same = (to_pixels(decoded) == pixels).reshape(len(pixels), -1)
        errors = statistics(round_trip_error(x0, decoded))
        rows.append(
            {
                "NFE": [encoding.spent / len(x0), flow.spent / len(x0)],
                "stored": f"{count} {dtype}",
                "MSE": [errors["mean"], errors["p99"]],
                "identical": [float(same.mean()), float(same.all(1).mean())],
                "latent": [latents[name] for name in ("std", "kurtosis", "correlation")],
                "noise recovery": float((recovered - x_T).square().mean()),
            }
        )
    return rows


def line(row: dict[str, Any]) -> str:
    cells = [row["method"], row["ladder"], row["S"], "{:.4g} + {:.4g}".format(*row["NFE"]), row["stored"]]
    cells += [f"{error:.2e}" for error in row["MSE"]]
    cells += ["{:.2%}".format(row["identical"][0]), "{:.1%}".format(row["identical"][1])]
    cells += [f"{figure:.3g}" for figure in row["latent"]] + [f"{row['noise recovery']:.2e}"]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
