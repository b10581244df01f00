"""Stored latents -> images on one or several ladders, the same or variations: `images/<shard>.parquet`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from palindrome.model.ddim import noise_index
from palindrome.model.ladder import Ladder
from palindrome.pipeline.images.metrics import check_finite, round_trip_error, to_pixels
from palindrome.pipeline.images.pixels import png
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.runs.kinds import IMAGES
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runs.schemas import REGENERATED_SCHEMA
from palindrome.pipeline.runs.selection import Selection
from palindrome.pipeline.runs.shards import ShardWriter, check_made, read_latents
from palindrome.pipeline.runtime.device import Model, stopwatch
from palindrome.pipeline.storage.folder import Folder


@dataclass(frozen=True)
class Regenerate:
    """Decodes the selected latents of a shard. `how` is passed to model.ddim.sample; with eta above 0 or sigma-hat,
    each variation has its own noise. The fraction `kept` of the steps is taken under what the images were encoded with,
    which is recorded in `source` as Checkpoint.told does."""

    run: Folder
    latents: Folder
    which: Selection
    ladders: tuple[Ladder, ...]
    variations: int
    seed: int
    how: Mapping[str, Any]
    batch_size: int
    metadata: Mapping[str, Any]
    source: Mapping[str, Any] = field(default_factory=dict)
    kept: float = 0.0

    def process(self, model: Model, shard: Shard) -> Receipt:
        spent = stopwatch(model)
        check_made(self.latents, shard.name)
        latents = images = 0
        with ShardWriter(self.run, IMAGES, shard.name, REGENERATED_SCHEMA, self.metadata, once=True) as out:
            for stored, x in read_latents(self.latents, shard.name, self.batch_size, self.which):
                for variation in range(self.variations):
                    for rows in self._decoded(model, stored, torch.from_numpy(x), variation):
                        out.add(pa.Table.from_pylist(rows, REGENERATED_SCHEMA))
                        images += len(rows)
                latents += len(stored)
                model.advance(len(stored))
            seconds = spent()
            written = out.commit(seconds, {"latents": latents, "images": images})
            return Receipt(shard.name, latents, 0, **seconds, bytes=written)

    def _decoded(
        self, model: Model, stored: Sequence[dict[str, Any]], x: Tensor, variation: int
    ) -> Iterator[list[dict[str, Any]]]:
        """Rows of one variation of a batch, ladder by ladder, the longest first."""
        indices = [noise_index(f"{variation}/{row['image_id']}") for row in stored]
        condition, longest = model.condition(stored), None
        source = model.condition(stored, model.checkpoint.as_told(self.source)) if self.kept else None
        for levels in sorted(self.ladders, key=len, reverse=True):
            # Clamped as in the stored PNGs, whose distances are measured.
            images = model.vary(x, levels, self.seed, indices, condition, source, self.kept, **self.how)
            images = images.clamp(-1, 1)
            check_finite(images, [row["image_id"] for row in stored])
            longest = images if longest is None else longest
            distances = round_trip_error(longest, images)
            yield [
                {
                    "image_id": row["image_id"],
                    "source": row["source"],
                    "steps": len(levels) - 1,
                    "variation": variation,
                    "to_longest": float(distance),
                    "image": {"bytes": png(pixels), "path": None},
                }
                for row, pixels, distance in zip(stored, to_pixels(images), distances, strict=True)
            ]
