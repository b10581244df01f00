"""Images read and decoded per second of one core: JPEGs of 32, 256 and 1024 pixels, to the model's size.

python -m benchmarks.decoding local [--images 6000 800 100]  # against a loop of Pillow, and Ray Data's read_images
python -m benchmarks.decoding s3 [--images 300] [--delay 20]  # against sequential reads

`local`: each contender runs in its own process; they alternate, and the best of each one's four rounds counts.
`per_core` is images per CPU second of the process and its children, so it depends neither on the number of cores that
Ray's workers use nor on other load; `seconds` is wall time. Imports, Ray's start and a small warm-up read are excluded.
Ray's read_images does not crop, which makes no difference for squares, and resizes bilinearly instead of by Lanczos.
Only palindrome hashes the files and checks them for damage. `draft` is the loop with JPEG's own scaling, whose pixels
differ, by `draft_differs_by`. `s3`: an rclone server with `delay` milliseconds of latency per request; reading only, in
images per second of wall time.

The JPEGs, quality 90 and 4:2:0, are made from the bundled CIFAR-10 images. Those of 32 pixels are unchanged; larger
ones are one image enlarged, blended with a mosaic of 16 others and with noise, so that they are not smooth. 50 distinct
images repeat. Prints one JSON object.
"""

import argparse
import io
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
from PIL import Image

import palindrome.infra.cluster
from benchmarks.listing import BUCKET, CHECKSUMS, delayed, s3_options, s3_server
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.read import read_batches
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.images.sources import FILES, Collection, list_pieces, read_raw
from palindrome.pipeline.storage.folder import Options, open_fs

ROOT = Path(__file__).parent.parent
SIDES = (32, 256, 1024)  # pixels of the files
SIZES = {32: (32,), 256: (32, 256), 1024: (32, 256)}  # pixels of the model's images, by those of the files
BATCH = 64
ROUNDS = 4
DISTINCT = 50  # images
TICKS = os.sysconf("SC_CLK_TCK")

