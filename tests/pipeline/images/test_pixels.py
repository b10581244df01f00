"""PNGs without loss and grids, against Pillow."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from palindrome.pipeline.images.decode import Preprocess, decode
from palindrome.pipeline.images.pixels import grid, pixels_of, png


@pytest.fixture(scope="module")
def pictures(pngs):
    return [np.asarray(Image.open(io.BytesIO(content))) for content in pngs]


def test_png_is_lossless(pictures):
    for pixels in pictures[:20]:
        image = Image.open(io.BytesIO(png(pixels)))
        assert (image.format, image.mode) == ("PNG", "RGB")
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_gray_png_is_lossless(pictures):
    pixels = pictures[0][:, :, 1:2]
    image = Image.open(io.BytesIO(png(pixels)))
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), pixels[:, :, 0])


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_png_round_trips_any_shape(height, width, channels, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    found = pixels_of(png(pixels))
    assert found.shape == pixels.shape
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_what_decode_reads(channels, pictures):
    pixels = pictures[5][:, :, :channels]
    np.testing.assert_array_equal(decode(png(pixels), Preprocess(32, channels))[0], pixels)


def test_same_pixels_give_the_same_bytes(pictures):
    assert png(pictures[0]) == png(pictures[0].copy())


def test_grid_is_what_pillow_pastes(pictures):
    sheet = Image.new("RGB", (3 * 34 - 2, 3 * 34 - 2), "white")
    for i, pixels in enumerate(pictures[:7]):
        sheet.paste(Image.fromarray(pixels), (i % 3 * 34, i // 3 * 34))
    np.testing.assert_array_equal(grid(pictures[:7], 3), np.asarray(sheet))


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 4))
def test_grid_holds_each_image_once_in_order(n, columns, gap):
    images = [np.full((2, 3, 1), i, np.uint8) for i in range(n)]
    sheet = grid(images, columns, gap)
    values, counts = np.unique(sheet, return_counts=True)
    assert values[values < 255].tolist() == list(range(n))
    assert set(counts[values < 255]) == {6}
    corners = sheet[:: 2 + gap, :: 3 + gap, 0].ravel()
    assert corners[:n].tolist() == list(range(n))
    assert (corners[n:] == 255).all()


def test_grid_without_a_gap_is_the_images_side_by_side(pictures):
    np.testing.assert_array_equal(grid(pictures[:4], 4, gap=0), np.concatenate(pictures[:4], axis=1))
