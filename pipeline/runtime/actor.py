"""The process that holds a model: the Ray actor of every job. It imports little, so that the constructor says how what
is large is imported."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import ray
from ray import ObjectRef

from palindrome.pipeline.base.frozen_gc import frozen_gc
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runtime.telemetry import Meters

if TYPE_CHECKING:
    from palindrome.model.execution import Execution
    from palindrome.model.families import Checkpoint
    from palindrome.pipeline.runtime.device import Model, ShardProgress


class Work(Protocol):
    """What a job does with one shard."""

    def process(self, model: "Model", shard: Shard) -> Receipt: ...


Given = tuple[Work, "Checkpoint", int | None, "Execution"]  # the threads, and how the network is evaluated


class ShardActor:
    """The Ray actor of every job: holds the model, works on a shard or two at a time."""

    def __init__(self, given: "Sequence[ObjectRef[Given]]") -> None:
        """`given` is one reference: Ray itself would read it, and so import torch, before this is called."""
        with frozen_gc():
            from palindrome.pipeline.runtime.device import Model, tune_process

            self.work, checkpoint, threads, execution = ray.get(given[0])
            self.meters = Meters(type(self.work).__name__.lower())
            self.model = Model(checkpoint, threads, self.meters, execution)
            tune_process(self.model)

    def ready(self) -> None:
        """Returns once the constructor has."""

    def process(self, shard: Shard) -> Receipt:
        from palindrome.pipeline.runtime.device import compute_alone

        compute_alone()
        with self.model.tracking(shard.name):
            receipt = self.work.process(self.model, shard)
        self.meters.shard(receipt.rejects, receipt.bytes)
        return receipt

    def in_flight(self) -> "list[ShardProgress]":
        """How far the shards are that are not done."""
        return self.model.in_flight()
