"""The components of a diffusers pipeline, as they are stored: they travel to workers, and become modules there."""

import hashlib
import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from palindrome.model.diffusers_folder import STEM, CheckpointError, DiffusersFolder, modern_name
from palindrome.model.families.base import check_weights

LIBRARIES = ("diffusers", "transformers")  # of the extra `latent`
NOT_OF_THE_MODEL = re.compile(r"_.*|.*dtype|transformers_version|architectures")  # keys that say who saved a config
TOKENIZER_FILES = re.compile(r".*\.(json|txt|model)")


@dataclass(frozen=True)
class Part:
    """A module: its class in one of LIBRARIES, its config, and its weights as stored."""

    library: str
    name: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]

    def described(self) -> list[Any]:
        """What is the same however it was saved, as JSON's types; without the weights."""
        config = {key: value for key, value in self.config.items() if not NOT_OF_THE_MODEL.fullmatch(key)}
        return [self.library, self.name, config]

    def made(self) -> nn.Module:
        """The module with other weights."""
        cls, config = imported(self.library, self.name), dict(self.config)
        module: nn.Module = (
            cls(cls.config_class.from_dict(config)) if self.library == "transformers" else cls.from_config(config)
        )
        return module

    def module(self, device: torch.device | str = "cpu") -> nn.Module:
        """In float32 on a device, in evaluation mode, without gradients."""
        module = self.made()
        module.load_state_dict({name: value.float() for name, value in self.weights.items()}, assign=True)
        if torch.device(device).type == "cpu":  # as families.base.placed says
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module.to(device).eval().requires_grad_(False)


@dataclass(frozen=True)
class Tokenizer:
    """A class of transformers, and its files by name."""

    name: str
    files: Mapping[str, bytes]

    def described(self) -> list[Any]:
        return [self.name, {name: hashlib.sha256(content).hexdigest() for name, content in sorted(self.files.items())}]

    def load(self) -> Any:
        with TemporaryDirectory() as folder:
            for name, content in self.files.items():
                Path(folder, name).write_bytes(content)
            return imported("transformers", self.name).from_pretrained(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' warnings of what is taken care of here."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    before = [(logging, logging.get_verbosity()) for logging in (of_diffusers, of_transformers)]
    for logging, _ in before:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        for logging, verbosity in before:
            logging.set_verbosity(verbosity)


def imported(library: str, name: str) -> Any:
    """A class of one of LIBRARIES."""
    with quiet():  # transformers warns of torchvision, which no part of these needs
        return getattr(import_module(library), name)


def check_installed() -> None:
    """Raises CheckpointError naming the extra, where a library of it is missing."""
    if missing := [library for library in LIBRARIES if find_spec(library) is None]:
        raise CheckpointError(
            f"a latent diffusion model needs {' and '.join(missing)}: pip install 'palindrome[latent]'"
        )


def read_part(folder: DiffusersFolder, part: str, library: str, name: str, allow_pickle: bool) -> Part:
    """Raises CheckpointError naming the file at fault."""
    config, of_texts = folder.read_json(f"{part}/config.json"), library == "transformers"
    file, weights = folder.weights(f"{part}/", allow_pickle and not of_texts, "model" if of_texts else STEM)
    found = Part(library, name, config, weights)
    if not of_texts and (key := _unknown(config, imported(library, name))):
        raise CheckpointError(
            f"{folder.uri}/{part}/config.json: unknown key {key!r}, of another {name} than diffusers'"
        )
    try:
        with torch.device("meta"):
            module = found.made()
    except (TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{folder.uri}/{part}/config.json: {e}") from e
    names = module.state_dict().keys()
    named = _text_names(weights, names) if of_texts else {modern_name(key): value for key, value in weights.items()}
    check_weights(lambda: module, named, f"{folder.uri}/{file}")
    return replace(found, weights=named)


def _unknown(config: Mapping[str, Any], cls: type) -> str | None:
    """A key that diffusers would pass over, though it may change what the module computes."""
    known = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    return next((k for k, v in config.items() if v is not None and not k.startswith("_") and k not in known), None)


def _text_names(weights: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Weights of a text encoder by the names of this version of transformers: CLIP's had a prefix until version 5, and
    positions beside the weights; what T5 uses twice is stored once."""
    prefix, found = "text_model.", dict[str, Tensor]()
    for name, value in weights.items():
        names = (name, name.removeprefix(prefix), f"{prefix}{name}")
        found[next((known for known in names if known in wanted), name)] = value
    for one, other in permutations(("shared.weight", "encoder.embed_tokens.weight")):
        if one in found and other in wanted:
            found.setdefault(other, found[one])
    return {name: value for name, value in found.items() if not name.endswith("position_ids")}


def read_tokenizer(folder: DiffusersFolder, part: str, name: str) -> Tokenizer:
    """Raises CheckpointError where it has no files."""
    names = [file for file in folder.names(f"{part}/") if TOKENIZER_FILES.fullmatch(file)]
    if not names:
        raise CheckpointError(f"{folder.uri} is no checkpoint folder: {part}/ is missing")
    return Tokenizer(name, {file: folder.read(f"{part}/{file}") for file in names})
