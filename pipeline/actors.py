"""What runs where the model is: a shard in, a committed file out."""

import ctypes
import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.ddim import Network, noise_stream, sample
from model.engine import FLOAT32, Execution
from model.fit import epsilon_products
from model.inversion import invert_exactly
from model.schedule import Ladder
from pipeline.decode import Preprocess
from pipeline.latents import ShardWriter, check_made, latent_rows, latent_writer, read_latents
from pipeline.meters import Meters
from pipeline.metrics import psnr, round_trip_error, to_model, to_pixels
from pipeline.pictures import png
from pipeline.read import Batch, read_batches
from pipeline.records import ERROR_SCHEMA, Image, Shard, latent_schema
from pipeline.sources import Collection
from pipeline.storage import Folder

RECONSTRUCTIONS = "reconstructions"
Walk = Callable[[Network, Tensor], tuple[Tensor, ...]]  # along a ladder, of a batch: each result is [B, ...]
STRICTER = (1e-4, 1e-6)  # tolerances of the further tries of an image that is to come back to the bit
MOST_CORRECTIONS = 50  # a step, in those
READ_AHEAD = 2  # batches that a reader may be ahead of the device


@dataclass(frozen=True)
class Receipt:
    """What the driver learns of a committed shard: counts, seconds, bytes written."""

    shard: str
    images: int
    rejects: int
    seconds: float
    device_seconds: float
    bytes: int


@dataclass
class Flight:
    """How far a shard is: images done, and how often anything has happened to it; `queued` where it waits for the
    device, while what happens to the other shard counts for it too."""

    shard: str
    images: int = 0
    events: int = 0
    queued: bool = False


class _Clock(threading.local):
    """Seconds on the device, of the thread that asks: two shards overlap in a process, one a thread."""

    seconds = 0.0


def _keep_memory() -> None:
    """Has glibc keep what a layer's activations took for the next layer's: to give it back to the system and take it
    again, page by page, costs a CPU up to a fifth of its time."""
    settings = {-8: 1, -3: 32 << 20, -1: 2**31 - 1, -2: 256 << 20}  # M_ARENA_MAX, M_MMAP_THRESHOLD, _TRIM_, M_TOP_PAD
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in settings.items():
            mallopt(parameter, value)


