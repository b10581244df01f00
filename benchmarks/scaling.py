"""Images/s of a run on 1, 2 and 4 actors, against the limit of their devices.

python -m benchmarks.scaling [--actors 1 2 4] [--count 6144] [--sleep 0.02] [--steps 20]

A sleep per evaluation of a batch replaces the network, since real actors would not share a device; so a few cores can
serve many actors. Everything else is the run of `encode`: it lists files of 32 pixels, reads and decodes them in the
actors, and commits Parquet. The paper's inversion takes one evaluation per step. Time counts from when all actors are
ready, which takes `start_seconds`, to the last receipt. `ideal` is the rate if the actors did nothing but sleep;
`of_ideal` is the fraction of it that is reached, and `of_one` the fraction of the first row's rate per actor. Prints
one JSON object.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.nulls import ROOT, encode_work, local_ray, null_checkpoint, pictures_of, write_files
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.runs.ladders import resolve
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runs.plan import read_plan
from palindrome.pipeline.runtime.device import Model
from palindrome.pipeline.runtime.scheduler import SHARDS_PER_ACTOR, Resources, run_shards
from palindrome.pipeline.tasks.encode import Encode

SIDE = 32  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--count", type=int, default=6144, help="number of images")
    parser.add_argument("--sleep", type=float, default=0.02, help="seconds per evaluation of a batch")
    parser.add_argument("--steps", type=int, default=20, help="evaluations per batch")
    parser.add_argument("--images", default=str(ROOT / "samples/cifar10-test-256.parquet"))
    parser.add_argument("--shard-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        write_files(folder / "files", args.count, pictures_of(args.images))
        with local_ray(max(args.actors)):
            found = [measured(args, folder, actors) for actors in args.actors]
    finally:
        shutil.rmtree(folder)
    first = found[0]["images_per_second"] / found[0]["actors"]
    for one in found:
        one["of_one"] = one["images_per_second"] / (one["actors"] * first)
    settings = {name: getattr(args, name) for name in ("count", "sleep", "steps", "shard_size", "batch_size")}
    print(json.dumps({"cores": os.cpu_count(), **settings, "found": found}, indent=2))


@dataclass(frozen=True)
class Together:
    """Encode, after a barrier: a shard without pieces waits until `actors` actors have one, each of which creates a
    file in `ready`."""

    encode: Encode
    ready: Path
    actors: int

    def process(self, model: Model, shard: Shard) -> Receipt:
        if shard.pieces:
            return self.encode.process(model, shard)
        Path(self.ready, str(os.getpid())).touch()
        while len(list(self.ready.iterdir())) < self.actors:
            time.sleep(0.01)
        return Receipt(shard.name, 0, 0, 0.0, 0.0, 0)


def measured(args: argparse.Namespace, folder: Path, actors: int) -> dict[str, Any]:
    out, ready = folder / f"run-{actors}", folder / f"ready-{actors}"
    ready.mkdir()
    resources, checkpoint = Resources(actors, 0, 1, decode_in_tasks=False), null_checkpoint(args.sleep)
    how = {"shard_size": args.shard_size, "batch_size": args.batch_size, "dtype": "float32"}
    levels = resolve("linear", args.steps, checkpoint.process)
    encode, totals = encode_work(folder / "files", SIDE, out, resources, **how, levels=levels)
    called = time.monotonic()
    shards = chain(empty(actors * SHARDS_PER_ACTOR), read_plan(encode.run))
    outcomes = run_shards(Together(encode, ready, actors), checkpoint, shards, resources)
    next(outcome for outcome in outcomes if isinstance(outcome, Receipt))
    started = time.monotonic()
    images = sum(outcome.images for outcome in outcomes if isinstance(outcome, Receipt))
    seconds = time.monotonic() - started
    assert images == totals.images, images
    batches = sum(-(-shard.images // args.batch_size) for shard in read_plan(encode.run))
    ideal = images / (batches * args.steps * args.sleep / actors)
    rate = images / seconds
    return {
        "actors": actors,
        "images_per_second": rate,
        "ideal": ideal,
        "of_ideal": rate / ideal,
        "start_seconds": started - called,
    }


def empty(count: int) -> Iterator[Shard]:
    """Empty shards, which keep the actors busy until the last one is ready."""
    return (Shard(f"{i:024x}", "files", 0, ()) for i in range(count))


if __name__ == "__main__":
    main()
