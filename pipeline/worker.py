"""The process that holds a model: the Ray actor of every job. It imports little, so that the constructor says how what
is large is imported."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import ray
from ray import ObjectRef

from pipeline.lasting import lasting
from pipeline.meters import Meters
from pipeline.records import Shard

if TYPE_CHECKING:
    from model.checkpoint import Checkpoint
    from model.engine import Execution
    from pipeline.device import Flight, Model


@dataclass(frozen=True)
class Receipt:
    """What the driver learns of a committed shard: counts, seconds, bytes written."""

    shard: str
    images: int
    rejects: int
    seconds: float
    device_seconds: float
    bytes: int


class Work(Protocol):
    """What a job does with one shard."""

    def process(self, model: "Model", shard: Shard) -> Receipt: ...


Given = tuple[Work, "Checkpoint", int | None, "Execution"]  # the threads, and how the network is evaluated


class ShardActor:
    """The Ray actor of every job: holds the model, works on a shard or two at a time."""

    def __init__(self, given: "Sequence[ObjectRef[Given]]") -> None:
        """`given` is one reference: Ray itself would read it, and so import torch, before this is called."""
        with lasting():
            from pipeline.device import Model

            self.work, checkpoint, threads, execution = ray.get(given[0])
            self.meters = Meters(type(self.work).__name__.lower())
            self.model = Model(checkpoint, threads, self.meters, execution)

    def ready(self) -> None:
        """Returns once the constructor has."""

    def process(self, shard: Shard) -> Receipt:
        from pipeline.device import Flight, compute_alone

        compute_alone()
        self.model.flights[threading.get_ident()] = Flight(shard.name)
        try:
            receipt = self.work.process(self.model, shard)
            self.meters.shard(receipt.rejects, receipt.bytes)
            return receipt
        finally:
            del self.model.flights[threading.get_ident()]

    def in_flight(self) -> "list[Flight]":
        """How far the shards are that are not done."""
        flights = list(self.model.flights.values())
        events = sum(flight.events for flight in flights)
        return [replace(flight, events=events if flight.queued else flight.events) for flight in flights]
