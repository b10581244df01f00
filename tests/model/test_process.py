"""Noise processes against diffusers' schedulers, the papers' equations, and one model written in each way."""

import json
import math
from math import sqrt

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from palindrome.model.ddim import invert, sample
from palindrome.model.inversion import invert_exactly
from palindrome.model.ladder import ladder, logsnr_ladder
from palindrome.model.process import BETA_SCHEDULES, CLEAN, EDM, PREDICTION_TYPES, VP, Flow, Marginal, SongVE, SongVP

# --- The table of betas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("T", [1, 50, 1000])
@pytest.mark.parametrize("ends", [(1e-4, 0.02), (0.00085, 0.012)])
def test_schedule_equals_diffusers(beta_schedule, T, ends):
    ours = VP(T, beta_schedule, *ends)
    theirs = DDIMScheduler(T, *ends, beta_schedule)
    np.testing.assert_allclose(ours.betas, theirs.betas, rtol=1e-5)
    # Theirs is float32, in which 1 - 0.999, the cosine's last factor, is good to 6e-5 only.
    rtol = 1e-4 if beta_schedule == "squaredcos_cap_v2" else 1e-5
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=rtol)
    assert ours.alphas_cumprod.dtype == np.float64


def test_trained_betas_equal_diffusers():
    betas = np.random.default_rng(0).uniform(0.001, 0.2, 30).tolist()
    ours = VP(30, "scaled_linear", trained_betas=tuple(betas))
    theirs = DDIMScheduler(30, trained_betas=betas)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5)


def test_cosine_alpha_bar_has_its_closed_form():
    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    T = 1000  # only the last beta is capped
    expected = [f((t + 1) / T) / f(0) for t in range(T - 1)]
    np.testing.assert_allclose(VP(T, "squaredcos_cap_v2").alphas_cumprod[:-1], expected, rtol=1e-11)


def test_alpha_bar_is_one_at_the_clean_end_and_bounded_by_the_schedule():
    schedule = VP(10, beta_start=0.1, beta_end=0.1)
    assert schedule.alpha_bar(CLEAN) == 1
    assert [schedule.alpha_bar(t) for t in range(10)] == pytest.approx([0.9 ** (t + 1) for t in range(10)], rel=1e-14)
    for level in (-2, 10):
        with pytest.raises(IndexError, match=str(level)):
            schedule.alpha_bar(level)


