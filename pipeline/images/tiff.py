"""TIFF files: their tags, and whether their pixels are all there."""

import ctypes
import struct
from typing import Any

from PIL import _imaging

from palindrome.pipeline.images import jpeg

WIDTH, HEIGHT = 256, 257
BITS, COMPRESSION, PHOTOMETRIC, STRIPS, SAMPLES, ROWS, STRIP_BYTES, PLANAR = 258, 259, 262, 273, 277, 278, 279, 284
TILE, TILES, TILE_BYTES = (322, 323), 324, 325  # width and height of tiles, and where they are
TABLES = 347  # what all JPEGs in the file share
SIGNS, SUBSAMPLING = 339, 530  # whether values are signed or floats, and how many pixels share a colour
TAGS = {WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, STRIPS, SAMPLES, ROWS, STRIP_BYTES, PLANAR, *TILE, TILES}
TAGS |= {TILE_BYTES, TABLES, SIGNS, SUBSAMPLING}
JPEG = 7  # a compression
Tags = dict[int, Any]


def tags_of(data: bytes) -> list[int]:
    """The tags in a TIFF's first directory, as often as they are there."""
    order = "<" if data[:1] == b"I" else ">"
    big = data[2:4] in (b"+\0", b"\0+")  # BigTIFF, where offsets and counts have 8 bytes
    try:
        (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        (n,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    except struct.error:  # it breaks off
        return []
    first, size = (at + 8, 20) if big else (at + 2, 12)
    entries = data[first : first + size * min(n, 65535)]
    return [struct.unpack_from(order + "H", entries, i)[0] for i in range(0, len(entries) - 1, size)]


def numbers(value: Any) -> list[int]:
    """A tag's value; [] where it has none, or others than whole numbers."""
    values = value if isinstance(value, tuple) else (value,)
    return list(values) if all(isinstance(n, int) for n in values) else []


def number(value: Any, default: int) -> int:
    return next(iter(numbers(value)), default)


def lacks(tags: Tags) -> str:
    """What a TIFF has not of its pixels by its tags, "" for nothing: Pillow leaves black what has no strip or tile, and
    takes one at 0 from the file's header."""
    tiled, width, height = TILES in tags, number(tags.get(WIDTH), 1), number(tags.get(HEIGHT), 1)
    starts = numbers(tags.get(TILES if tiled else STRIPS))
    planes = number(tags.get(SAMPLES), 1) if tags.get(PLANAR) == 2 else 1
    across = number(tags.get(TILE[0]), width) if tiled else width
    down = number(tags.get(TILE[1] if tiled else ROWS), height)
    needed = -(-width // max(across, 1)) * -(-height // max(min(down, height), 1)) * planes
    what = "tiles" if tiled else "strips"
    if starts and len(starts) < needed:
        return f"{len(starts)} of {needed} {what}"
    if 0 in starts[:needed]:
        return f"{what} that are nowhere"
    counts = numbers(tags.get(STRIP_BYTES))
    if not tiled and needed > 1 and counts and number(tags.get(COMPRESSION), 1) == 1:
        bits = numbers(tags.get(BITS)) or [1]
        row = width * (bits[0] if planes > 1 else max(sum(bits), bits[0] * number(tags.get(SAMPLES), 1))) // 8
        if sum(counts) < row * height * planes:
            return f"{sum(counts)} of {row * height * planes} bytes of pixels"
    return ""


def lacks_of_jpegs(tags: Tags, data: bytes) -> str:
    """What a TIFF's strips or tiles lack that are JPEGs, "" for nothing, or where they are none."""
    starts, counts = (
        numbers(tags.get(tag)) for tag in ((TILES, TILE_BYTES) if TILES in tags else (STRIPS, STRIP_BYTES))
    )
    tables = tags.get(TABLES, b"")
    if tags.get(COMPRESSION) != JPEG or not isinstance(tables, bytes):
        return ""
    color = {1: "GRAY", 4: "CMYK"}.get(1 if tags.get(PLANAR) == 2 else number(tags.get(SAMPLES), 1), "RGB")
    for start, count in zip(starts, counts, strict=False):
        part = data[start : start + count]
        if words := jpeg.warning(tables.removesuffix(jpeg.EOI) + part[2 if tables else 0 :], color):
            return words
    return ""


try:  # libtiff prints each error
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)
except (OSError, AttributeError):  # a Pillow without libtiff, or with one built in
    pass
