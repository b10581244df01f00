"""What a worker does with a shard of images: encode it, or reconstruct it; and how the images come to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palindrome.model.schedule import Ladder
from palindrome.pipeline.images.metrics import psnr, round_trip_error, to_model, to_pixels
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runs.schemas import latent_schema
from palindrome.pipeline.runs.shards import latent_rows, latent_writer
from palindrome.pipeline.runtime.device import Model, stopwatch
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.storage.folder import Folder

STRICTER = (1e-4, 1e-6)  # tolerances of the further tries of an image that is to come back to the bit
MOST_CORRECTIONS = 50  # a step, in those


@dataclass(frozen=True)
class Encode:
    """Images -> `latents/<shard>.parquet`. `exact` tries again what does not come back to the bit; shards that are
    there are written over only where they are to be encoded `again`."""

    run: Folder
    reader: Reader
    levels: Ladder
    corrections: int
    tolerance: float
    exact: bool
    dtype: str
    measure: bool
    metadata: Mapping[str, Any]
    again: bool = False

    def process(self, model: Model, shard: Shard) -> Receipt:
        spent = stopwatch(model)
        size, channels = self.reader.how.size, self.reader.how.channels
        schema = latent_schema((channels, size, size), self.dtype, self.reader.collection.kept)
        with latent_writer(self.run, shard.name, schema, self.metadata, once=not self.again) as out:
            for batch in self.reader.batches(shard):
                rows = None
                if batch.images:
                    x = to_model(np.stack([image.pixels for image in batch.images]))
                    how = self.levels, self.corrections, self.tolerance, self.exact, self.dtype, self.measure
                    latents, found = latents_of(model, x, *how)
                    rows = latent_rows(schema, batch.images, latents.numpy(), found)
                out.add(rows, batch.rejects)
                model.advance(len(batch.images))
            seconds = spent()
            written = out.commit(seconds)
            return Receipt(shard.name, out.rows, out.refused, **seconds, bytes=written)


def latents_of(
    model: Model,
    x: Tensor,
    levels: Ladder,
    corrections: int,
    tolerance: float,
    exact: bool,
    dtype: str,
    measured: bool = False,
) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Images in [-1, 1] -> their latents as stored, and the columns of records.MEASURED that are known."""
    stored = getattr(torch, dtype)
    latents, residual, nfe = model.encode(x, levels, corrections, tolerance)
    latents = latents.to(stored)
    found = {"residual": residual.numpy(), "nfe": nfe.numpy()}
    if not (measured or exact):
        return latents, found
    found |= measure(x, model.decode(latents.float(), levels))
    for stricter in STRICTER if exact else ():
        left = np.flatnonzero(found["identical"] < 1)
        if not len(left):
            break
        again, residual, nfe = model.encode(x[left], levels, MOST_CORRECTIONS, stricter)
        again = again.to(stored)
        tried = measure(x[left], model.decode(again.float(), levels))
        found["nfe"][left] += nfe.numpy()
        better = tried["mse"] < found["mse"][left]
        latents[left[better]] = again[better]
        for name, values in {"residual": residual.numpy(), **tried}.items():
            found[name][left[better]] = values[better]
    return latents, found


def measure(x: Tensor, decoded: Tensor) -> dict[str, np.ndarray]:
    """mse, psnr (dB) and the share of identical 8-bit values, [B] each, of images [B, C, H, W] in [-1, 1]."""
    mse = round_trip_error(x, decoded)
    same = to_pixels(x) == to_pixels(decoded)
    return {"mse": mse, "psnr": np.array([psnr(e) for e in mse]), "identical": same.reshape(len(x), -1).mean(1)}
