"""Fitted ladders against brute force, and against the ladders of a formula on a flow that is known."""

from itertools import combinations, pairwise
from math import sqrt

import numpy as np
import pytest
import torch

from palindrome.model.ddim import sample
from palindrome.model.fit import FIRST, candidates, epsilon_products, fit_ladder
from palindrome.model.inversion import invert_exactly
from palindrome.model.ladder import check_ladder, ladder
from palindrome.model.process import CLEAN, VP

SCHEDULE = VP()


def images(n=8):
    drawn = torch.randn(n, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return 0.6 * drawn.sign() + 0.2 * drawn.flip(0)


def cost(levels, epsilons, corrections):
    """model.fit's sum, from the epsilons [S, D] themselves and one pair of levels at a time."""
    kept = FIRST ** (corrections + 1 if corrections else 0)
    first = SCHEDULE.alpha_bar(levels[1])
    total = (1 - first) / first * (epsilons[levels[1]] * kept).square().mean()
    for low, high in pairwise(levels[1:]):
        a, b = SCHEDULE.alpha_bar(low), SCHEDULE.alpha_bar(high)
        s = sqrt(b / a)
        gain = sqrt(1 - b) - s * sqrt(1 - a)
        kappa = gain / sqrt(1 - b)
        left = (kappa / (2 - kappa)) ** corrections * gain / s
        total += (left * (epsilons[high] - epsilons[low])).square().mean()
    return float(total)


@pytest.mark.parametrize("corrections", [0, 1, 3])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_it_is_the_best_of_all_ladders(corrections, steps):
    levels = (CLEAN, 0, 2, 9, 30, 100, 240, 500, 800)
    drawn = torch.randn(8, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).cumsum(0)
    epsilons = dict(zip(levels[1:], drawn, strict=True))
    found = fit_ladder((drawn @ drawn.T / 50).numpy(), levels, SCHEDULE, steps, corrections)
    every = [(CLEAN, *chosen, 800) for chosen in combinations(levels[1:-1], steps - 1)]
    assert found in every
    assert found == min(every, key=lambda levels: cost(levels, epsilons, corrections))


def test_products_are_those_of_the_epsilons_on_the_way_up(mixture):
    levels, x0 = candidates(SCHEDULE, 10, 800), images(2)
    products = epsilon_products(mixture, x0, levels, SCHEDULE)
    n = len(levels) - 1
    assert products.shape == (2, n, n)
    top, *_ = invert_exactly(mixture, x0, levels, SCHEDULE, corrections=20)
    epsilon = mixture(top, 800)
    assert torch.allclose(products[:, -1, -1], epsilon.square().flatten(1).mean(1), rtol=0.02)
    assert np.linalg.eigvalsh(products.mean(0).numpy()).min() > -1e-9


def test_a_fitted_ladder_beats_the_quadratic_one(mixture):
    levels, x0 = candidates(SCHEDULE, 10, 800), images()
    products = epsilon_products(mixture, x0, levels, SCHEDULE).mean(0).numpy()
    fitted = fit_ladder(products, levels, SCHEDULE, 10, 2)
    assert check_ladder(fitted, 1000) == fitted
    assert (len(fitted), fitted[-1]) == (11, 800)

    def error(levels):
        latents, *_ = invert_exactly(mixture, x0, levels, SCHEDULE, corrections=2)
        return (sample(mixture, latents, levels, SCHEDULE) - x0).square().mean()

    assert error(fitted) < error(ladder("quadratic", 10)) / 2


@pytest.mark.parametrize("steps", [1, 20, 300, 801])
def test_candidates_are_enough_for_the_steps(steps):
    found = candidates(SCHEDULE, steps, 800)
    assert len(found) > steps
    assert found[-1] == 800
    assert check_ladder(found, 1000) == found


@pytest.mark.parametrize(("steps", "top"), [(0, 800), (802, 800), (5, 1000)])
def test_steps_that_do_not_fit_are_refused(steps, top):
    with pytest.raises(ValueError, match="fit"):
        candidates(SCHEDULE, steps, top)
    with pytest.raises(ValueError, match="fit"):
        fit_ladder(np.eye(3), (CLEAN, 0, 1, 2), SCHEDULE, 4, 1)
