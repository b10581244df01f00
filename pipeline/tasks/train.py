"""The training loop of each Ray Train worker."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray.train
import ray.train.torch
import torch

from palindrome.model.families import unet2d
from palindrome.model.families.base import refusal_of_number
from palindrome.model.process import VP
from palindrome.model.training import Hyperparameters, Training, multiplies_bfloat16
from palindrome.model.unet import UNetConfig
from palindrome.pipeline.base.threads import read_ahead
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.metrics import to_pixels
from palindrome.pipeline.images.pixels import grid, png
from palindrome.pipeline.images.records import Image
from palindrome.pipeline.images.shuffle import Batch, shuffled_batches
from palindrome.pipeline.images.sources import Collection
from palindrome.pipeline.runs.plan import read_plan
from palindrome.pipeline.storage.folder import Folder, options_for

PROGRESS, RECORD = "progress.json", "training.json"
PROGRESS_INTERVAL = 10  # seconds
SAMPLES = 16  # in a grid


@dataclass(frozen=True, kw_only=True)
class Train:
    """A training in the run folder `out`, on the images of its plan. `batch_size` is over all workers; `class_column`,
    `num_classes`, `precision` and `save_dtype` are flags of `palindrome train`."""

    out: Folder
    collection: Collection
    preprocess: Preprocess
    unet: UNetConfig
    process: VP
    how: Hyperparameters
    batch_size: int
    workers: int
    precision: str
    save_dtype: str
    sample_every: int
    save_every: int
    class_column: str | None = None
    num_classes: int | None = None

    @property
    def class_of(self) -> Callable[[Image], int] | None:
        """The class of an image, None for an unconditional network."""
        if self.class_column is None:
            return None
        return partial(_class_of, column=self.class_column, classes=self.num_classes or 0)


def _class_of(image: Image, column: str, classes: int) -> int:
    """Raises ValueError, naming the image: to leave it out would train on less than was asked."""
    found: Any = image.kept.get(column)
    if refusal_of_number(found, classes):
        raise ValueError(f"{image.source}: {column} is {found!r}, not a class below {classes}")
    return int(found)


def train(job: dict[str, Train]) -> None:
    """Ray Train's training function; `job` has the single key "train". Every rank reports the states from which the run
    resumes. Rank 0 writes progress.json about every ten seconds, samples/*.png, and at the end the checkpoint, then
    training.json, which commits the training."""
    task = job["train"]
    context = ray.train.get_context()
    rank, out, steps = context.get_world_rank(), task.out, task.how.steps
    device = ray.train.torch.get_device()
    bfloat16 = multiplies_bfloat16(device) if task.precision == "auto" else task.precision == "bfloat16"
    if device.type == "cpu":
        # Ray reserves the CPUs, but sets torch to one thread.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
    training = Training(task.unet, task.process, task.how, device, bfloat16, rank, task.workers, _last_state(device))
    images = shuffled_batches(
        task.collection,
        list(read_plan(out)),
        task.preprocess,
        task.batch_size // task.workers,
        hash((task.how.seed, training.step)) % 2**63,
        rank,
        task.workers,
        task.class_of,
    )
    logged, logged_at = training.step, time.monotonic()
    for step in training.steps(map(_tensors, read_ahead(images))):
        last = step == steps
        if rank == 0 and (last or time.monotonic() - logged_at > PROGRESS_INTERVAL):
            rate = (step - logged) / (time.monotonic() - logged_at)
            progress = {"step": step, "steps": steps, "loss": training.recent_loss()}
            progress |= {"images_per_second": rate * task.batch_size, "eta": (steps - step) / rate}
            out.put(PROGRESS, json.dumps(progress).encode())
            logged, logged_at = step, time.monotonic()
        if rank == 0 and (last or step % task.sample_every == 0):
            out.put(f"samples/step-{step:07d}.png", png(grid(list(to_pixels(training.samples(SAMPLES))), columns=4)))
        if last or step % task.save_every == 0:
            _report(training, rank)
    if rank == 0:
        trained = training.checkpoint(getattr(torch, task.save_dtype))
        unet2d.save(trained, out.uri, options_for(out.uri, out.storage_options))
        record = {
            "steps": training.step,
            "images": training.step * task.batch_size,
            "seconds": training.history[-1]["seconds"],
            "loss": training.history,
            "device": device.type,
            "precision": "bfloat16" if bfloat16 else "float32",
        }
        out.put(RECORD, (json.dumps(record, indent=2) + "\n").encode())


def _tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    pixels, classes = batch
    return torch.from_numpy(pixels), None if classes is None else torch.from_numpy(classes)


def _last_state(device: torch.device) -> dict[str, Any] | None:
    if (saved := ray.train.get_checkpoint()) is None:
        return None
    with saved.as_directory() as folder:
        return dict(torch.load(os.path.join(folder, "state.pt"), map_location=device, weights_only=True))


def _report(training: Training, rank: int) -> None:
    """Ray Train requires a report from every rank; rank 0 attaches the state."""
    state = training.state()
    if rank != 0:
        ray.train.report(training.history[-1])
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, os.path.join(folder, "state.pt"))
        ray.train.report(training.history[-1], checkpoint=ray.train.Checkpoint.from_directory(folder))
