"""Spherical interpolation against eq. 67 in fifty digits, and against what a sphere demands."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palindrome.model.interpolate import angle, lerp, slerp

SHAPE = (3, 32, 32)


def latents(seed, count=1, dtype=torch.float32):
    return torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def eq_67(a, b, t):
    """The paper's formula with fifty digits."""
    with mpmath.workdps(50):
        a, b = ([mpmath.mpf(v) for v in x.flatten().tolist()] for x in (a, b))
        dot, norms = mpmath.fdot(a, b), mpmath.norm(a) * mpmath.norm(b)
        theta = mpmath.acos(dot / norms)
        of_a, of_b = mpmath.sin((1 - t) * theta) / mpmath.sin(theta), mpmath.sin(t * theta) / mpmath.sin(theta)
        return np.array([float(of_a * x + of_b * y) for x, y in zip(a, b, strict=True)]), float(theta)


@pytest.mark.parametrize("apart", [2.0, 1.0, 1e-3, 1e-7, 1e-12])
def test_it_is_eq_67_also_where_latents_are_nearly_parallel(apart):
    a = latents(0, dtype=torch.float64)[:, :, :4, :4]
    b = 1.5 * a + apart * latents(1, dtype=torch.float64)[:, :, :4, :4]
    for t in (0.125, 0.5, 0.75):
        expected, theta = eq_67(a, b, t)
        assert angle(a, b).item() == pytest.approx(theta, rel=1e-3 if apart < 1e-10 else 1e-8)  # b itself is rounded
        found = slerp(a, b, torch.tensor([t])).flatten().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]))
def test_the_ends_are_the_latents_to_the_bit(seed, dtype):
    a, b = latents(seed).to(dtype), latents(seed + 1).to(dtype)
    for between in (slerp, lerp):
        assert torch.equal(between(a, b, torch.zeros(1)), a)
        assert torch.equal(between(a, b, torch.ones(1)), b)
        assert between(a, b, torch.ones(1)).dtype == dtype


@given(seed=st.integers(0, 2**31), t=st.floats(0, 1))
def test_on_a_sphere_it_keeps_the_norm_and_goes_at_one_speed(seed, t):
    a, b = (x / x.norm() for x in (latents(seed, dtype=torch.float64), latents(seed + 1, dtype=torch.float64)))
    x = slerp(a, b, torch.tensor([t], dtype=torch.float64))
    assert x.norm().item() == pytest.approx(1, abs=1e-12)
    assert angle(a, x).item() == pytest.approx(t * angle(a, b).item(), abs=1e-7)
    back = slerp(b, a, torch.tensor([1 - t], dtype=torch.float64))
    torch.testing.assert_close(x, back, rtol=0, atol=1e-12)


def test_gaussian_noise_stays_on_its_shell_where_linear_interpolation_leaves_it():
    a, b, t = latents(0, 64), latents(1, 64), torch.full((64,), 0.5)
    expected = math.sqrt(math.prod(SHAPE))
    assert slerp(a, b, t).flatten(1).norm(dim=1).mean().item() == pytest.approx(expected, rel=0.01)
    assert lerp(a, b, t).flatten(1).norm(dim=1).mean().item() == pytest.approx(expected * math.sqrt(0.5), rel=0.01)


def test_equal_latents_stay_equal():
    a = latents(0, 3)
    torch.testing.assert_close(slerp(a, a, torch.tensor([0.0, 0.3, 1.0])), a, rtol=1e-6, atol=0)


@pytest.mark.parametrize("b", [-1.0, -0.25, 0.0, math.nan, math.inf])
def test_no_arc_between_opposite_zero_or_broken_latents(b):
    a = latents(0)
    with pytest.raises(ValueError, match="opposite, 0 or not finite"):
        slerp(a, a * b, torch.tensor([0.5]))
