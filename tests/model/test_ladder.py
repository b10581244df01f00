"""Ladders against their definition, diffusers' timesteps, and the code of the DDIM paper's authors."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from palindrome.model.ladder import LADDERS, check_ladder, default_top, ladder, logsnr_ladder
from palindrome.model.process import BETA_SCHEDULES, CLEAN, VP

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)


@st.composite
def ladders(draw):
    """(kind, steps, T, top): arguments that make a ladder."""
    T = draw(st.integers(1, 3000))
    steps = draw(st.integers(1, T))
    return draw(st.sampled_from(LADDERS)), steps, T, draw(st.none() | st.integers(steps - 1, T - 1))


@PROPERTY
@given(ladders())
def test_ladder_rises_from_the_clean_end_to_its_top(arguments):
    _, steps, T, top = arguments
    levels = ladder(*arguments)
    assert len(levels) == steps + 1
    assert levels[:2] == (CLEAN, 0)
    assert all(a < b for a, b in pairwise(levels))
    assert levels[-1] < T
    assert all(type(level) is int for level in levels)
    assert check_ladder(levels, T) == levels
    if top is not None and steps > 1:
        assert levels[-1] == top


@PROPERTY
@given(ladders())
def test_ladder_is_the_floor_of_its_formula_except_where_that_repeats(arguments):
    kind, steps, _, _ = arguments
    levels = ladder(*arguments)
    for i in range(1, steps):
        fraction = Fraction(i, steps - 1)
        floor = math.floor(levels[-1] * (fraction if kind == "linear" else fraction**2))
        assert levels[i + 1] == max(floor, levels[i] + 1)
        assert levels[i + 1] == floor or kind == "quadratic"


@PROPERTY
@given(st.integers(1, 60), st.integers(1, 60))
def test_linear_ladder_equals_diffusers_leading_spacing(steps, ratio):
    scheduler = DDIMScheduler(steps * ratio, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    assert list(ladder("linear", steps, steps * ratio)[:0:-1]) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("T", [1000, 4000])
@pytest.mark.parametrize("steps", range(2, 29))
def test_quadratic_ladder_equals_the_authors_code(T, steps):
    authors = np.linspace(0, np.sqrt(T * 0.8), steps) ** 2
    for ours, theirs in zip(ladder("quadratic", steps, T)[1:], authors, strict=True):
        # they truncate floats, of which 799.9999999 stands for 800
        exact = round(theirs) if abs(theirs - round(theirs)) < 1e-9 else int(theirs)
        assert ours == exact


@pytest.mark.parametrize(
    "arguments",
    [
        ("cubic", 10),
        ("linear", 0),
        ("linear", -1),
        ("linear", 1001),
        ("quadratic", 11, 10),
        ("linear", 10, 1000, 1000),
        ("linear", 10, 1000, 8),
        ("quadratic", 10, 1000, -1),
    ],
)
def test_ladder_that_does_not_fit_is_refused(arguments):
    with pytest.raises(ValueError):
        ladder(*arguments)


@pytest.mark.parametrize(
    "levels",
    [
        (),
        (-1,),
        (0, 1),
        (-1, 5, 5),
        (-1, 5, 4),
        (-1, -1, 3),
        (-1, 0, 10),
        (-2, 0, 3),
        (-1, -0.5, 3),
        (-1, 0, 9.5),
        (-1, 2.5, math.nan),
    ],
)
def test_levels_that_are_no_ladder_are_refused(levels):
    assert check_ladder([-1, 0.5, 9], 10) == (-1, 0.5, 9)
    with pytest.raises(ValueError, match="ladder"):
        check_ladder(levels, 10)


@PROPERTY
@given(st.sampled_from(BETA_SCHEDULES), st.integers(10, 1500), st.data())
def test_a_logsnr_ladder_rises_to_its_top(beta_schedule, T, data):
    schedule = VP(T, beta_schedule)
    steps = data.draw(st.integers(2, T))
    top = data.draw(st.none() | st.integers(steps - 1, T - 1))
    levels = logsnr_ladder(schedule, steps, top)
    assert check_ladder(levels, T) == levels
    assert len(levels) == steps + 1
    assert (levels[1], levels[-1]) == (0, default_top(schedule, steps) if top is None else top)


def test_the_top_is_where_the_log_snr_of_diffusers_schedulers_is_least_but_above_the_end():
    for config in ({}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": "scaled_linear", "beta_end": 0.012}):
        alpha_bar = DDIMScheduler(**config).alphas_cumprod.double()
        top = default_top(VP(**config), 20)
        assert top == 999 or abs(np.log(alpha_bar[top] / (1 - alpha_bar[top])) + 6.5) < 0.02
        assert top == 999 or config.get("beta_end") is None
    assert default_top(VP(), 20) == 800  # the end of the paper's ladders
    assert default_top(VP(), 1000) == 999


def test_a_logsnr_ladder_takes_equal_steps_of_diffusers_log_snr():
    alpha_bar = DDIMScheduler(1000).alphas_cumprod.double()
    log_snr = np.log(alpha_bar / (1 - alpha_bar)).numpy()
    steps = np.diff(log_snr[list(logsnr_ladder(VP(), 20)[1:])])
    nearest = np.abs(np.diff(log_snr)).max() / 2  # half a timestep where timesteps are widest apart
    assert np.abs(steps - steps.mean()).max() <= 2 * nearest
    assert np.abs(steps[6:] / steps.mean() - 1).max() < 0.05  # where timesteps are dense


@pytest.mark.parametrize(("steps", "top"), [(0, None), (1001, None), (10, 8), (2, 1000), (1, -1)])
def test_a_logsnr_ladder_that_does_not_fit_is_refused(steps, top):
    with pytest.raises(ValueError, match="fit"):
        logsnr_ladder(VP(), steps, top)
