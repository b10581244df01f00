"""What a file says of how it was made: its container, and the quality of a JPEG.

Where real images are JPEGs and generated ones PNGs, what tells them apart may be compression alone.
"""

import re
from functools import lru_cache

import numpy as np

from palindrome.pipeline.images.jpeg import segments

CONTAINERS = {  # by the first bytes, as Pillow names them
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "GIF": rb"GIF8[79]a",
    "WEBP": rb"RIFF....WEBP",
    "AVIF": rb"....ftypavi",
    "TIFF": rb"II(\*|\+)\0|MM\0(\*|\+)",
    "JPEG2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "BMP": rb"BM",
    "PPM": rb"P[1-6fF]\s",
}
MAGIC = {name: re.compile(pattern, re.DOTALL) for name, pattern in CONTAINERS.items()}
TABLES = 0xDB  # the marker of quantization tables
# ITU-T T.81, table K.1: luminance, at quality 50; in the zigzag order of a file.
LUMINANCE = np.array(
    [
        *(16, 11, 12, 14, 12, 10, 16, 14, 13, 14, 18, 17, 16, 19, 24, 40),
        *(26, 24, 22, 22, 24, 49, 35, 37, 29, 40, 58, 51, 61, 60, 57, 51),
        *(56, 55, 64, 72, 92, 78, 64, 68, 87, 69, 55, 56, 80, 109, 81, 87),
        *(95, 98, 103, 104, 103, 62, 77, 113, 121, 112, 100, 120, 92, 101, 103, 99),
    ]
)


def _scaled() -> np.ndarray:
    """The luminance table at qualities 1 to 100, int [100, 64], as the Independent JPEG Group's library scales it."""
    quality = np.arange(1, 101)[:, None]
    percent = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return np.clip((LUMINANCE * percent + 50) // 100, 1, 255)


AT_QUALITY = _scaled()


def container_of(data: bytes) -> str | None:
    """The name of a file's container, from its first bytes; None for one that is not known."""
    return next((name for name, pattern in MAGIC.items() if pattern.match(data)), None)


def jpeg_quality(data: bytes) -> int | None:
    """The quality from 1 to 100 whose luminance table is nearest to a JPEG's first quantization table, the smallest of
    several; None for other files, and without a table. Programs with tables of their own have no such scale: of their
    files it is an estimate."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    for segment in segments(data, 0):
        if segment.code == TABLES:
            wide = data[segment.body : segment.body + 1] >= b"\x10"  # 16 bits a value
            return _nearest(data[segment.body + 1 : segment.end][: 64 << wide], wide)
    return None


@lru_cache(1024)  # a collection's files are made by few programs, and this took longer than the rest of a small one
def _nearest(table: bytes, wide: bool) -> int | None:
    if len(table) != 64 << wide:
        return None
    values = np.frombuffer(table, ">u2" if wide else "u1").astype(np.int64)
    return int(np.abs(AT_QUALITY - values).sum(1).argmin()) + 1
