"""diffusers' `scheduler_config.json` -> the noise process that a network was trained on.

Of a scheduler only its table of alpha and sigma, its prediction type and its clean end matter here: DDIM along a ladder
of our own takes the place of its sampling. Every key is therefore one of three: read, without effect on the process,
or refused by name. docs/models.md has the table.
"""

from collections.abc import Mapping
from typing import Any

from palindrome.model.process import VP, Flow, Process

# The variance-preserving schedulers: all sample the same alphas_cumprod. Each with those of its defaults that differ.
K_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}
OF_BETAS: dict[str, dict[str, Any]] = {
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
OF_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
OTHERS = {  # beginnings of class names -> what those are
    "FlowM": "a distilled flow",
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
    *("prediction_type", "predict_epsilon", "set_alpha_to_one", "rescale_betas_zero_snr"),
}
READ_OF_FLOW = {"num_train_timesteps", "shift"}
ONLY = {  # keys of other mathematics -> the value that stands for ours
    "timestep_type": "discrete",
    "use_flow_sigmas": False,
    "invert_sigmas": False,
}
# How diffusers' own sampler spaces its timesteps, bounds x0, adds noise or solves: DDIM on our ladder does none of it.
OF_SAMPLING = {
    *("timestep_spacing", "steps_offset", "clip_sample", "clip_sample_range", "thresholding", "sample_max_value"),
    *("dynamic_thresholding_ratio", "variance_type", "eta", "skip_prk_steps", "solver_order", "solver_type"),
    *("algorithm_type", "lower_order_final", "euler_at_final", "final_sigmas_type", "lambda_min_clipped", "predict_x0"),
    *("disable_corrector", "predictor_order", "corrector_order", "tau_func", "interpolation_type", "sigma_min"),
    *("sigma_max", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "flow_shift"),
    *("use_dynamic_shifting", "time_shift_type", "shift_terminal", "noise_sampler_seed"),
    *("base_shift", "max_shift", "base_image_seq_len"),  # a flow's network is told t itself, however samplers space it
    *("max_image_seq_len", "stochastic_sampling"),
    *("solver_p", "tensor_format", "timestep_values", "format"),  # of the first versions: numpy or torch
}


def parse_scheduler(config: Mapping[str, Any]) -> Process:
    """The process. Raises ValueError or TypeError, which name the class or the key, for what is neither the
    variance-preserving process of a table of betas nor flow matching."""
    name = config.get("_class_name", "DDPMScheduler")
    if name not in OF_BETAS and name not in OF_FLOW:
        other = next((what for prefix, what in OTHERS.items() if str(name).startswith(prefix)), None)
        what = f"is for {other}" if other else "is not known"
        raise ValueError(f"_class_name {name!r} {what}; known are those of DDPM's table of betas and of flow matching")
    read = READ_OF_FLOW if name in OF_FLOW else READ
    for key, value in config.items():
        if key in ONLY and value not in (None, ONLY[key]):
            raise ValueError(f"{key} is {value!r}; only {ONLY[key]!r} is supported")
        if value is not None and not key.startswith("_") and key not in read | ONLY.keys() | OF_SAMPLING:
            raise ValueError(f"unknown key {key!r}: whether it changes the noise process can't be known")
    if name in OF_FLOW:
        dynamic = config.get("use_dynamic_shifting")  # then `shift` has no effect
        names = READ_OF_FLOW - ({"shift"} if dynamic else set())
        return Flow(**{name: config[name] for name in names if config.get(name) is not None})
    defaults = {**_DEFAULTS, **OF_BETAS[name]}
    found = {key: config.get(key, default) for key, default in defaults.items()}
    betas = config.get("trained_betas")
    prediction_type = config.get("prediction_type")
    if prediction_type is None:  # `predict_epsilon` is its name in the first versions
        prediction_type = "sample" if config.get("predict_epsilon") is False else "epsilon"
    trained = None if betas is None else tuple(betas)
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    return VP(**found, trained_betas=trained, rescale_betas_zero_snr=zero_snr, prediction_type=prediction_type)


_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "set_alpha_to_one": True,
}


def scheduler_config(process: Process) -> dict[str, Any]:
    """The config of diffusers' scheduler of this process, which walks our levels without clipping. Raises ValueError
    for a process that diffusers has no deterministic scheduler for."""
    if isinstance(process, Flow):
        return {"_class_name": OF_FLOW[0], "num_train_timesteps": process.num_train_timesteps, "shift": process.shift}
    if not isinstance(process, VP):
        raise ValueError(f"{process} has no scheduler config")
    zero_snr = {"rescale_betas_zero_snr": True} if process.rescale_betas_zero_snr else {}
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": process.num_train_timesteps,
        "beta_schedule": process.beta_schedule,
        "beta_start": process.beta_start,
        "beta_end": process.beta_end,
        "trained_betas": list(process.trained_betas) if process.trained_betas is not None else None,
        "prediction_type": process.prediction_type,
        "clip_sample": False,
        "set_alpha_to_one": process.set_alpha_to_one,
        "steps_offset": 0,
        "timestep_spacing": "leading",
        **zero_snr,
    }