@pytest.mark.parametrize(
    "bad",
    [
        {"beta_schedule": "sigmoid"},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": -5},
        {"beta_start": 0.0},
        {"beta_start": -1e-4},
        {"beta_start": -1e-4, "beta_schedule": "scaled_linear"},
        {"beta_start": math.nan},
        {"beta_end": 1.0},
        {"beta_end": math.inf},
        {"num_train_timesteps": 3, "trained_betas": (0.1, 0.2)},
        {"num_train_timesteps": 2, "trained_betas": (0.1, 1.0)},
        {"num_train_timesteps": 2, "trained_betas": (0.0, 0.5)},
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_impossible_schedule_is_refused(bad):
    with pytest.raises(ValueError):
        VP(**bad)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_rescaled_betas_end_at_alpha_0_as_diffusers_do(prediction_type):
    ours = VP(rescale_betas_zero_snr=True, prediction_type=prediction_type)
    theirs = DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(ours.alphas_cumprod, theirs, rtol=1e-4, atol=1e-9)
    assert ours.marginal(999) == (0, 1)
    with pytest.raises(ValueError, match="epsilon"):
        VP(rescale_betas_zero_snr=True)


@pytest.mark.parametrize(
    "process",
    [VP(), VP(rescale_betas_zero_snr=True, prediction_type="sample"), Flow(), EDM(), SongVP(), SongVE()],
)
def test_levels_between_timesteps_lie_between_them(process):
    for level in (0, 3, 998):
        here, between, above = (process.marginal(level + part) for part in (0, 0.25, 1))
        assert here.alpha > between.alpha > above.alpha
        assert here.sigma < between.sigma < above.sigma
        assert between.alpha**2 + between.sigma**2 == pytest.approx(1, abs=1e-15)
    for level in (-0.5, 999.5, 1000):
        with pytest.raises(IndexError, match=str(level)):
            process.marginal(level)


# --- One model in each way ------------------------------------------------------------------------------------------


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def posterior_mean(x, alpha, sigma):
    """E[x0 | alpha x0 + sigma epsilon = x] for data of two Gaussians at -0.6 and 0.6, each value on its own."""
    variance = (0.3 * alpha) ** 2 + sigma**2
    means = torch.tensor([-0.6, 0.6], dtype=x.dtype)
    weights = torch.softmax(-((x[..., None] - alpha * means) ** 2) / (2 * variance), -1)
    shrunk = 0.3**2 * alpha / variance
    return (weights * (means + shrunk * (x[..., None] - alpha * means))).sum(-1)


def of_betas(process):
    """The mixture's network on a table of betas, told timesteps."""

    def network(x, t):
        alpha, sigma = process.marginal(t)
        x0 = posterior_mean(x, alpha, sigma)
        if process.prediction_type == "sample":
            return x0
        epsilon = (x - alpha * x0) / sigma
        return epsilon if process.prediction_type == "epsilon" else alpha * epsilon - sigma * x0

    return network


def of_flow(z, told):
    """Its velocity, as flow matching defines it."""
    t = told / 1000
    x0 = posterior_mean(z, 1 - t, t)
    return (z - (1 - t) * x0) / t - x0


def of_edm(given, c_noise, sigma_data=0.5):
    """Its raw network, after Karras et al., table 1 and eq. 7."""
    s = math.exp(4 * c_noise)
    c_skip, c_out = sigma_data**2 / (s**2 + sigma_data**2), s * sigma_data / sqrt(s**2 + sigma_data**2)
    z = given * sqrt(s**2 + sigma_data**2)
    return (posterior_mean(z, 1, s) - c_skip * z) / c_out


def of_song_vp(given, told):
    """Song et al.'s network of the VP process, whose output is epsilon (Karras et al., table 1)."""
    t = told / 999
    s = sqrt(math.exp(19.9 * t**2 / 2 + 0.1 * t) - 1)
    return (given * sqrt(s**2 + 1) - posterior_mean(given * sqrt(s**2 + 1), 1, s)) / s


def of_song_ve(z, told):
    """That of the VE process, whose output is -epsilon."""
    s = 2 * math.exp(told)
    return (posterior_mean(z, 1, s) - z) / s


WAYS = {
    **{name: (VP(prediction_type=name), of_betas(VP(prediction_type=name))) for name in PREDICTION_TYPES},
    "flow": (Flow(), of_flow),
    "shifted flow": (Flow(shift=3.0), of_flow),
    "edm": (EDM(), of_edm),
    "song_vp": (SongVP(), of_song_vp),
    "song_ve": (SongVE(), of_song_ve),
}


def angles(process):
    alphas, sigmas = process.table
    return np.arctan2(sigmas, alphas)


def same_levels(process, levels):
    """The levels of `process` at the noise of the levels of a table of betas."""
    wanted = [math.atan2(*reversed(VP().marginal(level))) for level in levels[1:]]
    return (CLEAN, *np.interp(wanted, angles(process), np.arange(process.num_train_timesteps)).tolist())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("corrections", [0, 3])
def test_the_same_model_gives_the_same_latent_in_each_way(way, corrections):
    process, network = WAYS[way]
    levels, x0 = logsnr_ladder(VP(), 20), 0.6 * normal(4, 3, 4, 4).clamp(-1, 1)
    expected, *_ = invert_exactly(WAYS["epsilon"][1], x0, levels, VP(), corrections=corrections)
    ours, *_ = invert_exactly(network, x0, same_levels(process, levels), process, corrections=corrections)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
    back = sample(network, ours, same_levels(process, levels), process)
    torch.testing.assert_close(back, sample(WAYS["epsilon"][1], expected, levels, VP()), rtol=0, atol=1e-9)


ZERO_SNR = [VP(rescale_betas_zero_snr=True, prediction_type=name) for name in ("v_prediction", "sample")]


@pytest.mark.parametrize(
    ("process", "network", "top"),
    [
        *(pytest.param(*WAYS[way], None, id=way) for way in WAYS),
        *(
            pytest.param(process, of_betas(process), 999, id=f"{process.prediction_type} to alpha 0")
            for process in ZERO_SNR
        ),
        pytest.param(Flow(), of_flow, 999, id="flow to alpha 0"),
    ],
)
def test_inversion_is_exact_in_each_way(process, network, top):
    levels = logsnr_ladder(process, 20) if top is None else ladder("linear", 20, top=top)
    x0 = 0.6 * normal(4, 3, 4, 4).clamp(-1, 1)
    latents, residual, _ = invert_exactly(network, x0, levels, process, corrections=60)
    assert residual.max() < 1e-10
    assert (sample(network, latents, levels, process) - x0).abs().max() < 1e-10
    plain = sample(network, invert(network, x0, levels, process), levels, process)
    assert (plain - x0).abs().max() > 1e-3


def test_epsilon_has_no_latent_at_alpha_0():
    class Ended(VP):
        """A table whose last alpha is 0, which VP itself refuses."""

        def marginal(self, level):
            return Marginal(0.0, 1.0) if level == 999 else super().marginal(level)

    x = normal(1, 1, 2, 2)
    with pytest.raises(ValueError, match="alpha 0"):
        sample(lambda x, t: x, x, (CLEAN, 0, 999), Ended())


def test_a_single_step_to_alpha_0_has_no_inverse():
    process = ZERO_SNR[0]
    with pytest.raises(ValueError, match="alpha 0"):
        invert_exactly(of_betas(process), normal(1, 1, 2, 2), (CLEAN, 999), process)


# --- Against others' samplers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampling_a_flow_equals_diffusers_euler(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(20)
    process = Flow(shift=shift)
    sigmas = scheduler.sigmas.double().numpy()[:-1][::-1]  # their t, rising
    levels = np.interp(np.arctan2(sigmas, 1 - sigmas), angles(process), np.arange(1000)).tolist()
    z = ours = normal(2, 3, 4, 4)
    for t in scheduler.timesteps:
        z = scheduler.step(of_flow(z, float(t)), t, z).prev_sample
    ours = sample(of_flow, ours, (CLEAN, *levels), process)  # their first t is 1, where z_t has unit scale
    torch.testing.assert_close(ours, z, rtol=0, atol=2e-5)  # theirs rounds sigmas to float32


def test_sampling_an_edm_network_is_eulers_method_in_sigma():
    """Karras et al., algorithm 1 without its second order: x + (s' - s) (x - D(x; s)) / s."""
    process, levels = EDM(), ladder("linear", 18, top=999)
    start = normal(2, 3, 4, 4)
    s = [sigma / alpha for alpha, sigma in map(process.marginal, levels)]
    x = start * sqrt(1 + s[-1] ** 2)
    for high, low in zip(s[:0:-1], s[-2::-1], strict=True):
        x = x + (low - high) * (x - posterior_mean(x, 1, high)) / high
    torch.testing.assert_close(sample(of_edm, start, levels, process), x, rtol=0, atol=1e-9)
    steps = np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 1000) ** 7  # their eq. 5
    np.testing.assert_allclose(process.table[1] / process.table[0], steps, rtol=1e-12)


def test_sampling_to_and_from_alpha_0_equals_diffusers():
    process, steps = ZERO_SNR[0], 10
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(steps)
    levels = (CLEAN, *scheduler.timesteps.tolist()[::-1])
    assert levels[-1] == 999
    x = start = normal(2, 3, 4, 4)
    network = of_betas(process)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(network(x, t), t, x).prev_sample
    torch.testing.assert_close(sample(network, start, levels, process), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bad", [Flow, EDM, SongVP, SongVE])
def test_impossible_processes_are_refused(bad):
    with pytest.raises(ValueError):
        bad(num_train_timesteps=0)
    with pytest.raises(ValueError):
        bad(**({"shift": 0.0} if bad is Flow else {"sigma_max": 0.001}))


@pytest.mark.parametrize("process", [VP(), ZERO_SNR[0], Flow(shift=2.0), EDM(), SongVP(M=100), SongVE(sigma_max=50)])
def test_a_description_is_json_and_makes_the_process_again(process):
    found = json.loads(json.dumps(process.describe()))
    kind = {"flow": Flow, "edm": EDM, "song_vp": SongVP, "song_ve": SongVE}.get(found.pop("process", None), VP)
    assert kind(**found) == process
