"""BMP files whose header says where in 16 or 32 bits each colour is: Pillow knows a dozen of such layouts."""

import struct

import numpy as np
from PIL import Image as PIL

MASKED = (3, 6)  # compressions: BITFIELDS, ALPHABITFIELDS
USUAL = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
MASKS = 54  # where they are, behind the 40 bytes of a header or in a longer one


def masked(data: bytes, max_pixels: int) -> PIL.Image | None:
    """RGB, or RGBA where it has alpha that is not 0 throughout, which writers leave that mean none. None for any other
    BMP, and one that is too large or breaks off: those are Pillow's."""
    if len(data) < MASKS + 12 or data[:2] != b"BM":
        return None
    start, header = struct.unpack_from("<II", data, 10)
    width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    if header < 40 or compression not in MASKED or bits not in (16, 32):
        return None
    has_alpha = header >= 56 or (header == 40 and compression == 6)
    masks = struct.unpack_from("<4I" if has_alpha else "<3I", data.ljust(MASKS + 16, b"\0"), MASKS)
    masks = masks if any(masks[:3]) else USUAL
    row = (width * bits + 31) // 32 * 4
    if width <= 0 or not height or width * abs(height) > max_pixels:
        return None
    if len(data) < start + row * abs(height):
        return None
    rows = np.frombuffer(data, np.uint8, row * abs(height), start).reshape(abs(height), row)
    values = rows[:, : width * bits // 8].copy().view(f"<u{bits // 8}")[:: -1 if height > 0 else 1]
    channels = [_channel(values, mask) for mask in masks]
    return PIL.fromarray(np.dstack(channels if channels[3:] and channels[3].any() else channels[:3]))


def _channel(values: np.ndarray, mask: int) -> np.ndarray:
    """Those bits as uint8, their largest value as 255."""
    largest = mask // (mask & -mask or 1)
    return ((values & mask).astype(np.uint64) // (mask & -mask or 1) * 255 // max(largest, 1)).astype(np.uint8)