Prepare = Callable[..., Callable[[], int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["local", "s3"])
    parser.add_argument("--images", type=int, nargs="+")
    parser.add_argument("--delay", type=float, default=20)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        if args.what == "local":
            counts = dict(zip(SIDES, args.images or (6000, 800, 100), strict=True))
            found: Any = [local(folder / str(side), side, count) for side, count in counts.items()]
        else:
            found = away(folder, (args.images or [300])[0], args.delay)
    finally:
        shutil.rmtree(folder)
    print(json.dumps({"what": args.what, "found": found}, indent=2))


def local(folder: Path, side: int, count: int) -> dict[str, Any]:
    size = make_pictures(folder, side, count)
    found: dict[str, Any] = {"side": side, "images": count, "bytes_an_image": size, "to": {}}
    for model_size in SIZES[side]:
        contenders: dict[str, Prepare] = {"palindrome": palindrome, "pillow": pillow, "draft": draft, "ray": ray_data}
        if side == model_size:
            del contenders["draft"]
        costs = best(contenders, folder, model_size)
        assert all(cost["images"] == count for cost in costs.values()), costs
        cores = {name: count / cost["cpu_seconds"] for name, cost in costs.items()}
        times = {f"times_{name}": cores["palindrome"] / cores[name] for name in contenders if name != "palindrome"}
        found["to"][model_size] = {"per_core": cores, **times, "seconds": {n: c["seconds"] for n, c in costs.items()}}
        if side != model_size:
            found["to"][model_size]["draft_differs_by"] = draft_error(folder, model_size)
    return found


def palindrome(folder: Path, size: int) -> Callable[[], int]:
    collection = Collection(f"file://{folder}", FILES)
    shard = Shard.of(FILES, list(list_pieces(collection, 1)))
    how = Preprocess(size)
    next(read_batches(collection, shard, how, 1))
    return lambda: sum(len(batch.images) for batch in read_batches(collection, shard, how, BATCH))


def pillow(folder: Path, size: int) -> Callable[[], int]:
    return loop(folder, lambda path: decoded(path, size))


def draft(folder: Path, size: int) -> Callable[[], int]:
    return loop(folder, lambda path: decoded(path, size, draft=True))


def loop(folder: Path, decode: Callable[[Path], np.ndarray]) -> Callable[[], int]:
    paths = sorted(folder.iterdir())
    decode(paths[0])
    return lambda: sum(decode(path).ndim == 3 for path in paths)


def decoded(path: Path, size: int, draft: bool = False) -> np.ndarray:
    with Image.open(path) as opened:
        if draft:
            opened.draft("RGB", (size, size))
        image = opened.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


def draft_error(folder: Path, size: int) -> dict[str, float]:
    """The differences of 8-bit values, over the first 20 files."""
    pairs = [(decoded(path, size), decoded(path, size, draft=True)) for path in sorted(folder.iterdir())[:20]]
    differences = np.stack([np.abs(a.astype(int) - b) for a, b in pairs])
    return {
        "mean": float(differences.mean()),
        "max": float(differences.max()),
        "equal": float(np.mean(differences == 0)),
    }


def ray_data(folder: Path, size: int) -> Callable[[], int]:
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def read(paths: Any) -> int:
        images = ray.data.read_images(paths, size=(size, size), mode="RGB")
        return sum(len(batch["image"]) for batch in images.iter_batches(batch_size=BATCH, batch_format="numpy"))

    read([str(path) for path in sorted(folder.iterdir())[:4]])
    return lambda: read(str(folder))


def away(folder: Path, count: int, delay: float) -> dict[str, Any]:
    size = make_pictures(folder / BUCKET, 256, count)
    with s3_server(folder, "--read-only") as endpoint, delayed(endpoint, delay) as url:
        runs = best({"read_raw": read_at_once, "loop": read_one_by_one}, s3_options(url), by="seconds")
    assert all(run["images"] == count for run in runs.values()), runs
    rates = {name: count / run["seconds"] for name, run in runs.items()}
    return {"images": count, "bytes_an_image": size, "delay_ms": delay, "per_second": rates,
            "times_loop": rates["read_raw"] / rates["loop"], "runs": runs}  # fmt: skip


def read_at_once(options: Options) -> Callable[[], int]:
    collection = Collection(f"s3://{BUCKET}", FILES, storage_options=options)
    shard = Shard.of(FILES, list(list_pieces(collection, 1)))
    return lambda: sum(raw.data is not None for raw in read_raw(collection, shard))


def read_one_by_one(options: Options) -> Callable[[], int]:
    fs, _ = open_fs(f"s3://{BUCKET}", options)
    paths = fs.find(BUCKET)
    return lambda: sum(bool(fs.cat_file(path)) for path in paths)


def best(contenders: Mapping[str, Prepare], *args: Any, by: str = "cpu_seconds") -> dict[str, dict[str, Any]]:
    """The cost of the functions that the contenders return for the arguments: the best round of each."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    with ExitStack() as stack:
        pools = {name: stack.enter_context(multiprocessing.get_context("spawn").Pool(1)) for name in contenders}
        for name, prepare in contenders.items():
            pools[name].apply(_prepare, (prepare, args))
        for _ in range(ROUNDS):
            for name, pool in pools.items():
                found[name].append(pool.apply(_measured))
        for pool in pools.values():
            pool.apply(ray.shutdown)  # has no effect if it was not started
    return {name: min(rounds, key=lambda cost: cost[by]) for name, rounds in found.items()}


_call: Callable[[], int]  # in a contender's process


def _prepare(prepare: Prepare, args: Any) -> None:
    global _call
    os.environ.update(dict.fromkeys(CHECKSUMS, "when_required"))
    _call = prepare(*args)


def _measured() -> dict[str, Any]:
    wall, cpu = time.monotonic(), _cpu_seconds()
    images = _call()
    return {"images": images, "seconds": time.monotonic() - wall, "cpu_seconds": _cpu_seconds() - cpu}


def _cpu_seconds() -> float:
    """CPU seconds of this process and its descendants, including those that have ended."""
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(words[1]), []).append(int(stat.parent.name))
        ticks[int(stat.parent.name)] = sum(map(int, words[11:15]))

    def below(pid: int) -> Iterator[int]:
        yield pid
        for child in children.get(pid, []):
            yield from below(child)

    return sum(ticks.get(pid, 0) for pid in below(os.getpid())) / TICKS


def make_pictures(folder: Path, side: int, count: int) -> float:
    """Writes `count` JPEGs of DISTINCT images; returns their mean size in bytes."""
    column = pq.read_table(ROOT / "samples/cifar10-test-256.parquet").column("img").to_pylist()
    samples = [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in column]
    random = np.random.default_rng(0)
    jpegs = []
    for picture in samples[: min(count, DISTINCT)]:
        if side > picture.width:
            picture = _mixed(picture, random.choice(len(samples), 16), samples, side, random)
        picture.save(jpeg := io.BytesIO(), "JPEG", quality=90, subsampling="4:2:0")
        jpegs.append(jpeg.getvalue())
    folder.mkdir()
    for i in range(count):
        Path(folder, f"{i:06d}.jpg").write_bytes(jpegs[i % len(jpegs)])
    return sum(map(len, jpegs)) / len(jpegs)


def _mixed(picture: Image.Image, others: Any, samples: list[Image.Image], side: int, random: Any) -> Image.Image:
    tile = side // 4
    mosaic = Image.new("RGB", (side, side))
    for k, other in enumerate(others):
        mosaic.paste(samples[other].resize((tile, tile), Image.Resampling.BICUBIC), (k % 4 * tile, k // 4 * tile))
    mixed = Image.blend(picture.resize((side, side), Image.Resampling.BICUBIC), mosaic, 0.4)
    grain = random.normal(0, 4, (side, side, 1))
    return Image.fromarray(np.clip(np.asarray(mixed) + grain, 0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()
