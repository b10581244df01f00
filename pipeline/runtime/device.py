"""The network on this process's device, and the threads that compute with it."""

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from palindrome.model.condition import Condition
from palindrome.model.ddim import Network, noise_stream, sample
from palindrome.model.execution import FLOAT32, Execution
from palindrome.model.families import Checkpoint
from palindrome.model.fit import epsilon_products
from palindrome.model.inversion import invert_exactly
from palindrome.model.schedule import Ladder
from palindrome.pipeline.base.errors import RunError
from palindrome.pipeline.images.metrics import finite
from palindrome.pipeline.runtime.telemetry import Meters

# Along a ladder, of a batch [B, ...] and its condition: each result is [B, ...].
Walk = Callable[[Network, Tensor, Condition | None], tuple[Tensor, ...]]
MOST_LANES = 4  # in a process, which has one lock of Python's for all
SWITCH = 1e-5  # seconds that one may keep the lock while another waits: some layers take less than Python's 5 ms


@dataclass
class ShardProgress:
    """How far a shard is: images done, and how often anything has happened to it; `queued` where it waits for the
    device, while what happens to the other shard counts for it too."""

    shard: str
    images: int = 0
    events: int = 0
    queued: bool = False


class Cancelled(Exception):
    """The run has ended; what this shard would have been does not matter."""


class _Clock(threading.local):
    """Seconds on the device, of the thread that asks: two shards overlap in a process, one a thread."""

    seconds = 0.0


