"""JPEG files: their segments, their pixels, and whether their data is all there.

A decoder fills in gray what a file lacks. libjpeg tells of it in warnings, which Pillow drops and simplejpeg raises: it
decodes with libjpeg-turbo, as Pillow does, to the same pixels.
"""

import re
import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import simplejpeg

MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")  # but those without a length
RESTART = re.compile(rb"\xff+[\xd0-\xd7]")
FRAMES = {
    0xC0,
    0xC1,
    0xC2,
    0xC9,
    0xCA,
}  # baseline, sequential, progressive; these two, arithmetic
PROGRESSIVE = {0xC2, 0xCA}
INTERVAL, SCAN, END = 0xDD, 0xDA, 0xD9
EOI = b"\xff\xd9"
COLORS = {"L": "GRAY", "RGB": "RGB"}  # Pillow's mode -> simplejpeg's
LACKING = re.compile(r"premature end|instead of RST|bad (Huffman|arithmetic) code", re.IGNORECASE)
FILLER = bytes(range(0x35, 0x75))  # bits that are neither all 0, which libjpeg fills in, nor part of a marker
ZEROS = 16  # at the end of a file without an end marker: space that was set aside for it and never written


class Incomplete(Exception):
    """The file lacks a part of the picture."""


class Segment(NamedTuple):
    """`code` is the marker's second byte. It begins at `start`, its content at `body`, and what follows at `end`: of a
    scan's header the entropy-coded data."""

    code: int
    start: int
    body: int
    end: int


def segments(jpeg: bytes, scans: int) -> list[Segment]:
    """Those of the file's first image, END the last if it is there; at most one scan more than `scans`."""
    found: list[Segment] = []
    marker, seen = MARKER.search(jpeg, 2), 0
    while marker and seen <= scans:
        at = marker.end()
        end = at if marker[0][-1] == END else at + int.from_bytes(jpeg[at : at + 2], "big")
        found.append(Segment(marker[0][-1], marker.start(), at + 2, end))
        if marker[0][-1] == END:
            break
        seen += marker[0][-1] == SCAN
        marker = MARKER.search(jpeg, end)
    return found


def pixels(jpeg: bytes, found: Sequence[Segment], mode: str, size: tuple[int, int], keep: bool) -> np.ndarray | None:
    """uint8 [H, W, 1 or 3], as Pillow decodes a JPEG of that mode and size (W, H); None where that is left to Pillow.
    `keep`: what is missing stays gray. Raises Incomplete."""
    frames = [segment for segment in found if segment.code in FRAMES]
    sizes = [struct.unpack_from(">HH", jpeg, segment.body + 1)[::-1] for segment in frames if segment.end <= len(jpeg)]
    if mode not in COLORS or sizes != [size]:
        return None
    try:
        return np.asarray(simplejpeg.decode_jpeg(clean(jpeg, found), COLORS[mode], strict=not keep))
    except ValueError as e:
        if not keep and LACKING.search(str(e)):
            raise Incomplete(str(e)) from None
        return None


def warning(jpeg: bytes, color: str) -> str:
    """What simplejpeg says of a file, whose pixels are not wanted, that lacks data; else ""."""
    try:
        simplejpeg.decode_jpeg(jpeg, color, min_factor=8)
    except ValueError as e:
        return str(e) if LACKING.search(str(e)) else ""
    return ""


def clean(jpeg: bytes, found: Sequence[Segment]) -> bytes:
    """Without stray bytes between its segments, of which libjpeg would warn first, and with an end marker."""
    parts, kept = [], 0
    for before, segment in pairwise(found):
        if before.code != SCAN and jpeg[before.end : segment.start].strip(b"\xff"):
            parts.append(jpeg[kept : before.end])
            kept = segment.start
    if parts or not _ends(found):
        parts += [jpeg[kept:], b"" if _ends(found) else EOI]
    return b"".join(parts) if parts else jpeg


def _ends(found: Sequence[Segment]) -> bool:
    return bool(found) and found[-1].code == END


def check_scans(jpeg: bytes, found: Sequence[Segment]) -> None:
    """Raises Incomplete where scans are missing, of which libjpeg does not warn; or where a file that has no end marker
    ends in zeros, which are valid codes."""
    if not _ends(found) and jpeg.endswith(bytes(ZEROS)):
        raise Incomplete("zeros in place of the rest of the file")
    frame = next((segment for segment in found if segment.code in FRAMES), None)
    if frame is None:
        return
    bits = {
        jpeg[at]: [14] * 64 for at in range(frame.body + 6, min(frame.end, len(jpeg)), 3)
    }  # of each coefficient, still to come
    for scan in found:
        if scan.code == SCAN and scan.end <= len(jpeg):
            of = jpeg[scan.body + 1 : scan.body + 1 + 2 * jpeg[scan.body] : 2]
            first, last, approximation = 0, 63, 0
            if frame.code in PROGRESSIVE:
                first, last, approximation = jpeg[scan.end - 3 : scan.end]
            for component in of:
                if component in bits:
                    bits[component][first : last + 1] = [approximation & 15] * (min(last, 63) - first + 1)
    if any(map(any, bits.values())):
        raise Incomplete("scans are missing")


def filled(jpeg: bytes, found: Sequence[Segment]) -> bytes:
    """The file with bytes behind the data of each scan and restart interval. A decoder reads them only where data is
    missing: only then does it make another picture of it. Raises Incomplete where an interval is missing."""
    parts, kept = [], 0
    restarts = any(segment.code == INTERVAL and any(jpeg[segment.body : segment.end]) for segment in found)
    for i, segment in enumerate(found):
        if segment.code != SCAN:
            continue
        end = found[i + 1].start if i + 1 < len(found) else len(jpeg)
        coded = jpeg[segment.end : end]
        numbers = [marker[0][-1] - 0xD0 for marker in RESTART.finditer(coded)]
        if restarts and numbers != [n % 8 for n in range(len(numbers))]:
            raise Incomplete("a restart interval is missing")
        more = bytes([0xFF, 0xD0 + len(numbers) % 8]) + FILLER if restarts else b""
        parts += [jpeg[kept : segment.end], RESTART.sub(lambda marker: FILLER + marker[0], coded), FILLER, more]
        kept = end
    return b"".join([*parts, jpeg[kept:], b"" if _ends(found) else EOI])
