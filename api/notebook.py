"""An encode run in a notebook: the table of its images, their latents, decoding these, and encoding further images.

    run = palindrome.open("runs/photos")
    pictures = run.decode(run.table("label == 3")["image_id"])
    latent = run.encode(PIL.Image.open("another.jpg"))

Everything runs in this process, on its GPU if it has one, without a cluster.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image as PIL
from pyarrow.dataset import Dataset, dataset
from torch import Tensor

from palindrome.model.condition import ClassOf, TextOf
from palindrome.model.ddim import noise_index
from palindrome.model.families import Checkpoint
from palindrome.model.interpolate import slerp
from palindrome.pipeline.images.decode import Preprocess, Rejected, decode, from_pillow
from palindrome.pipeline.images.masks import Masks
from palindrome.pipeline.images.metrics import check_finite, to_model, to_pixels
from palindrome.pipeline.images.pixels import to_pillow
from palindrome.pipeline.images.read import read_batches
from palindrome.pipeline.images.records import REASONS, Image, Reject
from palindrome.pipeline.runs.directions import read_direction
from palindrome.pipeline.runs.encoded import EncodeRun
from palindrome.pipeline.runs.ladders import resolve
from palindrome.pipeline.runs.manifest import open_run
from palindrome.pipeline.runs.plan import read_plan
from palindrome.pipeline.runs.selection import Selection
from palindrome.pipeline.runs.shards import TENSORS, committed
from palindrome.pipeline.runtime.device import Model
from palindrome.pipeline.storage.folder import Folder, Options, absolute, by_protocol, current_options, open_fs, using
from palindrome.pipeline.tasks.edit import Change, Subject
from palindrome.pipeline.tasks.encode import latents_of
from palindrome.pipeline.tasks.originals import Originals
from palindrome.pipeline.tasks.paths import by_shard, every
from palindrome.pipeline.tasks.restore import Degradation

__all__ = ["Run", "open", "restored", "scores"]

BATCH = 64  # latents on the device at once, the jobs' default
Location = str | os.PathLike[str]  # a path or an fsspec URI
Ids = str | Iterable[str]  # image ids: one, several, or a column of a table


def open(latents: Location, model: Location | None = None, storage_options: Options | None = None) -> "Run":
    """The encode run in the folder `latents`, a path or an fsspec URI, with the shards committed by now.

    `model` is the checkpoint folder (default: the one that encode used, at the same path); it is loaded when it is
    first needed. `storage_options` are fsspec's options by protocol, such as {"s3": {"endpoint_url": "https://..."}},
    also for every later call. Raises ValueError if the folder is not an encode run or has no latents yet.
    """
    if storage_options is not None and not by_protocol(storage_options):
        raise ValueError('storage_options must map protocols to options, as {"s3": {"endpoint_url": "https://..."}}')
    with using(current_options() if storage_options is None else storage_options):
        folder = Folder(absolute(os.fspath(latents)))
    encoded = EncodeRun.open(folder)
    return Run(encoded, encoded.rows(), None if model is None else absolute(os.fspath(model)))


def scores(
    run: Location,
    where: str | None = None,
    columns: Sequence[str] | None = None,
    storage_options: Options | None = None,
) -> pa.Table:
    """The rows of the score run in the folder `run`, of the shards committed by now; by default without latents and
    maps. `where`, `columns` and `storage_options` are those of `Run.table` and `open`. Raises RunError if the folder is
    no score run, and ValueError as `Run.table` does."""
    rows = _rows(run, "score", storage_options)
    kinds = ((f.name, f.type) for f in rows.schema)
    small = [n for n, t in kinds if not isinstance(t, pa.FixedShapeTensorType) and not n.endswith("_map")]
    return _selected(rows, where, small if columns is None else columns)


def restored(
    run: Location,
    where: str | None = None,
    columns: Sequence[str] | None = None,
    storage_options: Options | None = None,
) -> pa.Table:
    """The rows of the restore run in the folder `run`, of the shards committed by now; with columns=["image_id",
    "image"], say, its pictures as PNGs, which are else left out. Otherwise as `scores`."""
    rows = _rows(run, "restore", storage_options)
    return _selected(rows, where, [n for n in rows.schema.names if n != "image"] if columns is None else columns)


def _rows(run: Location, job: str, storage_options: Options | None) -> Dataset:
    """The rows of a run of that job. Raises RunError if the folder is none, and ValueError if it has none yet."""
    with using(current_options() if storage_options is None else storage_options):
        folder, manifest = open_run(os.fspath(run), job)
    below = manifest.kind.folder
    files = [folder.path(f"{below}/{name}.parquet") for name in sorted(committed(folder, below))]
    if not files:
        raise ValueError(f"{folder.uri} holds no {below} yet")
    return dataset(files, filesystem=folder.arrow_fs, format="parquet")


def _selected(rows: Dataset, where: str | None, columns: Sequence[str]) -> pa.Table:
    schema = rows.schema
    for name in columns:
        if name not in schema.names:
            raise ValueError(f"{name!r} is not a column; the columns are {', '.join(schema.names)}")
    return rows.to_table(columns=list(columns), filter=Selection(where=where).expression(schema))


def _listed(images: Any) -> list[Any]:
    """One id or picture, several, or a column of ids."""
    if isinstance(images, str | PIL.Image):
        return [images]
    return list(images.to_pylist() if hasattr(images, "to_pylist") else images)


def _raise_first(rejects: Sequence[Reject]) -> None:
    for reject in rejects:
        raise ValueError(f"{reject.image_id}: {reject.reason}: {reject.detail}")


def _image(name: str, given: PIL.Image, how: Preprocess) -> Image:
    """Raises ValueError for a picture that is unusable."""
    try:
        return Image(name, "", *given.size, "", {}, from_pillow(given, how))
    except Rejected as e:
        raise ValueError(f"{e.reason}: {e.detail}") from None


def _there(row: Mapping[str, Any], original: Image | str) -> Image:
    """An original that was read again, with the columns of its row. Raises ValueError where there is none."""
    if isinstance(original, str):
        raise ValueError(f"{row['image_id']}: {original}: {REASONS[original]}")
    return replace(original, kept={**row, **original.kept})


@dataclass(frozen=True, eq=False)
class Run:
    """An encode run, as it was when it was opened; `len` is its number of latents.

    `manifest` is the content of its run.json. `dataset` is a pyarrow dataset of its rows, including latents, for uses
    beyond `table`: batches of data that does not fit into memory, or queries by another engine.
    """

    encoded: EncodeRun
    dataset: Dataset = field(repr=False)
    model: str | None = None

    @property
    def folder(self) -> Folder:
        return self.encoded.folder

    @property
    def manifest(self) -> Mapping[str, Any]:
        return self.encoded.manifest.content

    def __len__(self) -> int:
        return int(self.dataset.count_rows())

    @cached_property
    def ids(self) -> list[str]:
        """The ids of all images with a latent, in the collection's order; images that were added later come last."""
        return list(self.table(columns=["image_id"])["image_id"].to_pylist())

    def table(self, where: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """One row per image, in the order of `ids`, with the given columns (default: all but `latent`).

        `where` is an expression over the columns, as for `regenerate --where`: 'label == 3 and mse < 1e-6'. Other rows
        and columns are not read. Raises ValueError for unknown columns and invalid expressions.
        """
        named = [name for name in self.dataset.schema.names if name not in TENSORS] if columns is None else columns
        return _selected(self.dataset, where, named)

    def latents(self, ids: Ids) -> np.ndarray:
        """x_T of these images, float32 [N, C, H, W], in the order of `ids`; nearly standard normal. Raises KeyError
        naming an id without a latent in the run."""
        return self._stored(ids, ["image_id"])[1]

    def _stored(self, ids: Ids, columns: Sequence[str]) -> tuple[list[dict[str, Any]], np.ndarray]:
        """The columns of these images, `image_id` among them, and their latents, as `latents` returns and raises."""
        wanted = _listed(ids)
        which = Selection(tuple(dict.fromkeys(wanted)))
        found = self.dataset.to_table(columns=[*columns, "latent"], filter=which.expression(self.dataset.schema))
        position = {image_id: i for i, image_id in enumerate(found["image_id"].to_pylist())}
        for image_id in wanted:
            if image_id not in position:
                raise KeyError(f"{self.folder.uri} has no latent of {image_id!r}")
        order = [position[image_id] for image_id in wanted]
        rows, latents = found.select(columns).to_pylist(), found["latent"].combine_chunks().to_numpy_ndarray()
        return [rows[i] for i in order], np.asarray(latents[order], np.float32)

    def decode(
        self,
        images: Ids | np.ndarray | Tensor,
        steps: int | None = None,
        class_: int | None = None,
        guidance: float | None = None,
        prompt: str | None = None,
    ) -> list[PIL.Image]:
        """Decodes images of the run by their ids, or latents [N, C, H, W] or [C, H, W], to RGB or L images; of a
        class-conditional model, as images of the class `class_`, of a model of texts, as described by `prompt`, with
        the weight `guidance` (default: the run's).

        The result equals that of `palindrome regenerate`: on the run's own ladder, or on one with `steps` steps up to
        the same level. Raises KeyError for an id without a latent; ValueError for latents of another shape, for steps
        that do not fit the schedule, if the model is not the one that made the latents, for a class that is missing or
        that the model does not know, and for guidance of a model that has no class for none.
        """
        x, told = torch.from_numpy(self._latents(images)), self._told(class_, guidance, prompt)
        ladder, *_ = self.encoded.ladders([] if steps is None else [steps], self._loaded.checkpoint.process)
        parts = [batch for batch in x.split(BATCH) if len(batch)]
        conditions = (self._loaded.condition_of_all(len(batch), told) for batch in parts)
        decoded = (self._loaded.decode(batch, ladder, of) for batch, of in zip(parts, conditions, strict=True))
        return [to_pillow(pixels) for batch in decoded for pixels in to_pixels(batch)]

    def edit(
        self,
        images: Ids,
        prompt: str | None = None,
        class_: int | None = None,
        guidance: float | None = None,
        keep_until: float = 0.0,
        steps: int | None = None,
        mask: str | PIL.Image | None = None,
        towards: str | np.ndarray | Tensor | None = None,
        direction: Location | None = None,
        strength: float = 1.0,
    ) -> list[PIL.Image]:
        """Changes images of the run, by their ids, as `palindrome edit` does: decodes them under another text or class
        than they were encoded with, but for the fraction `keep_until` of the steps, from the latent on; and moves them,
        by `strength`, `towards` the latent of another image, an id or a latent [C, H, W], or along the `direction` in a
        file of `palindrome direction`. With a `mask`, a recipe such as "box:0.25" or a picture, they change where that
        is white, and nowhere else where the inversion is exact.

        Raises what `decode` raises; OSError for a file that can't be read; and ValueError for a mask that does not fit,
        for a direction of another model, and for what `palindrome edit` would reject."""
        stored, latents = self._stored(images, [n for n in self.dataset.schema.names if n not in TENSORS])
        told, loaded = self._told(class_, guidance, prompt, of_run=True).told(), self._loaded
        ladder, *_ = self.encoded.ladders([] if steps is None else [steps], loaded.checkpoint.process)
        masks, along = self._masks(mask), None
        if direction is not None:
            with using(self.folder.storage_options):
                along = read_direction(absolute(os.fspath(direction)))
            along.check(loaded.checkpoint.digest, ladder, loaded.checkpoint.latent_shape)
        other = None if towards is None else torch.from_numpy(self._latents(towards)[0])
        tells = told if told != loaded.checkpoint.told() else None
        change = Change(ladder, (strength,), other, along, tells, keep_until, masks)
        column = masks.column if masks else None
        originals = self._originals(stored, column) if change.reads(loaded.checkpoint) else {}
        pictures: list[PIL.Image] = []
        for first in range(0, len(stored), BATCH):
            batch = zip(stored[first : first + BATCH], torch.from_numpy(latents[first : first + BATCH]), strict=True)
            subjects = [Subject(row, x, originals.get(row["image_id"], "missing")) for row, x in batch]
            subjects, known, rejects = change.usable(loaded, subjects)
            _raise_first(rejects)
            _, edited = change.make(loaded, subjects, known)
            check_finite(edited, [subject.image_id for subject in subjects])
            pictures += map(to_pillow, to_pixels(edited))
        return pictures

    def restore(
        self,
        images: Ids | PIL.Image | Sequence[PIL.Image],
        task: str,
        mask: str | PIL.Image | None = None,
        factor: int | None = None,
        operator: str | None = None,
        degraded: bool = False,
        eta: float = 0.85,
        steps: int | None = None,
        seed: int = 0,
        class_: int | None = None,
        prompt: str | None = None,
        guidance: float | None = None,
    ) -> list[PIL.Image]:
        """Images of which a part is known, whole, as `palindrome restore` makes them with the run's model, its flags
        being the arguments: images of the run, by their ids, which are read again, or Pillow images. `mask` is a recipe
        such as "box:0.25", or a picture that is white where pixels are missing. Without `degraded` that part is taken
        of whole images. A Pillow image has the noise of its place in the list.

        Raises what `decode` raises, and ValueError for arguments that make no sense, and for what `palindrome restore`
        would reject."""
        loaded, how, masks = self._loaded, self.encoded.preprocess, self._masks(mask)
        model = loaded.checkpoint
        degradation = Degradation.of(model, task, masks, factor, operator, degraded)
        if degraded:
            how = replace(how, size=degradation.size, fit="exact")
        given = _listed(images)
        pillow = [image for image in given if isinstance(image, PIL.Image)]
        if pillow:
            whole = [_image(str(i), image, how) for i, image in enumerate(pillow)]
        else:
            stored, _ = self._stored(given, [n for n in self.dataset.schema.names if n not in TENSORS])
            found = self._originals(stored, masks.column if masks else None, how)
            whole = [_there(row, found[row["image_id"]]) for row in stored]
        told = self._told(class_, guidance, prompt, of_run=not pillow)
        levels = resolve("linear", steps or min(100, model.process.num_train_timesteps), model.process)
        pictures: list[PIL.Image] = []
        for first in range(0, len(whole), BATCH):
            batch, known, rejects = degradation.usable(whole[first : first + BATCH])
            _raise_first(rejects)
            _, y, of = degradation.observed(batch, known)
            noise = [noise_index(f"0/{image.image_id}") for image in batch]
            condition = loaded.condition([image.kept for image in batch], told)
            restored = loaded.restore(y, of, levels, seed, noise, condition, eta)
            check_finite(restored, [image.image_id for image in batch])
            pictures += map(to_pillow, to_pixels(restored))
        return pictures

    def encode(
        self, image: PIL.Image | bytes | Location, class_: int | None = None, prompt: str | None = None
    ) -> np.ndarray:
        """The latent of one image, float32 [C, H, W], with the run's preprocessing, inversion and dtype: the latent
        that encode would have stored; `class_` and `prompt` are as for `decode`.

        `image` is the content of a file, its path or fsspec URI; or a Pillow image at its current frame, turned upright
        by its EXIF. Prefer files: Pillow itself reads a few unusual PNGs and TIFFs differently. Raises ValueError
        starting with a reject's reason (`truncated`, `too_large`) for an unusable image, OSError for a file that can't
        be read, and ValueError if the model is not the run's.
        """
        how = self.encoded.preprocess
        try:
            if isinstance(image, PIL.Image):
                pixels = from_pillow(image, how)
            else:
                pixels, *_ = decode(image if isinstance(image, bytes) else self._read(image), how)
        except Rejected as e:
            raise ValueError(f"{e.reason}: {e.detail}") from None
        x, condition = to_model(np.stack([pixels])), self._loaded.condition_of_all(1, self._told(class_, prompt=prompt))
        latents, _ = latents_of(self._loaded, x, self.encoded.inversion, condition=condition)
        return latents[0].float().numpy()

    def interpolate(
        self,
        a: str | np.ndarray | Tensor,
        b: str | np.ndarray | Tensor,
        frames: int = 11,
        steps: int | None = None,
        class_: int | None = None,
        guidance: float | None = None,
        prompt: str | None = None,
    ) -> list[PIL.Image]:
        """Images between two images, both included: decodes latents interpolated spherically, at equal angles. `a` and
        `b` are ids or latents [C, H, W]; `steps`, `class_`, `guidance` and `prompt` are as for `decode`. Raises what
        `decode` raises, and ValueError for fewer than 2 frames, or if no unique arc connects the latents."""
        if frames < 2:
            raise ValueError(f"frames must be at least 2, for both ends; got {frames}")
        ends = [torch.from_numpy(self._latents(end)) for end in (a, b)]
        if any(len(end) != 1 for end in ends):
            raise ValueError("an interpolation is between two single images")
        from_a, to_b = (end.expand(frames, -1, -1, -1) for end in ends)
        between = slerp(from_a, to_b, torch.linspace(0, 1, frames, dtype=torch.float64))
        return self.decode(between, steps, class_, guidance, prompt)

    def _masks(self, mask: str | PIL.Image | None) -> Masks | None:
        """Of a recipe or a picture. Raises ValueError, and OSError."""
        size = self.encoded.preprocess.size
        if mask is None:
            return None
        with using(self.folder.storage_options):
            return Masks.of(mask, size) if isinstance(mask, str) else Masks.of_picture(mask, size)

    def _originals(
        self, stored: Sequence[Mapping[str, Any]], column: str | None = None, how: Preprocess | None = None
    ) -> dict[str, Image | str]:
        """The images of these rows by id, read again with a further column, or why they can't be."""
        hashes = {row["image_id"]: row["content_hash"] for row in stored}
        collection = self.encoded.collection if column is None else self.encoded.collection_with(column)
        where = by_shard(every(self.folder, self.encoded.done, Selection(tuple(hashes))))
        found: dict[str, Image | str] = {}
        for shard in (shard for shard in read_plan(self.folder) if shard.name in where):
            ids = where[shard.name]
            read = Originals(read_batches(collection, shard, how or self.encoded.preprocess, BATCH), frozenset(ids))
            found |= {name: read.find(name, hashes[name]) for name in ids}
        return found

    def _told(
        self, class_: int | None, guidance: float | None = None, prompt: str | None = None, of_run: bool = False
    ) -> Checkpoint:
        """The model, told that images are of that class or described by that text, and guided; by default what the run
        was told, which for images that are not `of_run` must not be in a column. Raises ValueError."""
        model = self._loaded.checkpoint
        if guidance is not None:
            model = model.with_guidance(guidance)
        if class_ is not None:
            return model.with_classes(ClassOf(value=class_))
        if not of_run and self.encoded.classes and self.encoded.classes.value is None:
            raise ValueError("the model is class-conditional: class_ says what the images are")
        if prompt is not None:
            return model.with_texts(TextOf(text=prompt))
        if not of_run and self.encoded.texts and self.encoded.texts.column is not None:
            raise ValueError("the images have texts of their own: prompt says what the images are")
        return model

    def _latents(self, images: Ids | np.ndarray | Tensor) -> np.ndarray:
        """The latents passed, or those stored under the ids passed: float32 [N, C, H, W]."""
        given = images.cpu().numpy() if isinstance(images, Tensor) else images
        if not isinstance(given, np.ndarray) or given.dtype.kind != "f":
            return self.latents(given)
        shape = tuple(self.dataset.schema.field("latent").type.shape)
        if given.shape[-3:] != shape or given.ndim not in (3, 4):
            raise ValueError(f"latents of this run have shape {list(shape)}; got {list(given.shape)}")
        return given.reshape(-1, *shape).astype(np.float32)

    def _read(self, image: Location) -> bytes:
        fs, path = open_fs(absolute(os.fspath(image)), self.folder.storage_options)
        return bytes(fs.cat_file(path))

    @cached_property
    def _loaded(self) -> Model:
        with using(self.folder.storage_options):
            return Model(self.encoded.load_model(self.model)[1], execution=self.encoded.execution)
