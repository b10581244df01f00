"""Where a run computes: on Ray's actors, or in this process."""

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Protocol

import ray
import torch

from palindrome.model.execution import FLOAT32, Execution
from palindrome.model.families import Checkpoint
from palindrome.pipeline.base.errors import RunError
from palindrome.pipeline.base.text import one_line
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.runs.outcome import Failure, Receipt
from palindrome.pipeline.runtime.actor import Work
from palindrome.pipeline.runtime.device import Model
from palindrome.pipeline.runtime.scheduler import RETRIES, STALL, Heartbeat, Resources, fit, run_shards

HEARTBEAT = 1.0  # seconds

Outcomes = Generator[Receipt | Failure | Heartbeat, None, None]


class Executor(Protocol):
    """How a job computes. Every job runs on either; what it writes is the same."""

    def fit(
        self, workers: Sequence[int], decode: str, gpus_per_worker: float | None, custom: Mapping[str, float]
    ) -> Resources:
        """What a run takes, as `scheduler.fit` says it."""

    def run(
        self,
        work: Work,
        checkpoint: Checkpoint,
        shards: Iterator[Shard],
        resources: Resources,
        execution: Execution = FLOAT32,
        stall: float = STALL,
    ) -> Outcomes:
        """An outcome for every shard, and heartbeats, as `scheduler.run_shards` says it."""

    def call(self, resources: Resources, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of one call, on a device as a worker has it."""


class OnRay:
    """On the Ray that this process is connected to."""

    def fit(
        self, workers: Sequence[int], decode: str, gpus_per_worker: float | None, custom: Mapping[str, float]
    ) -> Resources:
        return fit(workers, decode, gpus_per_worker, custom)

    def run(
        self,
        work: Work,
        checkpoint: Checkpoint,
        shards: Iterator[Shard],
        resources: Resources,
        execution: Execution = FLOAT32,
        stall: float = STALL,
    ) -> Outcomes:
        return run_shards(work, checkpoint, shards, resources, execution, stall)

    def call(self, resources: Resources, function: Callable[..., Any], *arguments: Any) -> Any:
        return ray.get(ray.remote(function).options(**resources.takes).remote(*arguments))


class Inline:
    """In this process, without Ray: one shard after the other, on the GPU if there is one. A shard that raises is tried
    again as on Ray; one that kills its process kills the run, which the same command resumes."""

    def fit(
        self, workers: Sequence[int], decode: str, gpus_per_worker: float | None, custom: Mapping[str, float]
    ) -> Resources:
        gpu = torch.cuda.is_available()
        return Resources(1, float(gpu), None if gpu else len(os.sched_getaffinity(0)), read_by_tasks=False)

    def run(
        self,
        work: Work,
        checkpoint: Checkpoint,
        shards: Iterator[Shard],
        resources: Resources,
        execution: Execution = FLOAT32,
        stall: float = STALL,
    ) -> Outcomes:
        """`stall` has no effect: no other worker could take the shard."""
        # In a thread, so that this one can report progress, and stop it: torch's settings are that thread's too.
        with ThreadPoolExecutor(1, "shard") as pool:
            model = pool.submit(Model, checkpoint, resources.threads, None, execution).result()

            def process(shard: Shard) -> Receipt:
                with model.tracking(shard.name):
                    return work.process(model, shard)

            try:
                for shard in shards:
                    for attempt in range(RETRIES + 1):
                        receipt = pool.submit(process, shard)
                        while not wait([receipt], HEARTBEAT).done:
                            yield Heartbeat(sum(progress.images for progress in model.in_flight()))
                        if (error := receipt.exception()) is None:
                            yield receipt.result()
                            break
                        if isinstance(error, RunError):
                            raise error
                        if attempt == RETRIES:
                            yield Failure(shard, one_line(error, 500))
            finally:
                model.cancelled.set()

    def call(self, resources: Resources, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)
