"""BMPs whose header has masks: the colours that they state."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from palindrome.pipeline.images.decode import Preprocess, Rejected, decode


def bmp(values, masks, header=124, compression=3, up=True):
    """values: [H, W] of uint16 or uint32."""
    height, width = values.shape
    row = values.astype(values.dtype.newbyteorder("<"))[:: -1 if up else 1]
    body = b"".join(r.tobytes() + bytes(-len(r.tobytes()) % 4) for r in row)
    sizes = (header, width, height if up else -height, 1, 8 * values.itemsize, compression, len(body))
    inner = struct.pack("<IiiHHIIiiII", *sizes, 0, 0, 0, 0)
    inner += struct.pack(f"<{len(masks)}I", *masks)
    start = 14 + max(header, len(inner))
    return (b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + inner).ljust(start, b"\0") + body


@pytest.fixture(scope="module")
def rgb(pngs):
    return np.asarray(Image.open(io.BytesIO(pngs[3])).convert("RGB"))


def packed(channels, masks, dtype):
    """8-bit channels by their high bits, where the masks are."""
    found = np.zeros(channels[0].shape, np.uint64)
    for channel, mask in zip(channels, masks, strict=True):
        low = (mask & -mask).bit_length() - 1 if mask else 0
        bits = mask.bit_count()
        wide = channel.astype(np.uint64) * 257  # of 16 bits
        found |= (wide >> np.uint64(16 - bits)) << np.uint64(low)
    return found.astype(dtype)


OF_32 = {
    "BGRX": (0xFF0000, 0xFF00, 0xFF),
    "GIMP's": (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
    "RGBX": (0xFF, 0xFF00, 0xFF0000),
    "XRGB from the left": (0xFF00, 0xFF0000, 0xFF000000),
    "BGRA": (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
    "RGBA": (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
}


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("alpha", [0, 255])
@pytest.mark.parametrize("name", OF_32)
def test_32_bits_of_any_order(name, alpha, up, rgb):
    """Alpha that is 0 throughout is none: writers leave it."""
    masks = OF_32[name]
    channels = [*np.moveaxis(rgb, 2, 0), np.full((32, 32), alpha, np.uint8)][: len(masks)]
    data = bmp(packed(channels, masks, np.uint32), masks, up=up)
    np.testing.assert_array_equal(decode(data, Preprocess(32))[0], rgb)


def test_alpha_that_says_something_is_laid_over_the_background(rgb):
    alpha = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))
    masks = OF_32["BGRA"]
    data = bmp(packed([*np.moveaxis(rgb, 2, 0), alpha], masks, np.uint32), masks)
    share = alpha[..., None] / 255
    found = decode(data, Preprocess(32, background=(10, 200, 60)))[0]
    assert np.abs(found - (rgb * share + np.array((10, 200, 60)) * (1 - share))).max() <= 1


KNOWN = ((0x7C00, 0x3E0, 0x1F), (0xF800, 0x7E0, 0x1F))  # to Pillow


@pytest.mark.parametrize("header", [40, 56, 108, 124])
@pytest.mark.parametrize(
    "masks", [(0x7C00, 0x3E0, 0x1F), (0xF800, 0x7E0, 0x1F), (0xF00, 0xF0, 0xF), (0x1F, 0x3E0, 0x7C00)]
)
def test_16_bits(masks, header, rgb):
    data = bmp(packed(np.moveaxis(rgb, 2, 0), masks, np.uint16), masks, header)
    found = decode(data, Preprocess(32))[0].astype(int)
    assert np.abs(found - rgb).max() <= max(256 >> mask.bit_count() for mask in masks)
    if masks in KNOWN:
        np.testing.assert_array_equal(found, np.asarray(Image.open(io.BytesIO(data))))


def test_10_bits_a_colour_and_masks_behind_a_short_header(rgb):
    masks = (0x3FF00000, 0xFFC00, 0x3FF)
    data = bmp(packed(np.moveaxis(rgb, 2, 0), masks, np.uint32), masks, 40)
    assert np.abs(decode(data, Preprocess(32))[0].astype(int) - rgb).max() <= 1


def test_odd_width_and_one_that_breaks_off(rgb):
    masks = (0xF00, 0xF0, 0xF)
    data = bmp(packed(np.moveaxis(rgb[:, :31], 2, 0), masks, np.uint16), masks)
    found, width, height = decode(data, Preprocess(32, fit="pad"))
    assert (width, height) == (31, 32)
    assert np.abs(found[:, :31].astype(int) - rgb[:, :31]).max() <= 16
    with pytest.raises(Rejected):
        decode(data[:-500], Preprocess(32))
    with pytest.raises(Rejected, match="31x32 pixels, not 32x32"):
        decode(data, Preprocess(32, fit="exact"))


def test_unused_fourth_byte_of_0_without_masks(rgb):
    values = packed(np.moveaxis(rgb, 2, 0), OF_32["BGRX"], np.uint32)
    np.testing.assert_array_equal(decode(bmp(values, (), 40, 0), Preprocess(32))[0], rgb)
