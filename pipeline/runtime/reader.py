"""How a shard's images come to the actor: read and decoded by streaming CPU tasks, or in a thread of its own."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ray

from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.read import Batch, read_batches
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.images.sources import Collection

READ_AHEAD = 2  # batches that a reader may be ahead of the device


@ray.remote(num_cpus=1, num_returns="streaming", max_retries=3, _generator_backpressure_num_objects=READ_AHEAD)
def _read_task(collection: Collection, shard: Shard, how: Preprocess, batch_size: int) -> Iterator[Batch]:
    yield from read_batches(collection, shard, how, batch_size)


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Each is read while the one before it is worked on."""
    with ThreadPoolExecutor(1, "reader") as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


@dataclass(frozen=True)
class Reader:
    """How a shard's images come to the actor, which has the next while it works on these: read and decoded by streaming
    CPU tasks, or in a thread of its own."""

    collection: Collection
    how: Preprocess
    batch_size: int
    by_tasks: bool

    def batches(self, shard: Shard) -> Iterator[Batch]:
        if not self.by_tasks:
            yield from _ahead(read_batches(self.collection, shard, self.how, self.batch_size))
            return
        task = _read_task.options(name=f"read {shard.name}")
        for ref in task.remote(self.collection, shard, self.how, self.batch_size):
            yield ray.get(ref)
