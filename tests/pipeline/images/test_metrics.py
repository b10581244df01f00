import math

import numpy as np
import polars as pl
import pytest
import torch

from palindrome.pipeline.images.metrics import moments, psnr, round_trip_error, to_model, to_pixels


def test_every_byte_value_comes_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert np.array_equal(to_pixels(to_model(pixels)), pixels)


def test_to_model_spans_minus_one_to_one():
    x = to_model(np.array([0, 255], np.uint8).reshape(1, 1, 2, 1))
    assert x.dtype == torch.float32
    assert x.flatten().tolist() == [-1.0, 1.0]


def test_channels_move_to_the_front_and_back():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 4), np.uint8)
    x = to_model(pixels)
    assert x.shape == (2, 4, 3, 5)
    assert float(x[1, 2, 0, 4]) == pytest.approx(pixels[1, 0, 4, 2] / 127.5 - 1, abs=1e-6)
    assert np.array_equal(to_pixels(x), pixels)


def test_to_pixels_clips_and_rounds_to_the_nearest():
    x = torch.tensor([-3.0, 3.0, 10.4 / 127.5 - 1, 10.6 / 127.5 - 1]).reshape(1, 1, 1, 4)
    assert to_pixels(x).flatten().tolist() == [0, 255, 10, 11]


def test_the_error_of_black_for_white_is_one():
    black, white = -torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    assert round_trip_error(black, white).tolist() == [1.0]


def test_the_error_is_that_of_the_pixels_by_hand():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 256, (2, 4, 8, 8, 3), np.uint8)
    by_hand = ((a / 255 - b / 255) ** 2).mean((1, 2, 3))
    found = round_trip_error(to_model(a), to_model(b))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, by_hand, rtol=1e-6)


def test_the_error_is_neither_clipped_nor_rounded():
    x = torch.zeros(1, 1, 1, 2)
    assert round_trip_error(x, x + 4).tolist() == [4.0]
    assert round_trip_error(x, x + 1e-4)[0] == pytest.approx(2.5e-9)


def test_each_image_has_its_own_error():
    x = torch.zeros(3, 1, 2, 2)
    assert round_trip_error(x, x + torch.tensor([0.0, 1.0, 2.0]).reshape(3, 1, 1, 1)).tolist() == [0, 0.25, 1]


def test_psnr_of_known_errors():
    assert psnr(1.0) == 0
    assert psnr(1e-4) == pytest.approx(40)
    assert psnr(0.0) == math.inf


def test_moments_are_those_of_polars_and_numpy():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 2, 64, 64, generator=generator)
    latents = latents + 0.5 * latents.roll(1, -1) + 0.25 * latents.roll(1, -2) + latents.pow(3) / 10
    found = moments(latents)
    for i, latent in enumerate(latents.double().numpy()):
        values = pl.Series(latent.reshape(-1))
        assert found["mean"][i] == pytest.approx(values.mean())
        assert found["std"][i] == pytest.approx(values.std(ddof=0))
        assert found["kurtosis"][i] == pytest.approx(values.kurtosis(fisher=False))
        across = np.corrcoef(latent[..., 1:].reshape(-1), latent[..., :-1].reshape(-1))[0, 1]
        down = np.corrcoef(latent[:, 1:].reshape(-1), latent[:, :-1].reshape(-1))[0, 1]
        assert found["correlation"][i] == pytest.approx((across + down) / 2, abs=1e-3)
    assert 0.2 < found["correlation"][0] < 0.6


def test_noise_has_the_moments_of_noise():
    found = moments(torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(1)))
    assert [found[n][0] for n in ("mean", "std", "kurtosis", "correlation")] == pytest.approx([0, 1, 3, 0], abs=0.02)
