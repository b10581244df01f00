"""PNGs whose data ends early or whose texts are long, against Pillow's and zlib's own reading of them."""

import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from palindrome.pipeline.images.decode import Preprocess, Rejected, decode
from palindrome.pipeline.images.png import PASSES, chunk, without_metadata

TEXT = os.urandom(700_000).hex().encode()  # 1.4 MB, as ImageMagick's raw profiles or a renderer's notes


def pixels(data, **options):
    return decode(data, Preprocess(32, **options))[0]


def rows_cut(data, part):
    """The file with that part of its rows, compressed by zlib, whose stream ends as it should."""
    size = int.from_bytes(data[data.index(b"IDAT") - 4 :][:4], "big")
    at = data.index(b"IDAT") + 4
    rows = zlib.decompress(data[at : at + size])
    return data[: at - 8] + chunk(b"IDAT", zlib.compress(rows[: int(len(rows) * part)])) + data[at + size + 4 :]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "I;16"])
def test_stream_that_ends_early_and_well_is_truncated(mode, pngs, corpus):
    image = Image.open(io.BytesIO(pngs[1])).convert("RGB").resize((32, 32))
    image = Image.fromarray(np.full((32, 32), 30_000, np.uint16)) if mode == "I;16" else image.convert(mode)
    data = corpus.encoded(image, "PNG")
    pixels(data)
    for part in (0, 0.5, 31 / 32):
        with pytest.raises(Rejected) as info:
            pixels(rows_cut(data, part))
        assert info.value.reason == "truncated"
    assert pixels(rows_cut(data, 31 / 32), truncated="keep").shape == (32, 32, 3)


def test_black_last_row_is_none_that_is_missing(pngs, corpus):
    image = np.asarray(Image.open(io.BytesIO(pngs[1])).convert("RGB")).copy()
    image[-1] = 0
    np.testing.assert_array_equal(pixels(corpus.encoded(Image.fromarray(image), "PNG")), image)
    black = corpus.bomb(1500, 1500)
    assert not pixels(black).any()


def interlaced(values):
    """uint8 [H, W] as Adam7."""
    height, width = values.shape
    parts = (values[y::dy, x::dx] for x, y, dx, dy in PASSES)
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(32, 32), (32, 7), (1, 1), (3, 32), (5, 1)])
def test_interlaced(size):
    values = np.random.default_rng(0).integers(1, 255, size[::-1], dtype=np.uint8)
    data, side = interlaced(values), max(size)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    found = decode(data, Preprocess(side, fit="pad"))[0]
    np.testing.assert_array_equal(found[top : top + size[1], left : left + size[0], 0], values)
    for part in (0, 0.99):
        with pytest.raises(Rejected) as info:
            pixels(rows_cut(data, part))
        assert info.value.reason == "truncated"


def with_chunk(png, kind, content):
    return png[:33] + chunk(kind, content) + png[33:]


@pytest.mark.parametrize("place", [33, -12])
@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "tEXt", "tEXt of 70 MB", "100 zTXt"])
def test_long_texts_and_profiles_are_no_matter(kind, place, pngs):
    content = {
        "zTXt": b"Raw profile type xmp\0\0" + zlib.compress(TEXT),
        "iTXt": b"workflow\0\1\0\0\0" + zlib.compress(TEXT),
        "iCCP": b"printer\0\0" + zlib.compress(TEXT),
        "tEXt": b"parameters\0" + TEXT,
        "tEXt of 70 MB": b"parameters\0" + bytes(70_000_000),
        "100 zTXt": b"a\0\0" + zlib.compress(bytes(1_000_000)),
    }[kind]
    name, count = ("zTXt", 100) if kind == "100 zTXt" else (kind[:4], 1)
    added = chunk(name.encode(), content) * count
    np.testing.assert_array_equal(pixels(pngs[0][:place] + added + pngs[0][place:]), pixels(pngs[0]))


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/>%s</x:xmpmeta>'


@pytest.mark.parametrize("length", [10, 3_000_000])
@pytest.mark.parametrize("packed", [False, True])
def test_orientation_in_a_text_however_long(packed, length, pngs):
    """As ImageOps turns it, which reads short ones only."""
    text = XMP % (b" " * length)
    head = b"XML:com.adobe.xmp\0" + (b"\1" if packed else b"\0") + b"\0\0\0"
    data = with_chunk(pngs[1], b"iTXt", head + (zlib.compress(text) if packed else text))
    turned = np.asarray(
        ImageOps.exif_transpose(
            Image.open(io.BytesIO(with_chunk(pngs[1], b"iTXt", head[:-4] + b"\0\0\0\0" + XMP % b"")))
        )
    )
    np.testing.assert_array_equal(pixels(data), turned)
    assert not np.array_equal(turned, pixels(pngs[1]))


def test_orientation_in_imagemagicks_profile(pngs):
    exif = Image.Exif()
    exif[0x0112] = 3
    block = exif.tobytes()
    text = b"\nexif\n%8d\n" % len(block) + re.sub(b"(.{72})", rb"\1\n", block.hex().encode()) + b"\n"
    data = with_chunk(pngs[1], b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))
    np.testing.assert_array_equal(pixels(data), pixels(pngs[1])[::-1, ::-1])


def test_a_png_without_texts_is_not_copied(pngs):
    assert without_metadata(pngs[0]) is pngs[0]
