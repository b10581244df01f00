"""What a worker does with a shard of images: encode it, or reconstruct it; and how the images come to it."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from torch import Tensor

from model.schedule import Ladder
from pipeline.decode import Preprocess
from pipeline.device import Model, stopwatch
from pipeline.latents import ShardWriter, check_made, latent_rows, latent_writer, read_latents
from pipeline.metrics import psnr, round_trip_error, to_model, to_pixels
from pipeline.pictures import png
from pipeline.read import Batch, read_batches
from pipeline.records import ERROR_SCHEMA, Image, Shard, latent_schema
from pipeline.sources import Collection
from pipeline.storage import Folder
from pipeline.worker import Receipt

RECONSTRUCTIONS = "reconstructions"
STRICTER = (1e-4, 1e-6)  # tolerances of the further tries of an image that is to come back to the bit
MOST_CORRECTIONS = 50  # a step, in those
READ_AHEAD = 2  # batches that a reader may be ahead of the device


def noise_index(name: str) -> int:
    """The index of the noise of what is named so: from the name alone, as no shard or batch may change it."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


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
                for levels in self.ladders:
                    decoded = model.decode(torch.from_numpy(latents), levels)
                    rows = list(_compare(stored, found, decoded, len(levels) - 1))
                    out.add(pa.Table.from_pylist(rows, ERROR_SCHEMA))
                images += len(stored)
                model.advance(len(stored))
            seconds = spent()
            written = out.commit(seconds, {"images": images, "uncompared": missing})
            return Receipt(shard.name, images, 0, **seconds, bytes=written)


class _Originals:
    """The originals of a shard, read again in the plan's order, which is the order of the latents too."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self.waiting: dict[str, Image | str] = {}

    def find(self, image_id: str, content_hash: str) -> Image | str:
        """The image, or why there is none to compare with: `changed`, or a reject's reason."""
        while image_id not in self.waiting:
            batch = next(self.batches, None)
            if batch is None:
                return "missing"
            self.waiting |= {image.image_id: image for image in batch.images}
            self.waiting |= {reject.image_id: reject.reason for reject in batch.rejects}
        found = self.waiting.pop(image_id)
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
