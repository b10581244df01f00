"""PNG files: what Pillow need not read of them, and whether their pixels are all there."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
from PIL import Image as PIL

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
ORIENTED = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # the texts that may say how the picture is turned
LIMIT = 1 << 20  # bytes of such a text: Pillow refuses a picture of which one is longer
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # of Adam7
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a colour type


def without_metadata(data: bytes) -> bytes:
    """The file without texts and colour profile, which Pillow would unpack, and refuse where they are long; with what
    they say of the orientation."""
    parts, kept, oriented = [], 0, 0
    for kind, start, body, end in _chunks(data):
        if kind not in TEXTS and kind != b"iCCP":
            continue
        parts.append(data[kept:start])
        kept = min(end + 4, len(data))
        if kind != b"iCCP" and data.startswith(tuple(name + b"\0" for name in ORIENTED), body) and oriented < 4:
            oriented += 1
            parts.append(_shortened(kind, data[body:end]))
    return b"".join([*parts, data[kept:]]) if parts else data


def _shortened(kind: bytes, content: bytes) -> bytes:
    """A text chunk with at most LIMIT of its bytes, none where it can't be read."""
    name, _, text = content.partition(b"\0")
    packed = kind == b"zTXt"
    if packed:
        text = text[1:]
    elif kind == b"iTXt":
        packed, text = text[:1] == b"\1", [*text[2:].split(b"\0", 2), b"", b""][2]
    if packed:
        try:
            text = zlib.decompressobj().decompress(text, LIMIT)
        except zlib.error:
            return b""
    head = b"\0\0\0\0\0" if kind == b"iTXt" else b"\0"
    return chunk(b"iTXt" if kind == b"iTXt" else b"tEXt", name + head + text[:LIMIT])


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def lacks(image: PIL.Image, data: bytes) -> str:
    """What a loaded PNG has not of its pixels, "" for nothing. Its compressed data may end early, and well: Pillow then
    leaves rows at 0."""
    # Pixels are stored row by row: where the last one is there, all are. To look at one costs next to nothing.
    if data[12:16] == b"IHDR" and data[28:29] == b"\0" and _is_set(image.getpixel((image.width - 1, image.height - 1))):
        return ""
    chunks = list(_chunks(data))
    header = next((data[body:end] for kind, _, body, end in chunks if kind == b"IHDR"), b"")
    if len(header) < 13:
        return ""
    width, height, bits, color, _, _, interlaced = struct.unpack(">IIBBBBB", header[:13])
    if not interlaced and np.asarray(image.crop((0, height - 1, width, height))).any():  # the last row was there
        return ""
    passes = PASSES if interlaced else ((0, 0, 1, 1),)
    sizes = ((-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes)
    needed = sum((1 + (w * bits * CHANNELS.get(color, 1) + 7) // 8) * h for w, h in sizes if w > 0 and h > 0)
    unpacker, found = zlib.decompressobj(), 0
    with suppress(zlib.error):  # what Pillow has read without an error is counted
        for kind, _, body, end in chunks:
            content = data[body:end] if kind == b"IDAT" else b""
            while content and found < needed and not unpacker.eof:
                found += len(unpacker.decompress(content, LIMIT))
                content = unpacker.unconsumed_tail
            while kind == b"IEND" and found < needed and (more := unpacker.decompress(b"", LIMIT)):
                found += len(more)
    return "" if found >= needed else f"{found} of {needed} bytes of pixels"


def _is_set(pixel: float | tuple[int, ...] | None) -> bool:
    return any(pixel) if isinstance(pixel, tuple) else bool(pixel)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int, int]]:
    """Each one's kind, and where it, its content and its checksum begin."""
    at = len(SIGNATURE)
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at, at + 8, end
        at = end + 4
