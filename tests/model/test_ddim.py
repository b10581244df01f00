"""DDIM against the papers' equations in float64, exact flows of known distributions, and diffusers' schedulers."""

import dataclasses
import math
from itertools import count, pairwise
from math import sqrt

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from palindrome.model.ddim import (
    invert,
    move,
    noise_stream,
    sample,
    sample_noise,
    sigma_eta,
    sigma_hat,
)
from palindrome.model.ladder import ladder
from palindrome.model.process import CLEAN, PREDICTION_TYPES, VP, Marginal
from palindrome.model.unet import UNet, UNetConfig

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)
DDPM = VP()
FINE = VP(4000, beta_start=2.5e-5, beta_end=5e-3)
SHORT = VP(100, beta_start=1e-3, beta_end=0.06)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noises(*shape, seed=1, dtype=torch.float64):
    return (normal(*shape, seed=1000 * seed + i, dtype=dtype) for i in count())


def wavy(x, t):
    """A smooth nonlinear epsilon, near what a network trained on N(0, I) says, so that x stays of order one."""
    return sqrt(1 - DDPM.alpha_bar(t)) * x + 0.5 * torch.sin(3 * x + t / 100)


class Gaussian:
    """Data N(mean, deviation^2 I): q(x_t) is normal and the best epsilon is linear in x."""

    def __init__(self, schedule, mean=0.4, deviation=0.5):
        self.schedule, self.mean, self.deviation = schedule, mean, deviation

    def moments(self, level):
        a = self.schedule.alpha_bar(level)
        return sqrt(a) * self.mean, a * self.deviation**2 + 1 - a

    def __call__(self, x, t):
        mean, variance = self.moments(t)
        return sqrt(1 - self.schedule.alpha_bar(t)) * (x - mean) / variance

    def flow(self, x, level_from, level_to):
        """The probability-flow ODE's exact solution keeps the standardised coordinate."""
        (mean, variance), (mean_to, variance_to) = self.moments(level_from), self.moments(level_to)
        return mean_to + (x - mean) * sqrt(variance_to / variance)


class TwoPeaks:
    """Data (N(-0.8, 0.3^2) + N(0.8, 0.3^2)) / 2 in each value: a nonlinear epsilon, and the flow keeps quantiles."""

    def __init__(self, schedule):
        self.schedule = schedule

    def parts(self, level):
        a = self.schedule.alpha_bar(level)
        return 0.8 * sqrt(a), 0.3**2 * a + 1 - a

    def __call__(self, x, t):
        peak, variance = self.parts(t)
        score = (peak * torch.tanh(peak * x / variance) - x) / variance
        return -sqrt(1 - self.schedule.alpha_bar(t)) * score

    def quantile(self, x, level):
        peak, variance = self.parts(level)
        return sum(torch.special.ndtr((x - p) / sqrt(variance)) for p in (-peak, peak)) / 2


def eq_12(x, epsilon, a_from, a_to, sigma):
    """The deterministic part of the DDIM paper's eq. 12, term by term."""
    predicted_x0 = (x - sqrt(1 - a_from) * epsilon) / sqrt(a_from)  # eq. 9
    return sqrt(a_to) * predicted_x0 + sqrt(1 - a_to - sigma**2) * epsilon


def at(alpha_bar):
    return Marginal(sqrt(alpha_bar), sqrt(1 - alpha_bar))


def predicting(prediction_type, process):
    return dataclasses.replace(process, prediction_type=prediction_type)


def assert_close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# --- The papers' equations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_sample_is_eq_12(eta, kind):
    levels, x = ladder(kind, 20), normal(2, 3, 4, 4)
    ours = sample(wavy, x, levels, DDPM, eta=eta, noise=noises(*x.shape))
    noise = noises(*x.shape)
    for low, high in reversed(list(pairwise(levels))):
        a, a_low = DDPM.alpha_bar(high), DDPM.alpha_bar(low)
        sigma = eta * sqrt((1 - a_low) / (1 - a)) * sqrt(1 - a / a_low)  # eq. 16
        x = eq_12(x, wavy(x, high), a, a_low, sigma) + sigma * next(noise)
    assert_close(ours, x, 1e-12)


