"""One evaluation of the network: diffusers' UNet2DModel, float32 and eager, against our engine.

python -m benchmarks.evaluation [--presets cifar10-32 cifar10-64] [--batch 64] [--compile] [--rounds 5]

All contenders have the same random weights and the same noise. The median of each one's rounds counts, in images per
second. `error` is the root mean square difference from diffusers' output, in standard deviations of that output.
`gflops` are those of the convolutions and matrix products of one evaluation; `of_matmul` is the fraction reached of the
rate of a product of large square matrices in that precision on this device; `where` is the fraction of the time by
torch operator, from 5 % on, by torch's profiler. On a GPU, diffusers' convolutions use TF32, torch's default, and those
of the engine in float32 do not. Prints one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from palindrome.model.execution import HALVES, PRECISIONS, Execution
from palindrome.model.families.unet2d import UNet2D
from palindrome.model.presets import PRESETS
from palindrome.model.process import VP
from palindrome.pipeline.runtime.device import Model, tune_process

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIDE = {"cuda": 8192, "cpu": 2048}[DEVICE]  # rows of the square matrices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=sorted(PRESETS), default=["cifar10-32", "cifar10-64"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--compile", action="store_true", help="also measure the engine with torch.compile")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    found = {preset: measure(preset, args) for preset in args.presets}
    print(json.dumps({"device": device_name(), "batch": args.batch, "presets": found}, indent=2))


@torch.no_grad()
def measure(preset: str, args: argparse.Namespace) -> dict[str, object]:
    config = PRESETS[preset]
    theirs = UNet2DModel(**{k: v for k, v in config.to_dict().items() if not k.startswith("_")}).eval()
    checkpoint = UNet2D(config, theirs.state_dict(), VP())
    theirs.to(DEVICE)
    x = torch.randn(args.batch, config.in_channels, config.sample_size, config.sample_size, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        expected = theirs(x[:1], 500).sample
    flops = counter.get_total_flops()
    contenders: dict[str, Callable[[], Tensor]] = {"diffusers": lambda: theirs(x, 500).sample}
    errors = {}
    # CPUs have no TF32, and torch has no fast float16 for them.
    for precision in PRECISIONS if DEVICE == "cuda" else ("float32", "bfloat16"):
        for compiled in (False, True)[: 1 + args.compile]:
            # An engine sets TF32 for the whole process, so each is measured before the next one is made.
            model = Model(checkpoint, execution=Execution(precision, compiled))
            tune_process(model)  # as actors do
            engine = model.network
            name = precision + ", compiled" * compiled
            contenders[name] = lambda engine=engine: engine(x, 500)  # type: ignore[misc]
            errors[name] = ((engine(x[:1], 500) - expected).square().mean().sqrt() / expected.std()).item()
    seconds = {name: rounds(contender, args.rounds) for name, contender in contenders.items()}
    baseline = statistics.median(seconds["diffusers"])
    rows: dict[str, dict[str, object]] = {}
    for name, taken in seconds.items():
        each = statistics.median(taken)
        dtype = HALVES.get(name.partition(",")[0], torch.float32)
        rows[name] = {
            "images_per_second": args.batch / each,
            "ratio": baseline / each,
            "of_matmul": flops * args.batch / each / matmul_rate(dtype, name.startswith("tf32")),
        }
        if name in errors:
            rows[name]["error"] = errors[name]
        if "compiled" not in name:
            rows[name]["where"] = where(contenders[name])
    return {"gflops": flops / 1e9, "contenders": rows}


def rounds(contender: Callable[[], Tensor], count: int) -> list[float]:
    """Seconds of each round, after two warm-up rounds."""
    for _ in range(2):
        contender()
    found = []
    for _ in range(count):
        wait()
        started = time.monotonic()
        contender()
        wait()
        found.append(time.monotonic() - started)
    return found


def where(contender: Callable[[], Tensor]) -> dict[str, float]:
    """The fraction of the time by operator, the largest first."""
    with profile() as prof:
        contender()
        wait()
    on = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    spent = {event.key.removeprefix("aten::"): getattr(event, on) for event in prof.key_averages()}
    shares = {name: round(seconds / sum(spent.values()), 3) for name, seconds in spent.items()}
    return {name: share for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share >= 0.05}


def matmul_rate(dtype: torch.dtype, tf32: bool = False) -> float:
    """FLOP/s."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    a = torch.randn(SIDE, SIDE, device=DEVICE).to(dtype)
    best = min(rounds(lambda: a @ a, 5))
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * SIDE**3 / best


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
