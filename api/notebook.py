"""An encode run in a notebook: a table of its images, their latents, pictures of these, and latents of other pictures.

    run = palindrome.open("runs/photos")
    pictures = run.decode(run.table("label == 3")["image_id"])
    latent = run.encode(PIL.Image.open("another.jpg"))

All of it happens in this process, on its GPU if it has one; no cluster is connected to and none is started.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image as PIL
from pyarrow.dataset import Dataset
from torch import Tensor

from palindrome.model.interpolate import slerp
from palindrome.pipeline.images.decode import Rejected, decode, from_pillow
from palindrome.pipeline.images.metrics import to_model, to_pixels
from palindrome.pipeline.images.pixels import to_pillow
from palindrome.pipeline.runs.encoded import EncodeRun
from palindrome.pipeline.runs.selection import Selection
from palindrome.pipeline.runtime.device import Model
from palindrome.pipeline.storage.folder import Folder, Options, absolute, by_protocol, current_options, open_fs, using
from palindrome.pipeline.tasks.encode import latents_of

__all__ = ["Run", "open"]

BATCH = 64  # latents on the device at once, as by default in a job
Place = str | os.PathLike[str]  # a path or an fsspec URI
Ids = str | Iterable[str]  # of images of the run: one, several, or a column of a table


def open(latents: Place, model: Place | None = None, storage_options: Options | None = None) -> "Run":
    """The run that encode wrote to the folder `latents`, a path or an fsspec URI, with the shards done by now.

    `model` is the checkpoint folder (default: the one that encode used, where it used it); it is loaded when it is
    first needed. `storage_options` say how stores are opened, by protocol, as in {"s3": {"endpoint_url": "https://..."}},
    now and in every later call. Raises ValueError where the folder is no encode run or holds no latents yet.
    """
    if storage_options is not None and not by_protocol(storage_options):
        raise ValueError('storage_options go by protocol, as in {"s3": {"endpoint_url": "https://..."}}')
    with using(current_options() if storage_options is None else storage_options):
        folder = Folder(absolute(os.fspath(latents)))
    encoded = EncodeRun.open(folder)
    return Run(encoded, encoded.rows(), None if model is None else absolute(os.fspath(model)))


@dataclass(frozen=True, eq=False)
class Run:
    """An encode run, as it was when `open` found it; `len` is how many latents it has.

    `manifest` is the content of its run.json. `dataset` is pyarrow's view of its rows, latents too, for what goes
    beyond `table`: batches that do not fit into memory, or queries by another engine.
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
        """The ids of all images that have a latent, in the collection's order; what was added to it later, behind."""
        return list(self.table(columns=["image_id"])["image_id"].to_pylist())

    def table(self, where: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """A row an image, in the order of `ids`, of the columns named (default: all but `latent`).

        `where` is an expression over the columns, as regenerate's --where takes it: 'label == 3 and mse < 1e-6'. Rows
        and columns that are not asked for are not read. Raises ValueError for columns that there are not, and for what
        is no such expression.
        """
        schema = self.dataset.schema
        named = [name for name in schema.names if name != "latent"] if columns is None else list(columns)
        for name in named:
            if name not in schema.names:
                raise ValueError(f"{name!r} is no column; there is {', '.join(schema.names)}")
        return self.dataset.to_table(columns=named, filter=Selection(where=where).expression(schema))

    def latents(self, ids: Ids) -> np.ndarray:
        """x_T of these images, float32 [N, C, H, W], in the order asked for; nearly standard normal. Raises KeyError
        naming an id that has no latent in the run."""
        wanted = [ids] if isinstance(ids, str) else ids.to_pylist() if hasattr(ids, "to_pylist") else list(ids)
        which = Selection(tuple(dict.fromkeys(wanted)))
        found = self.dataset.to_table(columns=["image_id", "latent"], filter=which.expression(self.dataset.schema))
        places = {image_id: place for place, image_id in enumerate(found["image_id"].to_pylist())}
        for image_id in wanted:
            if image_id not in places:
                raise KeyError(f"{self.folder.uri} has no latent of {image_id!r}")
        latents = found["latent"].combine_chunks().to_numpy_ndarray()
        return np.asarray(latents[[places[image_id] for image_id in wanted]], np.float32)

    def decode(self, images: Ids | np.ndarray | Tensor, steps: int | None = None) -> list[PIL.Image]:
        """RGB or L pictures of the run's images by their ids, or of latents [N, C, H, W] or [C, H, W], in their order.

        They are those of `palindrome regenerate`: the run's own ladder, or one of `steps` steps up to the same level.
        Raises KeyError for an id without a latent; ValueError for latents of another shape, for steps that do not fit
        the schedule, and where the model is another than the one that made the latents.
        """
        x = torch.from_numpy(self._latents(images))
        ladder, *_ = self.encoded.ladders([] if steps is None else [steps], self._loaded.checkpoint.schedule)
        decoded = (self._loaded.decode(batch, ladder) for batch in x.split(BATCH) if len(batch))
        return [to_pillow(pixels) for batch in decoded for pixels in to_pixels(batch)]

    def encode(self, image: PIL.Image | bytes | Place) -> np.ndarray:
        """The latent of one image, float32 [C, H, W]: cropped or padded, resized, inverted and rounded as this run did
        it, so that it is the latent that encode would have stored.

        `image` is a picture of Pillow, at the frame that it shows, turned upright by its EXIF; or a file's bytes, path
        or fsspec URI, which are the surer: Pillow by itself reads a few odd PNGs and TIFFs otherwise. Raises ValueError
        that begins with a reject's reason (`truncated`, `too_large`) for what is no usable image, OSError for a file
        that can't be read, and ValueError where the model is another than the one of the run.
        """
        how = self.encoded.preprocess
        try:
            if isinstance(image, PIL.Image):
                pixels = from_pillow(image, how)
            else:
                pixels, *_ = decode(image if isinstance(image, bytes) else self._read(image), how)
        except Rejected as e:
            raise ValueError(f"{e.reason}: {e.detail}") from None
        latents, _ = latents_of(self._loaded, to_model(np.stack([pixels])), self.encoded.inversion)
        return latents[0].float().numpy()

    def interpolate(
        self, a: str | np.ndarray | Tensor, b: str | np.ndarray | Tensor, frames: int = 11, steps: int | None = None
    ) -> list[PIL.Image]:
        """Pictures on the way from one image to another, both included: their latents are interpolated spherically, by
        equal angles. `a` and `b` are ids or latents [C, H, W]; `steps` and what is raised are as for `decode`, and
        ValueError where there are fewer than 2 frames, or no one arc leads from one latent to the other."""
        if frames < 2:
            raise ValueError(f"frames is {frames}; the two ends are 2")
        ends = [torch.from_numpy(self._latents(end)) for end in (a, b)]
        if any(len(end) != 1 for end in ends):
            raise ValueError("an interpolation leads from one image to one other")
        from_a, to_b = (end.expand(frames, -1, -1, -1) for end in ends)
        return self.decode(slerp(from_a, to_b, torch.linspace(0, 1, frames, dtype=torch.float64)), steps)

    def _latents(self, images: Ids | np.ndarray | Tensor) -> np.ndarray:
        """Latents that are given, or that are stored under ids: float32 [N, C, H, W]."""
        given = images.cpu().numpy() if isinstance(images, Tensor) else images
        if not isinstance(given, np.ndarray) or given.dtype.kind != "f":
            return self.latents(given)
        shape = tuple(self.dataset.schema.field("latent").type.shape)
        if given.shape[-3:] != shape or given.ndim not in (3, 4):
            raise ValueError(f"a latent of this run is {list(shape)}, and what is given is {list(given.shape)}")
        return given.reshape(-1, *shape).astype(np.float32)

    def _read(self, image: Place) -> bytes:
        fs, path = open_fs(absolute(os.fspath(image)), self.folder.storage_options)
        return bytes(fs.cat_file(path))

    @cached_property
    def _loaded(self) -> Model:
        with using(self.folder.storage_options):
            return Model(self.encoded.load_model(self.model)[1], execution=self.encoded.execution)
