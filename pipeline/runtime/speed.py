"""The speed of a cluster's device, measured by a real actor that decodes noise for a few seconds."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch

from palindrome.model.execution import Execution
from palindrome.model.families import Checkpoint
from palindrome.model.ladder import ladder
from palindrome.pipeline.base.errors import RunError
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.runs.outcome import Failure, Receipt
from palindrome.pipeline.runtime.device import Model, stopwatch
from palindrome.pipeline.runtime.executor import Executor
from palindrome.pipeline.runtime.scheduler import Resources
from palindrome.pipeline.storage.folder import Folder, file_at

CALIBRATION_SECONDS = 6.0  # of measurement, after one warm-up batch
TRIAL_SECONDS = 1.0  # enough to compare batch sizes or precisions
STEPS = 4  # network evaluations per batch between its transfers to and from the device


@dataclass(frozen=True)
class Calibration:
    """Decodes noise; the `images` of its receipt are network evaluations, of one image each."""

    batch_size: int

    def process(self, model: Model, shard: Shard) -> Receipt:
        evaluations, spent = decode_noise(model, self.batch_size, CALIBRATION_SECONDS)
        return Receipt(shard.name, evaluations, 0, **spent, bytes=0)


def decode_noise(model: Model, batch_size: int, seconds: float) -> tuple[int, dict[str, float]]:
    """Decodes noise for at least `seconds` seconds, after one warm-up batch. Returns the network evaluations, of one
    image each, and the time as `stopwatch` gives it."""
    levels = ladder("linear", STEPS, model.checkpoint.process.num_train_timesteps)
    x = torch.randn(batch_size, *model.checkpoint.latent_shape)
    condition = model.condition_of_all(batch_size, model.checkpoint.with_any_condition())
    model.decode(x, levels, condition)
    spent, until, evaluations = stopwatch(model), time.monotonic() + seconds, 0
    while time.monotonic() < until:
        model.decode(x, levels, condition)
        evaluations += len(x) * STEPS
    return evaluations, spent()


def evaluations_per_second(model: Model, batch_size: int) -> float:
    """Network evaluations per second, of one image each, measured for TRIAL_SECONDS."""
    evaluations, spent = decode_noise(model, batch_size, TRIAL_SECONDS)
    return evaluations / spent["seconds"]


@dataclass(frozen=True)
class Speed:
    """The speed of one device, in network evaluations of one image, and the seconds until an actor was ready. `origin`
    is `measured`, or says when it was measured."""

    evaluations_per_second: float
    seconds_to_start: float
    precision: str
    origin: str = "measured"


def measure(model: Checkpoint, resources: Resources, execution: Execution, executor: Executor) -> Speed:
    """Measures with one worker like the run's. Raises RunError."""
    started = time.monotonic()
    work, one = Calibration(execution.batch_size), replace(resources, workers=1, min_workers=1)
    shards: Iterator[Shard] = iter([Shard("calibration", "noise", execution.batch_size, ())])
    for outcome in executor.run(work, model, shards, one, execution):
        if isinstance(outcome, Failure):
            raise RunError(f"--calibrate: {outcome.error}")
        if isinstance(outcome, Receipt):
            up = max(0.0, time.monotonic() - started - outcome.seconds)
            return Speed(outcome.images / outcome.device_seconds, up, execution.precision)
    raise RunError("--calibrate: nothing was measured")


def record(uri: str, model: Checkpoint, speed: Speed) -> None:
    """Adds a measurement to a file, replacing an earlier one of this model. Raises ValueError if the file holds
    something else."""
    folder, name = file_at(uri)
    content = _recorded(folder, name) if folder.exists(name) else {}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    content[_key(model)] = {k: v for k, v in asdict(speed).items() if k != "origin"} | {"measured": now}
    folder.put(name, (json.dumps(content, indent=2) + "\n").encode())


def recall(uri: str, model: Checkpoint) -> Speed:
    """The measurement of this model in a file that `record` wrote. Raises ValueError if there is none."""
    folder, name = file_at(uri)
    if not folder.exists(name):
        raise ValueError(f"{uri} does not exist; --calibrate writes it")
    found = _recorded(folder, name).get(_key(model))
    if found is None:
        guided = " with guidance" if model.guidance else ""
        message = f"{uri} has no measurement of this model{guided}, digest {model.digest[:12]}…; --calibrate adds one"
        raise ValueError(message)
    figures = {name: found[name] for name in ("evaluations_per_second", "seconds_to_start", "precision")}
    return Speed(**figures, origin=f"measured at {found['measured']}")


def _key(model: Checkpoint) -> str:
    """With guidance an evaluation is one of a batch of two."""
    return model.digest + (" guided" if model.guidance else "")


def _recorded(folder: Folder, name: str) -> dict[str, Any]:
    try:
        content = json.loads(folder.read(name))
        valid = isinstance(content, dict) and all("evaluations_per_second" in found for found in content.values())
    except (ValueError, TypeError):
        valid = False
    if not valid:
        raise ValueError(f"{name} is not a calibration file")
    return dict(content)
