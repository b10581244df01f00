"""Pixel models, also of classes: folders with a UNet2DModel in diffusers' layout, which opens ours as we open its.

unet/config.json, unet/diffusion_pytorch_model.safetensors, scheduler/scheduler_config.json, model_index.json

A network that UNet2DModel can't express has a folder of the same layout with other names, which diffusers refuses: it
would pass over the settings that it does not know.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import fsspec
import safetensors.torch
import torch
from torch import Tensor

from palindrome.model.ddim import Network
from palindrome.model.diffusers_folder import INDEX, STEM, DiffusersFolder, modern_name
from palindrome.model.engine import Engine
from palindrome.model.execution import FLOAT32, Execution
from palindrome.model.families.base import (
    CheckpointError,
    OfClasses,
    check_weights,
    digest_of,
    placed,
    refusal_of_number,
)
from palindrome.model.process import Process
from palindrome.model.scheduler_config import parse_scheduler, scheduler_config
from palindrome.model.unet import OWN, UNet, UNetConfig

WEIGHTS, OWN_WEIGHTS = f"unet/{STEM}.safetensors", "unet/palindrome.safetensors"
CONFIG = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
NULL_CLASS = "_null_class"  # a key of CONFIG
OWN_PIPELINE = "PalindromePipeline"
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "RePaintPipeline")  # of a U-Net on pixels
AUTOENCODERS = ("vae", "vqvae", "movq")  # folders of a latent diffusion model


@dataclass(frozen=True)
class UNet2D(OfClasses):
    """A network's configuration, its weights as stored, and the process it was trained on.

    `weights` maps diffusers' parameter names to tensors of the stored dtype. A network with twice as many outputs as
    inputs predicts the variance too (Nichol & Dhariwal, section 3.1), by the second half, which DDIM has no use for.
    """

    config: UNetConfig
    weights: Mapping[str, Tensor]
    process: Process

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.config.in_channels, self.config.sample_size, self.config.sample_size

    @cached_property
    def digest(self) -> str:
        # The clean end is a matter of the path that is walked, and recorded with the run: not of the model.
        return digest_of([self.config.to_dict(), scheduler_config(self.process.as_described({}))], self.weights)

    def network(self, device: torch.device | str = "cpu") -> UNet:
        """The network, as `placed` on a device."""
        channels = self.config.in_channels
        net = UNet(dataclasses.replace(self.config, out_channels=channels))
        mean = {name: value[:channels] for name, value in self.weights.items() if name.startswith("conv_out.")}
        net.load_state_dict({**self.weights, **mean})
        return placed(net, device)

    def denoiser(self, device: torch.device | str = "cpu", execution: Execution = FLOAT32) -> Network:
        """Raises as Engine does."""
        return Engine(self.network(device), execution)

    @property
    def class_conditional(self) -> bool:
        return self.config.class_conditional

    def refusal_of(self, value: Any) -> str:
        if self.config.class_embed_type == "identity":
            return "" if isinstance(value, Sequence) else f"the class is {value!r}, not an embedding"
        return refusal_of_number(value, self.config.num_class_embeds if self.config.class_embed_type is None else None)

    @property
    def class_dtype(self) -> torch.dtype:
        """float32 for the class embedding `identity`, whose classes are embeddings [B, E]."""
        return torch.float32 if self.config.class_embed_type == "identity" else torch.int64

    def with_process(self, process: Process) -> Self:
        return dataclasses.replace(self, process=process)


def save(checkpoint: UNet2D, uri: str, storage_options: Mapping[str, Any] | None = None) -> None:
    """Writes the folder, `model_index.json`, by which readers know one, last. The weights keep their dtype."""
    own = bool(checkpoint.config.beyond_diffusers)
    fs, root = fsspec.url_to_fs(uri, **storage_options or {})
    weights = {k: v.detach().cpu().contiguous() for k, v in checkpoint.weights.items()}
    # diffusers passes over keys that begin with an underscore.
    null_class = {} if checkpoint.null_class is None else {NULL_CLASS: checkpoint.null_class}
    unet = {**checkpoint.config.to_dict(), **null_class, **({"_class_name": OWN} if own else {})}
    index = {
        "_class_name": OWN_PIPELINE if own else "DDIMPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["palindrome" if own else "diffusers", unet["_class_name"]],
    }
    files = {
        OWN_WEIGHTS if own else WEIGHTS: safetensors.torch.save(weights, metadata={"format": "pt"}),
        CONFIG: _json(unet),
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
    if config_dict.get("_class_name") == OWN:
        file, weights = OWN_WEIGHTS, folder.tensors(OWN_WEIGHTS)
    else:
        file, weights = folder.weights(config_name.removesuffix("config.json"), allow_pickle)
    weights = {modern_name(k): v for k, v in weights.items()}
    check_weights(lambda: UNet(config), weights, f"{uri}/{file}")
    return UNet2D(config, weights, process, null_class=_null_class(config_dict, f"{uri}/{config_name}"))


def _null_class(config: Mapping[str, Any], where: str) -> int | None:
    """The class that stands for none, which `save` writes. Raises CheckpointError if it is no number of a class."""
    found, known = config.get(NULL_CLASS), config.get("num_class_embeds")
    if found is None or (type(found) is int and isinstance(known, int) and 0 <= found < known):
        return found
    raise CheckpointError(f"{where}: {NULL_CLASS} is {found!r}, and num_class_embeds {known!r}")


def pixel_config(config: UNetConfig) -> UNetConfig:
    """The config itself. Raises ValueError where its channels are not those of a model of pixels."""
    if config.in_channels not in (1, 3) or config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise ValueError(
            f"{config.in_channels} in_channels and {config.out_channels} out_channels: a pixel model has 1 or 3"
            " channels, and as many outputs, or twice as many if it predicts the variance"
        )
    return config


def _check_pipeline(folder: DiffusersFolder) -> None:
    """Raises CheckpointError where the network is a part of something that is no model of pixels."""
    if folder.exists(INDEX):
        index = folder.read_json(INDEX)
        name = index.get("_class_name")
        if name not in (*PIPELINES, OWN_PIPELINE):
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


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
