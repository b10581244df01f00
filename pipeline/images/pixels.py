"""uint8 images [H, W, C] as PNG, and grids of them."""

import io
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image as PIL

ACROSS = 16  # frames of a strip side by side


def to_pillow(pixels: np.ndarray) -> PIL.Image:
    """uint8 [H, W, 3] or [H, W, 1] -> a picture of mode RGB or L."""
    return PIL.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] or [H, W, 1] -> the bytes of a PNG, lossless."""
    content = io.BytesIO()
    to_pillow(pixels).save(content, "PNG")
    return content.getvalue()


def picture(image_id: str, pixels: np.ndarray) -> dict[str, Any]:
    """uint8 [H, W, C] -> the value of a column of pictures: a PNG, and the name of a file for it."""
    return {"bytes": png(pixels), "path": re.sub(r"[^\w.-]+", "_", image_id).strip(".") + ".png"}


def pixels_of(content: bytes) -> np.ndarray:
    """A PNG of ours back to uint8 [H, W, C]."""
    pixels = np.asarray(PIL.open(io.BytesIO(content)))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def check_png(content: bytes | None) -> None:
    """Raises ValueError where that is no whole PNG: every chunk is held to its checksum, and nothing is decoded."""
    if not content:
        raise ValueError("there is no image")
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("it is no PNG")
    view, at, kind = memoryview(content), 8, b""
    while at + 12 <= len(view) and kind != b"IEND":
        end = at + 8 + int.from_bytes(view[at : at + 4])
        kind = bytes(view[at + 4 : at + 8])
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4]):
            break
        at = end + 4
    else:
        if kind == b"IEND":
            return
    raise ValueError("the PNG is damaged or breaks off")


def grid(images: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Images of one size in rows of `columns` on white."""
    height, width, channels = images[0].shape
    rows = -(-len(images) // columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, channels)
    sheet = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def strip(frames: Sequence[np.ndarray], square: bool) -> np.ndarray:
    """Frames side by side, in rows of ACROSS; those of a grid as the square that they are."""
    return grid(frames, math.isqrt(len(frames)) if square else min(ACROSS, len(frames)), gap=1)


def stacked(pictures: Sequence[np.ndarray], gap: int = 6) -> np.ndarray:
    """Pictures below one another, on white."""
    height = sum(p.shape[0] + gap for p in pictures) - gap
    sheet = np.full((height, max(p.shape[1] for p in pictures), pictures[0].shape[2]), 255, np.uint8)
    top = 0
    for picture in pictures:
        sheet[top : top + picture.shape[0], : picture.shape[1]] = picture
        top += picture.shape[0] + gap
    return sheet
