"""Watermarks in x_T: against the authors' own code (tests/fixtures/make_watermark_fixtures.py), and by p-values that
are uniform where there is no watermark."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from palindrome.model.watermarks import GaussianShading, Keys, TreeRing

FIXTURES = Path(__file__).parents[1] / "fixtures"
MADE = runpy.run_path(str(FIXTURES / "make_watermark_fixtures.py"))
THEIRS = json.loads((FIXTURES / "watermarks.json").read_text())
SHAPE = (4, 64, 64)
KINDS = [TreeRing(SHAPE), TreeRing(SHAPE, channels=(0, 3), pattern="ring"), GaussianShading(SHAPE)]


def noise(count, shape=SHAPE, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def both(watermark):
    """What it says of the fixture's latents, without and with the watermark."""
    secret = MADE["SECRET"]
    return [watermark.find(x, secret) for x in (MADE["latents"](), MADE["marked"](watermark))]


def test_the_distance_is_that_of_tree_rings_code():
    plain, marked = both(TreeRing(SHAPE, MADE["RADIUS"]))
    theirs = np.array(THEIRS["tree-ring: l1 without and with"]).T
    np.testing.assert_allclose([plain["distance"], marked["distance"]], theirs, rtol=1e-6)
    assert marked["p"].max() < 1e-20 and plain["p"].min() > 1e-3


def test_the_bits_are_those_of_gaussian_shadings_code():
    theirs = 1 - np.array(THEIRS["gaussian-shading: accuracy without and with"])
    plain, marked = both(GaussianShading(SHAPE))
    np.testing.assert_allclose(marked["bit_errors"], theirs[1])
    # A bit with as many copies right as wrong is read as 0 by theirs, and as half an error by ours.
    np.testing.assert_allclose(plain["bit_errors"], theirs[0], atol=0.05)
    assert marked["p"].max() < 1e-200 and plain["p"].min() > 1e-3


@pytest.mark.parametrize("watermark", KINDS, ids=lambda kind: f"{kind.METHOD} {getattr(kind, 'pattern', '')}")
def test_p_is_uniform_without_a_watermark(watermark):
    """Of 2,000 draws of noise under one key, and of a latent that is anything but noise under 500 keys."""
    x = noise(2000)
    assert kstest(watermark.find(x, b"key")["p"], "uniform").pvalue > 0.05
    smooth = torch.nn.functional.avg_pool2d(x[:1], 9, 1, 4) + 0.3 * x[1:2] + torch.linspace(-1, 1, 64)
    p = torch.cat([watermark.find(smooth, b"%d" % number)["p"] for number in range(500)])
    assert kstest(p, "uniform").pvalue > 0.05


def test_the_papers_p_value_holds_its_level_for_noise_and_not_for_what_is_none():
    watermark = TreeRing(SHAPE)
    p = torch.cat([watermark.find(noise(2000, seed=seed), b"key")["noise_p"] for seed in (1, 2)])
    assert 0.006 < (p < 0.01).double().mean() < 0.016
    fewer_low = noise(200) - 0.5 * torch.nn.functional.avg_pool2d(noise(200), 5, 1, 2)
    found = watermark.find(fewer_low, b"key")
    assert (found["noise_p"] < 0.01).double().mean() > 0.5 > 10 * (found["p"] < 0.01).double().mean()


@pytest.mark.parametrize("watermark", KINDS, ids=lambda kind: f"{kind.METHOD} {getattr(kind, 'pattern', '')}")
def test_what_is_marked_is_still_noise(watermark):
    """To who does not know the secrets, but where rings are, at the corner; and what is not the watermark's stays."""
    each = [watermark.mark(x[None], b"%d" % number) for number, x in enumerate(noise(300))]
    assert kstest(torch.cat(each)[:, 3, 8::16, 8::16].flatten(), "norm").pvalue > 0.05
    x = noise(1)
    marked = watermark.mark(x, b"0")
    assert marked.dtype == x.dtype
    if isinstance(watermark, GaussianShading):
        assert torch.equal(marked.abs(), x.abs())
    else:
        others = [channel for channel in range(4) if channel not in watermark.channels]
        assert torch.equal(marked[:, others], x[:, others])
        before, after = (torch.fft.fft2(each.double())[..., ~watermark.inside] for each in (x, marked))
        assert torch.allclose(before, after, atol=1e-4)


@given(
    channels=st.integers(1, 4),
    height=st.sampled_from([8, 12, 16, 17]),
    width=st.sampled_from([8, 9, 16]),
    pattern=st.sampled_from(["rand", "ring"]),
    radius=st.integers(2, 3),
    secret=st.binary(min_size=1, max_size=40),
)
def test_what_was_put_in_is_what_is_found(channels, height, width, pattern, radius, secret):
    watermark = TreeRing((channels, height, width), radius, tuple(range(channels)), pattern)
    x = watermark.mark(noise(2, watermark.shape).double(), secret)
    found = watermark.find(x, secret)
    assert found["distance"].max() < 1e-9 and not x.isnan().any()
    assert torch.equal(watermark.find(x[:1], secret)["p"], found["p"][:1])


@given(
    times=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)),
    copies=st.integers(1, 4),
    channel_copies=st.integers(1, 2),
    secret=st.binary(min_size=1, max_size=40),
)
def test_every_bit_put_in_is_found(times, copies, channel_copies, secret):
    shape = (times[0] * channel_copies, times[1] * copies, times[2] * copies)
    watermark = GaussianShading(shape, copies, channel_copies)
    found = watermark.find(watermark.mark(noise(2, shape), secret), secret)
    assert not found["bit_errors"].any() and not found["sign_errors"].any()
    assert torch.allclose(found["p"].log2(), torch.tensor(-float(np.prod(shape)), dtype=torch.float64))


def test_the_nearest_of_twenty_keys_is_named_and_each_p_is_of_all_of_them():
    watermark = GaussianShading(SHAPE)
    keys = Keys(watermark, {f"key {number}": b"%d" % number for number in range(20)})
    x = keys.mark(noise(40), range(40)) + noise(40, seed=1)
    found = keys.find(x)
    assert found["key"].tolist() == [number % 20 for number in range(40)] and keys.of(23) == "key 3"
    each = torch.stack([watermark.find(x, secret)["p"] for secret in keys.secrets.values()])
    assert torch.equal(found["p"], (20 * each.amin(0)).clamp(max=1))
    none = keys.find(noise(500, seed=2))["p"]
    assert (none < 0.05).double().mean() < 0.08


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TreeRing((3, 16, 16)), "a radius of 10 does not fit in latents of 3 x 16 x 16"),
        (lambda: TreeRing((3, 32, 32), channels=(3,)), "latents of 3 x 32 x 32 have the channels 0 to 2"),
        (lambda: TreeRing((3, 32, 32), 1, pattern="ring"), "a single ring is no pattern"),
        (lambda: GaussianShading((3, 32, 36)), "latents of 3 x 32 x 36 can't be divided by 1 x 8 x 8 copies"),
    ],
)
def test_what_has_no_room_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
