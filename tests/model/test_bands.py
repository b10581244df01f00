"""Coordinates and bands against scipy's DCT."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import dctn

from palindrome.model.bands import OCTAVES, Bands


def drawn(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def bands_of(x):
    return Bands.of(x.shape[1:], x.dtype, x.device)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 4, 16, 8), (1, 1, 5, 7), (3, 3, 1, 1)], ids=str)
def test_coordinates_are_a_dct_of_luma_and_chroma_that_is_undone(shape):
    x = drawn(*shape)
    found = bands_of(x).forward(x)
    r, g, b = x.unbind(1) if shape[1] == 3 else (0, 0, 0)
    colours = [(r + g + b) / 3**0.5, (r - g) / 2**0.5, (r + g - 2 * b) / 6**0.5]
    expected = torch.stack(colours, 1) if shape[1] == 3 else x
    assert np.allclose(found, dctn(expected.numpy(), axes=(2, 3), norm="ortho"), atol=1e-12)
    torch.testing.assert_close(bands_of(x).inverse(found), x)


@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 12))
def test_bands_have_each_coordinate_once(channels, height, width):
    """So products add up to those of the samples, and one weight for all bands is one for the sample."""
    x, y = drawn(2, 2, channels, height, width)
    bands = bands_of(x)
    a, b = bands.forward(x), bands.forward(y)
    products = bands.products(a, b)
    assert products.shape == (2, OCTAVES, 2 if channels == 3 else 1)
    torch.testing.assert_close(products.sum((1, 2)), (x * y).flatten(1).sum(1))
    torch.testing.assert_close(bands.inverse(bands.spread(torch.full_like(products, 0.3)) * a), 0.3 * x)


def test_a_band_is_an_octave_of_luma_or_of_chroma():
    """A smooth gray is in none of the bands of a fine colour."""
    smooth = torch.linspace(0, 1, 64, dtype=torch.float64).expand(1, 3, 64, 64)
    stripes = torch.tensor([1, -1], dtype=torch.float64).repeat(32).expand(1, 64, 64)
    fine = torch.stack([stripes, -stripes, 0 * stripes], 1)
    bands = bands_of(smooth)
    of_smooth, of_fine = (bands.products(c, c)[0] for c in (bands.forward(smooth), bands.forward(fine)))
    assert of_smooth[:, 1].max() < 1e-20 and of_smooth[0, 0] > 0.99 * of_smooth.sum()
    assert of_fine[:, 0].max() < 1e-20 and of_fine[-1, 1] > 0.95 * of_fine.sum()


def test_a_weight_is_its_bands_alone():
    x = drawn(1, 3, 16, 16)
    bands = bands_of(x)
    weights = torch.arange(2.0 * OCTAVES, dtype=torch.float64).reshape(1, OCTAVES, 2)
    before = bands.forward(x)
    found = bands.spread(weights) * before
    torch.testing.assert_close(bands.products(found, found), weights.square() * bands.products(before, before))
