"""palindrome convert: any model that Palindrome opens -> a checkpoint folder with safetensors."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from palindrome.jobs.arguments import ConfigError, Options, config_error
from palindrome.model.families import CheckpointError, unet2d
from palindrome.pipeline.base.text import size
from palindrome.pipeline.runs.models import load_model
from palindrome.pipeline.storage.folder import Folder, absolute, options_for


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Options):
    """Write a model as a checkpoint folder with safetensors. Runs made with either can be resumed with the other."""

    GROUP: ClassVar[str] = "model"
    EXAMPLES: ClassVar[str] = """
    palindrome convert --model 256x256_diffusion_uncond.pt --allow-pickle --out checkpoints/imagenet-256
    """

    model: str
    """The model: whatever --model of encode opens, such as a .pt file of OpenAI's; a path or an fsspec URI."""
    out: str
    """The folder to write, a path or an fsspec URI. diffusers opens it too, if its UNet2DModel has all that the network
    is made of."""
    allow_pickle: bool = False
    """Also load weights that are a pickle (.bin, .pt), as tensors alone: for checkpoints that you trust."""
    dry_run: bool = False
    """Check the model and the output, print what would be written, and exit."""


def run(config: ConvertConfig) -> int:
    """Writes the folder and returns the exit code."""
    with config_error("--model"):
        _, model = load_model(config.model, config.allow_pickle)
    if model.autoencoded:
        raise ConfigError("--model: a latent diffusion pipeline is a folder of safetensors already")
    if not isinstance(model, unet2d.UNet2D):
        raise ConfigError("--model: EDM's models are converted by the script in docs/models.md")
    out = Folder(absolute(config.out))
    with config_error("--out"):
        if not (_is_there(out, model) or config.dry_run):
            unet2d.save(model, out.uri, options_for(out.uri, out.storage_options))
    values, written = (sum(map(count, model.weights.values())) for count in (Tensor.numel, _bytes))
    print(f"checkpoint in {config.out}: {values:,} parameters, {size(written)}, digest {model.digest[:16]}")
    if others := model.config.beyond_diffusers:
        print(f"diffusers can't open it: its UNet2DModel has no {', '.join(others)}")
    if config.dry_run:
        print("dry run: nothing was done")
    return 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _is_there(out: Folder, model: unet2d.UNet2D) -> bool:
    """Whether the folder holds this very model. Raises ConfigError if it holds anything else."""
    names = {info["name"].rstrip("/").rpartition("/")[2] for info in out.infos("")}
    if names <= {"unet", "scheduler"}:  # nothing, or what a killed command left, as the index is written last
        return False
    try:
        if unet2d.load(out.uri, options_for(out.uri, out.storage_options)).digest == model.digest:
            return True
    except CheckpointError:
        pass
    raise ConfigError(f"--out: {out.uri} is not empty, and is not this model")
