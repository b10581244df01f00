"""Stored latents -> images, compared with the originals: `reconstructions/<shard>.parquet`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from palindrome.model.ladder import Ladder
from palindrome.pipeline.images.metrics import errors_apart, psnr, round_trip_error, to_model, to_pixels
from palindrome.pipeline.images.pixels import picture
from palindrome.pipeline.images.records import Image, Shard
from palindrome.pipeline.runs.kinds import RECONSTRUCTIONS
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runs.schemas import error_schema
from palindrome.pipeline.runs.shards import ShardWriter, check_made, read_latents
from palindrome.pipeline.runtime.device import Model, stopwatch
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.originals import Originals


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
        originals = Originals(self.reader.batches(shard))
        schema = error_schema(model.checkpoint.autoencoded)
        with ShardWriter(self.run, RECONSTRUCTIONS, shard.name, schema, self.metadata, once=True) as out:
            images = missing = 0
            for stored, latents in read_latents(self.latents, shard.name, self.reader.batch_size):
                found = [originals.find(row["image_id"], row["content_hash"]) for row in stored]
                missing += sum(isinstance(original, str) for original in found)
                condition = model.condition(stored)
                floor = list(_autoencoded(model, found))
                for levels in self.ladders:
                    decoded = model.decode_both(torch.from_numpy(latents), levels, condition)
                    rows = list(_compare(stored, found, floor, *decoded, len(levels) - 1))
                    out.add(pa.Table.from_pylist(rows, schema))
                images += len(stored)
                model.advance(len(stored))
            seconds = spent()
            written = out.commit(seconds, {"images": images, "uncompared": missing})
            return Receipt(shard.name, images, 0, **seconds, bytes=written)


def _autoencoded(model: Model, originals: list[Image | str]) -> Iterator[tuple[Tensor, Tensor] | None]:
    """Of each original the state and what the autoencoder makes of it, [1, C, H, W] each; None without either."""
    there = [original for original in originals if isinstance(original, Image)]
    if not (model.checkpoint.autoencoded and there):
        yield from (None for _ in originals)
        return
    made = zip(*model.autoencode(to_model(np.stack([original.pixels for original in there]))), strict=True)
    for original in originals:
        state, image = next(made) if isinstance(original, Image) else (None, None)
        yield None if state is None or image is None else (state[None], image[None])


def _compare(
    rows: list[dict[str, Any]],
    originals: list[Image | str],
    floor: list[tuple[Tensor, Tensor] | None],
    states: Tensor,
    decoded: Tensor,
    steps: int,
) -> Iterator[dict[str, Any]]:
    for i, (row, original, pixels) in enumerate(zip(rows, originals, to_pixels(decoded), strict=True)):
        result = {"image_id": row["image_id"], "source": row["source"], "steps": steps}
        result["image"] = picture(row["image_id"], pixels)
        if isinstance(original, str):
            yield {**result, "status": original}
            continue
        x, wanted = to_model(original.pixels[None]), original.pixels
        mse = float(round_trip_error(x, decoded[i][None])[0])
        if (made := floor[i]) is not None:
            [wanted] = to_pixels(made[1])
            apart = errors_apart(x, decoded[i][None], states[i][None], made)
            result |= {error: float(value[0]) for error, value in apart.items()}
            result["vae_image"] = picture(row["image_id"], wanted)
        identical = float((wanted == pixels).mean())
        yield {**result, "status": "compared", "mse": mse, "psnr": psnr(mse), "identical": identical}
