"""Latent diffusion: the folder of a diffusers pipeline, whose network denoises the states of an autoencoder.

diffusers' and transformers' own modules are the network, the autoencoder and the text encoders. They are imported where
a model is loaded, and no sooner.
"""

from collections.abc import Mapping

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


def family_of(folder: DiffusersFolder) -> type[Latent] | None:
    """The class of `PIPELINES` that reads the folder, if it is one of such a pipeline."""
    return PIPELINES.get(folder.read_json(INDEX).get("_class_name", "")) if folder.exists(INDEX) else None
