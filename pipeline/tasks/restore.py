"""Images -> observations of a part of them -> whole images again: one shard of a restore run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from palindrome.model.condition import Condition
from palindrome.model.ddim import noise_index
from palindrome.model.families import Checkpoint
from palindrome.model.ladder import Ladder
from palindrome.model.restoration import Gray, Masked, Operator, Pooled, Separable
from palindrome.pipeline.base.errors import SettingError
from palindrome.pipeline.images.decode import Rejected
from palindrome.pipeline.images.masks import Masks, mask_hash
from palindrome.pipeline.images.metrics import finite, psnr, round_trip_error, ssim, to_model, to_pixels
from palindrome.pipeline.images.pixels import picture
from palindrome.pipeline.images.records import Image, Reject, Shard, not_finite
from palindrome.pipeline.runs.kinds import IMAGES
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runs.schemas import IMAGE_FIELDS, restored_schema
from palindrome.pipeline.runs.shards import ShardWriter
from palindrome.pipeline.runtime.device import Model, stopwatch
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.encode import split_by_condition

INPAINT, UPSCALE, COLORIZE = "inpaint", "upscale", "colorize"
AVERAGE, BICUBIC = "average", "bicubic"
FACTOR = 4


@dataclass(frozen=True)
class Degradation:
    """What is left of images of shape [C, H, W]: with `masks` the pixels that they leave known; with a `factor` as many
    fewer pixels, shrunk by a `filter`; else the mean of the channels. `degraded` images are what is left already."""

    shape: tuple[int, int, int]
    masks: Masks | None = None
    factor: int | None = None
    filter: str = AVERAGE
    degraded: bool = False

    @classmethod
    def of(
        cls,
        model: Checkpoint,
        task: str,
        masks: Masks | None = None,
        factor: int | None = None,
        operator: str | None = None,
        degraded: bool = False,
    ) -> Self:
        """What that task takes from images of the model. Raises SettingError where it makes no sense."""
        if task == INPAINT and masks is None:
            raise SettingError("inpaint needs it, to know which pixels are missing", "mask")
        needs = {"mask": (masks, INPAINT), "factor": (factor, UPSCALE), "operator": (operator, UPSCALE)}
        for name, (value, its_task) in needs.items():
            if value is not None and task != its_task:
                raise SettingError(f"goes with --task {its_task}, not with {task}", name)
        channels, size, _ = model.image_shape
        if model.autoencoded and task != INPAINT:
            raise SettingError(f"{task} needs a model of pixels; by an autoencoder's states only inpaint does", "task")
        if task == COLORIZE and channels != 3:
            raise SettingError("the model's images have no colours", "task")
        factor = (factor or FACTOR) if task == UPSCALE else None
        if factor and (size % factor or size == factor):
            words = f"the model's {size} pixels are no multiple of {factor}, or nothing is left of them"
            raise SettingError(words, "factor")
        return cls(model.image_shape, masks, factor, operator or AVERAGE, degraded)

    @property
    def task(self) -> str:
        return INPAINT if self.masks else UPSCALE if self.factor else COLORIZE

    @property
    def size(self) -> int:
        """The side of the images that are read."""
        return self.shape[-1] // self.factor if self.degraded and self.factor else self.shape[-1]

    def record(self) -> dict[str, Any]:
        """For run.json and the shards' metadata."""
        by_task: dict[str, dict[str, Any]] = {
            INPAINT: {"mask": self.masks and self.masks.record()},
            UPSCALE: {"factor": self.factor, "operator": self.filter},
            COLORIZE: {"operator": "mean"},
        }
        return {"task": self.task, **by_task[self.task], "degraded": self.degraded}

    def settings(self) -> dict[str, Any]:
        """The flags that say it, for run.json."""
        about = {"factor": self.factor, "operator": self.filter} if self.factor else {}
        return {"mask": self.masks.recipe if self.masks else None, **about}

    def described(self) -> dict[str, str]:
        """For a report."""
        words = {UPSCALE: f"{self.factor} times, {self.filter}", INPAINT: self.masks.recipe if self.masks else ""}
        given = "what is known" if self.degraded else "whole, and degraded first"
        return {"task": f"{self.task} {words.get(self.task, '')}".strip(), "images are": given}

    def operator(self, known: Sequence[np.ndarray | None]) -> Operator:
        """Of images with those masks, [B] of bool [H, W]."""
        if self.masks:
            return Masked(torch.from_numpy(np.stack([mask for mask in known if mask is not None]))[:, None])
        channels, height, width = self.shape
        if not self.factor:
            return Gray(channels)
        return Pooled(self.factor) if self.filter == AVERAGE else Separable.bicubic(self.factor, height, width)

    def observed(self, images: Sequence[Image], known: Sequence[np.ndarray | None]) -> tuple[Tensor, Tensor, Operator]:
        """Pixels as they were read, [B, C, h, w] in [-1, 1], the observations of them, and their operator."""
        x, operator = to_model(np.stack([image.pixels for image in images])), self.operator(known)
        return x, x if self.degraded and self.factor else operator.observe(x), operator

    def usable(self, images: Sequence[Image]) -> tuple[list[Image], list[np.ndarray | None], list[Reject]]:
        """The images that can be restored, their masks, and rejects of the others."""
        good: list[tuple[Image, np.ndarray | None]] = []
        rejects: list[Reject] = []
        masks = self.masks.find_each(images) if self.masks else [None] * len(images)
        for image, found in zip(images, masks, strict=True):
            if isinstance(found, Rejected):
                rejects.append(Reject(image.image_id, image.source, found.reason, found.detail))
            else:
                good.append((image, found))
        return [image for image, _ in good], [mask for _, mask in good], rejects


