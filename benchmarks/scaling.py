"""Images/s of the run over 1, 2 and 4 actors, against what their devices alone would do.

python -m benchmarks.scaling [--actors 1 2 4] [--count 6144] [--sleep 0.02] [--steps 20]

In place of the network, whose device would not be shared by the actors, stands a sleep of so many seconds an
evaluation of a batch: a few cores then serve many actors, and all else is the run of `encode`, which lists files of 32
pixels, reads and decodes them in the actors, and commits Parquet. The paper's inversion takes one evaluation a step.
Time counts from when all actors are up, which takes `start_seconds`, to the last receipt. `ideal` is the images by the
time that an actor's share of the evaluations sleeps; `of_ideal` is the part of it reached, and `of_one` that of so many
times what one actor did. Prints one JSON object.
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
    parser.add_argument("--count", type=int, default=6144, help="images")
    parser.add_argument("--sleep", type=float, default=0.02, help="seconds an evaluation of a batch")
    parser.add_argument("--steps", type=int, default=20, help="evaluations of each batch")
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
    """Encode; but shards without pieces are done once so many actors work on one, each of which leaves a file."""

    encode: Encode
    up: Path
    actors: int

    def process(self, model: Model, shard: Shard) -> Receipt:
        if shard.pieces:
            return self.encode.process(model, shard)
        Path(self.up, str(os.getpid())).touch()
        while len(list(self.up.iterdir())) < self.actors:
            time.sleep(0.01)
        return Receipt(shard.name, 0, 0, 0.0, 0.0, 0)


def measured(args: argparse.Namespace, folder: Path, actors: int) -> dict[str, Any]:
    out, up = folder / f"run-{actors}", folder / f"up-{actors}"
    up.mkdir()
    resources, checkpoint = Resources(actors, 0, 1, decode_in_tasks=False), null_checkpoint(args.sleep)
    how = {"shard_size": args.shard_size, "batch_size": args.batch_size, "dtype": "float32"}
    levels = resolve("linear", args.steps, checkpoint.schedule)
    encode, totals = encode_work(folder / "files", SIDE, out, resources, **how, levels=levels)
    called = time.monotonic()
    shards = chain(empty(actors * SHARDS_PER_ACTOR), read_plan(encode.run))
    outcomes = run_shards(Together(encode, up, actors), checkpoint, shards, resources)
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
    """Shards of nothing: as many as keep every actor busy until the last is up."""
    return (Shard(f"{i:024x}", "files", 0, ()) for i in range(count))


if __name__ == "__main__":
    main()
