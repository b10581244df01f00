"""Scores against the authors' own code (tests/fixtures/scores/README.md), and against their papers' equations."""

import json
import math
import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from palindrome.model.families import openai
from palindrome.model.process import EDM, VP, Flow, Marginal
from palindrome.model.scores import (
    diffpath,
    dire,
    distance,
    gaussian,
    invad,
    path,
    secmi,
    secmi_levels,
    sectioned,
    spaced,
    step,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASE = json.loads((FIXTURES / "scores/case.json").read_text())
SIX = safetensors.torch.load_file(FIXTURES / "scores/tensors.safetensors")
THEIRS = {name: value[:2] for name, value in SIX.items()}  # test_score.py has all six through the command
X = THEIRS["x"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guided")
    draw = runpy.run_path(str(FIXTURES / "make_openai_fixtures.py"))["weights_for"]
    torch.save(draw(CASE["shapes"], CASE["seed"]), folder / "model.pt")
    (folder / "model.json").write_text(json.dumps(CASE["flags"]))
    return openai.load(str(folder / "model.pt"), allow_pickle=True)


@pytest.fixture(scope="module")
def network(loaded):
    return loaded.denoiser()


def test_diffpath_s_statistics_are_those_of_its_code(network, loaded):
    found = diffpath(network, X, spaced(10, 1000), loaded.process)
    names = ["eps_sum", "eps_sum_sq", "eps_sum_cb", "deps_dt", "deps_dt_sq", "deps_dt_cb", "deps_dt_sq_sqrt"]
    for name in names:
        theirs = THEIRS[f"diffpath: {name}"]
        summed = f"{name}_abs" if name in ("eps_sum", "deps_dt") else name  # in float32, of terms that cancel
        scale = float(THEIRS[f"diffpath: {summed}"].abs().max())
        torch.testing.assert_close(found[name], theirs.double(), rtol=1e-5, atol=2e-5 * scale)
        assert theirs.unique().numel() == len(X)
    assert found["eps_sum_steps"].shape == (2, 10) and found["deps_dt_cb_steps"].shape == (2, 9)


def test_without_clipping_they_are_others(network, loaded):
    """The case has values to be clipped."""
    sums = sum(epsilon.double().flatten(1).sum(1) for _, epsilon in path(network, X, spaced(10, 1000), loaded.process))
    assert ((sums - THEIRS["diffpath: eps_sum"]).abs() > 1).all()


def test_secmi_s_statistic_is_that_of_its_script(network, loaded):
    found = secmi(network, X, secmi_levels(1000), loaded.process)["t_error"]
    torch.testing.assert_close(found.float(), THEIRS["secmi: statistic"], rtol=1e-4, atol=0)


def test_invad_s_statistics_are_those_of_its_code(network, loaded):
    found = invad(network, X, sectioned(3, 1000), loaded.process)
    for name in ("nll", "norm_range"):
        torch.testing.assert_close(found[name].float(), THEIRS[f"invad: {name}"], rtol=1e-4, atol=0)


def test_dire_s_map_is_that_of_its_script(network, loaded):
    found = dire(network, X, spaced(20, 1000), loaded.process)
    map_of_theirs = THEIRS["dire: map"].permute(0, 3, 1, 2).float()
    assert ((found["map"] * 255).clamp(0, 255).byte().float() - map_of_theirs).abs().max() <= 1
    torch.testing.assert_close(found["l1"].float(), (map_of_theirs / 255).mean((1, 2, 3)), rtol=0, atol=1 / 255)
    assert map_of_theirs.std() > 10


@pytest.mark.parametrize(("steps", "T"), [(10, 1000), (20, 1000), (3, 1000), (50, 4000), (1, 7), (7, 7)])
def test_spacings_are_guided_diffusion_s(steps, T):
    """`space_timesteps`, from its docstring: the first stride with so many, and evenly spaced ones, ends included."""
    strides = [i for i in range(1, T + 1) if len(range(0, T, i)) == steps]
    if strides:
        assert spaced(steps, T) == tuple(range(0, T, strides[0]))
    assert sectioned(3, 1000) == (0, 500, 999)
    levels = sectioned(steps, T)
    assert levels[0] == 0 and len(set(levels)) == steps and (steps == 1 or levels[-1] == T - 1)


def test_no_spacing_and_too_many_steps_are_refused():
    with pytest.raises(ValueError, match="no spacing of 1000 timesteps has 600"):
        spaced(600, 1000)
    with pytest.raises(ValueError, match="8 steps do not fit in 7"):
        sectioned(8, 7)


def test_secmi_s_levels_scale_with_the_schedule():
    assert secmi_levels(1000) == tuple(range(0, 101, 10))
    assert secmi_levels(4000)[-2:] == (360, 400)
    assert secmi_levels(50)[:3] == (0, 0.5, 1)


@pytest.mark.parametrize("process", [VP(prediction_type=p) for p in ("epsilon", "sample", "v_prediction")], ids=str)
@pytest.mark.parametrize("clip", [False, True])
def test_a_step_is_equation_12_whatever_the_network_predicts(process, clip):
    """A network that knows one image and says it in its own terms: its x0 and epsilon are known, as numbers."""
    known = torch.linspace(-1.2, 0.9, 12).reshape(1, 3, 2, 2)
    x, level, end = torch.linspace(-2, 2, 12).reshape(1, 3, 2, 2), 300, Marginal(0.8, 0.6)
    alpha, sigma = process.marginal(level)

    def network(x, told):
        epsilon = (x - alpha * known) / sigma
        outputs = {"epsilon": epsilon, "sample": known, "v_prediction": alpha * epsilon - sigma * known}
        return outputs[process.prediction_type]

    x0 = known.clamp(-1, 1) if clip else known
    epsilon = (x - alpha * x0) / sigma
    found = step(network, x, level, end, process, clip=clip)
    torch.testing.assert_close(found, (0.8 * x0 + 0.6 * epsilon, epsilon), rtol=0, atol=1e-5)
    _, noise = step(network, x, level, Marginal(0.0, 1.0), process, clip=clip)
    torch.testing.assert_close(noise, epsilon, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "process",
    [VP(prediction_type="v_prediction", rescale_betas_zero_snr=True), Flow(), EDM()],
    ids=["zero", "flow", "edm"],
)
def test_other_processes_have_paths_too(process):
    def network(x, told):
        return 0.5 * x.tanh()

    x = torch.linspace(-1, 1, 24).reshape(2, 3, 2, 2)
    for found in (diffpath(network, x, spaced(10, 1000), process), dire(network, x, spaced(20, 1000), process)):
        assert all(value.isfinite().all() and len(value) == 2 for value in found.values())
    assert (invad(network, x, sectioned(3, 1000), process)["nll"] > 0).all()


def test_parts_sum_to_the_statistics(network, loaded):
    found = diffpath(network, X[:2], spaced(5, 1000), loaded.process)
    for name, parts in found.items():
        if name.endswith("_steps"):
            torch.testing.assert_close(parts.sum(1), found[name.removesuffix("_steps")])
    epsilons = torch.stack([e.double() for _, e in path(network, X[:2], spaced(5, 1000), loaded.process, clip=True)], 1)
    rates = 5 * epsilons.diff(dim=1)
    torch.testing.assert_close(found["deps_dt_sq_steps"], rates.square().sum((2, 3, 4)))
    torch.testing.assert_close(found["deps_dt_sq_sqrt"], rates.flatten(1).norm(dim=1))


@given(st.integers(1, 4), st.integers(1, 5), st.floats(0.1, 30))
def test_the_gaussian_is_torch_s(batch, side, scale):
    x = scale * torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(side))
    found = gaussian(x)
    expected = -torch.distributions.Normal(0, 1).log_prob(x.double()).flatten(1).sum(1)
    torch.testing.assert_close(found["nats"], expected)
    torch.testing.assert_close(found["norm"], x.double().flatten(1).norm(dim=1))


def test_the_range_of_norms_is_over_positions():
    """A latent that the path can't change: epsilon of it is itself at alpha 0."""
    latent = torch.zeros(1, 3, 2, 2)
    latent[0, :, 0, 1], latent[0, :, 1, 1] = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([0.0, 1.0, 0.0])
    found = invad(lambda x, told: latent, torch.zeros_like(latent), (500,), VP())
    assert found["norm_range"].tolist() == [5.0]
    assert found["nll"].tolist() == pytest.approx([(26 + 12 * math.log(2 * math.pi)) / 2])


def test_secmi_goes_up_and_back_between_the_last_two_levels():
    """Which levels the network is told, and that a network whose epsilon is the same everywhere leaves no error."""
    told = []

    def network(x, level):
        told.append(level)
        return torch.ones_like(x)

    found = secmi(network, torch.zeros(2, 1, 2, 2), secmi_levels(1000), VP())
    assert told == [*range(0, 101, 10)]
    assert found["t_error"].tolist() == pytest.approx([0, 0], abs=1e-9)


def test_dire_tells_the_network_each_level_twice():
    told = []

    def network(x, level):
        told.append(level)
        return torch.zeros_like(x)

    dire(network, torch.zeros(1, 1, 2, 2), (0, 10, 20), VP())
    assert told == [0, 10, 20, 20, 10, 0]
    assert all(a != b or a == 20 for a, b in pairwise(told))


def test_what_is_not_finite_is_not_clipped_away():
    def network(x, level):
        return torch.where(torch.arange(2)[:, None, None, None] == 1, torch.inf, 0.1 * x)

    x = torch.full((2, 1, 2, 2), 0.5)
    assert dire(network, x, spaced(4, 1000), VP())["l1"].isfinite().tolist() == [True, False]
    assert diffpath(network, x, spaced(4, 1000), VP())["eps_sum"].isfinite().tolist() == [True, False]


def test_distances_are_of_pixels_in_0_to_1():
    found = distance(torch.full((1, 3, 2, 2), -1.0), torch.full((1, 3, 2, 2), 1.0))
    assert found["l1"].tolist() == [1.0] and found["map"].unique().tolist() == [1.0]
