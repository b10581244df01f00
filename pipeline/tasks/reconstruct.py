"""Stored latents -> images, compared with the originals: `reconstructions/<shard>.parquet`."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from palindrome.model.ladder import Ladder
from palindrome.pipeline.images.metrics import psnr, round_trip_error, to_model, to_pixels
from palindrome.pipeline.images.pixels import png
from palindrome.pipeline.images.read import Batch
from palindrome.pipeline.images.records import Image, Shard
from palindrome.pipeline.runs.kinds import RECONSTRUCTIONS
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runs.schemas import ERROR_SCHEMA
from palindrome.pipeline.runs.shards import ShardWriter, check_made, read_latents
from palindrome.pipeline.runtime.device import Model, stopwatch
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.storage.folder import Folder


@dataclass(frozen=True)
class Reconstruct:
    """`latents/<shard>.parquet` of an encode run -> `reconstructions/<shard>.parquet`, compared with the originals."""

    run: Folder
    latents: Folder
    reader: Reader
    ladders: tuple[Ladder, ...]
    metadata: Mapping[str, Any]

    def process(self, model: Model, shard: Shard) -> Receipt:
        spent = stopwatch(model)
        check_made(self.latents, shard.name)
        originals = _Originals(self.reader.batches(shard))
        with ShardWriter(self.run, RECONSTRUCTIONS, shard.name, ERROR_SCHEMA, self.metadata, once=True) as out:
            images = missing = 0
            for stored, latents in read_latents(self.latents, shard.name, self.reader.batch_size):
                found = [originals.find(row["image_id"], row["content_hash"]) for row in stored]
                missing += sum(isinstance(original, str) for original in found)
                condition = model.checkpoint.condition(stored)
                for levels in self.ladders:
                    decoded = model.decode(torch.from_numpy(latents), levels, condition)
                    rows = list(_compare(stored, found, decoded, len(levels) - 1))
                    out.add(pa.Table.from_pylist(rows, ERROR_SCHEMA))
                images += len(stored)
                model.advance(len(stored))
            seconds = spent()
            written = out.commit(seconds, {"images": images, "uncompared": missing})
            return Receipt(shard.name, images, 0, **seconds, bytes=written)


class _Originals:
    """The originals of a shard, read again. They come in the plan's order, as the latents do."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self.buffered: dict[str, Image | str] = {}

    def find(self, image_id: str, content_hash: str) -> Image | str:
        """The image, or why there is none to compare with: `missing`, `changed`, or a reject's reason."""
        while image_id not in self.buffered:
            batch = next(self.batches, None)
            if batch is None:
                return "missing"
            self.buffered |= {image.image_id: image for image in batch.images}
            self.buffered |= {reject.image_id: reject.reason for reject in batch.rejects}
        found = self.buffered.pop(image_id)
        return found if isinstance(found, str) or found.content_hash == content_hash else "changed"


def _compare(
    rows: list[dict[str, Any]], originals: list[Image | str], decoded: Tensor, steps: int
) -> Iterator[dict[str, Any]]:
    for row, original, x, pixels in zip(rows, originals, decoded, to_pixels(decoded), strict=True):
        name = re.sub(r"[^\w.-]+", "_", row["image_id"]).strip(".") + ".png"
        result = {"image_id": row["image_id"], "source": row["source"], "steps": steps}
        result["image"] = {"bytes": png(pixels), "path": name}
        if isinstance(original, str):
            yield {**result, "status": original}
            continue
        mse = float(round_trip_error(to_model(original.pixels[None]), x[None])[0])
        identical = float((original.pixels == pixels).mean())
        yield {**result, "status": "compared", "mse": mse, "psnr": psnr(mse), "identical": identical}
