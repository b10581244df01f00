"""The cost of a run before it starts: --dry-run prints it and exits, --calibrate measures the device first."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from palindrome.infra.cluster import ClusterError, connect
from palindrome.jobs.arguments import ConfigError, config_error
from palindrome.jobs.config import ComputeConfig, OutOptions, Planned, ShardedConfig
from palindrome.model.execution import FLOAT32, Execution
from palindrome.model.families import Checkpoint
from palindrome.pipeline.base.errors import SettingError
from palindrome.pipeline.base.text import duration, size
from palindrome.pipeline.runs.kinds import KINDS, REJECTS
from palindrome.pipeline.runs.manifest import NAME, read_manifest
from palindrome.pipeline.runs.plan import Totals
from palindrome.pipeline.runtime.batch_size import try_batch_sizes
from palindrome.pipeline.runtime.executor import Executor, Inline, OnRay
from palindrome.pipeline.runtime.precision import MIN_IMAGES_FOR_TRIAL
from palindrome.pipeline.runtime.scheduler import Resources
from palindrome.pipeline.runtime.speed import Speed, measure, recall, record
from palindrome.pipeline.storage.folder import Folder, absolute, file_at

C = TypeVar("C", bound=OutOptions)


@dataclass(frozen=True)
class Cost:
    """What is left of a run: shards, images, and at most so many network evaluations and bytes to write, in total."""

    shards: int
    images: int
    evaluations: float
    bytes: float

    @classmethod
    def of(cls, totals: Totals, left: int, evaluations: float, written: float) -> "Cost":
        """The cost of `left` shards of a run, with `evaluations` and `written` bytes per image."""
        images = totals.part(left).images if left else 0
        return cls(left, images, images * evaluations, images * written)

    def described(self) -> str:
        if not self.images:
            return "nothing is left to do"
        return (
            f"{self.images:,} images in {self.shards:,} shards; at most {self.evaluations / self.images:,.4g} network"
            f" evaluations an image, {self.evaluations:,.0f} in all; at most {size(self.bytes)} to write"
        )


@contextmanager
def executor_of(config: ComputeConfig) -> Iterator[Executor]:
    """This process, or a connection to Ray. Raises ConfigError if there is no cluster."""
    if config.inline:
        yield Inline()
        return
    with config_error("--address", ClusterError), connect(config.address):
        yield OnRay()


@contextmanager
def prepared(
    config: ShardedConfig,
    model: Checkpoint,
    cost: Cost,
    decode: str,
    precision: Callable[[Executor, Resources, int], str | None],
) -> Iterator[tuple[Executor, Resources, Execution]]:
    """The executor of a run, its resources, and how it evaluates the network; `decode` and `precision` are those of a
    ShardedJob. Prints the cost if asked to. Raises Planned in a dry run, ConfigError if there is no cluster."""
    if config.dry_run or config.calibrate:
        print(cost.described(), flush=True)
    recorded = None
    if config.calibration and cost.images and not config.calibrate:
        with config_error("--calibration"):
            recorded = recall(config.calibration, model)
        if config.dry_run:
            _forecast(cost, recorded, config.workers[-1] if config.workers else 1)
    if config.dry_run and not (config.calibrate and cost.images):
        raise Planned
    with executor_of(config) as executor:
        with config_error("--workers", SettingError):
            resources = executor.choose_resources(config.workers, decode, config.gpus_per_worker, config.custom())
        batch_size = _batch_size(config, model, cost, resources, executor)
        execution = config.execution(precision(executor, resources, batch_size), batch_size)
        if config.calibrate:
            recorded = measure(model, resources, execution, executor)
            if config.calibration:
                with config_error("--calibration"):
                    record(config.calibration, model, recorded)
        # Workers that share a GPU are no faster than one worker with all of it.
        forecast = _forecast(cost, recorded, resources.workers, resources.gpus or 1) if recorded else None
        if config.dry_run:
            raise Planned
        started = time.monotonic()
        yield executor, resources, execution
        if forecast:
            took = time.monotonic() - started
            print(f"estimated {duration(forecast)}, took {duration(took)}: {took / forecast - 1:+.0%}")


def _batch_size(config: ShardedConfig, model: Checkpoint, cost: Cost, resources: Resources, executor: Executor) -> int:
    """--batch-size; else, on a GPU and for enough images, the result of a trial. CPUs gain nothing beyond the
    default."""
    if config.batch_size or not resources.gpus or cost.images < MIN_IMAGES_FOR_TRIAL:
        return config.batch_size or FLOAT32.batch_size
    workers = min(resources.workers, cost.shards)
    # With --precision auto, the trial runs in bfloat16, which takes the largest batch to keep a GPU busy.
    fast = config.execution("bfloat16", FLOAT32.batch_size)
    found, tried = try_batch_sizes(
        model, fast, cost.evaluations / workers, cost.images / cost.shards, resources, executor
    )
    speeds = "; ".join(f"{images}: {speed:,.0f} network evaluations a second" for images, speed in tried.items())
    print(f"batch size: {found} ({speeds})", flush=True)
    return found


def _forecast(cost: Cost, speed: Speed, max_workers: int, device_share: float = 1) -> float:
    """Estimates and prints the seconds that the run takes with at most `max_workers` workers, each with that share of a
    device."""
    workers = min(max_workers, cost.shards)
    device = cost.evaluations / speed.evaluations_per_second
    seconds = speed.seconds_to_start + device / max(1, workers * device_share)
    print(
        f"{speed.origin}: {speed.evaluations_per_second:,.0f} network evaluations a second on a device, in"
        f" {speed.precision}; estimated: {device / 3600:,.3g} device hours, {duration(seconds)} with {workers} worker"
        + "s"
        * (workers > 1),
        flush=True,
    )
    return seconds


@contextmanager
def dry(config: C) -> Iterator[C]:
    """The config for a dry run, with a temporary folder as `--out`. If there is a run at `--out`, the folder has its
    manifest and plan, and empty files in place of its output. Raises ConfigError, also if `--out` is not writable."""
    where = absolute(config.out)
    if config.OUT_IS_FILE:
        with config_error("--out"):
            _check_writable(file_at(where)[0])
            if Folder(where).is_local and Path(where).is_dir():
                raise ConfigError(f"--out: {where} is a folder")
        yield config
        return
    with tempfile.TemporaryDirectory(prefix="palindrome-") as folder:
        with config_error("--out"):
            out, shadow = Folder(where), Folder(folder)
            _check_writable(out)
            if manifest := read_manifest(out):
                kind = KINDS.get(manifest.job)
                for name in (
                    NAME,
                    *(f"plan/{name}" for name in out.files("plan")),
                    *(kind.state_files if kind else ()),
                ):
                    if out.exists(name):
                        shadow.put(name, out.read(name))
                for output in (*(kind.folders if kind else ()), REJECTS):
                    for name in out.files(output):
                        shadow.put(f"{output}/{name}", b"")
        try:
            yield replace(config, out=folder)
        except ConfigError as e:
            raise ConfigError(str(e).replace(folder, config.out)) from e


def _check_writable(out: Folder) -> None:
    """Raises ConfigError if a local folder, or its nearest existing parent, is not writable."""
    if out.is_local:
        path = Path(out.path())
        nearest = next(p for p in (path, *path.parents) if p.exists())
        if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
            raise ConfigError(f"--out: {nearest} can't be written to")