def test_sample_with_sigma_hat_is_appendix_d3():
    levels, x = ladder("linear", 20), normal(2, 3, 4, 4)
    ours = sample(wavy, x, levels, DDPM, use_sigma_hat=True, noise=noises(*x.shape))
    noise = noises(*x.shape)
    for low, high in reversed(list(pairwise(levels))):
        a, a_low = DDPM.alpha_bar(high), DDPM.alpha_bar(low)
        x = eq_12(x, wavy(x, high), a, a_low, sqrt((1 - a_low) / (1 - a)) * sqrt(1 - a / a_low))
        if low != CLEAN:
            x = x + sqrt(1 - a / a_low) * next(noise)
    assert_close(ours, x, 1e-12)


@pytest.mark.parametrize("told", ["source", "target"])
def test_invert_is_eq_14_reversed(told):
    levels, x = ladder("linear", 20), normal(2, 3, 4, 4)
    ours = invert(wavy, x, levels, DDPM, told=told)
    for low, high in pairwise(levels):
        epsilon = wavy(x, high if told == "target" else max(low, 0))
        a, a_high = DDPM.alpha_bar(low), DDPM.alpha_bar(high)
        # dx(t) / sqrt(alpha) = epsilon d sqrt((1 - alpha) / alpha)
        x = sqrt(a_high) * (x / sqrt(a) + epsilon * (sqrt((1 - a_high) / a_high) - sqrt((1 - a) / a)))
    assert_close(ours, x, 1e-12)


ALPHAS = st.floats(1e-4, 0.9999)


@PROPERTY
@given(ALPHAS, ALPHAS, st.floats(0, 1))
def test_step_down_keeps_the_marginals(a, b, eta):
    """Lemma 1: x_from = sqrt(a) x0 + sqrt(1 - a) epsilon goes to mean sqrt(a') x0 and variance 1 - a'."""
    a_from, a_to = min(a, b), max(a, b)
    x0, epsilon = torch.tensor([[0.7, 0.0], [0.0, 1.0]], dtype=torch.float64)
    sigma = sigma_eta(at(a_from), at(a_to), eta)
    x = move(sqrt(a_from) * x0 + sqrt(1 - a_from) * epsilon, epsilon, at(a_from), at(a_to), sigma)
    assert x[0].item() == pytest.approx(sqrt(a_to) * 0.7, abs=1e-12)
    assert x[1].item() ** 2 + sigma**2 == pytest.approx(1 - a_to, abs=1e-12)


@PROPERTY
@given(ALPHAS, ALPHAS)
def test_move_up_undoes_move_down(a, b):
    x, epsilon = normal(5), normal(5, seed=1)
    assert_close(move(move(x, epsilon, at(a), at(b)), epsilon, at(b), at(a)), x, 1e-10)


@pytest.mark.parametrize("schedule", [DDPM, VP(beta_schedule="squaredcos_cap_v2")])
def test_eta_1_on_adjacent_timesteps_is_the_ddpm_posterior(schedule):
    """Ho et al., eq. 7, and the two variances of their section 3.2."""
    x, epsilon = normal(4), normal(4, seed=1)
    for t in range(1, 1000, 7):
        a, a_prev, beta = schedule.alpha_bar(t), schedule.alpha_bar(t - 1), float(schedule.betas[t])
        x0 = (x - sqrt(1 - a) * epsilon) / sqrt(a)
        mean = sqrt(a_prev) * beta / (1 - a) * x0 + sqrt(1 - beta) * (1 - a_prev) / (1 - a) * x
        start, end = schedule.marginal(t), schedule.marginal(t - 1)
        sigma = sigma_eta(start, end, 1.0)
        assert sigma**2 == pytest.approx((1 - a_prev) / (1 - a) * beta, rel=1e-9)
        torch.testing.assert_close(move(x, epsilon, start, end, sigma), mean, rtol=1e-9, atol=1e-11)
        assert sigma_hat(start, end) == pytest.approx(sqrt(beta), rel=1e-9)
        assert sigma_eta(start, end, 0.25) == pytest.approx(0.25 * sigma, rel=1e-15)


# --- Exact flows ----------------------------------------------------------------------------------------------------


def assert_first_order(errors):
    """Each error about half the one before it, the number of steps having doubled."""
    ratios = [a / b for a, b in pairwise(errors)]
    assert all(1.7 < r < 2.4 for r in ratios), (errors, ratios)


STEPS = (100, 200, 400, 800)


