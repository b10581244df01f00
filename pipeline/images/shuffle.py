"""Batches of a collection's images in a random order, for each rank of a training."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import numpy as np

from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.read import read_batches
from palindrome.pipeline.images.records import Image, Shard
from palindrome.pipeline.images.sources import Collection

BUFFER_BYTES = 2**30  # of images to draw the next batch from, a rank

Batch = tuple[np.ndarray, np.ndarray | None]
"""Pixels, uint8 [B, H, W, C], and classes, int64 [B]."""


def shuffled_batches(
    collection: Collection,
    shards: Sequence[Shard],
    how: Preprocess,
    batch_size: int,
    seed: int,
    rank: int = 0,
    ranks: int = 1,
    class_of: Callable[[Image], int] | None = None,
) -> Iterator[Batch]:
    """This rank's images for ever, and their classes where `class_of` tells them: its part of the shards in a new
    random order each epoch, through a shuffle buffer. Rejects are left out. Raises RuntimeError where there is nothing
    else."""
    buffer: list[tuple[np.ndarray, int | None]] = []
    room = max(batch_size, min(8192, BUFFER_BYTES // (how.channels * how.size**2)))
    draw = np.random.default_rng([seed, rank])
    seen = 0
    for epoch in count():
        order = np.random.default_rng([seed, epoch]).permutation(len(shards))  # the same for every rank
        ours = order[rank % len(shards) :: ranks]
        for place, at in enumerate([*ours, *order]):
            if place >= len(ours) and seen:  # others' shards are read only where ours hold nothing but rejects
                break
            for batch in read_batches(collection, shards[at], how, batch_size):
                buffer.extend((image.pixels, class_of(image) if class_of else None) for image in batch.images)
                seen += len(batch.images)
                while len(buffer) >= room:
                    yield _draw(buffer, batch_size, draw)
        while len(buffer) >= batch_size:
            yield _draw(buffer, batch_size, draw)
        if not seen:
            raise RuntimeError(f"no image of {collection.uri} could be decoded")


def _draw(buffer: list[tuple[np.ndarray, int | None]], size: int, order: np.random.Generator) -> Batch:
    drawn = []
    for _ in range(size):
        at = int(order.integers(len(buffer)))
        buffer[at], buffer[-1] = buffer[-1], buffer[at]
        drawn.append(buffer.pop())
    pixels, classes = zip(*drawn, strict=True)
    return np.stack(pixels), None if classes[0] is None else np.array(classes, np.int64)
