"""diffusers' `scheduler_config.json` -> the noise path that a network was trained on.

Of a scheduler only its table of alphas_cumprod, its prediction type and its clean end matter here: DDIM along a ladder
of our own takes the place of its sampling. Every key is therefore one of three: read, without effect on that path, or
refused by name. docs/models.md has the table.
"""

from collections.abc import Mapping
from typing import Any

from palindrome.model.ddim import PREDICTION_TYPES
from palindrome.model.schedule import NoiseSchedule

# The variance-preserving schedulers: all sample the same alphas_cumprod. Each with those of its defaults that differ.
K_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}
VP: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {},
    "DDPMParallelScheduler": {},
    "DDIMScheduler": {},
    "DDIMParallelScheduler": {},
    "DDIMInverseScheduler": {},
    "PNDMScheduler": {"set_alpha_to_one": False},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepInverseScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "DPMSolverSDEScheduler": K_DIFFUSION,
    "DEISMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": K_DIFFUSION,
    "KDPM2DiscreteScheduler": K_DIFFUSION,
    "KDPM2AncestralDiscreteScheduler": K_DIFFUSION,
    "LMSDiscreteScheduler": {},
    "RePaintScheduler": {},
    "SASolverScheduler": {},
    "UniPCMultistepScheduler": {},
}
OTHER_PATHS = {  # beginnings of class names -> what those are
    "FlowM": "flow matching",
    "EDM": "EDM",
    "ScoreSdeVe": "a variance-exploding SDE",
    "KarrasVe": "a variance-exploding SDE",
    "ScoreSdeVp": "an SDE of continuous time",
    "IPNDM": "a schedule of continuous time",
    "CMStochastic": "a consistency model",
    "LCM": "a consistency model",
    "TCD": "a consistency model",
    "VQDiffusion": "discrete diffusion",
}
READ = {
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "predict_epsilon", "set_alpha_to_one"),
}
ONLY = {  # keys of other mathematics -> the value that stands for ours
    "rescale_betas_zero_snr": False,  # at alpha_bar 0 an epsilon network's image has no latent
    "timestep_type": "discrete",
    "use_flow_sigmas": False,
}
# How diffusers' own sampler spaces its timesteps, bounds x0, adds noise or solves: DDIM on our ladder does none of it.
OF_SAMPLING = {
    *("timestep_spacing", "steps_offset", "clip_sample", "clip_sample_range", "thresholding", "sample_max_value"),
    *("dynamic_thresholding_ratio", "variance_type", "eta", "skip_prk_steps", "solver_order", "solver_type"),
    *("algorithm_type", "lower_order_final", "euler_at_final", "final_sigmas_type", "lambda_min_clipped", "predict_x0"),
    *("disable_corrector", "predictor_order", "corrector_order", "tau_func", "interpolation_type", "sigma_min"),
    *("sigma_max", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "flow_shift"),
    *("use_dynamic_shifting", "time_shift_type", "shift_terminal", "noise_sampler_seed"),
    *("solver_p", "tensor_format", "timestep_values", "format"),  # of the first versions: numpy or torch
}


def parse_scheduler(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str]:
    """The schedule and the prediction type. Raises ValueError or TypeError, which name the class or the key, for what
    is not the variance-preserving path of a table of betas."""
    name = config.get("_class_name", "DDPMScheduler")
    if name not in VP:
        path = next((path for prefix, path in OTHER_PATHS.items() if str(name).startswith(prefix)), None)
        what = f"is for {path}" if path else "is not known"
        raise ValueError(f"_class_name {name!r} {what}; known are those that share DDPM's table of betas")
    for key, value in config.items():
        if key in ONLY and value not in (None, ONLY[key]):
            raise ValueError(f"{key} is {value!r}; only {ONLY[key]!r} is supported")
        if value is not None and not key.startswith("_") and key not in READ | ONLY.keys() | OF_SAMPLING:
            raise ValueError(f"unknown key {key!r}: whether it changes the noise path can't be known")
    defaults = {**_DEFAULTS, **VP[name]}
    read = {key: config.get(key, default) for key, default in defaults.items()}
    betas = config.get("trained_betas")
    prediction_type = config.get("prediction_type")
    if prediction_type is None:  # `predict_epsilon` is its name in the first versions
        prediction_type = "sample" if config.get("predict_epsilon") is False else "epsilon"
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")
    return NoiseSchedule(**read, trained_betas=None if betas is None else tuple(betas)), prediction_type


_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "set_alpha_to_one": True,
}


def scheduler_config(schedule: NoiseSchedule, prediction_type: str) -> dict[str, Any]:
    """diffusers' DDIMScheduler config that walks our levels, without clipping."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.num_train_timesteps,
        "beta_schedule": schedule.beta_schedule,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "trained_betas": list(schedule.trained_betas) if schedule.trained_betas is not None else None,
        "prediction_type": prediction_type,
        "clip_sample": False,
        "set_alpha_to_one": schedule.set_alpha_to_one,
        "steps_offset": 0,
        "timestep_spacing": "leading",
    }
