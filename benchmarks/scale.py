"""The cost of a run besides the model: planning and resuming, the driver's time per shard, memory.

python -m benchmarks.scale plan [--shards 250000]         # a simulated listing of Parquet pieces, 4,000 images each
python -m benchmarks.scale driver [--shards 5000]         # empty shards, on a local Ray
python -m benchmarks.scale memory [--images 10000 100000] # encode with a null network, one run after the other

Each prints one JSON object.
"""

import argparse
import io
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image

from benchmarks.nulls import null_checkpoint
from palindrome.infra.cluster import connect
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.records import Piece, Shard
from palindrome.pipeline.images.sources import PARQUET, Collection, open_collection
from palindrome.pipeline.runs import plan
from palindrome.pipeline.runs.inversion import Inversion
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runs.plan import extend_plan, plan_totals, read_plan, write_plan
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.runs.summary import latents_summary
from palindrome.pipeline.runtime.device import Model
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.runtime.scheduler import Resources, run_shards
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.encode import Encode

ROWS = 4000  # images per shard of the simulated listing
SIZE = 8  # pixels of a side of the images for `memory`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["plan", "driver", "memory"])
    parser.add_argument("--shards", type=int)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000])
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        if args.what == "plan":
            found = planning(Folder(str(folder)), args.shards or 250_000)
        elif args.what == "driver":
            found = driving(args.shards or 5000)
        else:  # each in its own process, as a peak never decreases
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                found = {"runs": [pool.apply(encoding, (folder / str(count), count)) for count in args.images]}
    finally:
        shutil.rmtree(folder)
    print(json.dumps({"what": args.what, **found}, indent=2))


def planning(run: Folder, shards: int) -> dict[str, Any]:
    """Seconds to write a plan, to list again and compare, and to resume with all shards committed; this process's peak
    memory."""

    def listing(*_: object) -> Iterator[Piece]:
        rows = 0
        for i in range(shards):
            yield Piece(f"s3://bucket/images-{i // 100:06d}.parquet", f"images-{i // 100:06d}.parquet", 1, "v", rows,
                        rows + ROWS)  # fmt: skip
            rows = 0 if i % 100 == 99 else rows + ROWS

    plan.list_pieces = listing  # type: ignore[assignment]
    collection = Collection("s3://bucket", PARQUET, "image")
    before = _peak()
    found: dict[str, Any] = {"shards": shards, "images": shards * ROWS}
    _, found["plan_seconds"] = _timed(lambda: write_plan(run, collection, ROWS))
    (_, changes), found["list_again_seconds"] = _timed(lambda: extend_plan(run, collection, ROWS))
    assert changes == plan.Changes()
    latents = Path(run.path("latents"))
    latents.mkdir()
    for shard in read_plan(run):
        (latents / f"{shard.name}.parquet").touch()

    def resume() -> int:
        done = committed(run)
        return sum(shard.name not in done for shard in read_plan(run))

    left, found["resume_seconds"] = _timed(resume)
    assert left == 0 and plan_totals(run) is not None
    return {**found, "peak_mib": _peak(), "peak_mib_before": before}


@dataclass(frozen=True)
class Nothing:
    """The work on an empty shard."""

    def process(self, model: Model, shard: Shard) -> Receipt:
        return Receipt(shard.name, 1, 0, 0.0, 0.0, 0)


def driving(shards: int) -> dict[str, Any]:
    """The driver's CPU time and the wall time per shard."""
    ray.cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["_"]))
    listed = (Shard(f"{i:024x}", "files", 1, ()) for i in range(shards))
    with connect("local"):
        outcomes = run_shards(Nothing(), null_checkpoint(), listed, Resources(1, 0, 1, False))
        next(outcome for outcome in outcomes if isinstance(outcome, Receipt))  # the actor is ready
        cpu, wall = time.process_time(), time.monotonic()
        done = sum(isinstance(outcome, Receipt) for outcome in outcomes)
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    return {"shards": done, "driver_cpu_ms_a_shard": 1e3 * cpu / done, "wall_ms_a_shard": 1e3 * wall / done}


@dataclass(frozen=True)
class Measured:
    """Encode, followed by writing the worker's peak memory."""

    encode: Encode
    peak: Path

    def process(self, model: Model, shard: Shard) -> Receipt:
        receipt = self.encode.process(model, shard)
        self.peak.write_text(str(_peak()))
        return receipt


def encoding(folder: Path, images: int) -> dict[str, Any]:
    """Peak memory in MiB of driver and worker when encoding `images` images of one Parquet file, in shards of
    10,000."""
    ray.cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["_"]))
    folder.mkdir()
    png = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), "teal").save(png, "PNG")
    with pq.ParquetWriter(folder / "images.parquet", pa.schema([("image", pa.binary())])) as writer:
        for start in range(0, images, 1000):
            writer.write_table(pa.table({"image": [png.getvalue()] * min(1000, images - start)}))
    collection = open_collection(str(folder / "images.parquet"))
    run, how = Folder(str(folder / "run")), Preprocess(SIZE, 3)
    started = time.monotonic()
    totals = write_plan(run, collection, 10_000)
    reader = Reader(collection, how, 64, in_tasks=False)
    work = Encode(run, reader, Inversion((-1, 0), 0), False, {})
    with connect("local"):
        measured = Measured(work, folder / "peak")
        outcomes = list(run_shards(measured, null_checkpoint(), read_plan(run), Resources(1, 0, 1, False)))
        assert sum(isinstance(outcome, Receipt) for outcome in outcomes) == totals.shards, outcomes
    assert latents_summary(run, measured=False)["latents"] == images
    worker = float((folder / "peak").read_text())
    return {"images": images, "driver_mib": _peak(), "worker_mib": worker, "seconds": time.monotonic() - started}


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.monotonic()
    return call(), time.monotonic() - started


def _peak() -> float:
    """The peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