class _Lanes:
    """Threads of a CPU that walk along the ladder side by side, each with its part of a batch, and with as many threads
    more as are left. Parts with a thread each wait for each other once a batch; threads that share each layer, after
    each layer. The thread that asks computes alone from then on."""

    def __init__(self, threads: int, most: int) -> None:
        self.count = min(threads, most)
        compute_alone()
        self._pool = ThreadPoolExecutor(self.count, "lane", _compute_with, (threads // self.count,))

    def __call__(
        self, walk: Callable[[Tensor, Condition | None], tuple[Tensor, ...]], batch: Tensor, condition: Condition | None
    ) -> tuple[Tensor, ...]:
        rows = torch.arange(len(batch)).tensor_split(min(self.count, len(batch)))
        walks = [self._pool.submit(walk, *part) for part in _parts(batch, condition, rows)]
        wait(walks)
        return _joined(each.result() for each in walks)


def _compute_with(threads: int) -> None:
    """Has torch use so many threads for what the calling one asks of it."""
    torch.set_num_threads(threads)
    torch.get_num_threads()  # by the first such call, a thread takes what any other has set last


def compute_alone() -> None:
    """Has torch use the calling thread alone for what that asks of it. Each thread that shares its work has helpers of
    its own, and where all together are more than the cores, OpenMP sends the lanes' to sleep after each layer."""
    _compute_with(1)


def _parts(
    batch: Tensor, condition: Condition | None, parts: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Condition | None]]:
    """Those rows; each part is consecutive."""
    for rows in parts:
        where = slice(int(rows[0]), int(rows[-1]) + 1)
        yield batch[where], None if condition is None else condition[where]


def _joined(parts: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    first, *others = parts
    return tuple(map(torch.cat, zip(first, *others, strict=True))) if others else first


class Model:
    """A network on this process's device. Latents and images go in and come out as float32 [B, C, H, W].

    With `threads`, it computes on a CPU with so many of its own, and the caller's computes alone from then on; without,
    in the caller's, as torch is set.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        threads: int | None = None,
        meters: Meters | None = None,
        execution: Execution = FLOAT32,
    ) -> None:
        device, self.lanes = "cuda" if torch.cuda.is_available() else "cpu", None
        if device == "cpu" and threads:
            self.lanes = _Lanes(threads, 1 if execution.compiled else MOST_LANES)
        self.network = checkpoint.denoiser(device, execution)
        self.checkpoint, self.device = checkpoint, torch.device(device)
        self.lock = threading.Lock()  # shards overlap in this process, and the device takes one batch at a time
        self.clock = _Clock()
        self.flights: dict[int, ShardProgress] = {}  # by the shard's thread
        self.largest = 2**31  # the largest batch that is known to fit, once one did not
        self.meters = meters
        self.proved = False  # whether it has had a finite output
        self.cancelled = threading.Event()  # once it is set, whatever is under way ends at its next evaluation

    def advance(self, images: int) -> None:
        """Tells the driver that one more batch of this thread's shard is done, with so many images."""
        flight = self._flight()
        flight.images, flight.events = flight.images + images, flight.events + 1
        if self.meters:
            self.meters.batch(images)

    @contextmanager
    def tracking(self, shard: str) -> Iterator[None]:
        """Within it, what this thread does is for that shard."""
        self.flights[threading.get_ident()] = ShardProgress(shard)
        try:
            yield
        finally:
            del self.flights[threading.get_ident()]

    def in_flight(self) -> list[ShardProgress]:
        """How far the shards are that are being worked on."""
        flights = list(self.flights.values())
        events = sum(flight.events for flight in flights)
        return [replace(flight, events=events if flight.queued else flight.events) for flight in flights]

    def _flight(self) -> ShardProgress:
        """Of this thread's shard; one that nobody asks for where a shard is not what is worked on."""
        return self.flights.get(threading.get_ident()) or ShardProgress("")

    def encode(
        self,
        images: Tensor,
        levels: Ladder,
        corrections: int = 0,
        tolerance: float = 0.0,
        condition: Condition | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images in [-1, 1] -> x at the ladder's top, the residuals [B] and the network evaluations [B], as
        model.inversion says; the paper's inversion is `corrections` = 0. Raises RunError where the model's first
        outputs are all not finite."""
        how = {**self._along(levels), "corrections": corrections, "tolerance": tolerance}

        def walk(net: Network, images: Tensor, condition: Condition | None) -> tuple[Tensor, Tensor, Tensor]:
            return invert_exactly(net, self.checkpoint.to_state(images), condition=condition, **how)

        return self._checked(images, self._on_device(walk, images, condition))

    def epsilon_products(self, images: Tensor, levels: Ladder, condition: Condition | None = None) -> Tensor:
        """As model.fit says, of images in [-1, 1]."""
        along = self._along(levels)

        def walk(net: Network, images: Tensor, condition: Condition | None) -> tuple[Tensor]:
            return (epsilon_products(net, self.checkpoint.to_state(images), condition=condition, **along),)

        return self._on_device(walk, images, condition)[0]

    def decode(self, x: Tensor, levels: Ladder, condition: Condition | None = None) -> Tensor:
        """x at the ladder's top -> images about [-1, 1], by DDIM with eta = 0."""
        along = self._along(levels)

        def walk(net: Network, x: Tensor, condition: Condition | None) -> tuple[Tensor]:
            return (self.checkpoint.to_images(sample(net, x, condition=condition, **along)),)

        return self._on_device(walk, x, condition)[0]

    def generate(
        self, seed: int, indices: Sequence[int], levels: Ladder, condition: Condition | None = None, **how: Any
    ) -> tuple[Tensor, Tensor]:
        """x_T of the samples of that seed with those indices, and their images about [-1, 1]; `how` goes to
        model.ddim.sample (eta, use_sigma_hat, clip). The noise of a sample depends on seed and index alone."""
        along, shape = self._along(levels), self.checkpoint.latent_shape

        def walk(net: Network, indices: Tensor, condition: Condition | None) -> tuple[Tensor, Tensor]:
            noise = noise_stream(seed, indices.tolist(), shape)
            x = next(noise).to(self.device)
            state = sample(net, x, noise=noise, condition=condition, **along, **how)
            return x, self.checkpoint.to_images(state)

        x, images = self._on_device(walk, torch.tensor(indices), condition)
        self._checked(x, (images,))
        return x, images

    def vary(
        self,
        x: Tensor,
        levels: Ladder,
        seed: int,
        indices: Sequence[int],
        condition: Condition | None = None,
        **how: Any,
    ) -> Tensor:
        """x at the ladder's top -> images about [-1, 1], with the noise of the samples of that seed with those indices,
        one for each x; `how` goes to model.ddim.sample."""
        along = self._along(levels)

        def walk(net: Network, rows: Tensor, condition: Condition | None) -> tuple[Tensor]:
            noise = noise_stream(seed, [indices[row] for row in rows.tolist()], x.shape[1:])
            state = sample(net, x[rows.cpu()].to(self.device), noise=noise, condition=condition, **along, **how)
            return (self.checkpoint.to_images(state),)

        return self._checked(x, self._on_device(walk, torch.arange(len(x)), condition))[0]

    def _along(self, levels: Ladder) -> dict[str, Any]:
        """What the functions of `model` are told of a ladder and this checkpoint."""
        return {
            "levels": levels,
            "schedule": self.checkpoint.schedule,
            "prediction_type": self.checkpoint.prediction_type,
        }

    def _on_device(self, walk: Walk, batch: Tensor, condition: Condition | None) -> Any:
        flight = self._flight()
        flight.queued = True
        with self.lock:
            flight.queued = False
            started = time.monotonic()
            try:
                whole = partial(self._in_parts, walk, flight)
                return self.lanes(whole, batch, condition) if self.lanes else whole(batch, condition)
            finally:
                seconds = time.monotonic() - started
                self.clock.seconds += seconds
                if self.meters:
                    self.meters.device(seconds)

    def _checked(self, batch: Tensor, found: Any) -> Any:
        """What was found of a batch. Raises RunError where the first batch of finite inputs has not one finite output:
        a model that diverged in training, or whose activations overflow in this precision, has no other."""
        if not self.proved and finite(batch).any():
            self.proved = bool(finite(found[0]).any())
            if not self.proved:
                raise RunError(f"the model's outputs are not finite (NaN or infinite) for all of {len(batch)} images")
        return found

    def _in_parts(
        self, walk: Walk, flight: ShardProgress, batch: Tensor, condition: Condition | None
    ) -> tuple[Tensor, ...]:
        """The whole batch at once, or halves where the device has not enough memory for it."""
        if len(batch) > self.largest:
            parts = _parts(batch, condition, torch.arange(len(batch)).split(self.largest))
            return _joined(self._in_parts(walk, flight, *part) for part in parts)

        def network(x: Tensor, *told: Any) -> Tensor:
            if self.cancelled.is_set():
                raise Cancelled
            flight.events += 1
            return self.network(x, *told)

        try:
            there = None if condition is None else condition.to(self.device)
            return tuple(result.cpu() for result in walk(network, batch.to(self.device), there))
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        torch.cuda.empty_cache()
        self.largest = len(batch) // 2
        return self._in_parts(walk, flight, batch, condition)


def tune_process(model: Model) -> None:
    """Tunes malloc and the interpreter for a model on a CPU. Only for a Ray worker: these are settings of the whole
    process, and a notebook's are the user's. Were they environment variables in `runtime_env`, Ray would start a new
    worker for each actor instead of taking an idle one: 0.8 s more."""
    if model.device.type != "cpu":
        return
    if model.lanes:
        sys.setswitchinterval(SWITCH)
    # glibc is to keep what a layer's activations took for the next layer's: giving it back to the system and taking it
    # again, page by page, costs a CPU up to a fifth of its time. M_ARENA_MAX and so on, of malloc.h:
    arenas, mmap_threshold, trim_threshold, top_pad = -8, -3, -1, -2
    threads = 1 + (model.lanes.count if model.lanes else 0)
    settings = {arenas: threads, mmap_threshold: 32 << 20, trim_threshold: 2**31 - 1, top_pad: 256 << 20}
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in settings.items():
            mallopt(parameter, value)


def stopwatch(model: Model) -> Callable[[], dict[str, float]]:
    """Called later, it gives the seconds since, and those of them that this thread had the device."""
    started, device = time.monotonic(), model.clock.seconds
    return lambda: {
        "seconds": round(time.monotonic() - started, 3),
        "device_seconds": round(model.clock.seconds - device, 3),
    }
