"""Prefetching a shard's images for the actor, in Ray tasks or in a thread."""

from collections.abc import Iterator
from dataclasses import dataclass

import ray

from palindrome.pipeline.base.threads import read_ahead
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.read import Batch, read_batches
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.images.sources import Collection

PREFETCH = 2  # batches that a reading task may be ahead of the device


@ray.remote(num_cpus=1, num_returns="streaming", max_retries=3, _generator_backpressure_num_objects=PREFETCH)
def _read_task(
    collection: Collection, shard: Shard, how: Preprocess, batch_size: int, containers: bool
) -> Iterator[Batch]:
    yield from read_batches(collection, shard, how, batch_size, containers)


@dataclass(frozen=True)
class Reader:
    """Yields a shard's batches, read and decoded ahead of the caller: by streaming Ray tasks, or in a thread."""

    collection: Collection
    how: Preprocess
    batch_size: int
    in_tasks: bool
    containers: bool = False
    """Whether the images have their files' container and JPEG quality."""

    def batches(self, shard: Shard) -> Iterator[Batch]:
        what = self.collection, shard, self.how, self.batch_size, self.containers
        if not self.in_tasks:
            yield from read_ahead(read_batches(*what))
            return
        task = _read_task.options(name=f"read {shard.name}")
        for ref in task.remote(*what):
            yield ray.get(ref)