@pytest.mark.parametrize("told", ["source", "target"])
def test_inversion_converges_to_the_exact_flow(told):
    data, top = Gaussian(FINE), 3000
    x0 = data.mean + data.deviation * normal(200)
    exact = data.flow(x0, CLEAN, top)
    latents = [invert(data, x0, ladder("linear", s, 4000, top), FINE, told=told) for s in STEPS]
    assert_first_order([(x - exact).abs().max().item() for x in latents])


def test_sampling_converges_to_the_exact_flow():
    data, top = Gaussian(FINE), 3000
    x_top = normal(200)
    exact = data.flow(x_top, top, CLEAN)
    samples = [sample(data, x_top, ladder("linear", s, 4000, top), FINE) for s in STEPS]
    assert_first_order([(x - exact).abs().max().item() for x in samples])


def test_nonlinear_flow_keeps_quantiles():
    data, top = TwoPeaks(FINE), 3000
    x0 = torch.linspace(-1.5, 1.5, 101, dtype=torch.float64)
    down, up = [], []
    for s in STEPS:
        levels = ladder("linear", s, 4000, top)
        up.append((data.quantile(invert(data, x0, levels, FINE), top) - data.quantile(x0, CLEAN)).abs().max().item())
        down.append((data.quantile(sample(data, x0, levels, FINE), CLEAN) - data.quantile(x0, top)).abs().max().item())
    assert_first_order(up)
    assert_first_order(down)
    assert max(up[-1], down[-1]) < 0.01


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_round_trip_error_falls_with_steps(kind):
    data = TwoPeaks(DDPM)
    x0 = torch.cat([0.3 * normal(500) - 0.8, 0.3 * normal(500, seed=1) + 0.8])
    errors = []
    for steps in (10, 20, 50, 100, 200, 500):
        levels = ladder(kind, steps)
        back = sample(data, invert(data, x0, levels, DDPM), levels, DDPM)
        errors.append((back - x0).square().mean().item() / 4)
    assert all(b < a for a, b in pairwise(errors)), errors
    assert errors[-1] < 1e-4 < 1e-3 < errors[0]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_full_ladder_samples_the_data(eta):
    n, data = 40_000, Gaussian(DDPM)
    samples = sample(data, normal(n), ladder("linear", 1000), DDPM, eta=eta, noise=noises(n))
    # Five standard errors of n draws, and 0.5 % of the deviation and 1 % of the variance for the discretisation.
    assert abs(samples.mean().item() - 0.4) < 5 * 0.5 / sqrt(n) + 0.005 * 0.5
    assert abs(samples.var().item() / 0.25 - 1) < 5 * sqrt(2 / n) + 0.01


# --- diffusers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet(randomize, small):
    """A U-Net's output added to the epsilon of N(0, I), so that x stays of order one."""
    network = randomize(UNet(UNetConfig(**small))).requires_grad_(False)
    return lambda x, t: sqrt(1 - SHORT.alpha_bar(t)) * x + 0.5 * network(x, t)


def schedulers(cls, schedule, steps, **options):
    scheduler = cls(
        schedule.num_train_timesteps, schedule.beta_start, schedule.beta_end, schedule.beta_schedule, **options
    )
    scheduler.set_timesteps(steps)
    return scheduler


def networks(unet):
    return {"unet": (unet, SHORT, 20, (2, 3, 8, 8)), "wavy": (wavy, DDPM, 50, (2, 3, 4, 4))}


DDIM_OPTIONS = {"clip_sample": False, "timestep_spacing": "leading", "set_alpha_to_one": True}


