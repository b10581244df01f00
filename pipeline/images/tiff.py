"""TIFF files: tags as numbers, and whether the pixels are all there, which libtiff says and Pillow does not pass on."""

import ctypes
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import _imaging

WIDTH, HEIGHT = 256, 257
BITS, COMPRESSION, PHOTOMETRIC, STRIPS, SAMPLES, ROWS, STRIP_BYTES, PLANAR = 258, 259, 262, 273, 277, 278, 279, 284
TILE, TILES = (322, 323), 324  # width and height of tiles, and where they are
SIGNS, SUBSAMPLING = 339, 530  # whether values are signed or floats, and how many pixels share a colour
TAGS = (WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, STRIPS, SAMPLES, ROWS, STRIP_BYTES, PLANAR, *TILE, TILES)
TAGS += (SIGNS, SUBSAMPLING)
CODEC = re.compile(rb"JPEGLib|\w+Decode\w*")  # libtiff's modules that speak of a strip's data
LACKING = re.compile(rb"premature|bad code word|not enough data|instead of RST|bad huffman", re.IGNORECASE)


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


def lacks(tags: dict[int, Any]) -> str:
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


_heard = threading.local()


@contextmanager
def listening() -> Iterator[list[str]]:
    """What libtiff says, while this thread is within, of data that it had to make up."""
    words: list[str] = []
    _heard.words = words
    try:
        yield words
    finally:
        _heard.words = None


def _hear(_: Any, module: bytes | None, form: bytes | None, values: int | None) -> None:
    words = getattr(_heard, "words", None)
    if words is not None and form and CODEC.fullmatch(module or b""):
        text = ctypes.create_string_buffer(300)
        _format(text, len(text), form, values)
        if LACKING.search(text.value):
            words.append(text.value.decode("ascii", "replace"))


# libtiff prints its errors, and tells its warnings to whom it is told of, in the terms of C's printf.
_handler = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)(_hear)
try:
    _format = ctypes.CDLL(None).vsnprintf
    _format.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p)
    _library = ctypes.CDLL(_imaging.__file__)
    _library.TIFFSetErrorHandler(None)
    _library.TIFFSetErrorHandlerExt(_handler)
    _library.TIFFSetWarningHandlerExt(_handler)
except (OSError, AttributeError, TypeError):  # a Pillow without libtiff, or with one built in
    pass
