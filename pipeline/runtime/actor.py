"""The Ray actor of every job. The module imports little: the actor's constructor imports torch, within frozen_gc."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import ray
from ray import ObjectRef

from palindrome.pipeline.base.frozen_gc import frozen_gc
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runtime.telemetry import ActorMetrics

if TYPE_CHECKING:
    from palindrome.model.execution import Execution
    from palindrome.model.families import Checkpoint
    from palindrome.pipeline.runtime.device import Model, ShardProgress


class Work(Protocol):
    """What a job does with a shard."""

    def process(self, model: "Model", shard: Shard) -> Receipt: ...


Setup = tuple[Work, "Checkpoint", int | None, "Execution"]  # the int is the number of threads


class ShardActor:
    """Holds the model and processes up to two shards at a time."""

    def __init__(self, setup: "Sequence[ObjectRef[Setup]]") -> None:
        """`setup` is a list of one ref: Ray would resolve a bare ref, and so import torch, before this is called."""
        with frozen_gc():
            from palindrome.pipeline.runtime.device import Model, tune_process

            self.work, checkpoint, threads, execution = ray.get(setup[0])
            self.metrics = ActorMetrics(type(self.work).__name__.lower())
            self.model = Model(checkpoint, threads, self.metrics, execution)
            tune_process(self.model)

    def ready(self) -> None:
        """Returns once the constructor has returned."""

    def process(self, shard: Shard) -> Receipt:
        from palindrome.pipeline.runtime.device import use_one_torch_thread

        use_one_torch_thread()
        with self.model.tracking(shard.name):
            receipt = self.work.process(self.model, shard)
        self.metrics.shard(receipt.rejects, receipt.bytes)
        return receipt

    def in_flight(self) -> "list[ShardProgress]":
        """The progress of the shards in flight."""
        return self.model.in_flight()
