"""The pipeline without a model: images/s from a folder of files to Parquet, against Ray Data's read_images to
write_parquet.

python -m benchmarks.null_model [--sizes 32 256] [--count 20000 3000] [--images FILE.parquet] [--photographs FOLDER]

Both read the same files on this machine's disk and write the name and the same floats [C, H, W] of each image, on one
Ray with one CPU per core. `seconds` are from the call to the last file, including actors and tasks that start, but not
Ray's own start. The contenders alternate, in reverse order every second round, and the best of each one's rounds
counts. `cpu_seconds` are the CPU seconds of all processes of this Ray, which depend less on other load than wall time.
The null network returns the same noise for every image, so that the output has as many distinct values as latents
have, and compresses no better.

palindrome: the run of `encode`, with the null network and a ladder of one step. It recognises and lists the collection,
writes a plan, reads, hashes, checks and decodes each file, crops, resizes by Lanczos, and computes the step; rows also
have width, height and hash; Parquet has zstd compression and checksums, and is synced to the disk.
ray: read_images(size=..., mode="RGB", include_paths=True), map_batches to the same floats, write_parquet, with Ray
Data's defaults: no hash, no crop, bilinear resizing, Parquet with snappy compression.

Files of 32 pixels are the unchanged images of the Parquet file, repeated. For other sizes they are the photographs,
repeated; or, without a folder, JPEGs made from the bundled images as in benchmarks.decoding. Prints one JSON object.
"""

import argparse
import functools
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
from ray.data import DataContext

from benchmarks.decoding import make_pictures
from benchmarks.nulls import (
    ROOT,
    STEP,
    cpu_meter,
    encode_work,
    local_ray,
    null_checkpoint,
    null_epsilon,
    pictures_of,
    write_files,
)
from palindrome.model.ddim import coefficients
from palindrome.model.process import VP
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runs.plan import read_plan
from palindrome.pipeline.runtime.scheduler import choose_resources, run_shards

SIDE = 32  # pixels of the images in the Parquet file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--count", type=int, nargs="+", default=[20_000, 3000], help="number of images of each size")
    parser.add_argument("--images", default=str(ROOT / "samples/cifar10-test-256.parquet"), help="images of 32 pixels")
    parser.add_argument("--photographs", help="a folder of image files for the other sizes")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float32")
    parser.add_argument("--shard-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--decode", choices=["auto", "actor", "tasks"], default="actor")
    args = parser.parse_args()
    if len(args.count) != len(args.sizes):
        parser.error("--count: one number for each of --sizes")
    logging.disable(logging.WARNING)  # Ray Data logs its execution plan at each run
    folder = Path(tempfile.mkdtemp())
    try:
        with local_ray(os.cpu_count() or 1):
            DataContext.get_current().enable_progress_bars = False
            found = [compared(args, folder, *of) for of in zip(args.sizes, args.count, strict=True)]
    finally:
        shutil.rmtree(folder)
    ours = {name: getattr(args, name) for name in ("workers", "decode", "shard_size", "batch_size")}
    print(json.dumps({"cpus": os.cpu_count(), "dtype": args.dtype, "palindrome": ours, "found": found}, indent=2))


def compared(args: argparse.Namespace, folder: Path, size: int, count: int) -> dict[str, Any]:
    files, out = folder / str(size), folder / "out"
    make_files(args, files, size, count)
    contenders: dict[str, Callable[[], None]] = {
        "palindrome": lambda: palindrome(args, files, size, out),
        "ray": lambda: ray_data(files, size, args.dtype, out),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    computed: dict[str, list[float]] = {name: [] for name in contenders}
    written: dict[str, int] = {}
    for i in range(args.rounds):
        for name in list(contenders)[:: -1 if i % 2 else 1]:
            os.sync()  # writes the other contender's dirty pages
            with cpu_meter() as cpu_seconds:
                started = time.monotonic()
                contenders[name]()
                seconds[name].append(time.monotonic() - started)
                computed[name].append(cpu_seconds())
            written[name] = check(out, size, count, args.dtype)
            shutil.rmtree(out)
    size_of_files = sum(file.stat().st_size for file in files.iterdir())
    shutil.rmtree(files)
    rates = {name: count / min(times) for name, times in seconds.items()}
    per_core = {name: count / min(times) for name, times in computed.items()}
    return {
        "size": size,
        "images": count,
        "bytes_an_image": size_of_files / count,
        "written_an_image": {name: total / count for name, total in written.items()},
        "images_per_second": rates,
        "times_ray": rates["palindrome"] / rates["ray"],
        "images_per_cpu_second": per_core,
        "times_ray_per_cpu_second": per_core["palindrome"] / per_core["ray"],
        "seconds": seconds,
        "cpu_seconds": computed,
    }


def make_files(args: argparse.Namespace, folder: Path, size: int, count: int) -> None:
    if size == SIDE:
        write_files(folder, count, pictures_of(args.images))
    elif args.photographs:
        photographs = sorted(Path(args.photographs).iterdir())
        write_files(folder, count, [(file.read_bytes(), file.suffix) for file in photographs])
    else:
        make_pictures(folder, size, count)


def palindrome(args: argparse.Namespace, files: Path, size: int, out: Path) -> None:
    resources = choose_resources([args.workers], args.decode)
    how = {"shard_size": args.shard_size, "batch_size": args.batch_size, "dtype": args.dtype}
    work, totals = encode_work(files, size, out, resources, **how)
    outcomes = list(run_shards(work, null_checkpoint(size=size), read_plan(work.run), resources))
    assert sum(done.images for done in outcomes if isinstance(done, Receipt)) == totals.images, outcomes


def ray_data(files: Path, size: int, dtype: str, out: Path) -> None:
    images = ray.data.read_images(str(files), size=(size, size), mode="RGB", include_paths=True)
    images.map_batches(functools.partial(to_floats, dtype=dtype), batch_format="numpy").write_parquet(str(out))


def to_floats(batch: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Pixels [B, H, W, C] -> [B, C, H, W] in [-1, 1], after one step with the null network, eq. 12."""
    x = batch["image"].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    scale, gain = coefficients(*map(VP().marginal, STEP))
    x = np.float32(scale) * x + np.float32(gain) * null_epsilon(*x.shape[1:])
    return {"path": batch["path"], "latent": np.ascontiguousarray(x, dtype)}


def check(out: Path, size: int, count: int, dtype: str) -> int:
    """The total bytes of the Parquet files. Raises AssertionError if they lack values of an image, in that dtype."""
    files = [file for file in out.rglob("*.parquet") if file.parent.name != "plan"]
    stored = {"float16": "FIXED_LEN_BYTE_ARRAY", "float32": "FLOAT"}[dtype]
    values = 0
    for file in files:
        about = pq.read_metadata(file)
        groups = map(about.row_group, range(about.num_row_groups))
        columns = [group.column(i) for group in groups for i in range(about.num_columns)]
        values += sum(
            column.num_values
            for column in columns
            if column.path_in_schema.startswith("latent.") and column.physical_type == stored
        )
    assert values == count * 3 * size * size, (out, values, count)
    return sum(file.stat().st_size for file in files)


if __name__ == "__main__":
    main()
