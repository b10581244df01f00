"""TIFFs of which strips, tiles or a part of them are missing."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from palindrome.pipeline.images.decode import Preprocess, Rejected, decode

STARTS, COUNTS = 273, 279


@pytest.fixture(scope="module")
def picture(pngs):
    return Image.open(io.BytesIO(pngs[1])).convert("RGB").resize((64, 48))


def changed(data, tag, change):
    """The file with a tag's numbers changed, of which there may be fewer."""
    (at,) = struct.unpack_from("<I", data, 4)
    out = bytearray(data)
    for entry in range(at + 2, at + 2 + 12 * struct.unpack_from("<H", data, at)[0], 12):
        found, kind, count, value = struct.unpack_from("<HHII", data, entry)
        if found == tag:
            form = {3: "H", 4: "I"}[kind]
            place = value if count * struct.calcsize(form) > 4 else entry + 8
            numbers = change(list(struct.unpack_from(f"<{count}{form}", data, place)))
            struct.pack_into("<I", out, entry + 4, len(numbers))
            struct.pack_into(f"<{len(numbers)}{form}", out, place, *numbers)
    return bytes(out)


def reason(data, **options):
    with pytest.raises(Rejected) as info:
        decode(data, Preprocess(48, **options))
    return info.value.reason


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_strips_that_are_not_there(compression, picture, corpus):
    data = corpus.encoded(picture, "TIFF", compression=compression, tiffinfo={278: 8})
    np.testing.assert_array_equal(
        decode(data, Preprocess(48))[0], np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[:, 8:56]
    )
    fewer = changed(changed(data, STARTS, lambda n: n[:4]), COUNTS, lambda n: n[:4])
    nowhere = changed(changed(data, STARTS, lambda n: [*n[:4], 0, 0]), COUNTS, lambda n: [*n[:4], 0, 0])
    short = changed(data, COUNTS, lambda n: [*n[:4], n[4] // 3, n[5]])
    assert {reason(cut) for cut in (fewer, nowhere)} == {"truncated"}
    assert reason(short) in ("truncated", "corrupt")


def test_jpeg_strips_of_which_a_part_is_missing(picture, corpus):
    """Pillow shows gray in its place."""
    data = corpus.encoded(picture, "TIFF", compression="jpeg", tiffinfo={278: 16})
    for part in (0.5, 0.8):
        cut = changed(data, COUNTS, lambda n, part=part: [n[0], int(n[1] * part), n[2]])
        assert Image.open(io.BytesIO(cut)).convert("RGB").size == (64, 48)
        assert reason(cut) == "truncated"
        assert decode(cut, Preprocess(48, truncated="keep"))[0].shape == (48, 48, 3)


def test_one_strip_whose_count_of_rows_is_none_or_more_than_it_has(picture, corpus):
    for rows in ([2**32 - 1], [1000], [48]):
        data = corpus.tiff_from(np.asarray(picture), 8, 2, {278: [rows[0] % 65536]})
        np.testing.assert_array_equal(decode(data, Preprocess(48))[0], np.asarray(picture)[:, 8:56])
