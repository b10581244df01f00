"""The network on this process's device, and the threads that compute on a CPU."""

import ctypes
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from palindrome.model.condition import Condition
from palindrome.model.ddim import Network, noise_stream, sample
from palindrome.model.editing import Move, edit
from palindrome.model.execution import FLOAT32, Execution
from palindrome.model.families import Checkpoint, OfTexts
from palindrome.model.fit import epsilon_products
from palindrome.model.inversion import invert_exactly
from palindrome.model.ladder import Ladder
from palindrome.model.restoration import Masked, Operator, restore
from palindrome.pipeline.base.errors import RunError
from palindrome.pipeline.images.metrics import finite
from palindrome.pipeline.runtime.telemetry import ActorMetrics

# Computes along a ladder, from the network, a batch [B, ...] and its condition; each result is [B, ...].
Computation = Callable[[Network, Tensor, Condition | None], tuple[Tensor, ...]]
MAX_BATCH_THREADS = 4  # they share one global interpreter lock
SWITCH_INTERVAL = 1e-5  # seconds after which a thread yields that lock; Python's default of 5 ms exceeds some layers


@dataclass
class ShardProgress:
    """The progress of a shard in flight: images done, and events so far (batches read, network evaluations). While it
    is `queued` for the device, the other shard's events count for it too."""

    shard: str
    images: int = 0
    events: int = 0
    queued: bool = False


class Cancelled(Exception):
    """The run has ended: the shard is dropped."""


class _Clock(threading.local):
    """Device seconds of the calling thread: a process works on two shards, each in its own thread."""

    seconds = 0.0


