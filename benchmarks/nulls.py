"""Runs with a null network, shared by the benchmarks of the pipeline around the network."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
from torch import Tensor

import palindrome.infra.cluster  # noqa: F401, sets Ray up before it is started
from palindrome.model.execution import FLOAT32, Execution
from palindrome.model.families.unet2d import UNet2D
from palindrome.model.ladder import Ladder
from palindrome.model.process import CLEAN, VP
from palindrome.model.unet import UNetConfig
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.sources import open_collection
from palindrome.pipeline.runs.inversion import Inversion
from palindrome.pipeline.runs.plan import Totals, write_plan
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.runtime.scheduler import Resources
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.encode import Encode

ROOT = Path(__file__).parent.parent
TICKS = os.sysconf("SC_CLK_TCK")
STEP = (CLEAN, 0)  # the ladder of a single step
SAMPLE_INTERVAL = 0.2  # seconds between samples of the processes' CPU time


@cache
def null_epsilon(*shape: int) -> np.ndarray:
    """The epsilon that a null network predicts for every image, float32. It is noise, so that the output has as many
    distinct values as latents have."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


class NullNetwork(torch.nn.Module):
    """Predicts the same epsilon for all images, after sleeping `sleep` seconds."""

    def __init__(self, sleep: float = 0.0) -> None:
        super().__init__()
        self.sleep = sleep

    def forward(self, x: Tensor, timestep: int) -> Tensor:
        if self.sleep:
            time.sleep(self.sleep)
        return torch.from_numpy(null_epsilon(*x.shape[1:])).expand_as(x)


@dataclass(frozen=True)
class NullCheckpoint(UNet2D):
    sleep: float = 0.0

    def denoiser(self, device: Any = "cpu", execution: Execution = FLOAT32) -> Any:
        return NullNetwork(self.sleep)


def null_checkpoint(sleep: float = 0.0, size: int = 32) -> NullCheckpoint:
    """A checkpoint for images of `size` by `size` pixels, with diffusers' default schedule."""
    return NullCheckpoint(UNetConfig(sample_size=size), {}, VP(), sleep=sleep)


@contextmanager
def local_ray(cpus: int) -> Iterator[None]:
    """A Ray on this machine with `cpus` logical CPUs, for both Palindrome and Ray Data."""
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def write_files(folder: Path, count: int, pictures: Sequence[tuple[bytes, str]]) -> None:
    """Writes `count` files with distinct names, repeating the given contents and suffixes."""
    folder.mkdir()
    for i in range(count):
        content, suffix = pictures[i % len(pictures)]
        Path(folder, f"{i:06d}{suffix}").write_bytes(content)


def pictures_of(parquet: str) -> list[tuple[bytes, str]]:
    """The contents of a Parquet file in the layout of the bundled samples, and their suffix."""
    return [(row["bytes"], Path(row["path"]).suffix) for row in pq.read_table(parquet).column("img").to_pylist()]


def encode_work(
    files: Path, size: int, out: Path, resources: Resources, *, shard_size: int, batch_size: int, dtype: str,
    levels: Ladder = STEP,
) -> tuple[Encode, Totals]:  # fmt: skip
    """Recognises, lists and plans the files as `palindrome encode` does; returns the run's work and its totals."""
    collection, run = open_collection(str(files)), Folder(str(out))
    totals = write_plan(run, collection, shard_size)
    reader = Reader(collection, Preprocess(size), batch_size, resources.decode_in_tasks)
    return Encode(run, reader, Inversion(levels, 0, dtype=dtype), False, {}), totals


@contextmanager
def cpu_meter() -> Iterator[Callable[[], float]]:
    """Yields a function that returns the CPU seconds of this process and its descendants since the start of the `with`.
    Samples /proc, so that killed processes count too, except for their last SAMPLE_INTERVAL."""
    seen: dict[str, int] = {}
    before, over = _ticks(), threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_INTERVAL):
            seen.update(_ticks())

    def spent() -> float:
        seen.update(_ticks())
        return sum(ticks - before.get(process, 0) for process, ticks in seen.items()) / TICKS

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield spent
    finally:
        over.set()
        thread.join()


def _ticks() -> dict[str, int]:
    """CPU ticks of this process and each descendant, without those of their children."""
    parents: dict[str, str] = {}
    ticks: dict[str, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            words = stat.read_text().rpartition(")")[2].split()
            parents[stat.parent.name], ticks[stat.parent.name] = words[1], int(words[11]) + int(words[12])

    def ours(process: str | None) -> bool:
        return process is not None and (process == str(os.getpid()) or ours(parents.get(process)))

    return {process: spent for process, spent in ticks.items() if ours(process)}
