"""Scheduler configs as each of diffusers' classes writes them: read as what it computes, or refused by name."""

import inspect

import diffusers
import numpy as np
import pytest

from palindrome.model.process import VP, Flow
from palindrome.model.scheduler_config import (
    OF_BETAS,
    OF_FLOW,
    OF_SAMPLING,
    ONLY,
    READ,
    READ_OF_FLOW,
    parse_scheduler,
    scheduler_config,
)

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
HOW = [{}, *({"beta_schedule": schedule} for schedule in SCHEDULES), {"trained_betas": np.array([0.1, 0.2, 0.3])}]
NEED_MORE = {"DPMSolverSDEScheduler", "LMSDiscreteScheduler"}  # torchsde and scipy
CAN_BE_MADE = sorted(OF_BETAS.keys() - NEED_MORE)
BETAS = {"beta_start", "beta_end", "trained_betas"}


def classes():
    """All of diffusers' schedulers whose constructor can be looked at."""
    found = {name: getattr(diffusers.schedulers, name, None) for name in dir(diffusers.schedulers)}
    found = {name: of for name, of in found.items() if name.endswith("Scheduler") and inspect.isclass(of)}
    return {name: set(inspect.signature(of.__init__).parameters) - {"self"} for name, of in found.items()}


@pytest.mark.parametrize("name", CAN_BE_MADE)
@pytest.mark.parametrize("how", HOW)
def test_the_table_is_the_one_that_the_class_makes(name, how):
    if "trained_betas" in how:
        how = {**how, "num_train_timesteps": 3}
    theirs = getattr(diffusers, name)(**how)
    written = {key: value for key, value in theirs.config.items() if value is not None}
    for config in (dict(theirs.config), written, {"_class_name": name, **how}):  # what is left out has its default
        schedule = parse_scheduler({**config, "_class_name": name})
        np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-5)
        assert schedule.prediction_type == "epsilon"
        final = getattr(theirs, "final_alpha_cumprod", None)
        final = getattr(theirs, "initial_alpha_cumprod", final)
        if final is not None:
            assert schedule.alpha_bar(-1) == pytest.approx(float(final), rel=1e-6)


def test_every_key_of_these_classes_is_known():
    """A new version of diffusers may add keys, which must be put into one of the three sets."""
    keys = set().union(*(keys for name, keys in classes().items() if name in OF_BETAS)) - {"args", "kwargs"}
    assert keys - (READ | ONLY.keys() | OF_SAMPLING) == set()
    keys = set().union(*(classes()[name] for name in OF_FLOW))
    assert keys - (READ_OF_FLOW | ONLY.keys() | OF_SAMPLING) == set()


def test_every_class_with_a_table_of_betas_is_known_or_of_another_path():
    with_betas = {name for name, keys in classes().items() if keys >= BETAS}
    assert (
        with_betas - OF_BETAS.keys()
        == {"LCMScheduler", "TCDScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"} & with_betas
    )


@pytest.mark.parametrize("name", sorted(classes().keys() - OF_BETAS.keys() - set(OF_FLOW)))
def test_every_other_class_is_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        parse_scheduler({"_class_name": name})


@pytest.mark.parametrize(
    "change",
    [
        {"rescale_betas_zero_snr": True},  # of an epsilon network
        {"timestep_type": "continuous"},
        {"use_flow_sigmas": True},
        {"prediction_type": "flow_prediction"},
        {"beta_schedule": "sigmoid"},
        {"snr_shift_scale": 3.0},
        {"a_key_of_a_later_version": 1},
    ],
)
def test_another_mathematics_is_refused_by_key(change):
    [key] = change
    with pytest.raises(ValueError, match=key):
        parse_scheduler({"_class_name": "DDIMScheduler", **change})


def test_configs_of_the_first_versions():
    about = {"_class_name": "DDPMScheduler", "tensor_format": "np", "timestep_values": None, "trained_betas": None}
    assert parse_scheduler({**about, "predict_epsilon": True}).prediction_type == "epsilon"
    assert parse_scheduler({**about, "predict_epsilon": False}).prediction_type == "sample"


@pytest.mark.parametrize("name", OF_FLOW)
@pytest.mark.parametrize("how", [{}, {"shift": 3.0}, {"num_train_timesteps": 500}])
def test_the_flow_is_the_one_that_the_class_makes(name, how):
    theirs = getattr(diffusers, name)(**how)
    ours = parse_scheduler({**theirs.config, "_class_name": name})
    alphas, sigmas = ours.table
    np.testing.assert_allclose((sigmas / (alphas + sigmas))[::-1], theirs.sigmas, rtol=1e-6)
    told = [ours.reading(level).told for level in range(ours.num_train_timesteps)]
    np.testing.assert_allclose(told[::-1], theirs.timesteps, rtol=1e-6)


def test_a_shift_by_the_images_size_leaves_the_table_as_it_is():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    alphas, sigmas = parse_scheduler({**theirs.config, "_class_name": OF_FLOW[0]}).table
    np.testing.assert_allclose((sigmas / (alphas + sigmas))[::-1], theirs.sigmas, rtol=1e-6)


def test_a_flows_config_has_no_keys_of_another_mathematics():
    with pytest.raises(ValueError, match="invert_sigmas"):
        parse_scheduler({"_class_name": OF_FLOW[0], "invert_sigmas": True})
    with pytest.raises(ValueError, match="beta_end"):
        parse_scheduler({"_class_name": OF_FLOW[0], "beta_end": 0.02})


@pytest.mark.parametrize("process", [VP(), VP(rescale_betas_zero_snr=True, prediction_type="sample"), Flow(shift=3.0)])
def test_diffusers_reads_what_is_written(process):
    config = scheduler_config(process)
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    assert parse_scheduler({**theirs.config, "_class_name": config["_class_name"]}) == process
