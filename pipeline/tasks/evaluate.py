"""Images -> what a network of features makes of them: the moments of each shard, and a row an image."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from palindrome.pipeline.images.distances import Labels, Moments, softmax
from palindrome.pipeline.images.metrics import finite
from palindrome.pipeline.images.records import Image, Shard, not_finite
from palindrome.pipeline.images.resize import resized
from palindrome.pipeline.runs.kinds import FEATURES
from palindrome.pipeline.runs.moments import put_moments, set_of
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runs.schemas import evaluated_schema
from palindrome.pipeline.runs.shards import ShardWriter, tensor_array
from palindrome.pipeline.runtime.device import Model, stopwatch
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.storage.folder import Folder


@dataclass(frozen=True)
class Evaluate:
    """Images -> `moments/<shard>.npz` and `features/<shard>.parquet`, with the features themselves if they are
    `stored`. The moments are computed of a whole shard at once, so that they do not depend on batches."""

    run: Folder
    readers: Mapping[str, Reader]
    """Of each of SETS that is given as images."""
    resize: str
    scale: tuple[float, float]
    splits: int
    dimensions: int
    classes: int
    stored: bool
    metadata: Mapping[str, Any]

    def process(self, model: Model, shard: Shard) -> Receipt:
        spent = stopwatch(model)
        schema = evaluated_schema(self.dimensions if self.stored else None)
        size = model.checkpoint.image_shape[-1]
        features, logits, ids = [], [], list[str]()
        with ShardWriter(self.run, FEATURES, shard.name, schema, self.metadata, once=True) as out:
            for batch in self.readers[set_of(shard)].batches(shard):
                images, rows, rejects = batch.images, None, batch.rejects
                if images:
                    x = resized([image.pixels for image in images], size, self.resize, self.scale)
                    found = model.features(x)
                    good = np.logical_and.reduce([finite(output) for output in found])
                    if not good.all():
                        rejects = [*rejects, *(not_finite(image) for image in compress(images, ~good))]
                        images = list(compress(images, good))
                    found = tuple(output[torch.from_numpy(good)] for output in found)
                    rows = self._rows(schema, images, *(output.numpy() for output in found))
                    features.append(found[0].numpy())
                    logits += [output.numpy() for output in found[1:]]
                    ids += [image.image_id for image in images]
                out.add(rows, rejects)
                model.advance(len(batch.images))
            put_moments(self.run, shard.name, *self._moments(features, logits, ids))
            seconds = spent()
            counts = {"images": out.rows + out.refused, "rows": out.rows, "rejects": out.refused}
            return Receipt(shard.name, out.rows, out.refused, **seconds, bytes=out.commit(seconds, counts))

    def _rows(self, schema: pa.Schema, images: Sequence[Image], features: np.ndarray, *logits: np.ndarray) -> pa.Table:
        columns: dict[str, Any] = {name: [getattr(i, name) for i in images] for name in schema.names if name in _OWN}
        columns["picture"] = [image.kept.get("image_id") for image in images]
        columns["entropy"] = -np.multiply(*softmax(*logits)).sum(1) if logits else [None] * len(images)
        arrays = [pa.array(columns[f.name], f.type) for f in schema if f.name in columns]
        if self.stored:
            arrays.append(tensor_array(schema.field("features").type, features))
        return pa.table(arrays, schema=schema)

    def _moments(
        self, features: Sequence[np.ndarray], logits: Sequence[np.ndarray], ids: Sequence[str]
    ) -> tuple[Moments, Labels | None]:
        """Of a whole shard, given in batches."""
        moments = Moments.of(np.concatenate([np.zeros((0, self.dimensions), np.float32), *features]))
        if not self.classes:
            return moments, None
        split = np.array([split_of(image_id, self.splits) for image_id in ids])
        every = np.concatenate([np.zeros((0, self.classes), np.float32), *logits])
        return moments, Labels.of(every, split, self.splits)


_OWN = ("image_id", "source", "width", "height", "content_hash")


def split_of(image_id: str, splits: int) -> int:
    """The split of an image for the Inception score: the same in whatever shard and order it comes."""
    return zlib.crc32(image_id.encode(errors="surrogatepass")) % splits
