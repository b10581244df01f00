"""A checkpoint folder in one of diffusers' layouts, on any store: its JSON and its weights."""

import io
import json
import pickle
import re
from collections.abc import Mapping
from typing import Any

import fsspec
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

INDEX = "model_index.json"
STEM = "diffusion_pytorch_model"
LFS = b"version https://git-lfs.github.com/spec/"
WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+")  # of torch.compile and of DistributedDataParallel


class CheckpointError(ValueError):
    """A checkpoint that can't be used; the message names the file at fault."""


class DiffusersFolder:
    """A component is read from the folder of its name (`unet/config.json`), else from the root, as in Google's DDPM
    checkpoints. Methods raise CheckpointError naming the file, and OSError where the store can't be reached."""

    def __init__(self, uri: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.uri = uri
        self.fs, self.root = fsspec.url_to_fs(uri, **storage_options or {})

    def exists(self, name: str) -> bool:
        return bool(self.fs.exists(f"{self.root}/{name}"))

    def read(self, name: str) -> bytes:
        try:
            content = bytes(self.fs.cat_file(f"{self.root}/{name}"))
        except FileNotFoundError:
            raise CheckpointError(f"{self.uri} is no checkpoint folder: {name} is missing") from None
        except OSError as e:
            raise CheckpointError(f"{self.uri}/{name} can't be read: {e.strerror or e}") from e
        if content.startswith(LFS):
            raise CheckpointError(f"{self.uri}/{name} is a Git LFS pointer, not the file: run `git lfs pull` there")
        return content

    def read_json(self, name: str) -> dict[str, Any]:
        content = self.read(name)
        try:
            value = json.loads(content)
        except ValueError as e:
            raise CheckpointError(f"{self.uri}/{name} is not JSON: {e}") from e
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.uri}/{name} is not a JSON object")
        return value

    def component(self, folder: str, config: str) -> str:
        """The path of a component's config, in its folder or in the root."""
        nested = f"{folder}/{config}"
        return config if not self.exists(nested) and self.exists(config) else nested

    def weights(self, folder: str, allow_pickle: bool, stem: str = STEM) -> tuple[str, dict[str, Tensor]]:
        """The file that names them and the tensors by name, without the prefixes of wrappers. `folder` is "" for the
        root, else ends in a slash; `stem` is what the files' names begin with. In order: safetensors whole, or in parts
        with an index; the only variant there is, such as fp16; and with `allow_pickle` the same as pickles, from which
        torch reads nothing but tensors."""
        names = self.names(folder)
        endings = ("safetensors", "bin") if allow_pickle else ("safetensors",)
        found = [find(names, ending, stem) for find in (_default, _variants) for ending in endings]
        choice = next(filter(None, found), [])
        if len(choice) > 1:
            raise CheckpointError(
                f"{self.uri}/{folder} holds only variants of the weights: keep one of {', '.join(choice)}"
            )
        if not choice and (pickles := _default(names, "bin", stem) or _variants(names, "bin", stem)):
            raise CheckpointError(
                f"{self.uri} holds its weights as a pickle ({folder}{pickles[0]}), which can run code when loaded:"
                " save it as safetensors, or give --allow-pickle if you trust it"
            )
        name = choice[0] if choice else f"{stem}.safetensors"
        where = f"{folder}{name}"
        parts = [where]
        if where.endswith(".json"):
            try:
                parts = [f"{folder}{part}" for part in sorted(set(self.read_json(where)["weight_map"].values()))]
            except (KeyError, TypeError, AttributeError) as e:
                raise CheckpointError(f"{self.uri}/{where} is no index of weights: it has no weight_map") from e
        tensors: dict[str, Tensor] = {}
        for part in parts:
            tensors |= self.tensors(part)
        return where, {WRAPPERS.sub("", key): value for key, value in tensors.items()}

    def names(self, folder: str) -> list[str]:
        """Of the files in a folder, sorted; none where there is no folder."""
        try:
            paths = self.fs.ls(f"{self.root}/{folder}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors in a file of weights, by name."""
        if name.endswith(".bin"):
            return self.pickled(name)
        try:
            return dict(safetensors.torch.load(self.read(name)))
        except SafetensorError as e:
            raise CheckpointError(f"{self.uri}/{name} is not a safetensors file: {e}") from e

    def pickled(self, name: str) -> dict[str, Tensor]:
        """The tensors in a pickle, by name; nothing else is read from it."""
        content = self.read(name)
        try:
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            loaded = loaded.get("state_dict", loaded)
            if not all(isinstance(value, Tensor) for value in loaded.values()):
                raise TypeError("it holds other things than tensors by name")
        except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{self.uri}/{name} is no file of weights: {_first_line(e)}") from e
        return dict(loaded)


def modern_name(name: str) -> str:
    """Attention parameters as diffusers has named them since 0.18 (`query` -> `to_q`, …)."""
    if ".attentions." not in name:
        return name
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = re.sub(rf"\.{old}\.(weight|bias)$", rf".{new}.\1", name)
    return name


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _default(names: list[str], ending: str, stem: str) -> list[str]:
    """The file of weights that ends so, or the index of its parts."""
    return [name for name in (f"{stem}.{ending}", f"{stem}.{ending}.index.json") if name in names][:1]


def _variants(names: list[str], ending: str, stem: str) -> list[str]:
    """Those of variants, such as fp16."""
    named = re.compile(rf"{stem}\.[^.]+(?<!-of-\d{{5}})\.{ending}|{stem}\.{ending}\.index\.[^.]+\.json")
    return [name for name in names if named.fullmatch(name)]
