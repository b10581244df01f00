"""How fast this cluster's devices evaluate a model: a few seconds of the real actor on noise."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from model.checkpoint import Checkpoint
from model.schedule import ladder
from pipeline.actors import Model, Receipt, stopwatch
from pipeline.errors import RunError
from pipeline.records import Shard
from pipeline.run import Failure, Resources, run_shards

SECONDS = 6.0  # of measurement, after one batch that is not counted
STEPS = 4  # a batch goes in and comes out that often, as in a run


@dataclass(frozen=True)
class Calibration:
    """Decodes noise; its receipt counts network evaluations of an image."""

    batch_size: int

    def process(self, model: Model, shard: Shard) -> Receipt:
        c, levels = model.checkpoint.config, ladder("linear", STEPS, model.checkpoint.schedule.num_train_timesteps)
        x = torch.randn(self.batch_size, c.in_channels, c.sample_size, c.sample_size)
        model.decode(x, levels)
        spent, until, evaluations = stopwatch(model), time.monotonic() + SECONDS, 0
        while time.monotonic() < until:
            model.decode(x, levels)
            evaluations += len(x) * STEPS
        return Receipt(shard.name, evaluations, 0, **spent(), bytes=0)


def seconds_an_evaluation(model: Checkpoint, batch_size: int, resources: Resources) -> tuple[float, float]:
    """Seconds of a device for one image through the network once; and those until an actor was up. Raises RunError."""
    started = time.monotonic()
    shards: Iterator[Shard] = iter([Shard("calibration", "noise", batch_size, ())])
    for outcome in run_shards(Calibration(batch_size), model, shards, replace(resources, workers=1, fewest=1)):
        if isinstance(outcome, Failure):
            raise RunError(f"--calibrate: {outcome.error}")
        if isinstance(outcome, Receipt):
            up = max(0.0, time.monotonic() - started - outcome.seconds)
            return outcome.device_seconds / outcome.images, up
    raise RunError("--calibrate: nothing was measured")