@pytest.mark.parametrize("which", ["unet", "wavy"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_sample_equals_diffusers(unet, which, prediction_type, eta):
    network, schedule, steps, shape = networks(unet)[which]
    start = normal(*shape, dtype=torch.float32)
    ours = sample(
        network,
        start,
        ladder("linear", steps, schedule.num_train_timesteps),
        predicting(prediction_type, schedule),
        eta=eta,
        noise=noises(*shape, dtype=torch.float32),
    )
    scheduler = schedulers(DDIMScheduler, schedule, steps, prediction_type=prediction_type, **DDIM_OPTIONS)
    x, noise = start, noises(*shape, dtype=torch.float32)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(network(x, t), t, x, eta, variance_noise=next(noise)).prev_sample
    assert_close(ours, x, 1e-4)
    assert x.std() > 0.1


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_clipped_sample_equals_diffusers(unet, prediction_type, eta):
    start, process = normal(2, 3, 8, 8, dtype=torch.float32), predicting(prediction_type, SHORT)
    noise = noises(*start.shape, dtype=torch.float32)
    ours = sample(unet, start, ladder("linear", 20, 100), process, eta=eta, noise=noise, clip=True)
    scheduler = schedulers(
        DDIMScheduler, SHORT, 20, **DDIM_OPTIONS | {"clip_sample": True}, prediction_type=prediction_type
    )
    x, noise = start, noises(*start.shape, dtype=torch.float32)
    for t in scheduler.timesteps.tolist():
        output = unet(x, t)
        # epsilon is derived again from the clipped x0
        x = scheduler.step(output, t, x, eta, use_clipped_model_output=True, variance_noise=next(noise)).prev_sample
    assert_close(ours, x, 1e-4)
    assert x.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("variance_type", "ours_options"), [("fixed_small", {"eta": 1.0}), ("fixed_large", {"use_sigma_hat": True})]
)
def test_full_ladder_equals_diffusers_ddpm(unet, variance_type, ours_options, clip):
    start, generator = normal(2, 3, 8, 8, dtype=torch.float32), torch.Generator().manual_seed(9)
    noise = (torch.randn(start.shape, generator=generator) for _ in range(99))
    ours = sample(unet, start, ladder("linear", 100, 100), SHORT, noise=noise, clip=clip, **ours_options)
    scheduler = schedulers(DDPMScheduler, SHORT, 100, variance_type=variance_type, clip_sample=clip)
    x, generator = start, torch.Generator().manual_seed(9)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(unet(x, t), t, x, generator=generator).prev_sample
    assert_close(ours, x, 1e-4)
    assert x.std() > 0.1


@pytest.mark.parametrize("which", ["unet", "wavy"])
@pytest.mark.parametrize("told", ["source", "target"])
def test_invert_equals_diffusers(unet, which, told):
    network, schedule, steps, shape = networks(unet)[which]
    start = normal(*shape, dtype=torch.float32)
    ours = invert(network, start, ladder("linear", steps, schedule.num_train_timesteps), schedule, told=told)
    scheduler = schedulers(DDIMInverseScheduler, schedule, steps, **DDIM_OPTIONS)
    x, ratio = start, schedule.num_train_timesteps // steps
    for t in scheduler.timesteps.tolist():  # the level that the step goes to
        told_timestep = t if told == "target" else max(t - ratio, 0)
        x = scheduler.step(network(x, told_timestep), t, x).prev_sample
    assert_close(ours, x, 1e-4)
    assert x.std() > 0.1


# --- Manners --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_prediction_types_of_the_same_noise_agree(prediction_type):
    data, levels, x = Gaussian(DDPM), ladder("linear", 50), normal(2, 3, 4, 4)

    def network(x, t):
        a, epsilon = DDPM.alpha_bar(t), data(x, t)
        x0 = (x - sqrt(1 - a) * epsilon) / sqrt(a)
        return x0 if prediction_type == "sample" else sqrt(a) * epsilon - sqrt(1 - a) * x0

    for walk in (sample, invert):
        expected = walk(data, x, levels, DDPM)
        assert_close(walk(network, x, levels, predicting(prediction_type, DDPM)), expected, 1e-10)


def test_networks_are_called_once_a_step_with_the_right_timestep():
    levels, told = (CLEAN, 3, 10, 40), []

    def network(x, t):
        told.append(t)
        return x

    x = normal(1, 1, 2, 2)
    sample(network, x, levels, SHORT)
    invert(network, x, levels, SHORT)
    invert(network, x, levels, SHORT, told="target")
    assert told == [40, 10, 3, *(3, 3, 10), *(3, 10, 40)]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_state_stays_float32_under_a_bfloat16_network(unet, prediction_type):
    x, levels = normal(1, 3, 8, 8, dtype=torch.float32), ladder("linear", 10, 100)
    seen = []

    def network(x, t):
        seen.append(x)
        return unet(x, t).bfloat16()

    process = predicting(prediction_type, SHORT)
    for walk in (sample, invert):
        half, whole = walk(network, x, levels, process), walk(unet, x, levels, process)
        assert half.dtype == torch.float32
        assert 0 < (half - whole).abs().max() < 0.2
    assert {x.dtype for x in seen} == {torch.float32}
    assert not any(torch.equal(x, x.bfloat16().float()) for x in seen)


@pytest.mark.parametrize("walk", [sample, invert])
def test_state_is_float32_at_least(unet, walk):
    x, levels = normal(1, 3, 8, 8, dtype=torch.float16), ladder("linear", 10, 100)
    ours = walk(lambda x, t: unet(x.float(), t), x, levels, SHORT)
    assert ours.dtype == torch.float32
    assert_close(ours, walk(unet, x.float(), levels, SHORT), 1e-5)


def test_noise_is_drawn_for_all_steps_but_the_last():
    x, levels = normal(1, 1, 2, 2), ladder("linear", 10)
    for options, left in (({"eta": 1.0}, 3), ({"use_sigma_hat": True}, 3), ({"eta": 0.0}, 12)):
        noise = iter([torch.zeros_like(x)] * 12)
        sample(wavy, x, levels, DDPM, noise=noise, **options)
        assert len(list(noise)) == left


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_out_of_range_is_refused(eta):
    with pytest.raises(ValueError, match="eta"):
        sample(wavy, normal(1, 1, 2, 2), (CLEAN, 0), DDPM, eta=eta, noise=noises(1, 1, 2, 2))


def test_clipping_the_deterministic_path_is_refused():
    with pytest.raises(ValueError, match="clip"):
        sample(wavy, normal(1, 1, 2, 2), (CLEAN, 0), DDPM, clip=True, noise=noises(1, 1, 2, 2))


@pytest.mark.parametrize("options", [{"eta": 0.5}, {"use_sigma_hat": True}])
def test_stochastic_sampling_without_noise_is_refused(options):
    with pytest.raises(ValueError, match="noise"):
        sample(wavy, normal(1, 1, 2, 2), (CLEAN, 0), DDPM, **options)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="middle"):
        invert(wavy, normal(1, 1, 2, 2), (CLEAN, 0), DDPM, told="middle")


