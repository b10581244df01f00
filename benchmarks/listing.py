"""The cost of listing and planning a collection of files: seconds and peak memory, each in its own process.

python -m benchmarks.listing simulated [--objects 1000000]  # an unordered listing, against sorting in memory
python -m benchmarks.listing files [--objects 1000000]      # empty files in a temporary folder, against fs.find
python -m benchmarks.listing s3 [--objects 20000] [--delay 50]  # rclone's server, against s3fs's find(detail=True)

The processes run one after the other. `seconds` is wall time and `cpu_seconds` is the CPU time of the process, both
without imports; `mib_before` is the peak memory after the imports. The server of `s3` has its objects on this machine's
disk, in 40 folders; `delay` is an additional latency per request in milliseconds, as of a remote store; both with and
without it are measured. Prints one JSON object.
"""

import argparse
import asyncio
import importlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import s3fs

from palindrome.pipeline.images import sources
from palindrome.pipeline.images.sources import FILES, Collection
from palindrome.pipeline.images.sources.listing import Listed, list_files
from palindrome.pipeline.runs.plan import write_plan
from palindrome.pipeline.storage.folder import Folder, Options

SHARD = 1024  # images, the default of `palindrome encode`
IN_MEMORY = 2_000_000  # maximum number of entries that are also sorted in memory, for comparison
FOLDERS = 40  # of the bucket
BUCKET = "pictures"
KEYS = ("benchmark", "no-secret")  # access key and secret
CHECKSUMS = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")  # rclone's server lacks these


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["simulated", "files", "s3"])
    parser.add_argument("--objects", type=int)
    parser.add_argument("--delay", type=float, default=50)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    objects = args.objects or {"s3": 20_000}.get(args.what, 1_000_000)
    try:
        if args.what == "simulated":
            found = {"plan": alone(planning_simulated, objects, in_memory=False)}
            if objects <= IN_MEMORY:
                found["sorted_in_memory"] = alone(planning_simulated, objects, in_memory=True)
                found |= ratios(found["plan"], found["sorted_in_memory"])
        elif args.what == "files":
            make_files(folder, objects, per_folder=1000)
            found = compared(f"file://{folder}", {})
        else:
            make_files(folder / BUCKET, objects, per_folder=-(-objects // FOLDERS))
            with s3_server(folder, "--read-only") as endpoint, delayed(endpoint, args.delay) as away:
                stores = {"here": endpoint, f"away_{args.delay:g}_ms": away}
                found = {name: compared(f"s3://{BUCKET}", s3_options(url)) for name, url in stores.items()}
    finally:
        shutil.rmtree(folder)
    print(json.dumps({"what": args.what, "objects": objects, **found}, indent=2))


def compared(uri: str, options: Options) -> dict[str, Any]:
    """Planning, and the listing only, against fsspec's."""
    calls = {"plan": planning, "list": listing, "find": finding}
    found = {name: alone(call, uri, options) for name, call in calls.items()}
    return {**found, **ratios(found["list"], found["find"])}


def ratios(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """The cost of the other one, relative to ours."""
    return {f"times_{what}": other[what] / ours[what] for what in ("seconds", "cpu_seconds", "peak_mib")}


def planning_simulated(objects: int, in_memory: bool) -> Callable[[], int]:
    stride = next(n for n in range(int(0.618 * objects), objects + 2) if math.gcd(n, objects) == 1)

    def entries(*_: object) -> Iterator[Listed]:
        for i in range(objects):
            k = i * stride % objects
            name = f"{k // 1000:05d}/{k:08d}.jpg"
            yield Listed(name, f"s3://{BUCKET}/{name}", 100_000 + k % 5000, f'"{k:032x}"')

    sources.list_files = entries  # type: ignore[assignment]
    if in_memory:
        sources.in_order = sorted  # type: ignore[assignment]
    return planning(f"s3://{BUCKET}", {})


def planning(uri: str, options: Options) -> Callable[[], int]:
    def plan() -> int:
        with tempfile.TemporaryDirectory() as run:
            return write_plan(Folder(run), Collection(uri, FILES, storage_options=options), SHARD).images

    return plan


def listing(uri: str, options: Options) -> Callable[[], int]:
    """The listing only, unordered, keeping nothing in memory."""
    return lambda: sum(1 for _ in list_files(uri, options))


def finding(uri: str, options: Options) -> Callable[[], int]:
    """The find of fsspec or s3fs, which returns a dict of all entries."""
    protocol = uri.partition("://")[0]
    kind = s3fs.S3FileSystem if protocol == "s3" else fsspec.get_filesystem_class(protocol)
    return lambda: len(kind(**options.get(protocol, {})).find(uri, detail=True))


def alone(prepare: Callable[..., Callable[[], int]], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The cost of the function that `prepare` returns, in its own process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (prepare, args, kwargs))


def _measured(prepare: Callable[..., Callable[[], int]], args: Any, kwargs: Any) -> dict[str, Any]:
    os.environ.update(dict.fromkeys(CHECKSUMS, "when_required"))
    importlib.import_module("palindrome.pipeline.storage.s3")  # before measuring; otherwise imported at its first use
    call, before = prepare(*args, **kwargs), _peak()
    wall, cpu = time.monotonic(), time.process_time()
    count = call()
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    return {"found": count, "seconds": wall, "cpu_seconds": cpu, "peak_mib": _peak(), "mib_before": before}


def make_files(folder: Path, count: int, per_folder: int) -> None:
    for start in range(0, count, per_folder):
        below = folder / f"{start // per_folder:05d}"
        below.mkdir(parents=True)
        for i in range(start, min(count, start + per_folder)):
            os.close(os.open(below / f"{i:08d}.jpg", os.O_CREAT))


@contextmanager
def s3_server(folder: Path, *flags: str) -> Iterator[str]:
    """The endpoint of `rclone serve s3` for a folder, whose subfolders are the buckets."""
    address = free_address()
    rclone = shutil.which("rclone", path=str(Path(sys.executable).parent)) or "rclone"
    options = ["--auth-key", ",".join(KEYS), "--config", os.devnull, "--log-level", "ERROR", *flags]
    server = subprocess.Popen([rclone, "serve", "s3", str(folder), "--addr", address, *options])
    try:
        wait_for(address)
        yield f"http://{address}"
    finally:
        server.terminate()
        server.wait()


def s3_options(endpoint: str) -> Options:
    return {"s3": {"endpoint_url": endpoint, "key": KEYS[0], "secret": KEYS[1]}}


@contextmanager
def delayed(endpoint: str, milliseconds: float) -> Iterator[str]:
    """The endpoint of a proxy that delays each request without a body."""
    host = endpoint.removeprefix("http://")
    context = multiprocessing.get_context("spawn")
    ready = context.SimpleQueue()
    proxy = context.Process(target=_proxy, args=(host, milliseconds / 1000, ready), daemon=True)
    proxy.start()
    try:
        yield f"http://127.0.0.1:{ready.get()}"
    finally:
        proxy.terminate()
        proxy.join()


def _proxy(address: str, delay: float, ready: Any) -> None:
    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
        try:
            while chunk := await reader.read(1 << 18):
                await asyncio.sleep(delay)
                writer.write(chunk)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = address.split(":")
        inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(copy(reader, inner_writer, delay), copy(inner_reader, writer, 0))

    async def serve() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        ready.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def wait_for(address: str) -> None:
    host, port = address.split(":")
    for _ in range(300):
        try:
            socket.create_connection((host, int(port))).close()
            return
        except ConnectionError:
            time.sleep(0.1)
    raise TimeoutError(f"nothing answers at {address}")


def _peak() -> float:
    """The peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
