"""Models as a person names them: a folder, on any store, or a repository of the Hugging Face hub."""

import re
from importlib.util import find_spec
from pathlib import Path

from palindrome.model import families
from palindrome.model.families import Checkpoint, CheckpointError
from palindrome.pipeline.base.text import one_line
from palindrome.pipeline.storage.folder import absolute, options_for

HUB = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*?)(@(?P<revision>[\w./-]+))?")
# Not the files of the whole model that often lie beside a pipeline's folders.
WEIGHTS = ["*/*.safetensors", "diffusion_pytorch_model*.safetensors", "model.safetensors"]
FILES = ["*.json", *WEIGHTS, "*/merges.txt", "*/*.model"]


def load_model(named: str, allow_pickle: bool = False) -> tuple[str, Checkpoint]:
    """Where the model is, and the model. Raises CheckpointError, and OSError where a store can't be reached."""
    uri = locate(named, allow_pickle)
    return uri, families.load(uri, options_for(uri), allow_pickle)


def locate(named: str, allow_pickle: bool = False) -> str:
    """The URI of a model's folder. `org/name` or `org/name@revision`, where there is no such folder here and
    huggingface_hub is installed, is downloaded into that library's cache, or found there. Raises CheckpointError."""
    hub = HUB.fullmatch(named)
    if hub is None or Path(named).exists() or find_spec("huggingface_hub") is None:
        return absolute(named)
    from huggingface_hub import snapshot_download  # of an extra, and slow to import

    patterns = [*FILES, "*.bin"] if allow_pickle else FILES
    try:
        return absolute(snapshot_download(hub["repository"], revision=hub["revision"], allow_patterns=patterns))
    except Exception as e:  # the library's own errors, and those of its HTTP client
        what = f"{named} is no folder, and can't be had from the Hugging Face hub: {one_line(e)}"
        raise CheckpointError(what) from e