# --- Noise ----------------------------------------------------------------------------------------------------------


def test_longer_noise_continues_the_same_stream():
    long = sample_noise(7, 3, (3, 5, 5), count=6)
    assert long.shape == (6, 3, 5, 5) and long.dtype == torch.float32
    sample_noise(7, 4, (3, 5, 5))
    for n in (1, 2, 5):
        assert torch.equal(sample_noise(7, 3, (3, 5, 5), count=n), long[:n])
    assert torch.equal(sample_noise(7, 3, (75,)), long[:1].reshape(1, 75))


def test_streams_of_a_batch_are_those_of_its_samples():
    draws = noise_stream(7, [3, 0, 11], (3, 5, 5))
    together = torch.stack([next(draws) for _ in range(4)], 1)
    assert torch.equal(together, torch.stack([sample_noise(7, i, (3, 5, 5), count=4) for i in (3, 0, 11)]))


SEEDS = st.integers(-(2**63), 2**64 - 1) | st.integers(-3, 3)
INDICES = st.integers(0, 2**63 - 1) | st.integers(0, 3)


@PROPERTY
@given(SEEDS, INDICES, st.integers(1, 3), st.integers(0, 3))
def test_noise_differs_between_seeds_and_between_indices(seed, index, by, index_by):
    one = sample_noise(seed, index, (8,))
    assert not torch.equal(one, sample_noise(seed + by, index + index_by, (8,)))
    assert not torch.equal(one, sample_noise(seed, index + by, (8,)))


def test_noise_is_standard_normal_and_uncorrelated():
    n, width = 1000, 1000
    x = torch.cat([sample_noise(0, i, (width,)) for i in range(n)]).double()
    five = 5 / sqrt(n * width)
    assert abs(x.mean()) < five
    assert abs(x.var() - 1) < five * sqrt(2)
    assert abs((x**3).mean()) < five * sqrt(15)
    assert abs((x**4).mean() - 3) < five * sqrt(96)
    assert abs((x[1:] * x[:-1]).mean()) < five  # neighbouring samples
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < five  # neighbouring values
    y = torch.cat([sample_noise(1, i, (width,)) for i in range(100)]).double()
    assert abs((x[:100] * y).mean()) < 5 / sqrt(100 * width)  # neighbouring seeds
