"""Encoding a collection by the paper's inversion: `palindrome encode` against diffusers scripts and a bare loop.

python -m benchmarks.encode [--model DIR] [--images FILE.parquet] [--limit 512] [--steps 20] [--precision bfloat16]
                            [--contenders script ray_data palindrome standing loop lanes]

The contenders run one after the other, each in its own process, timed from start to exit, including imports and Ray's
start. `script` is benchmarks.diffusers_encode: UNet2DModel and DDIMInverseScheduler, float32, eager; `ray_data` is the
same with Ray Data's map_batches; `palindrome` starts and stops its own Ray, `standing` connects to a running one, as on
a cluster. `loop` is our engine, in the given precision, over images in memory, without Ray or files, with torch's
threads sharing each layer; `lanes` is the same with the batch threads of our actors, each of which computes a slice of
the batch. Their images/s are those of the loop only; `loop_process` and `lanes_process` are the whole processes, like
the others. All use the same number of network evaluations per image. `error` is the mean squared error (pixels in
[0, 1]) of the latents decoded by DDIM on the same levels, in float32. Prints one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
from torch import Tensor

from benchmarks.nulls import local_ray
from palindrome.model import families
from palindrome.model.execution import PRECISIONS, Execution
from palindrome.model.ladder import ladder
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.metrics import round_trip_error, to_model
from palindrome.pipeline.images.read import first_images
from palindrome.pipeline.images.sources import open_collection
from palindrome.pipeline.runtime.device import Model, tune_process
from palindrome.pipeline.storage.folder import absolute

ROOT = Path(__file__).parent.parent
CONTENDERS = ("script", "ray_data", "palindrome", "standing", "loop", "lanes")
OURS, LOOPS = ("palindrome", "standing"), ("loop", "lanes")
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints/cifar10-32"))
    parser.add_argument("--images", default=str(ROOT / "samples/cifar10-test-256.parquet"))
    parser.add_argument("--limit", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="bfloat16")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--loop", choices=LOOPS, help=argparse.SUPPRESS)  # this process is that contender
    args = parser.parse_args()
    if args.loop:
        print(json.dumps(loop(args)))
        return
    x = pictures(args)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.contenders:
            out = Path(folder, name)
            with cluster() if name == "standing" else nullcontext({}) as environment:
                started = time.monotonic()
                output = run(command(name, args, out), environment)
                seconds = time.monotonic() - started
            found[name] = {"seconds": seconds, "images_per_second": len(x) / seconds}
            if name in LOOPS:
                found[name + "_process"] = found[name]
                found[name] = json.loads(output.splitlines()[-1])
                continue
            found[name]["error"] = error_of(out, x, args)
            if name in OURS:
                found[name]["precision"] = json.loads((out / "run.json").read_text())["precision"]
    others = [name for name in found if name not in OURS]
    ratios = {
        f"{ours} / {other}": found[ours]["images_per_second"] / found[other]["images_per_second"]
        for ours in OURS
        for other in others
        if ours in found
    }
    about = {"model": Path(args.model).name, "images": len(x), "steps": args.steps, "batch": BATCH}
    print(json.dumps({**about, **found, "ratios": ratios}, indent=2))


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """A running Ray; yields the environment variables with which a command connects to it."""
    with local_ray(os.cpu_count() or 1):
        yield {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def run(command: list[str], environment: dict[str, str]) -> bytes:
    """The standard output of a command."""
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True, stdout=subprocess.PIPE).stdout


def command(name: str, args: argparse.Namespace, out: Path) -> list[str]:
    python = [sys.executable, "-m"]
    common = ["--images", args.images, "--model", args.model, "--steps", str(args.steps), "--limit", str(args.limit)]
    if name in LOOPS:
        return [*python, "benchmarks.encode", "--loop", name, *common, "--precision", args.precision]
    if name in OURS:
        plain = ["--ladder", "linear", "--corrections", "0", "--batch-size", str(BATCH), "--precision", args.precision]
        return [*python, "palindrome", "encode", *common, *plain, "--out", str(out)]
    flags = ["--ray-data"] if name == "ray_data" else []
    return [*python, "benchmarks.diffusers_encode", *common, "--batch", str(BATCH), *flags, "--out", str(out)]


def pictures(args: argparse.Namespace) -> Tensor:
    """The preprocessed images, float32 [N, C, H, W] in [-1, 1]."""
    channels, size, _ = families.load(absolute(args.model)).image_shape
    how = Preprocess(size, channels)
    return to_model(first_images(open_collection(absolute(args.images)), how, args.limit))


def loop(args: argparse.Namespace) -> dict[str, float]:
    loaded = families.load(absolute(args.model))
    precision = "float32" if args.precision == "auto" else args.precision
    threads = torch.get_num_threads() if args.loop == "lanes" else None
    model, x = Model(loaded, threads, execution=Execution(precision)), pictures(args)
    tune_process(model)  # as actors do
    levels = ladder("linear", args.steps, loaded.process.num_train_timesteps)
    started = time.monotonic()
    for batch in x.split(BATCH):
        model.encode(batch, levels)
    seconds = time.monotonic() - started
    return {"seconds": seconds, "images_per_second": len(x) / seconds}


def error_of(out: Path, x: Tensor, args: argparse.Namespace) -> float:
    """The round-trip error of the first 256 images."""
    loaded = families.load(absolute(args.model))
    model, levels = Model(loaded), ladder("linear", args.steps, loaded.process.num_train_timesteps)
    rows = [row for file in sorted(out.rglob("*.parquet")) for row in latents_in(file)]
    if "image_id" in rows[0]:  # shards are named by hashes, and rows by their number in the input
        rows.sort(key=lambda row: int(row["image_id"].rpartition("#")[2]))
    latents = np.array([row["latent"] for row in rows], np.float32).reshape(-1, *x.shape[1:])
    if len(latents) != len(x):
        raise SystemExit(f"{out.name} wrote {len(latents)} latents of {len(x)} images")
    first = slice(None, 256)
    return float(round_trip_error(x[first], model.decode(torch.from_numpy(latents[first]), levels)).mean())


def latents_in(file: Path) -> list[dict[str, Any]]:
    columns = [name for name in ("image_id", "latent") if name in pq.read_schema(file).names]
    return list(pq.read_table(file, columns=columns).to_pylist()) if "latent" in columns else []


if __name__ == "__main__":
    main()