@dataclass(frozen=True)
class Restore:
    """Images -> `images/<shard>.parquet`, a row for each image and variation. The noise of an image is that of its id
    and the variation alone. Committed shards are overwritten only with `again`."""

    run: Folder
    reader: Reader
    degradation: Degradation
    kept: tuple[pa.Field, ...]
    levels: Ladder
    eta: float
    variations: int
    seed: int
    metadata: Mapping[str, Any]
    again: bool = False
    similarity: bool = False
    """Whether SSIM is measured too."""

    def process(self, model: Model, shard: Shard) -> Receipt:
        spent, schema = stopwatch(model), restored_schema(self.kept)
        with ShardWriter(self.run, IMAGES, shard.name, schema, self.metadata, once=not self.again) as out:
            cut = 0
            for batch in self.reader.batches(shard):
                images, refused = split_by_condition(model, batch.images)
                images, known, useless = self.degradation.usable(images)
                rows: list[dict[str, Any]] = []
                if images:
                    kept = [image.kept for image in images]
                    condition, cut = model.condition(kept), cut + model.prompts_cut(kept)
                    rows, bad = self._restored(model, images, known, condition)
                    useless += bad
                table = pa.Table.from_pylist(rows, schema) if rows else None
                out.add(table, [*batch.rejects, *refused, *useless])
                model.advance(len(batch.images))
            seconds, restored = spent(), out.rows // self.variations
            counts = {"images": restored + out.refused, "restored": restored, "rejects": out.refused}
            written = out.commit(seconds, {**counts, **({"prompts_cut": cut} if cut else {})})
            return Receipt(shard.name, restored, out.refused, **seconds, bytes=written)

    def _restored(
        self, model: Model, images: list[Image], known: list[np.ndarray | None], condition: Condition | None
    ) -> tuple[list[dict[str, Any]], list[Reject]]:
        """The rows of a batch, and rejects of images of which a variation has values that are not finite."""
        x, y, operator = self.degradation.observed(images, known)
        original = None if self.degradation.degraded else x
        alone = self._errors("baseline_", original, to_pixels(operator.invert(y)))
        made, good = [], np.ones(len(images), bool)
        for variation in range(self.variations):
            indices = [noise_index(f"{variation}/{image.image_id}") for image in images]
            restored = model.restore(y, operator, self.levels, self.seed, indices, condition, self.eta)
            good &= finite(restored)
            pixels = to_pixels(restored)
            errors = {
                "observation_error": _distance(operator.observe(restored), y),
                "picture_error": _distance(operator.observe(to_model(pixels)), y),
                **self._errors("", original, pixels),
                **alone,
            }
            each = zip(range(len(x)), images, known, pixels, strict=True)
            made.append([self._row(*row, variation, errors) for row in each])
        rows = [of_variation[i] for i in np.flatnonzero(good).tolist() for of_variation in made]
        return rows, [not_finite(image) for image in compress(images, ~good)]

    def _errors(self, prefix: str, original: Tensor | None, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Of pictures as stored, where the originals [B, C, H, W] are known."""
        if original is None:
            return {}
        mse = round_trip_error(original, to_model(pixels))
        found = {"mse": mse, "psnr": np.array([psnr(error) for error in mse])}
        found |= {"ssim": ssim(to_pixels(original), pixels)} if self.similarity else {}
        return {f"{prefix}{name}": values for name, values in found.items()}

    def _row(
        self,
        i: int,
        image: Image,
        known: np.ndarray | None,
        pixels: np.ndarray,
        variation: int,
        errors: Mapping[str, np.ndarray],
    ) -> dict[str, Any]:
        return {
            **{field.name: getattr(image, field.name) for field in IMAGE_FIELDS},
            **{field.name: image.kept[field.name] for field in self.kept},
            "variation": variation,
            "mask_hash": None if known is None else mask_hash(known),
            **{name: float(values[i]) for name, values in errors.items()},
            "image": picture(image.image_id, pixels),
        }


def _distance(observed: Tensor, y: Tensor) -> np.ndarray:
    """The largest |A x - y| of each image, float64 [B], with pixels in [0, 1]."""
    return (observed - y).abs().flatten(1).amax(1).double().div(2).cpu().numpy()
