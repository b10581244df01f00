"""Stored latents -> images that are changed, and where a mask says so are not: one shard of an edit run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from math import isfinite
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from palindrome.model.editing import Move, along, stay, towards
from palindrome.model.families import Checkpoint
from palindrome.model.interpolate import has_arc
from palindrome.model.ladder import Ladder
from palindrome.pipeline.base.errors import SettingError
from palindrome.pipeline.images.decode import Rejected
from palindrome.pipeline.images.masks import Masks, mask_hash
from palindrome.pipeline.images.metrics import finite, round_trip_error, to_model, to_pixels
from palindrome.pipeline.images.pixels import picture
from palindrome.pipeline.images.records import REASONS, Image, Reject, Shard
from palindrome.pipeline.runs.directions import Direction
from palindrome.pipeline.runs.kinds import IMAGES
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runs.schemas import EDITED_SCHEMA, IMAGE_FIELDS
from palindrome.pipeline.runs.selection import Selection
from palindrome.pipeline.runs.shards import ShardWriter, check_made, read_ids, read_latents
from palindrome.pipeline.runtime.device import Model, stopwatch
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.originals import Originals


@dataclass(frozen=True)
class Subject:
    """An image to be edited: its row of the encode run, its latent [C, H, W], and its original, or why there is
    none."""

    row: Mapping[str, Any]
    latent: Tensor
    original: Image | str

    @property
    def image_id(self) -> str:
        return str(self.row["image_id"])

    @property
    def kept(self) -> Mapping[str, Any]:
        """The columns read with the original."""
        return self.original.kept if isinstance(self.original, Image) else {}

    def reject(self, reason: str, detail: str = "") -> Reject:
        return Reject(self.image_id, self.row["source"], reason, detail or REASONS[reason])


@dataclass(frozen=True, eq=False)
class Change:
    """What is done to images on a ladder. Their latents are moved towards the latent `other` [C, H, W], or x along a
    `direction` at its level, by each of `strengths`. The steps after the fraction `kept` of them are taken under what
    `told` says, as Checkpoint.told records it, if that is something else than the images were encoded with. With
    `masks`, what these leave known stays."""

    levels: Ladder
    strengths: tuple[float, ...] = (1.0,)
    other: Tensor | None = None
    direction: Direction | None = None
    told: Mapping[str, Any] | None = None
    kept: float = 0.0
    masks: Masks | None = None

    def __post_init__(self) -> None:
        """Raises SettingError."""
        if self.other is not None and self.direction is not None:
            raise SettingError("can't be combined with --towards", "direction")
        if self.other is None and self.direction is None and self.strengths != (1.0,):
            raise SettingError("goes with --towards or --direction", "strength")
        if len(set(self.strengths)) != len(self.strengths):
            raise SettingError("a strength is given twice", "strength")
        for strength in self.strengths:
            if not isfinite(strength):
                raise SettingError(f"{strength} is not finite", "strength")
            if self.other is not None and not 0 <= strength <= 1:
                raise SettingError(f"{strength:g} is no part of the way --towards another image, 0 to 1", "strength")

    @cached_property
    def moves(self) -> list[Move]:
        if self.other is not None:
            return [towards(self.other, strength, self.levels[-1]) for strength in self.strengths]
        if self.direction is not None:
            return [along(self.direction.values, strength, self.direction.level) for strength in self.strengths]
        return [stay]

    def reads(self, model: Checkpoint) -> bool:
        """Whether an image can't be edited without its original: its mask stands beside it, or its pixels are put into
        what an autoencoder makes."""
        return self.masks is not None and (self.masks.column is not None or model.autoencoded)

    def usable(self, model: Model, subjects: Sequence[Subject]) -> tuple[list[Subject], list[np.ndarray], list[Reject]]:
        """The images that can be edited, the masks of these, if there are some, and rejects of the others."""
        good, known, rejects = list[Subject](), list[np.ndarray](), list[Reject]()
        needed = self.reads(model.checkpoint)
        for subject in subjects:
            if needed and isinstance(subject.original, str):
                rejects.append(subject.reject(subject.original))
            elif self.other is not None and not has_arc(subject.latent[None], self.other[None]).all():
                rejects.append(subject.reject("no_arc"))
            else:
                good.append(subject)
        if self.masks is None:
            return good, known, rejects
        masks, left = self.masks.find_each(good), good
        good = []
        for subject, mask in zip(left, masks, strict=True):
            if isinstance(mask, Rejected):
                rejects.append(subject.reject(mask.reason, mask.detail))
            else:
                good.append(subject)
                known.append(mask)
        return good, known, rejects

    def make(self, model: Model, subjects: Sequence[Subject], known: Sequence[np.ndarray]) -> tuple[Tensor, ...]:
        """Of images that are `usable`, with their masks: what they decode to themselves, and an edit of them for each
        strength, [B, C, H, W] each, about in [-1, 1]."""
        rows = [subject.row for subject in subjects]
        told = None if self.told is None else model.condition(rows, model.checkpoint.as_told(self.told))
        masks = torch.from_numpy(np.stack(known))[:, None] if known else None
        pixels = [subject.original.pixels for subject in subjects if isinstance(subject.original, Image)]
        originals = to_model(np.stack(pixels)) if len(pixels) == len(subjects) else None
        x = torch.stack([subject.latent for subject in subjects])
        return model.edit(x, self.levels, self.moves, model.condition(rows), told, self.kept, masks, originals)


@dataclass(frozen=True)
class Edit:
    """Edits the selected latents of a shard: `images/<shard>.parquet`, a row for each image and strength. Committed
    shards are overwritten only with `again`."""

    run: Folder
    latents: Folder
    which: Selection
    reader: Reader
    change: Change
    metadata: Mapping[str, Any]
    again: bool = False

    def process(self, model: Model, shard: Shard) -> Receipt:
        spent = stopwatch(model)
        check_made(self.latents, shard.name)
        wanted = frozenset(read_ids(self.latents, shard.name, self.which))
        originals = Originals(self.reader.batches(shard) if wanted else iter(()), wanted)
        with ShardWriter(self.run, IMAGES, shard.name, EDITED_SCHEMA, self.metadata, once=not self.again) as out:
            for stored, latents in read_latents(self.latents, shard.name, self.reader.batch_size, self.which):
                found = [originals.find(row["image_id"], row["content_hash"]) for row in stored]
                subjects = [Subject(*each) for each in zip(stored, torch.from_numpy(latents), found, strict=True)]
                subjects, known, rejects = self.change.usable(model, subjects)
                rows, bad = self._edited(model, subjects, known) if subjects else ([], [])
                out.add(pa.Table.from_pylist(rows, EDITED_SCHEMA) if rows else None, [*rejects, *bad])
                model.advance(len(stored))
            seconds, edited = spent(), out.rows // len(self.change.strengths)
            written = out.commit(seconds, {"latents": edited, "images": out.rows, "rejects": out.refused})
            return Receipt(shard.name, edited, out.refused, **seconds, bytes=written)

    def _edited(
        self, model: Model, subjects: Sequence[Subject], known: Sequence[np.ndarray]
    ) -> tuple[list[dict[str, Any]], list[Reject]]:
        """The rows of a batch, and rejects of images of which a result has values that are not finite."""
        made = self.change.make(model, subjects, known)
        good = np.logical_and.reduce([finite(images) for images in made])
        own, *edits = [to_pixels(images) for images in made]
        rows = []
        for i in np.flatnonzero(good).tolist():
            subject, mask = subjects[i], known[i] if known else None
            about = {field.name: subject.row[field.name] for field in IMAGE_FIELDS} | _compared(subject, made[0][i])
            about["mask_hash"] = None if mask is None else mask_hash(mask)
            for strength, pixels in zip(self.change.strengths, edits, strict=True):
                row = {**about, "strength": strength, **changes(subject.original, pixels[i], mask)}
                first = {"own": picture(subject.image_id, own[i])} if strength == self.change.strengths[0] else {}
                rows.append({**row, "image": picture(subject.image_id, pixels[i]), **first})
        return rows, [subject.reject("not_finite") for subject in compress(subjects, ~good)]


def _compared(subject: Subject, own: Tensor) -> dict[str, Any]:
    """`status` and `own_mse` of an image and what it decodes to itself, [C, H, W]."""
    if isinstance(subject.original, str):
        return {"status": subject.original}
    [error] = round_trip_error(to_model(subject.original.pixels[None]), own[None])
    return {"status": "compared", "own_mse": float(error)}


def changes(original: Image | str, pixels: np.ndarray, known: np.ndarray | None) -> dict[str, Any]:
    """`change`, `changed_outside` and `values_outside` of a picture, uint8 [H, W, C], and its mask, bool [H, W]."""
    there = {} if known is None else {"values_outside": int(known.sum()) * pixels.shape[-1]}
    if isinstance(original, str):
        return there
    squared = ((pixels.astype(np.float64) - original.pixels) / 255) ** 2
    if known is None:
        return {"change": float(squared.mean())}
    changed = int((pixels != original.pixels)[known].sum())
    return {**there, "change": float(squared[~known].mean()), "changed_outside": changed}
