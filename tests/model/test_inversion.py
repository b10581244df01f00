"""Exact inversion against flows that are known, and against diffusers' sampler."""

from itertools import pairwise
from math import sqrt

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from palindrome.model.bands import OCTAVES, Bands
from palindrome.model.ddim import invert, move, sample
from palindrome.model.inversion import evaluations, invert_exactly
from palindrome.model.ladder import ladder
from palindrome.model.process import CLEAN, VP
from palindrome.model.unet import UNet, UNetConfig

SCHEDULE = VP()
MU, S = 0.3, 0.5  # the toy data's mean and deviation


def gaussian(x, t):
    """The optimal epsilon for data N(MU, S^2 I)."""
    a = SCHEDULE.alpha_bar(t)
    return sqrt(1 - a) * (x - sqrt(a) * MU) / (a * S**2 + 1 - a)


def images(n=4, seed=0):
    return MU + S * torch.randn(n, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gaussian_preimage(x, levels):
    """The x that DDIM decodes to this one: each of its steps is affine in x, and is undone in closed form."""
    for low, high in pairwise(levels):
        a, b = SCHEDULE.marginal(low), SCHEDULE.marginal(high)
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        at_0, at_1 = (move(v, gaussian(v, high), b, a) for v in (zero, zero + 1))
        x = (x - at_0) / (at_1 - at_0)
    return x


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_corrections_find_the_true_preimage(kind):
    levels, x0 = ladder(kind, 20), images()
    true = gaussian_preimage(x0, levels)
    assert (sample(gaussian, true, levels, SCHEDULE) - x0).abs().max() < 1e-10
    plain = (invert(gaussian, x0, levels, SCHEDULE) - true).abs().max()
    errors = [(invert_exactly(gaussian, x0, levels, SCHEDULE, corrections=k)[0] - true).abs().max() for k in (1, 2)]
    assert errors[0] < plain / 3
    assert errors[1] < 1e-10  # G has a single eigenvalue here: one difference of residuals tells it


def test_two_corrections_solve_what_differs_from_band_to_band():
    """A linear flow whose G has one eigenvalue for each band: one difference of residuals tells all of them."""
    levels, x0 = (CLEAN, 20, 100, 300), images()
    bands = Bands.of(x0.shape[1:], x0.dtype, x0.device)
    share = torch.linspace(0.1, 0.9, 2 * OCTAVES, dtype=torch.float64).reshape(1, OCTAVES, 2)

    def network(x, t):
        return bands.inverse(bands.spread(share) * bands.forward(x)) / sqrt(1 - SCHEDULE.alpha_bar(t))

    found, *_ = invert_exactly(network, x0, levels, SCHEDULE, corrections=2)
    assert (sample(network, found, levels, SCHEDULE) - x0).abs().max() < 1e-10


@settings(max_examples=40)
@given(
    st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    st.sets(st.integers(0, 950), min_size=8, max_size=30),
    st.integers(0, 2**32 - 1),
)
def test_any_ladder_decodes_to_the_very_image(beta_schedule, levels, seed):
    schedule = VP(beta_schedule=beta_schedule)
    x0 = images(2, seed)

    def network(x, t):
        a = schedule.alpha_bar(t)
        return sqrt(1 - a) * (x - sqrt(a) * MU) / (a * S**2 + 1 - a) + 0.05 * torch.sin(3 * x)

    levels = (CLEAN, *sorted(levels))
    latents, residual, _ = invert_exactly(network, x0, levels, schedule, corrections=25)
    solved = residual < 1e-11
    error = (sample(network, latents, levels, schedule) - x0).abs().flatten(1).max(1).values
    plain = (
        (sample(network, invert(network, x0, levels, schedule), levels, schedule) - x0).abs().flatten(1).max(1).values
    )
    assert (error[solved] < 1e-7).all()  # what decoding amplifies: up to 1 / sqrt(alpha_bar) at the top
    assert (error <= plain + 1e-7).all()


def test_a_mixture_is_recovered_where_plain_inversion_fails(mixture):
    levels, x0 = ladder("quadratic", 20), images() / 2
    latents, residual, _ = invert_exactly(mixture, x0, levels, SCHEDULE, corrections=30)
    assert residual.max() < 1e-10
    assert (sample(mixture, latents, levels, SCHEDULE) - x0).abs().max() < 1e-9
    plain = sample(mixture, invert(mixture, x0, levels, SCHEDULE), levels, SCHEDULE)
    assert (plain - x0).abs().max() > 1e-2


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_every_prediction_type_is_inverted(prediction_type):
    def network(x, t):
        a, epsilon = SCHEDULE.alpha_bar(t), gaussian(x, t)
        x0 = (x - sqrt(1 - a) * epsilon) / sqrt(a)
        return x0 if prediction_type == "sample" else sqrt(a) * epsilon - sqrt(1 - a) * x0

    levels, x0 = ladder("quadratic", 20), images()
    found, *_ = invert_exactly(network, x0, levels, VP(prediction_type=prediction_type), corrections=6)
    assert (found - gaussian_preimage(x0, levels)).abs().max() < 1e-9


def test_no_corrections_are_the_papers_inversion():
    levels, x0 = ladder("linear", 10), images()
    found, residual, _ = invert_exactly(gaussian, x0, levels, SCHEDULE, corrections=0)
    assert torch.equal(found, invert(gaussian, x0, levels, SCHEDULE))
    assert residual.isnan().all()


@pytest.mark.parametrize("corrections", [0, 1, 2, 5])
def test_evaluations_are_as_stated(corrections):
    calls = []

    def network(x, t):
        calls.append(t)
        return gaussian(x, t)

    invert_exactly(network, images(1), ladder("linear", 7), SCHEDULE, corrections=corrections)
    assert len(calls) == evaluations(7, corrections)


@pytest.mark.parametrize("tolerance", [0.0, 1e-4])
def test_a_sample_does_not_depend_on_its_batch(tolerance, mixture):
    levels, x0 = ladder("quadratic", 10), images() / 2
    together = invert_exactly(mixture, x0, levels, SCHEDULE, corrections=4, tolerance=tolerance)
    for i in range(len(x0)):
        alone = invert_exactly(mixture, x0[i : i + 1], levels, SCHEDULE, corrections=4, tolerance=tolerance)
        for one, among in zip(alone, together, strict=True):
            assert torch.equal(one, among[i : i + 1])


def test_the_relaxation_halves_the_spectrum_of_a_linear_flow():
    """Eigenvalues of G anywhere in [0, kappa]: a relaxed correction leaves at most kappa / (2 - kappa) of an error."""
    levels = (CLEAN, 100, 300)
    a, b = (SCHEDULE.marginal(level) for level in levels[1:])
    kappa = 1 - b.alpha * a.sigma / (a.alpha * b.sigma)
    share = torch.linspace(0, 1, 64, dtype=torch.float64).reshape(1, 1, 8, 8)

    def network(x, t):
        return share * x / sqrt(1 - SCHEDULE.alpha_bar(t))

    x0 = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    true, *_ = invert_exactly(network, x0, levels, SCHEDULE, corrections=60)
    step_below, *_ = invert_exactly(network, x0, levels[:2], SCHEDULE, corrections=60)
    start = true + 1
    corrected = start + 2 / (2 - kappa) * (move(step_below, network(start, 300), a, b) - start)
    left = (corrected - true).abs()
    assert left.max() < kappa / (2 - kappa) + 1e-6
    assert left.max() > 0.99 * kappa / (2 - kappa)  # the bound is met at both ends of the spectrum


def test_a_tolerance_spends_evaluations_where_the_error_is(mixture):
    levels = ladder("quadratic", 20)
    x0 = torch.cat([torch.full((1, 3, 8, 8), MU, dtype=torch.float64), images(1) / 2])  # an easy one and a hard one
    calls = []

    def network(x, t):
        calls.append(len(x))
        return mixture(x, t)

    fixed, _, all_spent = invert_exactly(network, x0, levels, SCHEDULE, corrections=30)
    assert (all_spent <= evaluations(20, 30)).all()
    calls.clear()
    latents, residual, spent = invert_exactly(network, x0, levels, SCHEDULE, corrections=30, tolerance=1e-6)
    assert spent.sum() == sum(calls)
    assert spent[0] < spent[1] < evaluations(20, 30) / 3
    assert (latents - fixed).abs().max() < 1e-4
    assert residual.max() < 1e-4
    _, _, more = invert_exactly(network, x0, levels, SCHEDULE, corrections=30, tolerance=1e-9)
    assert (more > spent).all()


def test_the_most_corrections_bound_a_tolerance(mixture):
    *_, spent = invert_exactly(mixture, images() / 2, ladder("linear", 10), SCHEDULE, corrections=2, tolerance=1e-12)
    assert (spent == evaluations(10, 2)).all()


def test_where_the_fixed_point_does_not_contract_the_sample_says_so_and_its_neighbour_is_untouched():
    def network(x, t):
        """Chaotic for samples whose mean is above 1, so that no iteration converges; smooth for the others."""
        wild = (x.mean((1, 2, 3), keepdim=True) > 1).to(x)
        return gaussian(x, t) + wild * 3 * torch.sin(400 * x)

    levels, x0 = ladder("linear", 10), images(2)
    x0[1] += 40
    latents, residual, _ = invert_exactly(network, x0, levels, SCHEDULE, corrections=8)
    calm, calm_residual, _ = invert_exactly(network, x0[:1], levels, SCHEDULE, corrections=8)
    assert torch.equal(latents[:1], calm)
    assert residual[0] == calm_residual[0] < 1e-8
    assert residual[1] > 0.1
    plain = invert(network, x0, levels, SCHEDULE)
    error, plain_error = ((sample(network, z, levels, SCHEDULE) - x0)[1].square().mean() for z in (latents, plain))
    assert error <= 2 * plain_error  # of the same size: nothing was thrown away by iterating


def test_float16_images_are_inverted_in_float32():
    latents, residual, _ = invert_exactly(gaussian, images().half(), ladder("linear", 5), SCHEDULE, corrections=2)
    assert latents.dtype == residual.dtype == torch.float32


def test_diffusers_decodes_a_networks_latents_to_the_image(small, randomize):
    random_unet = randomize(UNet(UNetConfig(**small)))

    def network(x, t):
        return 0.1 * random_unet(x, t)  # unscaled it amplifies rounding a ten thousandfold on its way down

    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading")
    scheduler.set_timesteps(20)
    x0 = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    levels = ladder("linear", 20)
    with torch.no_grad():
        x, *_ = invert_exactly(network, x0, levels, SCHEDULE, corrections=12)
        plain = invert(network, x0, levels, SCHEDULE)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x).prev_sample
            plain = scheduler.step(network(plain, t), t, plain).prev_sample
    assert (x - x0).square().mean() < 1e-8 < 0.1 < (plain - x0).square().mean()
