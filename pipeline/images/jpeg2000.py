"""JPEG 2000 codestreams: their sizes, and whether all tiles are there."""

import re
import struct
from collections import Counter
from collections.abc import Iterator

SIZ = re.compile(rb"\xff\x4f\xff\x51....(.{32})", re.DOTALL)  # their header
PART, END = b"\xff\x90", b"\xff\xd9"  # markers: of a part of a tile, and of the end


def tiles_of(data: bytes) -> Iterator[int]:
    """How many tiles each codestream in the file says to have."""
    for sizes in SIZ.findall(data):
        width, height, _, _, tile_width, tile_height, left, top = struct.unpack(">8I", sizes)
        yield -(-(width - left) // max(tile_width, 1)) * -(-(height - top) // max(tile_height, 1))


def lacks(data: bytes) -> str:
    """What a file has not of its first codestream, "" for nothing: tiles without any part, or parts that its tiles are
    said to have. Of a part that breaks off, OpenJPEG says so."""
    header = SIZ.search(data)
    if not header:
        return ""
    at, parts, stated = header.start() + 2, Counter[int](), Counter[int]()
    try:
        while data[at : at + 2] not in (PART, END, b""):  # the other headers
            at += 2 + max(struct.unpack_from(">H", data, at + 2)[0], 2)
        while data[at : at + 2] == PART:
            tile, length, _, of = struct.unpack_from(">HIBB", data, at + 4)
            parts[tile] += 1
            stated[tile] = max(of, stated[tile])
            at = at + max(length, 12) if length else len(data)
    except struct.error:
        pass
    if len(parts) < (tiles := next(tiles_of(header[0]))):
        return f"{len(parts)} of {tiles} tiles"
    return "parts of tiles" if any(parts[tile] < of for tile, of in stated.items()) else ""