class Model:
    """A network on this process's device. Latents and images go in and come out as float32 [B, C, H, W]."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        threads: int | None = None,
        meters: Meters | None = None,
        execution: Execution = FLOAT32,
    ) -> None:
        if torch.cuda.is_available():
            device = "cuda"
        else:
            device = "cpu"
            _keep_memory()
            torch.set_num_threads(threads or torch.get_num_threads())
        self.network = checkpoint.engine(device, execution)
        self.checkpoint, self.device = checkpoint, torch.device(device)
        self.lock = threading.Lock()  # shards overlap in this process, and the device takes one batch at a time
        self.clock = _Clock()
        self.flights: dict[int, Flight] = {}  # by the shard's thread
        self.largest = 2**31  # the largest batch that is known to fit, once one did not
        self.meters = meters

    def advance(self, images: int) -> None:
        """Tells the driver that one more batch of this thread's shard is done, with so many images."""
        flight = self._flight()
        flight.images, flight.events = flight.images + images, flight.events + 1
        if self.meters:
            self.meters.batch(images)

    def _flight(self) -> Flight:
        """Of this thread's shard; one that nobody asks for where a shard is not what is worked on."""
        return self.flights.get(threading.get_ident()) or Flight("")

    def encode(
        self, x: Tensor, levels: Ladder, corrections: int = 0, tolerance: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images in [-1, 1] -> x at the ladder's top, the residuals [B] and the network evaluations [B], as
        model.inversion says; the paper's inversion is `corrections` = 0."""
        along = self._along(levels)
        return self._on_device(
            lambda net, x: invert_exactly(net, x, corrections=corrections, tolerance=tolerance, **along), x
        )

    def epsilon_products(self, x: Tensor, levels: Ladder) -> Tensor:
        """As model.fit says, of images in [-1, 1]."""
        along = self._along(levels)
        return self._on_device(lambda net, x: (epsilon_products(net, x, **along),), x)[0]

    def decode(self, x: Tensor, levels: Ladder) -> Tensor:
        """x at the ladder's top -> images about [-1, 1], by DDIM with eta = 0."""
        along = self._along(levels)
        return self._on_device(lambda net, x: (sample(net, x, **along),), x)[0]

    def generate(self, seed: int, indices: Sequence[int], levels: Ladder, **how: Any) -> tuple[Tensor, Tensor]:
        """x_T of the samples of that seed with those indices, and their images about [-1, 1]; `how` goes to
        model.ddim.sample (eta, use_sigma_hat, clip). The noise of a sample depends on seed and index alone."""
        along, c = self._along(levels), self.checkpoint.config
        shape = (c.in_channels, c.sample_size, c.sample_size)

        def walk(net: Network, indices: Tensor) -> tuple[Tensor, Tensor]:
            noise = noise_stream(seed, indices.tolist(), shape)
            x = next(noise).to(self.device)
            return x, sample(net, x, noise=noise, **along, **how)

        return self._on_device(walk, torch.tensor(indices))

    def vary(self, x: Tensor, levels: Ladder, seed: int, indices: Sequence[int], **how: Any) -> Tensor:
        """x at the ladder's top -> images about [-1, 1], with the noise of the samples of that seed with those indices,
        one for each x; `how` goes to model.ddim.sample."""
        along = self._along(levels)

        def walk(net: Network, rows: Tensor) -> tuple[Tensor]:
            noise = noise_stream(seed, [indices[row] for row in rows.tolist()], x.shape[1:])
            return (sample(net, x[rows.cpu()].to(self.device), noise=noise, **along, **how),)

        return self._on_device(walk, torch.arange(len(x)))[0]

    def _along(self, levels: Ladder) -> dict[str, Any]:
        """What the functions of `model` are told of a ladder and this checkpoint."""
        return {
            "levels": levels,
            "schedule": self.checkpoint.schedule,
            "prediction_type": self.checkpoint.prediction_type,
        }

    def _on_device(self, walk: Walk, batch: Tensor) -> Any:
        flight = self._flight()
        flight.queued = True
        with self.lock:
            flight.queued = False
            started = time.monotonic()
            try:
                return self._in_parts(walk, batch)
            finally:
                seconds = time.monotonic() - started
                self.clock.seconds += seconds
                if self.meters:
                    self.meters.device(seconds)

    def _in_parts(self, walk: Walk, batch: Tensor) -> tuple[Tensor, ...]:
        """The whole batch at once, or halves where the device has not enough memory for it."""
        if len(batch) > self.largest:
            parts = [self._in_parts(walk, part) for part in batch.split(self.largest)]
            return tuple(torch.cat(results) for results in zip(*parts, strict=True))
        flight = self._flight()

        def network(x: Tensor, timestep: int) -> Tensor:
            flight.events += 1
            return self.network(x, timestep)

        try:
            return tuple(result.cpu() for result in walk(network, batch.to(self.device)))
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        torch.cuda.empty_cache()
        self.largest = len(batch) // 2
        return self._in_parts(walk, batch)


def noise_index(name: str) -> int:
    """The index of the noise of what is named so: from the name alone, as no shard or batch may change it."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def stopwatch(model: Model) -> Callable[[], dict[str, float]]:
    """Called later, it gives the seconds since, and those of them that this thread had the device."""
    started, device = time.monotonic(), model.clock.seconds
    return lambda: {
        "seconds": round(time.monotonic() - started, 3),
        "device_seconds": round(model.clock.seconds - device, 3),
    }


class Work(Protocol):
    """What a job does with one shard."""

    def process(self, model: "Model", shard: Shard) -> Receipt: ...


class ShardActor:
    """The Ray actor of every job: holds the model, works on a shard or two at a time."""

    def __init__(self, work: Work, checkpoint: Checkpoint, threads: int | None, execution: Execution) -> None:
        self.meters = Meters(type(work).__name__.lower())
        self.work, self.model = work, Model(checkpoint, threads, self.meters, execution)

    def ready(self) -> None:
        """Returns once the constructor has."""

    def process(self, shard: Shard) -> Receipt:
        self.model.flights[threading.get_ident()] = Flight(shard.name)
        try:
            receipt = self.work.process(self.model, shard)
            self.meters.shard(receipt.rejects, receipt.bytes)
            return receipt
        finally:
            del self.model.flights[threading.get_ident()]

    def in_flight(self) -> list[Flight]:
        """How far the shards are that are not done."""
        flights = list(self.model.flights.values())
        events = sum(flight.events for flight in flights)
        return [replace(flight, events=events if flight.queued else flight.events) for flight in flights]


@ray.remote(num_cpus=1, num_returns="streaming", max_retries=3, _generator_backpressure_num_objects=READ_AHEAD)
def _read_task(collection: Collection, shard: Shard, how: Preprocess, batch_size: int) -> Iterator[Batch]:
    yield from read_batches(collection, shard, how, batch_size)


@dataclass(frozen=True)
class Reader:
    """How a shard's images come to the actor: read and decoded by streaming CPU tasks, or in the actor's own thread."""

    collection: Collection
    how: Preprocess
    batch_size: int
    by_tasks: bool

    def batches(self, shard: Shard) -> Iterator[Batch]:
        if not self.by_tasks:
            yield from read_batches(self.collection, shard, self.how, self.batch_size)
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
