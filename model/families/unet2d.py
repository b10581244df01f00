"""Unconditional pixel models: folders with a UNet2DModel in diffusers' layout, which opens ours as we open its. No
pickle is ever loaded.

unet/config.json, unet/diffusion_pytorch_model.safetensors, scheduler/scheduler_config.json, model_index.json
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import fsspec
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from palindrome.model.ddim import PREDICTION_TYPES, Network
from palindrome.model.engine import Engine
from palindrome.model.execution import FLOAT32, Execution
from palindrome.model.families.base import Checkpoint, CheckpointError
from palindrome.model.schedule import NoiseSchedule
from palindrome.model.unet import UNet, UNetConfig

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CONFIG = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
INDEX = "model_index.json"


@dataclass(frozen=True)
class UNet2D(Checkpoint):
    """A network's configuration, its weights as stored, and the schedule it was trained on.

    `weights` maps diffusers' parameter names to tensors of the stored dtype.
    """

    config: UNetConfig
    weights: Mapping[str, Tensor]
    schedule: NoiseSchedule
    prediction_type: str = "epsilon"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.config.in_channels, self.config.sample_size, self.config.sample_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.image_shape

    @cached_property
    def digest(self) -> str:
        h = hashlib.sha256()
        configs = [self.config.to_dict(), _scheduler_dict(self.schedule, self.prediction_type)]
        h.update(json.dumps(configs, sort_keys=True).encode())
        for name, value in sorted(self.weights.items()):
            h.update(f"\0{name} {value.dtype} {tuple(value.shape)}\0".encode())
            h.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return h.hexdigest()

    def network(self, device: torch.device | str = "cpu") -> UNet:
        """The network in float32 on a device, in evaluation mode, without gradients.

        On CPU its weights lie channels last, and the activations follow: oneDNN's convolutions need no reordering then.
        """
        net = UNet(self.config)
        net.load_state_dict(dict(self.weights))
        if torch.device(device).type == "cpu":
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return net.to(device, torch.float32).eval().requires_grad_(False)

    def denoiser(self, device: torch.device | str = "cpu", execution: Execution = FLOAT32) -> Network:
        """Raises as Engine does."""
        return Engine(self.network(device), execution)


def save(checkpoint: UNet2D, uri: str, storage_options: Mapping[str, Any] | None = None) -> None:
    """Writes the folder, `model_index.json`, by which readers know one, last. The weights keep their dtype."""
    fs, root = fsspec.url_to_fs(uri, **storage_options or {})
    weights = {k: v.detach().cpu().contiguous() for k, v in checkpoint.weights.items()}
    index = {
        "_class_name": "DDIMPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    files = {
        WEIGHTS: safetensors.torch.save(weights, metadata={"format": "pt"}),
        CONFIG: _json(checkpoint.config.to_dict()),
        SCHEDULER: _json(_scheduler_dict(checkpoint.schedule, checkpoint.prediction_type)),
        INDEX: _json(index),
    }
    for name, content in files.items():
        fs.makedirs(f"{root}/{name}".rsplit("/", 1)[0], exist_ok=True)
        fs.pipe_file(f"{root}/{name}", content)


def load(uri: str, storage_options: Mapping[str, Any] | None = None) -> UNet2D:
    """Reads a folder. Raises CheckpointError for what is missing, unreadable, or of another architecture."""
    fs, root = fsspec.url_to_fs(uri, **storage_options or {})

    def read(name: str) -> bytes:
        try:
            return fs.cat_file(f"{root}/{name}")
        except FileNotFoundError:
            pass
        except OSError as e:
            raise CheckpointError(f"{uri}/{name} can't be read: {e.strerror or e}") from e
        pickled = name.replace("safetensors", "bin")
        if name == WEIGHTS and fs.exists(f"{root}/{pickled}"):
            raise CheckpointError(f"{uri} holds a pickle ({pickled}), which is not loaded; save it as safetensors")
        raise CheckpointError(f"{uri} is no checkpoint folder: {name} is missing")

    def read_json(name: str) -> dict[str, Any]:
        try:
            value = json.loads(read(name))
        except ValueError as e:
            if isinstance(e, CheckpointError):
                raise
            raise CheckpointError(f"{uri}/{name} is not JSON: {e}") from e
        if not isinstance(value, dict):
            raise CheckpointError(f"{uri}/{name} is not a JSON object")
        return value

    config_dict, scheduler_dict = read_json(CONFIG), read_json(SCHEDULER)
    try:
        config = UNetConfig.from_dict(config_dict)
    except (ValueError, TypeError) as e:
        raise CheckpointError(f"{uri}/{CONFIG}: {e}") from e
    try:
        schedule, prediction_type = _parse_scheduler(scheduler_dict)
    except (ValueError, TypeError) as e:
        raise CheckpointError(f"{uri}/{SCHEDULER}: {e}") from e
    try:
        weights = safetensors.torch.load(read(WEIGHTS))
    except SafetensorError as e:
        raise CheckpointError(f"{uri}/{WEIGHTS} is not a safetensors file: {e}") from e
    weights = {_modern_name(k): v for k, v in weights.items()}
    with torch.device("meta"):
        expected = {k: v.shape for k, v in UNet(config).state_dict().items()}
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or name not in expected or weights[name].shape != expected[name]:
            found = tuple(weights[name].shape) if name in weights else "nothing"
            wanted = tuple(expected[name]) if name in expected else "nothing"
            raise CheckpointError(f"{uri}/{WEIGHTS}: {name} is {found}, and the config asks for {wanted}")
    return UNet2D(config, weights, schedule, prediction_type)


def _parse_scheduler(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str]:
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")
    if config.get("rescale_betas_zero_snr"):
        raise ValueError("rescale_betas_zero_snr is not supported: at alpha-bar 0 an image has no latent")
    betas = config.get("trained_betas")
    defaults = NoiseSchedule()
    schedule = NoiseSchedule(
        config.get("num_train_timesteps", defaults.num_train_timesteps),
        config.get("beta_schedule", defaults.beta_schedule),
        config.get("beta_start", defaults.beta_start),
        config.get("beta_end", defaults.beta_end),
        tuple(betas) if betas is not None else None,
    )
    return schedule, prediction_type


def _scheduler_dict(schedule: NoiseSchedule, prediction_type: str) -> dict[str, Any]:
    """diffusers' DDIMScheduler config that walks our levels: no clipping, the clean end at alpha-bar 1."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.num_train_timesteps,
        "beta_schedule": schedule.beta_schedule,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "trained_betas": list(schedule.trained_betas) if schedule.trained_betas is not None else None,
        "prediction_type": prediction_type,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
    }


def _modern_name(name: str) -> str:
    """Attention parameters as diffusers has named them since 0.18 (`query` -> `to_q`, …)."""
    if ".attentions." not in name:
        return name
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = re.sub(rf"\.{old}\.(weight|bias)$", rf".{new}.\1", name)
    return name


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
