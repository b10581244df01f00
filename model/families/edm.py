"""The pixel models of EDM (Karras et al., arXiv 2206.00364): state dicts of NVlabs/edm's networks, beside which a JSON
object has the arguments that they were constructed with.

A folder with config.json and model.safetensors, or x.json beside x.safetensors or x.pt. NVIDIA's own files are pickles
of code, and not read: docs/models.md has a script that converts one.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from palindrome.model.ddim import Network
from palindrome.model.diffusers_folder import WRAPPERS, DiffusersFolder
from palindrome.model.edm_unet import NO_CLASS, EDMUNet, EDMUNetConfig, filter_of
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
from palindrome.model.process import EDM, Process, SongVE, SongVP

ENDINGS = (".safetensors", ".pt", ".pth")
PICKLES = (".pkl", ".pickle")  # as NVIDIA names them
CONVERT = "convert it once to safetensors, in a checkout of NVlabs/edm: docs/models.md has the script"
SAVES_CODE = b"torch_utils.persistence"  # in NVIDIA's pickles
# Of the noise levels of EDM's sampler, where the network does not say less.
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
PRECONDITIONING: dict[str, dict[str, float]] = {
    "EDMPrecond": {"sigma_min": 0.0, "sigma_max": math.inf, "sigma_data": 0.5},
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5},
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100.0},
}
"""By `class_name`, the keys that are not the network's, with their defaults."""
WITHOUT_EFFECT = {"use_fp16", "dropout", "label_dropout"}  # precision is --precision, the others are of training


@dataclass(frozen=True)
class EDMModel(OfClasses):
    """A network's configuration, its weights as stored, and how it is preconditioned, which is its process.

    `weights` maps the names of `EDMUNet`'s state dict to tensors of the stored dtype. No class is the label of zeros,
    which guidance needs the network to have been trained with (`label_dropout`).
    """

    config: EDMUNetConfig
    weights: Mapping[str, Tensor]
    process: Process
    null_class: int | None = field(default=NO_CLASS, kw_only=True)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.config.img_channels, self.config.img_resolution, self.config.img_resolution

    @cached_property
    def digest(self) -> str:
        return digest_of([self.config.to_dict(), self.process.describe()], self.weights)

    def network(self, device: torch.device | str = "cpu") -> EDMUNet:
        """The network, as `placed` on a device."""
        net = EDMUNet(self.config)
        net.load_state_dict(self.weights)
        return placed(net, device)

    def denoiser(self, device: torch.device | str = "cpu", execution: Execution = FLOAT32) -> Network:
        """Raises as Engine does."""
        return Engine(self.network(device), execution)

    @property
    def class_conditional(self) -> bool:
        return self.config.label_dim > 0

    def refusal_of(self, value: Any) -> str:
        return refusal_of_number(value, self.config.label_dim)

    def with_process(self, process: Process) -> Self:
        return dataclasses.replace(self, process=process)


def recognises(uri: str, storage_options: Mapping[str, Any] | None = None) -> bool:
    """Whether a folder, or a file of weights, has a config of EDM's. Raises CheckpointError where it is not JSON."""
    if uri.endswith(".safetensors"):  # no other family has its weights in one such file
        return True
    folder, config, _ = _files(uri, storage_options)
    return folder.exists(config) and not {"img_resolution", "model_type"}.isdisjoint(folder.read_json(config))


def load(uri: str, storage_options: Mapping[str, Any] | None = None, allow_pickle: bool = False) -> EDMModel:
    """Reads a folder, or a file and the config beside it; a state dict in a pickle (.pt) with `allow_pickle` only, and
    as tensors alone. Raises CheckpointError for what is missing, unreadable, or of another architecture."""
    if uri.endswith(PICKLES):
        raise CheckpointError(f"{uri} is a pickle, which runs the code in it when loaded: {CONVERT}")
    folder, config_name, weights_name = _files(uri, storage_options)
    file = f"{folder.uri}/{weights_name}"
    if not folder.exists(weights_name):
        raise CheckpointError(f"{file} does not exist")
    if not folder.exists(config_name):
        raise CheckpointError(
            f"{file}: tensors do not say all of a model. Put {config_name} beside it, a JSON object with the arguments"
            " that EDM's network was constructed with (docs/models.md)"
        )
    found = folder.read_json(config_name)
    try:
        config, process = _parsed(found)
        with torch.device("meta"):
            EDMUNet(config)  # whose channels may not divide into groups and heads
    except (ValueError, TypeError) as e:
        raise CheckpointError(f"{folder.uri}/{config_name}: {e}") from e
    weights = _weights(folder, weights_name, allow_pickle)
    check_weights(lambda: EDMUNet(config), weights, file)
    for name, value in weights.items():
        if name.endswith("resample_filter") and not torch.allclose(value.float(), filter_of(config)):
            raise CheckpointError(f"{file}: {name} is not the config's {list(config.resample_filter)}")
    return EDMModel(config, weights, process)


