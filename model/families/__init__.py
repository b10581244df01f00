"""Model families: each is one file, and one kind of Checkpoint."""

from collections.abc import Mapping
from typing import Any

from palindrome.model.diffusers_folder import DiffusersFolder
from palindrome.model.families import edm, latent, openai, unet2d
from palindrome.model.families.base import Checkpoint as Checkpoint
from palindrome.model.families.base import CheckpointError as CheckpointError
from palindrome.model.families.base import OfTexts as OfTexts


def load(uri: str, storage_options: Mapping[str, Any] | None = None, allow_pickle: bool = False) -> Checkpoint:
    """The model in a checkpoint folder, of a pixel model or a latent diffusion pipeline; in a file of OpenAI's (.pt,
    .pth); or in a folder or a file with a config of EDM's; a path or an fsspec URI. Raises CheckpointError for what is
    missing, unreadable, or of no family that is known. Weights that are pickles are read only with `allow_pickle`."""
    if uri.endswith(edm.PICKLES) or edm.recognises(uri, storage_options):
        return edm.load(uri, storage_options, allow_pickle)
    if uri.endswith(openai.ENDINGS):
        return openai.load(uri, storage_options, allow_pickle)
    folder = DiffusersFolder(uri, storage_options)
    if (pipeline := latent.family_of(folder)) is not None:
        return pipeline.load(folder, allow_pickle)
    return unet2d.load(uri, storage_options, allow_pickle)
