"""Masks: which pixels of an image are known. A recipe says where they come from.

A picture of a mask is white where pixels are to be filled in and black where they are known, as diffusers' pipelines
have it; of the levels between, the upper half is white. It has the size of the image as the model takes it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Protocol, Self

import numpy as np
from PIL import Image as PIL

from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.images.decode import Preprocess, Rejected, decode, from_pillow
from palindrome.pipeline.storage.folder import Folder, absolute, is_outage

AS_IT_IS = Preprocess(0, channels=1)
WHITE = 128


class Named(Protocol):
    """What a mask is found by: an image's id, and the columns kept with it."""

    @property
    def image_id(self) -> str: ...
    @property
    def kept(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Masks:
    """Of images of size x size pixels: `whole` of all of them, bool [H, W], or `folder` or `column` of each its own."""

    recipe: str
    size: int
    whole: np.ndarray | None = None
    folder: Folder | None = None
    column: str | None = None

    @classmethod
    def of(cls, recipe: str, size: int) -> Self:
        """box:FRACTION leaves out a centred square of that fraction of the area; file:URI is one picture, or a folder
        with a picture ID.png for each image ID, or ID itself where that ends so; column:NAME is a column of pictures.
        Raises ValueError and OSError, also for a single mask that `check` refuses."""
        kind, _, value = recipe.partition(":")
        if kind == "column" and value:
            return cls(recipe, size, column=value)
        if kind == "box":
            return cls(recipe, size, whole=_checked(recipe, _box(value, size), size))
        if kind != "file" or not value:
            raise ValueError(f"{recipe!r} is not box:FRACTION, file:URI or column:NAME")
        folder = Folder(absolute(value))
        recipe = f"file:{folder.uri}"
        if folder.fs.isdir(folder.path()):
            return cls(recipe, size, folder=folder)
        try:
            known = known_of(folder.read(""))  # it is a file
        except Rejected as e:
            raise ValueError(f"{value}: {e}") from e
        except FileNotFoundError as e:
            raise FileNotFoundError(f"{value} does not exist") from e
        return cls(recipe, size, whole=_checked(value, known, size))

    @classmethod
    def of_picture(cls, mask: PIL.Image, size: int) -> Self:
        """That picture for all images. Raises ValueError where `check` refuses it."""
        try:
            known = from_pillow(mask, AS_IT_IS)[:, :, 0] < WHITE
        except Rejected as e:
            raise ValueError(f"the mask is {e.reason}: {e}") from e
        return cls("picture", size, whole=_checked("the mask", known, size))

    def record(self) -> dict[str, Any]:
        """For run.json: numbers depend on the masks."""
        return {"recipe": self.recipe, **({} if self.whole is None else {"sha256": mask_hash(self.whole)})}

    def find_each(self, images: Sequence[Named]) -> list[np.ndarray | Rejected]:
        """`find` of each image, several at once where they are files; what is Rejected stands in its place."""

        def found(image: Named) -> np.ndarray | Rejected:
            try:
                return self.find(image)
            except Rejected as e:
                return e

        return list(in_threads(found, images) if self.folder is not None else map(found, images))

    def find(self, image: Named) -> np.ndarray:
        """The mask of an image, bool [H, W]. Raises Rejected, and OSError where a store is out of order."""
        if self.whole is not None:
            return self.whole
        known = known_of(self._beside(image) if self.column is None else _bytes_of(image.kept[self.column]))
        check(known, self.size)
        return known

    def _beside(self, image: Named) -> bytes:
        assert self.folder is not None  # else it has a column
        name = image.image_id if image.image_id.lower().endswith(".png") else f"{image.image_id}.png"
        try:
            return self.folder.read(name)
        except OSError as e:
            if is_outage(e, self.folder.fs):
                raise
            missing = isinstance(e, FileNotFoundError | NotADirectoryError)
            why = "does not exist" if missing else f"can't be read: {e.strerror or type(e).__name__}"
            raise Rejected("no_mask", f"{name} {why}") from None


def known_of(content: bytes) -> np.ndarray:
    """The pixels that a picture of a mask leaves known, bool [H, W]. Raises Rejected."""
    try:
        pixels, *_ = decode(content, AS_IT_IS)
    except Rejected as e:
        raise Rejected("no_mask", f"the mask is {e.reason}: {e}") from e
    return pixels[:, :, 0] < WHITE


def check(known: np.ndarray, size: int) -> None:
    """Raises Rejected where a mask is of no use for images of size x size pixels."""
    if known.shape != (size, size):
        height, width = known.shape
        raise Rejected("mask_size", f"the mask has {width}x{height} pixels, and the image {size}x{size}")
    if known.all() or not known.any():
        raise Rejected("all_known" if known.all() else "none_known", f"{int(known.sum())} of {known.size} are known")


def mask_hash(known: np.ndarray) -> str:
    """sha256 over a mask, bool [H, W]: a byte for each pixel, row by row, 1 where it is known."""
    return hashlib.sha256(np.ascontiguousarray(known, np.uint8).tobytes()).hexdigest()


def _box(fraction: str, size: int) -> np.ndarray:
    try:
        area = float(fraction)
    except ValueError:
        area = -1.0
    if not 0 < area < 1:
        raise ValueError(f"box:{fraction} is no fraction of the area between 0 and 1")
    side = round(size * sqrt(area))
    first = (size - side) // 2
    known = np.ones((size, size), bool)
    known[first : first + side, first : first + side] = False
    return known


def _bytes_of(value: Any) -> bytes:
    """A value of a column of pictures. Raises Rejected."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if content is None:
        raise Rejected("no_mask", "the column has none for this image")
    return bytes(content)


def _checked(where: str, known: np.ndarray, size: int) -> np.ndarray:
    try:
        check(known, size)
    except Rejected as e:
        raise ValueError(f"{where}: {e.reason.replace('_', ' ')}: {e}") from e
    return known
