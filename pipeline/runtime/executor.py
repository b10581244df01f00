"""Where a run computes: on Ray actors, or in this process."""

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
from palindrome.pipeline.runtime.scheduler import (
    ERROR_LENGTH,
    HEARTBEAT_SECONDS,
    MAX_RETRIES,
    STALL_TIMEOUT,
    Heartbeat,
    Resources,
    choose_resources,
    run_shards,
)

Outcomes = Generator[Receipt | Failure | Heartbeat, None, None]


class Executor(Protocol):
    """Runs a job's computation. Every job runs on either executor, with the same output."""

    def choose_resources(
        self, workers: Sequence[int], decode: str, gpus_per_worker: float | None, custom: Mapping[str, float]
    ) -> Resources:
        """The resources of a run, as `scheduler.choose_resources` describes it."""

    def run(
        self,
        work: Work,
        checkpoint: Checkpoint,
        shards: Iterator[Shard],
        resources: Resources,
        execution: Execution = FLOAT32,
        stall_timeout: float = STALL_TIMEOUT,
    ) -> Outcomes:
        """One outcome per shard, and heartbeats, as `scheduler.run_shards` describes it."""

    def call(self, resources: Resources, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of one function call, on the device of a worker with these resources."""


class OnRay:
    """The Ray cluster that this process is connected to."""

    choose_resources = staticmethod(choose_resources)
    run = staticmethod(run_shards)

    def call(self, resources: Resources, function: Callable[..., Any], *arguments: Any) -> Any:
        return ray.get(ray.remote(function).options(**resources.ray_options).remote(*arguments))


class Inline:
    """This process, without Ray: one shard after the other, on the GPU if there is one. A shard that raises is retried
    as on Ray. A shard that kills the process ends the run; the same command resumes it."""

    def choose_resources(
        self, workers: Sequence[int], decode: str, gpus_per_worker: float | None, custom: Mapping[str, float]
    ) -> Resources:
        gpu = torch.cuda.is_available()
        return Resources(1, float(gpu), None if gpu else len(os.sched_getaffinity(0)), decode_in_tasks=False)

    def run(
        self,
        work: Work,
        checkpoint: Checkpoint,
        shards: Iterator[Shard],
        resources: Resources,
        execution: Execution = FLOAT32,
        stall_timeout: float = STALL_TIMEOUT,
    ) -> Outcomes:
        """`stall_timeout` has no effect: no other worker could retry the shard."""
        # Shards run in a thread, so that this one can report progress and cancel it. The model is made there as well,
        # because torch's number of threads is set per thread.
        with ThreadPoolExecutor(1, "shard") as pool:
            model = pool.submit(Model, checkpoint, resources.threads, None, execution).result()

            def process(shard: Shard) -> Receipt:
                with model.tracking(shard.name):
                    return work.process(model, shard)

            try:
                for shard in shards:
                    for attempt in range(MAX_RETRIES + 1):
                        receipt = pool.submit(process, shard)
                        while not wait([receipt], HEARTBEAT_SECONDS).done:
                            yield Heartbeat(sum(progress.images for progress in model.in_flight()))
                        if (error := receipt.exception()) is None:
                            yield receipt.result()
                            break
                        if isinstance(error, RunError):  # no retry would help
                            raise error
                        if attempt == MAX_RETRIES:
                            yield Failure(shard, one_line(error, ERROR_LENGTH))
            finally:
                model.cancelled.set()

    def call(self, resources: Resources, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)