def _files(uri: str, storage_options: Mapping[str, Any] | None) -> tuple[DiffusersFolder, str, str]:
    """The folder, and in it the names of the config and of the weights."""
    if not uri.endswith(ENDINGS):
        return DiffusersFolder(uri, storage_options), "config.json", "model.safetensors"
    parent, _, name = uri.rpartition("/")
    return DiffusersFolder(parent or ".", storage_options), f"{name.rpartition('.')[0]}.json", name


def _weights(folder: DiffusersFolder, name: str, allow_pickle: bool) -> dict[str, Tensor]:
    """By the network's names, without the prefix that the preconditioning's class gives them."""
    if name.endswith(".safetensors"):
        tensors = folder.tensors(name)
    elif not allow_pickle:
        raise CheckpointError(
            f"{folder.uri}/{name} is a pickle, which can run code when loaded: give --allow-pickle if you trust it, and"
            " torch reads nothing but tensors from it"
        )
    else:
        try:
            tensors = folder.pickled(name)
        except CheckpointError as e:
            if SAVES_CODE in folder.read(name):
                raise CheckpointError(
                    f"{folder.uri}/{name} holds code next to tensors, as NVIDIA's do: {CONVERT}"
                ) from e
            raise
    return {WRAPPERS.sub("", key).removeprefix("model."): value for key, value in tensors.items()}


def _parsed(found: Mapping[str, Any]) -> tuple[EDMUNetConfig, Process]:
    """Raises ValueError naming a key that is missing, is not known, or has a value that is not supported."""
    kind = found.get("class_name")
    if kind is None:
        raise ValueError(f"class_name is missing, which says how the network is preconditioned: {_KINDS}")
    kind = str(kind).rpartition(".")[2]  # training.networks.EDMPrecond
    if kind not in PRECONDITIONING:
        raise ValueError(f"class_name is {found['class_name']!r}; known: {_KINDS}")
    own = {key: found.get(key, default) for key, default in PRECONDITIONING[kind].items()}
    for key, value in own.items():
        if type(value) not in (int, float) or value != value or value < 0:
            raise ValueError(f"{key} is {value!r}, not a number of at least 0")
    network = {key: value for key, value in found.items() if key not in own and key not in WITHOUT_EFFECT}
    network.pop("class_name")
    config = EDMUNetConfig.from_dict({"model_type": "DhariwalUNet", **network})
    if config.img_channels not in (1, 3):
        raise ValueError(f"img_channels is {config.img_channels}: a pixel model has 1 or 3")
    return config, _process(kind, own)


_KINDS = ", ".join(PRECONDITIONING)


def _process(kind: str, own: Mapping[str, float]) -> Process:
    """Raises ValueError where the noise levels are none."""
    if kind == "VPPrecond":
        beta_d, beta_min, steps = own["beta_d"], own["beta_min"], own["M"]
        if type(steps) is not int:
            raise ValueError(f"M is {steps!r}, not a whole number")
        ends = (math.sqrt(math.expm1(beta_d * t**2 / 2 + beta_min * t)) for t in (own["epsilon_t"], 1))
        sigma_min, sigma_max = _limited(*ends)
        return SongVP(sigma_min=sigma_min, sigma_max=sigma_max, beta_d=beta_d, beta_min=beta_min, M=steps)
    sigma_min, sigma_max = _limited(own["sigma_min"], own["sigma_max"])
    if kind == "VEPrecond":
        return SongVE(sigma_min=sigma_min, sigma_max=sigma_max)
    return EDM(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=own["sigma_data"])


def _limited(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """To the noise levels of EDM's sampler, as there."""
    return max(SIGMA_MIN, sigma_min), min(SIGMA_MAX, sigma_max)
