"""The cost of a run besides the model: planning and resuming, the driver's time per shard, memory.

python -m benchmarks.scale plan [--shards 250000]         # a simulated listing of Parquet pieces, 4,000 images each
python -m benchmarks.scale driver [--shards 5000]         # empty shards, on a local Ray
python -m benchmarks.scale memory [--images 10000 100000] # encode with a null network, one run after the other
python -m benchmarks.scale summary [--shards 20000] [--server rclone]   # of measured shards on an S3 server, twice
python -m benchmarks.scale measured [--images 100000 300000 1000000]   # the summary of so many images, on a disk

The server of `summary` is rclone's or moto's (`--server`); `--delay` is an additional latency per request, 50
milliseconds as of a remote store. The shards have 4 rows each, those of `measured` 1,000, all of tiny latents. Each
summary is made in a process of its own: `mib_before` is its peak memory after the imports. Each prints one JSON object.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image

from benchmarks.listing import CHECKSUMS, delayed, free_address, s3_options, s3_server, wait_for
from benchmarks.nulls import null_checkpoint
from palindrome.infra.cluster import connect
from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.records import Image as Picture
from palindrome.pipeline.images.records import Piece, Shard
from palindrome.pipeline.images.sources import PARQUET, Collection, open_collection
from palindrome.pipeline.runs import plan
from palindrome.pipeline.runs.inversion import Inversion
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runs.plan import extend_plan, plan_totals, read_plan, write_plan
from palindrome.pipeline.runs.schemas import latent_schema, shards_table
from palindrome.pipeline.runs.shards import committed, latent_rows, latent_writer
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
    parser.add_argument("what", choices=["plan", "driver", "memory", "summary", "measured"])
    parser.add_argument("--shards", type=int)
    parser.add_argument("--images", type=int, nargs="+")
    parser.add_argument("--delay", type=float, default=50)
    parser.add_argument("--server", choices=["rclone", "moto"], default="rclone")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        if args.what == "plan":
            found = planning(Folder(str(folder)), args.shards or 250_000)
        elif args.what == "driver":
            found = driving(args.shards or 5000)
        elif args.what == "memory":
            counts = args.images or [10_000, 100_000]
            found = {"runs": [alone(encoding, folder / str(count), count) for count in counts]}
        elif args.what == "summary":
            found = summarising(folder, args.server, args.shards or 20_000, args.delay)
        else:
            counts = args.images or [100_000, 300_000, 1_000_000]
            found = {"runs": [measuring(Folder(str(folder / str(count))), count) for count in counts]}
    finally:
        shutil.rmtree(folder)
    print(json.dumps({"what": args.what, **found}, indent=2))


def alone(call: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a function finds in a process of its own, as a peak never decreases."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, arguments)


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


def summarising(folder: Path, server: str, shards: int, delay: float) -> dict[str, Any]:
    """The summary of measured shards of 4 rows on a server that answers late, the first and the next one."""
    local = Folder(str(folder / "run"))
    put_measured(local, 64, 4)
    contents = [local.read(f"latents/{name}") for name in local.files("latents")]
    os.environ.update(dict.fromkeys(CHECKSUMS, "when_required"))
    served = folder / "served"
    (served / "bucket/run/latents").mkdir(parents=True)
    put_plan(Folder(f"{served}/bucket/run"), shards)
    for i in range(shards):
        (served / f"bucket/run/latents/{name_of(i)}.parquet").write_bytes(contents[i % 64])
    with s3_server(served) if server == "rclone" else moto(served) as endpoint, delayed(endpoint, delay) as away:
        behind = Folder("s3://bucket/run", s3_options(away))
        first, again = alone(summary_of, behind), alone(summary_of, behind)
    assert first["shards"] == again["shards"] == shards
    size = float(np.mean([len(content) for content in contents]))
    return {"server": server, "delay_ms": delay, "bytes_a_shard": size, "first": first, "again": again}


def measuring(run: Folder, images: int) -> dict[str, Any]:
    """The summary of so many images in shards of 1,000, the first and the next one."""
    put_measured(run, images // 1000, 1000)
    return {"images": images, "first": alone(summary_of, run), "again": alone(summary_of, run)}


def summary_of(run: Folder) -> dict[str, Any]:
    """Seconds and peak memory of a summary, in this process."""
    before, cpu = _peak(), time.process_time()
    summary, seconds = _timed(lambda: latents_summary(run, measured=True))
    found = {"shards": summary["shards"], "median": summary["round_trip"]["median"]}
    cpu = time.process_time() - cpu
    return {**found, "seconds": seconds, "cpu_seconds": cpu, "peak_mib": _peak(), "mib_before": before}


def put_measured(run: Folder, shards: int, rows: int) -> None:
    """Shards of tiny latents, each with an error drawn at random."""
    put_plan(run, shards)
    schema, dice = latent_schema((1, 2, 2), "float16"), np.random.default_rng(0)
    for i in range(shards):
        uris = [f"s3://bucket/pictures/{i:06d}/{row:06d}.jpg" for row in range(rows)]
        pictures = [Picture(uri[12:], uri, 64, 64, "0" * 64, {}, None) for uri in uris]
        mse = 10 ** dice.normal(-6, 1, rows)
        measured = {"mse": mse, "psnr": -10 * np.log10(mse), "identical": dice.random(rows), "nfe": np.full(rows, 80)}
        with latent_writer(run, name_of(i), schema, {"model_digest": "0" * 64}) as out:
            out.add(latent_rows(schema, pictures, np.zeros((rows, 1, 2, 2), np.float16), measured))
            out.commit({"seconds": 60.0, "device_seconds": 59.0})


def put_plan(run: Folder, shards: int) -> None:
    planned = [Shard(name_of(i), "files", 1, ()) for i in range(shards)]
    run.put_parquet("plan/000000.parquet", shards_table(planned), row_group_size=64)
    run.put("plan/complete.json", json.dumps({"shards": shards, "images": shards, "files": 1}).encode())


def name_of(shard: int) -> str:
    return hashlib.sha256(str(shard).encode()).hexdigest()[:24]


@contextmanager
def moto(folder: Path) -> Iterator[str]:
    """The endpoint of a server of moto, with the files of a folder, whose subfolders are the buckets."""
    host, _, port = (address := free_address()).partition(":")
    program = Path(sys.executable).with_name("moto_server")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([program, "-H", host, "-p", port], **quiet)
    try:
        wait_for(address)
        fs = Folder("s3://", s3_options(f"http://{address}")).fs
        for bucket in folder.iterdir():
            fs.call_s3("create_bucket", Bucket=bucket.name)
        files = [path for path in folder.rglob("*") if path.is_file()]
        for _ in in_threads(lambda path: fs.pipe_file(str(path.relative_to(folder)), path.read_bytes()), files):
            pass
        yield f"http://{address}"
    finally:
        server.kill()
        server.wait()


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.monotonic()
    return call(), time.monotonic() - started


def _peak() -> float:
    """The peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
