"""Pixel models, also of classes: folders with a UNet2DModel in diffusers' layout, which opens ours as we open its.

unet/config.json, unet/diffusion_pytorch_model.safetensors, scheduler/scheduler_config.json, model_index.json
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, Self

import fsspec
import safetensors.torch
import torch
from torch import Tensor

from palindrome.model.condition import ClassOf, Condition
from palindrome.model.ddim import Network
from palindrome.model.diffusers_folder import INDEX, STEM, DiffusersFolder
from palindrome.model.engine import Engine
from palindrome.model.execution import FLOAT32, Execution
from palindrome.model.families.base import Checkpoint, CheckpointError
from palindrome.model.process import Process
from palindrome.model.scheduler_config import parse_scheduler, scheduler_config
from palindrome.model.unet import UNet, UNetConfig

WEIGHTS = f"unet/{STEM}.safetensors"
CONFIG = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "RePaintPipeline")  # of a U-Net on pixels
AUTOENCODERS = ("vae", "vqvae", "movq")  # folders of a latent diffusion model


@dataclass(frozen=True)
class UNet2D(Checkpoint):
    """A network's configuration, its weights as stored, and the process it was trained on.

    `weights` maps diffusers' parameter names to tensors of the stored dtype. A network with twice as many outputs as
    inputs predicts the variance too (Nichol & Dhariwal, section 3.1), by the second half, which DDIM has no use for.
    A class-conditional network is told the class of each image that `classes` says.
    """

    config: UNetConfig
    weights: Mapping[str, Tensor]
    process: Process
    classes: ClassOf | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.config.in_channels, self.config.sample_size, self.config.sample_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.image_shape

    @cached_property
    def digest(self) -> str:
        h = hashlib.sha256()
        # The clean end is a matter of the path that is walked, and recorded with the run: not of the model.
        configs = [self.config.to_dict(), scheduler_config(self.process.as_described({}))]
        h.update(json.dumps(configs, sort_keys=True).encode())
        for name, value in sorted(self.weights.items()):
            h.update(f"\0{name} {value.dtype} {tuple(value.shape)}\0".encode())
            h.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return h.hexdigest()

    def network(self, device: torch.device | str = "cpu") -> UNet:
        """The network in float32 on a device, in evaluation mode, without gradients.

        On CPU its weights lie channels last, and the activations follow: oneDNN's convolutions need no reordering then.
        """
        channels = self.config.in_channels
        net = UNet(dataclasses.replace(self.config, out_channels=channels))
        mean = {name: value[:channels] for name, value in self.weights.items() if name.startswith("conv_out.")}
        net.load_state_dict({**self.weights, **mean})
        if torch.device(device).type == "cpu":
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return net.to(device, torch.float32).eval().requires_grad_(False)

    def denoiser(self, device: torch.device | str = "cpu", execution: Execution = FLOAT32) -> Network:
        """Raises as Engine does."""
        return Engine(self.network(device), execution)

    @property
    def class_conditional(self) -> bool:
        return self.config.class_conditional

    def with_classes(self, classes: ClassOf) -> Self:
        if not self.class_conditional:
            return super().with_classes(classes)
        told = dataclasses.replace(self, classes=classes)
        if classes.value is not None and (why := told.refusal({})):
            raise ValueError(why)
        return told

    def told(self) -> dict[str, Any]:
        return {} if self.classes is None else {"classes": self.classes.record()}

    def refusal(self, row: Mapping[str, Any]) -> str:
        if not self.class_conditional:
            return ""
        value = None if self.classes is None else self.classes(row)
        if value is None:
            return "the model is class-conditional, and the image has no class"
        if self.config.class_embed_type == "identity":
            return "" if isinstance(value, Sequence) else f"the class is {value!r}, not an embedding"
        known = self.config.num_class_embeds if self.config.class_embed_type is None else None
        if isinstance(value, Integral) and 0 <= int(value) < (known or math.inf):
            return ""
        return f"the class is {value!r}, not a number{f' below {known}' if known else ''}"

    def condition(self, rows: Sequence[Mapping[str, Any]]) -> Condition | None:
        """`class`: int64 [B]; or for the class embedding `identity`, float32 [B, E]."""
        if not self.class_conditional:
            return None
        for why in filter(None, map(self.refusal, rows)):
            raise ValueError(why)
        assert self.classes is not None  # else refused
        dtype = torch.float32 if self.config.class_embed_type == "identity" else torch.int64
        return Condition({"class": torch.tensor([self.classes(row) for row in rows], dtype=dtype)})

    def with_process(self, process: Process) -> Self:
        return dataclasses.replace(self, process=process)


def save(checkpoint: UNet2D, uri: str, storage_options: Mapping[str, Any] | None = None) -> None:
    """Writes the folder, `model_index.json`, by which readers know one, last. The weights keep their dtype.
    Raises ValueError for a network that diffusers' UNet2DModel can't express."""
    if settings := checkpoint.config.beyond_diffusers:
        raise ValueError(f"diffusers' UNet2DModel has no {settings[0]}: this network has no folder in its layout")
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
        SCHEDULER: _json(scheduler_config(checkpoint.process)),
        INDEX: _json(index),
    }
    for name, content in files.items():
        fs.makedirs(f"{root}/{name}".rsplit("/", 1)[0], exist_ok=True)
        fs.pipe_file(f"{root}/{name}", content)


def load(uri: str, storage_options: Mapping[str, Any] | None = None, allow_pickle: bool = False) -> UNet2D:
    """Reads a folder. Raises CheckpointError for what is missing, unreadable, or of another architecture; weights as
    pickles are read only with `allow_pickle`, and then as tensors alone."""
    folder = DiffusersFolder(uri, storage_options)
    _check_pipeline(folder)
    config_name = folder.component("unet", "config.json")
    scheduler_name = folder.component("scheduler", "scheduler_config.json")
    config_dict, scheduler_dict = folder.read_json(config_name), folder.read_json(scheduler_name)
    try:
        config = pixel_config(UNetConfig.from_dict(config_dict))
    except (ValueError, TypeError) as e:
        raise CheckpointError(f"{uri}/{config_name}: {e}") from e
    try:
        process = parse_scheduler(scheduler_dict)
    except (ValueError, TypeError) as e:
        raise CheckpointError(f"{uri}/{scheduler_name}: {e}") from e
    file, weights = folder.weights(config_name.removesuffix("config.json"), allow_pickle)
    weights = {_modern_name(k): v for k, v in weights.items()}
    check_weights(config, weights, f"{uri}/{file}")
    return UNet2D(config, weights, process)


def pixel_config(config: UNetConfig) -> UNetConfig:
    """The config itself. Raises ValueError where its channels are not those of a model of pixels."""
    if config.in_channels not in (1, 3) or config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise ValueError(
            f"{config.in_channels} in_channels and {config.out_channels} out_channels: a pixel model has 1 or 3"
            " channels, and as many outputs, or twice as many if it predicts the variance"
        )
    return config


def check_weights(config: UNetConfig, weights: Mapping[str, Tensor], where: str) -> None:
    """Raises CheckpointError, which begins with `where`, unless they are those of this network, and finite."""
    with torch.device("meta"):
        expected = {k: v.shape for k, v in UNet(config).state_dict().items()}
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or name not in expected or weights[name].shape != expected[name]:
            found = tuple(weights[name].shape) if name in weights else "nothing"
            wanted = tuple(expected[name]) if name in expected else "nothing"
            raise CheckpointError(f"{where}: {name} is {found}, and the config asks for {wanted}")
        if not weights[name].isfinite().all():
            raise CheckpointError(f"{where}: {name} holds values that are not finite (NaN or infinite)")


def _check_pipeline(folder: DiffusersFolder) -> None:
    """Raises CheckpointError where the network is a part of something that is no model of pixels."""
    if folder.exists(INDEX):
        index = folder.read_json(INDEX)
        name = index.get("_class_name")
        if name not in PIPELINES:
            raise CheckpointError(
                f"{folder.uri}/{INDEX}: _class_name is {name!r}, not a pipeline of a U-Net on pixels"
                f" ({', '.join(PIPELINES)})"
            )
        others = [part for part, of in index.items() if not part.startswith("_") and isinstance(of, list) and any(of)]
        if others := [part for part in others if part not in ("unet", "scheduler")]:
            raise CheckpointError(
                f"{folder.uri}/{INDEX}: the pipeline has a {others[0]}, which a model of pixels has not"
            )
    for part in AUTOENCODERS:
        if folder.exists(part):
            raise CheckpointError(f"{folder.uri} has a {part}: a latent diffusion model's U-Net is not for pixels")


def _modern_name(name: str) -> str:
    """Attention parameters as diffusers has named them since 0.18 (`query` -> `to_q`, …)."""
    if ".attentions." not in name:
        return name
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = re.sub(rf"\.{old}\.(weight|bias)$", rf".{new}.\1", name)
    return name


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
