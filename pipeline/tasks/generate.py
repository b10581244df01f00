"""New samples: a range of indices -> `images/<shard>.parquet`. Sample i depends only on the seed, i and the model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from palindrome.model.ladder import Ladder
from palindrome.model.watermarks import Keys
from palindrome.pipeline.images.metrics import check_finite, to_pixels
from palindrome.pipeline.images.pixels import png
from palindrome.pipeline.images.records import Piece, Shard
from palindrome.pipeline.runs.kinds import IMAGES
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runs.plan import SAMPLES, sample_id
from palindrome.pipeline.runs.schemas import sample_schema
from palindrome.pipeline.runs.shards import ShardWriter, tensor_array
from palindrome.pipeline.runtime.device import Model, stopwatch
from palindrome.pipeline.storage.folder import Folder

KIND = SAMPLES


def ranges(count: int, seed: int, shard_size: int) -> Iterator[Piece]:
    """The indices 0 to `count` - 1 as pieces; a shard is named after its indices and the seed."""
    for start in range(0, count, shard_size):
        yield Piece("", KIND, 0, str(seed), start, min(start + shard_size, count))


@dataclass(frozen=True)
class Generate:
    """Generates the samples of a shard. `how` is passed to model.ddim.sample; `dtype` is that of the stored latents,
    None to store none. With `keys`, sample i has the watermark of the i-th one in its x_T, each in turn."""

    run: Folder
    seed: int
    levels: Ladder
    how: Mapping[str, Any]
    dtype: str | None
    batch_size: int
    metadata: Mapping[str, Any]
    keys: Keys | None = None

    def process(self, model: Model, shard: Shard) -> Receipt:
        spent = stopwatch(model)
        schema = sample_schema(model.checkpoint.latent_shape, self.dtype, self.keys is not None)
        mark = None if self.keys is None else self.keys.mark
        [piece] = shard.pieces
        with ShardWriter(self.run, IMAGES, shard.name, schema, self.metadata, once=True) as out:
            for first in range(piece.start, piece.stop, self.batch_size):
                indices = range(first, min(first + self.batch_size, piece.stop))
                condition = model.condition_of_all(len(indices))
                noise, images = model.generate(self.seed, indices, self.levels, condition, mark, **self.how)
                check_finite(images, [sample_id(index) for index in indices])
                out.add(_rows(schema, indices, self.keys, to_pixels(images), noise.numpy()))
                model.advance(len(indices))
            seconds = spent()
            written = out.commit(seconds, {"images": shard.images})
            return Receipt(shard.name, shard.images, 0, **seconds, bytes=written)


def _rows(schema: pa.Schema, indices: range, keys: Keys | None, pixels: np.ndarray, noise: np.ndarray) -> pa.Table:
    ids = [sample_id(index) for index in indices]
    images = [{"bytes": png(p), "path": f"{name}.png"} for name, p in zip(ids, pixels, strict=True)]
    columns: dict[str, Any] = {"image_id": ids, "index": list(indices), "image": images}
    if keys is not None:
        columns["watermark"] = [keys.of(index) for index in indices]
    arrays = [pa.array(columns[f.name], f.type) for f in schema if f.name in columns]
    if "latent" in schema.names:
        tensor = schema.field("latent").type
        arrays.append(tensor_array(tensor, noise.astype(tensor.value_type.to_pandas_dtype())))
    return pa.table(arrays, schema=schema)
