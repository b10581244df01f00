"""A shard -> batches of decoded images and rejects, a constant number of them in memory at a time."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from palindrome.pipeline.images.container import container_of, jpeg_quality
from palindrome.pipeline.images.decode import Preprocess, Rejected, decode
from palindrome.pipeline.images.records import Image, Reject, Shard, pack
from palindrome.pipeline.images.sources import Collection, RawImage, list_pieces, read_raw


@dataclass(frozen=True)
class Batch:
    """At most `batch_size` images, and the rejects met on the way to them."""

    images: list[Image]
    rejects: list[Reject]


def read_batches(
    collection: Collection, shard: Shard, how: Preprocess, batch_size: int, containers: bool = False
) -> Iterator[Batch]:
    images: list[Image] = []
    rejects: list[Reject] = []
    for raw in read_raw(collection, shard):
        result = read_image(raw, how, containers)
        if isinstance(result, Reject):
            rejects.append(result)
        else:
            images.append(result)
        if len(images) == batch_size or len(rejects) >= 1024:
            yield Batch(images, rejects)
            images, rejects = [], []
    if images or rejects:
        yield Batch(images, rejects)


def first_images(collection: Collection, how: Preprocess, limit: int) -> np.ndarray:
    """The first `limit` images that can be decoded, uint8 [N, H, W, C]. Raises ValueError where there is none."""
    found: list[np.ndarray] = []
    for group in pack(list_pieces(collection, limit), limit):
        for batch in read_batches(collection, Shard.of(collection.kind, group), how, limit):
            found += [image.pixels for image in batch.images]
            if len(found) >= limit:
                return np.stack(found[:limit])
    if not found:
        raise ValueError(f"{collection.uri} holds no image that can be decoded")
    return np.stack(found)


def read_image(raw: RawImage, how: Preprocess, containers: bool = False) -> Image | Reject:
    """With `containers` the image has its container and JPEG quality, which takes a sixth of a small one's time."""
    if raw.data is None:
        return Reject(raw.image_id, raw.source, raw.reason, raw.detail)
    try:
        pixels, width, height = decode(raw.data, how)
    except Rejected as e:
        return Reject(raw.image_id, raw.source, e.reason, e.detail)
    content_hash = hashlib.sha256(raw.data).hexdigest()
    made = (container_of(raw.data), jpeg_quality(raw.data)) if containers else ()
    return Image(raw.image_id, raw.source, width, height, content_hash, raw.kept, pixels, *made)