class _BatchThreads:
    """Worker threads on a CPU, each of which computes one slice of a batch along the whole ladder; threads that are
    left over serve each of them within torch. Slices synchronise once per batch, torch's own threads after each layer.
    The constructor limits torch to one thread in the calling thread."""

    def __init__(self, threads: int, most: int) -> None:
        self.count = min(threads, most)
        use_one_torch_thread()
        self._pool = ThreadPoolExecutor(self.count, "batch", _set_torch_threads, (threads // self.count,))

    def __call__(
        self,
        compute: Callable[[Tensor, Condition | None], tuple[Tensor, ...]],
        batch: Tensor,
        condition: Condition | None,
    ) -> tuple[Tensor, ...]:
        rows = torch.arange(len(batch)).tensor_split(min(self.count, len(batch)))
        futures = [self._pool.submit(compute, *part) for part in _slices(batch, condition, rows)]
        wait(futures)
        return _concatenated(future.result() for future in futures)


def _set_torch_threads(threads: int) -> None:
    """Sets the number of threads that torch uses for calls of the calling thread."""
    torch.set_num_threads(threads)
    torch.get_num_threads()  # a thread's first such call applies the number that any thread has set last


def use_one_torch_thread() -> None:
    """Limits torch to one thread for calls of the calling thread. Otherwise this thread would have OpenMP threads of
    its own, and with more of them than cores, OpenMP suspends the batch threads' after each layer."""
    _set_torch_threads(1)


def _slices(
    batch: Tensor, condition: Condition | None, parts: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Condition | None]]:
    """The batch and the condition at each of `parts`, which are consecutive row numbers."""
    for rows in parts:
        where = slice(int(rows[0]), int(rows[-1]) + 1)
        yield batch[where], None if condition is None else condition[where]


def _concatenated(parts: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    first, *others = parts
    return tuple(map(torch.cat, zip(first, *others, strict=True))) if others else first


class Model:
    """A network on this process's device. Latents and images are float32 [B, C, H, W], in and out.

    On a CPU with `threads`, it computes in that many threads of its own, and torch is limited to one thread in the
    caller's. Without, it computes in the caller's thread, with torch's settings.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        threads: int | None = None,
        metrics: ActorMetrics | None = None,
        execution: Execution = FLOAT32,
    ) -> None:
        device, self.batch_threads = "cuda" if torch.cuda.is_available() else "cpu", None
        if device == "cpu" and threads:
            self.batch_threads = _BatchThreads(threads, 1 if execution.compiled else MAX_BATCH_THREADS)
        self.network = checkpoint.denoiser(device, execution)
        self.autoencoder, self.text_encoder = checkpoint.autoencoder(device), checkpoint.text_encoder(device)
        self.checkpoint, self.device = checkpoint, torch.device(device)
        self.lock = threading.Lock()  # two shards are in flight, and the device computes one batch at a time
        self.clock = _Clock()
        self.progress: dict[int, ShardProgress] = {}  # by the id of the shard's thread
        self.max_batch = 2**31  # lowered once a batch did not fit into the device's memory
        self.metrics = metrics
        self.has_finite_output = False
        self.cancelled = threading.Event()  # once set, the next network evaluation raises Cancelled

    def advance(self, images: int) -> None:
        """Records that this thread's shard has finished a batch of `images` images."""
        progress = self._shard_progress()
        progress.images, progress.events = progress.images + images, progress.events + 1
        if self.metrics:
            self.metrics.batch(images)

    @contextmanager
    def tracking(self, shard: str) -> Iterator[None]:
        """Within the `with`, the calling thread's work counts as progress of that shard."""
        self.progress[threading.get_ident()] = ShardProgress(shard)
        try:
            yield
        finally:
            del self.progress[threading.get_ident()]

    def in_flight(self) -> list[ShardProgress]:
        """The progress of the shards in flight."""
        shards = list(self.progress.values())
        events = sum(shard.events for shard in shards)
        return [replace(shard, events=events if shard.queued else shard.events) for shard in shards]

    def _shard_progress(self) -> ShardProgress:
        """That of this thread's shard; outside of `tracking`, one that nothing reads."""
        return self.progress.get(threading.get_ident()) or ShardProgress("")

    def condition(self, rows: Sequence[Mapping[str, Any]], checkpoint: Checkpoint | None = None) -> Condition | None:
        """What the network is told of images with these columns; `checkpoint` is this one, told otherwise. Raises
        ValueError as Checkpoint.condition does."""
        return (checkpoint or self.checkpoint).condition(rows, self.text_encoder)

    def prompts_cut(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """How many of the images with these columns have a text that is longer than the network can be told."""
        encoder, model = self.text_encoder, self.checkpoint
        if encoder is None or not isinstance(model, OfTexts):
            return 0
        texts = Counter(model.texts(row) for row in rows)
        return sum(count for text, count in texts.items() if encoder.is_cut(text))

    def condition_of_all(self, count: int, checkpoint: Checkpoint | None = None) -> Condition | None:
        """`condition` of images without columns: noise, or frames between images."""
        return self.condition([{}] * count, checkpoint)

    def encode(
        self,
        images: Tensor,
        levels: Ladder,
        corrections: int = 0,
        tolerance: float = 0.0,
        condition: Condition | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images in [-1, 1] -> x at the ladder's top level, residuals [B] and network evaluations [B], as
        model.inversion.invert_exactly returns them; `corrections` = 0 is the paper's inversion. Raises RunError if the
        model's first outputs are all not finite."""
        how = {**self._along(levels), "corrections": corrections, "tolerance": tolerance}

        def compute(net: Network, images: Tensor, condition: Condition | None) -> tuple[Tensor, Tensor, Tensor]:
            return invert_exactly(net, self.autoencoder.to_state(images), condition=condition, **how)

        return self._checked(images, self._on_device(compute, images, condition))

    def epsilon_products(self, images: Tensor, levels: Ladder, condition: Condition | None = None) -> Tensor:
        """model.fit.epsilon_products of images in [-1, 1]."""
        along = self._along(levels)

        def compute(net: Network, images: Tensor, condition: Condition | None) -> tuple[Tensor]:
            return (epsilon_products(net, self.autoencoder.to_state(images), condition=condition, **along),)

        return self._on_device(compute, images, condition)[0]

    def measure(
        self,
        along: Callable[..., Mapping[str, Tensor]],
        images: Tensor,
        levels: Ladder,
        condition: Condition | None = None,
    ) -> dict[str, Tensor]:
        """What a function of model.scores says of images in [-1, 1]. Raises RunError as `encode` does."""
        names: tuple[str, ...] = ()

        def compute(net: Network, images: Tensor, condition: Condition | None) -> tuple[Tensor, ...]:
            nonlocal names
            found = along(net, self.autoencoder.to_state(images), condition=condition, **self._along(levels))
            names = tuple(found)
            return tuple(found.values())

        values = self._on_device(compute, images, condition)
        self._checked(images, (values[0][:, None],))
        return dict(zip(names, values, strict=True))

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """What a network of model.features makes of images [B, 3, S, S] in its range: features, and logits if any."""

        def compute(network: Network, images: Tensor, _: Condition | None) -> tuple[Tensor, ...]:
            found: Any = network(images)
            return tuple(found)

        found: tuple[Tensor, ...] = self._on_device(compute, images, None)
        return found

    def decode(self, x: Tensor, levels: Ladder, condition: Condition | None = None) -> Tensor:
        """x at the ladder's top level -> images, about in [-1, 1], by DDIM with eta = 0."""
        return self._decoded(x, levels, condition, lambda state: (self.autoencoder.to_images(state),))[0]

    def decode_both(self, x: Tensor, levels: Ladder, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        """x at the ladder's top level -> states x0, and their images, as `decode` makes them."""
        if not self.checkpoint.autoencoded:
            images = self.decode(x, levels, condition)
            return images, images
        state, images = self._decoded(x, levels, condition, lambda state: (state, self.autoencoder.to_images(state)))
        return state, images

    def partly_decode(self, x: Tensor, levels: Ladder, steps: int, condition: Condition | None = None) -> Tensor:
        """x at the ladder's top -> the state that many steps below, by DDIM with eta = 0."""
        return self._decoded(x, levels[len(levels) - 1 - steps :], condition, lambda state: (state,))[0]

    def _decoded(
        self,
        x: Tensor,
        levels: Ladder,
        condition: Condition | None,
        results: Callable[[Tensor], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """x at the ladder's top level -> `results` of the states x0."""
        along = self._along(levels)

        def compute(net: Network, x: Tensor, condition: Condition | None) -> tuple[Tensor, ...]:
            return results(sample(net, x, condition=condition, **along))

        found: tuple[Tensor, ...] = self._on_device(compute, x, condition)
        return found

    def attainable(self, images: Tensor) -> Tensor:
        """What a perfect inversion of images in [-1, 1] decodes to: the images themselves, or what the autoencoder
        makes of them."""
        return self.autoencode(images)[1] if self.checkpoint.autoencoded else images

    def autoencode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The states of images in [-1, 1], and what the autoencoder makes of them again."""

        def compute(_: Network, images: Tensor, __: Condition | None) -> tuple[Tensor, Tensor]:
            state = self.autoencoder.to_state(images)
            return state, self.autoencoder.to_images(state)

        return self._on_device(compute, images, None)

    def generate(
        self,
        seed: int,
        indices: Sequence[int],
        levels: Ladder,
        condition: Condition | None = None,
        mark: Callable[[Tensor, Sequence[int]], Tensor] | None = None,
        **how: Any,
    ) -> tuple[Tensor, Tensor]:
        """x_T of the samples `indices` of `seed`, and their images, about in [-1, 1]. The noise of a sample depends on
        the seed and its index only; `mark` may change its x_T. `how` is passed to model.ddim.sample (eta,
        use_sigma_hat, clip)."""
        along, shape = self._along(levels), self.checkpoint.latent_shape

        def compute(net: Network, indices: Tensor, condition: Condition | None) -> tuple[Tensor, Tensor]:
            noise = noise_stream(seed, indices.tolist(), shape)
            x = next(noise)
            x = (mark(x, indices.tolist()) if mark else x).to(self.device)
            state = sample(net, x, noise=noise, condition=condition, **along, **how)
            return x, self.autoencoder.to_images(state)

        x, images = self._on_device(compute, torch.tensor(indices), condition)
        self._checked(x, (images,))
        return x, images

    def vary(
        self,
        x: Tensor,
        levels: Ladder,
        seed: int,
        indices: Sequence[int],
        condition: Condition | None = None,
        source: Condition | None = None,
        kept: float = 0.0,
        **how: Any,
    ) -> Tensor:
        """x at the ladder's top level -> images, about in [-1, 1], with the noise of the samples `indices` of `seed`,
        one index per x; `how` is passed to model.ddim.sample. The fraction `kept` of the steps, from the top on, is
        taken under the condition `source`, the others under `condition`."""
        steps = len(levels) - 1
        first = round(kept * steps)
        if first:
            x = self._sampled(x, levels[steps - first :], (seed, indices, 0), source, False, how)
        images = self._sampled(x, levels[: steps - first + 1], (seed, indices, first), condition, True, how)
        return self._checked(x, (images,))[0]

    def _sampled(
        self,
        x: Tensor,
        levels: Ladder,
        noise: tuple[int, Sequence[int], int],
        condition: Condition | None,
        to_images: bool,
        how: Mapping[str, Any],
    ) -> Tensor:
        """x at the top of `levels` -> x at their lowest one, or its image. `noise` is the seed, the samples' indices,
        and how many draws the steps above took."""
        along, (seed, indices, drawn) = self._along(levels), noise

        def compute(net: Network, rows: Tensor, condition: Condition | None) -> tuple[Tensor]:
            draws = islice(noise_stream(seed, [indices[row] for row in rows.tolist()], x.shape[1:]), drawn, None)
            state = sample(net, x[rows.cpu()].to(self.device), noise=draws, condition=condition, **along, **how)
            return (self.autoencoder.to_images(state) if to_images else state,)

        return self._on_device(compute, torch.arange(len(x)), condition)[0]

    def restore(
        self,
        y: Tensor,
        operator: Operator,
        levels: Ladder,
        seed: int,
        indices: Sequence[int],
        condition: Condition | None = None,
        eta: float = 0.85,
    ) -> Tensor:
        """Observations y [B, ...] -> images with those observations, not clipped, by model.restoration.restore with the
        noise of the samples `indices` of `seed`. Through an autoencoder only of `Masked` images: what is known of their
        states is held to, and that of their pixels is put into what they decode to."""
        along, shape = self._along(levels), self.checkpoint.latent_shape

        def compute(net: Network, rows: Tensor, condition: Condition | None) -> tuple[Tensor]:
            rows = rows.cpu()
            seen, of = y[rows].to(self.device), operator.of(rows, self.device)
            how = {**along, "noise": noise_stream(seed, [indices[row] for row in rows.tolist()], shape)}
            if not self.checkpoint.autoencoded:
                return (restore(net, seen, of, condition=condition, eta=eta, **how),)
            assert isinstance(of, Masked)
            known = of.shrunk(*shape[1:])
            state = restore(net, self.autoencoder.to_state(seen), known, condition=condition, eta=eta, **how)
            return (of.project(self.autoencoder.to_images(state), seen),)

        return self._checked(y, self._on_device(compute, torch.arange(len(y)), condition))[0]

    def edit(
        self,
        x: Tensor,
        levels: Ladder,
        moves: Sequence[Move],
        source: Condition | None = None,
        condition: Condition | None = None,
        kept: float = 0.0,
        known: Tensor | None = None,
        originals: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """x at the ladder's top -> images, about in [-1, 1], by model.editing.edit: of its own path under `source`, and
        of an edited one for each of `moves`. Without a `condition` nothing else is told; without `known` [B, 1, H, W]
        all may change. Through an autoencoder what is known of the states is held to, and the known pixels of the
        `originals`, which are needed then, are put into what they decode to."""
        along, shape = self._along(levels), self.checkpoint.latent_shape
        held = None if known is None else Masked(known)

        def compute(net: Network, rows: Tensor, source: Condition | None) -> tuple[Tensor, ...]:
            rows = rows.cpu()
            told = source if condition is None else condition[rows].to(self.device)
            of = None if held is None else held.of(rows, self.device)
            pasted = self.checkpoint.autoencoded and of is not None
            there = None if of is None else (of.shrunk(*shape[1:]) if pasted else of).known
            how = {**along, "source": source, "condition": told, "kept": kept, "known": there}
            own, edits = edit(net, x[rows].to(self.device), moves=moves, **how)
            images = [self.autoencoder.to_images(state) for state in (own, *edits)]
            if of is not None and pasted:
                assert originals is not None
                original = originals[rows].to(self.device)
                images[1:] = [of.project(image, original) for image in images[1:]]
            return tuple(images)

        found: tuple[Tensor, ...] = self._checked(x, self._on_device(compute, torch.arange(len(x)), source))
        return found

    def _along(self, levels: Ladder) -> dict[str, Any]:
        """The arguments that describe the ladder and this checkpoint to the functions of `model`."""
        return {"levels": levels, "process": self.checkpoint.process}

    def _checked(self, batch: Tensor, outputs: Any) -> Any:
        """The outputs for a batch. Raises RunError if the first batch of finite inputs has not one finite output: a
        model that diverged in training, or whose activations overflow in this precision, has no other."""
        if not self.has_finite_output and finite(batch).any():
            self.has_finite_output = bool(finite(outputs[0]).any())
            if not self.has_finite_output:
                raise RunError(f"the model's outputs are not finite (NaN or infinite) for all of {len(batch)} images")
        return outputs

    def _on_device(self, compute: Computation, batch: Tensor, condition: Condition | None) -> Any:
        progress = self._shard_progress()
        progress.queued = True
        with self.lock:
            progress.queued = False
            started = time.monotonic()
            try:
                fitted = partial(self._within_memory, compute, progress)
                return self.batch_threads(fitted, batch, condition) if self.batch_threads else fitted(batch, condition)
            finally:
                seconds = time.monotonic() - started
                self.clock.seconds += seconds
                if self.metrics:
                    self.metrics.device(seconds)

    def _within_memory(
        self, compute: Computation, progress: ShardProgress, batch: Tensor, condition: Condition | None
    ) -> tuple[Tensor, ...]:
        """Computes the whole batch at once, or in microbatches if the device's memory is too small for it."""
        if len(batch) > self.max_batch:
            parts = _slices(batch, condition, torch.arange(len(batch)).split(self.max_batch))
            return _concatenated(self._within_memory(compute, progress, *part) for part in parts)

        def network(x: Tensor, *inputs: Any) -> Tensor:
            if self.cancelled.is_set():
                raise Cancelled
            progress.events += 1
            return self.network(x, *inputs)

        try:
            on_device = None if condition is None else condition.to(self.device)
            return tuple(result.cpu() for result in compute(network, batch.to(self.device), on_device))
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        if self.text_encoder is not None:
            self.text_encoder.leave()
        torch.cuda.empty_cache()
        self.max_batch = len(batch) // 2
        return self._within_memory(compute, progress, batch, condition)


def tune_process(model: Model) -> None:
    """Tunes malloc and the interpreter for a model on a CPU. Only for Ray workers: the settings apply to the whole
    process, and a notebook's process is the user's. As environment variables in `runtime_env` they would cost 0.8 s per
    actor, because Ray would start a new worker process instead of reusing an idle one."""
    if model.device.type != "cpu":
        return
    if model.batch_threads:
        sys.setswitchinterval(SWITCH_INTERVAL)
    # Makes glibc keep the memory of a layer's activations for the next layer: returning it to the system and faulting
    # it in again, page by page, takes up to a fifth of the CPU time. The numbers are M_ARENA_MAX and so on in malloc.h.
    arenas, mmap_threshold, trim_threshold, top_pad = -8, -3, -1, -2
    threads = 1 + (model.batch_threads.count if model.batch_threads else 0)
    settings = {arenas: threads, mmap_threshold: 32 << 20, trim_threshold: 2**31 - 1, top_pad: 256 << 20}
    with suppress(OSError, AttributeError):  # a C library other than glibc
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in settings.items():
            mallopt(parameter, value)


def stopwatch(model: Model) -> Callable[[], dict[str, float]]:
    """Starts a stopwatch. The function returned gives the seconds since then, and the device seconds of this thread."""
    started, device = time.monotonic(), model.clock.seconds
    return lambda: {
        "seconds": round(time.monotonic() - started, 3),
        "device_seconds": round(model.clock.seconds - device, 3),
    }
