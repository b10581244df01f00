"""Latent diffusion: the folder of a diffusers pipeline, whose network denoises the states of an autoencoder.

diffusers' and transformers' own modules are the network, the autoencoder and the text encoders. They are imported where
a model is loaded, and no sooner.
"""

from collections.abc import Mapping
from typing import Any

from palindrome.model.diffusers_folder import INDEX, DiffusersFolder
from palindrome.model.families.latent.base import Latent
from palindrome.model.families.latent.pipelines import (
    DiT,
    Flux,
    Ldm,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
)

PIPELINES: Mapping[str, type[Latent]] = {
    family.PIPELINE: family for family in (StableDiffusion, StableDiffusionXL, Ldm, DiT, StableDiffusion3, Flux)
}


def recognises(uri: str, storage_options: Mapping[str, Any] | None = None) -> bool:
    """Whether that is a folder of one of `PIPELINES`."""
    folder = DiffusersFolder(uri, storage_options)
    return folder.exists(INDEX) and folder.read_json(INDEX).get("_class_name") in PIPELINES


def load(uri: str, storage_options: Mapping[str, Any] | None = None, allow_pickle: bool = False) -> Latent:
    """Reads what the network, the autoencoder and the texts need of the folder. Raises CheckpointError for what is
    missing, unreadable, not of one of `PIPELINES`, or not known to be like it, and where palindrome[latent] is not
    installed."""
    folder = DiffusersFolder(uri, storage_options)
    return PIPELINES[folder.read_json(INDEX)["_class_name"]].load(folder, allow_pickle)
