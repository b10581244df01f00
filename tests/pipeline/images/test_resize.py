"""Resizing for networks of features against the programs that it is named after."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from palindrome.pipeline.images.resize import CLEAN, MODES, PYTORCH, RANGES, TENSORFLOW, resized

FIXTURES = Path(__file__).parents[2] / "fixtures"
PLAIN = (0.0, 255.0)


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(1)
    return [random.integers(0, 256, (*shape, 3), np.uint8) for shape in ((32, 32), (40, 9), (13, 13), (5, 70))]


def test_clean_is_clean_fid_s():
    """Recorded by tests/fixtures/make_resize_fixtures.py."""
    with np.load(FIXTURES / "resize.npz") as recorded:
        pairs = [(recorded[f"image{i}"], recorded[f"resized{i}"]) for i in range(4)]
    for image, expected in pairs:
        [found] = resized([image], len(expected), CLEAN, PLAIN)
        np.testing.assert_allclose(found.permute(1, 2, 0), expected, atol=1e-4)


def test_legacy_pytorch_is_what_pytorch_fid_s_network_does(images):
    """`interpolate` of what ToTensor makes, then 2 x - 1: pytorch_fid.inception.InceptionV3.forward."""
    for image in images:
        x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
        expected = 2 * interpolate(x, size=(29, 29), mode="bilinear", align_corners=False) - 1
        assert torch.equal(resized([image], 29, PYTORCH, RANGES[PYTORCH]), expected)


@pytest.mark.parametrize("size", [13, 29])
def test_legacy_tensorflow_is_torch_fidelity_s(images, torch_fidelity, size):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as bilinear

    for image in images:
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        expected = (bilinear(x, size=(size, size), align_corners=False) - 128) / 128
        assert torch.equal(resized([image], size, TENSORFLOW, RANGES[TENSORFLOW]), expected)


@pytest.mark.parametrize("mode", MODES)
def test_an_image_does_not_depend_on_the_others(images, mode):
    together = resized(images, 21, mode, PLAIN)
    alone = torch.cat([resized([image], 21, mode, PLAIN) for image in images])
    assert together.shape == (4, 3, 21, 21) and torch.equal(together, alone)


@pytest.mark.parametrize("mode", MODES)
def test_gray_is_three_equal_channels(mode):
    gray = np.random.default_rng(2).integers(0, 256, (16, 16, 1), np.uint8)
    found = resized([gray], 20, mode, PLAIN)
    assert torch.equal(found, resized([gray.repeat(3, 2)], 20, mode, PLAIN))


@pytest.mark.parametrize(("mode", "scale"), [(CLEAN, (-1, 1)), (PYTORCH, (0, 1)), (TENSORFLOW, (-2, 3))])
def test_the_range_is_that_of_0_and_255(mode, scale):
    for value, expected in zip((0, 255), scale, strict=True):
        found = resized([np.full((8, 8, 3), value, np.uint8)], 11, mode, scale)
        assert found.numpy() == pytest.approx(np.full((1, 3, 11, 11), expected), abs=1e-5)
