"""uint8 images [H, W, C] as PNG, and grids of them."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image as PIL


def png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] or [H, W, 1] -> the bytes of a PNG, lossless."""
    content = io.BytesIO()
    PIL.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(content, "PNG")
    return content.getvalue()


def pixels_of(content: bytes) -> np.ndarray:
    """A PNG of ours back to uint8 [H, W, C]."""
    pixels = np.asarray(PIL.open(io.BytesIO(content)))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


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
