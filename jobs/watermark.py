"""palindrome watermark: keys, for `generate` to put into its noise and for `score` to find in images."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from palindrome.jobs.arguments import ConfigError, Range, config_error, flag_of
from palindrome.jobs.config import LatentOptions, OutOptions, Planned
from palindrome.model.watermarks import KINDS, TreeRing, Watermark
from palindrome.pipeline.runs.models import load_model
from palindrome.pipeline.runs.watermarks import new_keys, write_keys
from palindrome.pipeline.storage.folder import file_at


@dataclass(frozen=True, kw_only=True)
class WatermarkConfig(LatentOptions, OutOptions):
    """Write a file of watermark keys for the latents of a model.

    `generate --watermark` puts them into the noise that it starts from, and `score --keys` finds them in images. Who
    has the file can do both."""

    GROUP: ClassVar[str] = "watermark"
    EXAMPLES: ClassVar[str] = """
    palindrome watermark --model MODEL --method tree-ring --count 20 --out keys.json
    palindrome generate --model MODEL --watermark keys.json --count 1000 --out runs/marked
    palindrome score --images photos/ --model MODEL --method tree-ring --keys keys.json --out runs/found
    """

    OUT_IS_FILE: ClassVar[bool] = True

    out: str
    """The file to write, JSON; a path or an fsspec URI. A file that is there is never overwritten."""
    model: str
    """The checkpoint that generates: a folder in diffusers' layout, also of a latent diffusion pipeline, or with EDM's
    config, or a .pt file of OpenAI's, a path or an fsspec URI; or a Hugging Face repository, ORG/NAME or
    ORG/NAME@REVISION, if huggingface_hub is installed."""
    allow_pickle: bool = False
    """Also load weights that are a pickle (.bin, .pt), as tensors alone: for checkpoints that you trust."""
    method: Literal["tree-ring", "gaussian-shading"]
    """tree-ring: a pattern in the low frequencies of the noise. gaussian-shading: the signs of the noise, the same ones
    in all images of a key."""
    count: Annotated[int, Range(1)] = 1
    """The number of keys, named key-0 and so on."""
    names: tuple[str, ...] = ()
    """The names of the keys, instead of --count."""
    seed: Annotated[int, Range(0)] | None = None
    """Derive the secrets from this number, so that the same command gives the same keys: for experiments, as who
    guesses it has the keys (default: the system's randomness)."""
    pattern: Literal["rand", "ring"] | None = None
    """The pattern of tree-ring: rand has a value a frequency; ring one a ring, which rotations leave: few
    numbers, whose p-values stay larger (default: rand)."""
    radius: Annotated[int, Range(1)] | None = None
    """The radius of tree-ring's pattern, in frequencies, below half the side of the latents (default: 10)."""
    channels: tuple[int, ...] = ()
    """The channels of tree-ring's pattern, from 0 on; -1 is the last one (default: the last one)."""
    copies: Annotated[int, Range(1)] | None = None
    """How often gaussian-shading repeats each bit of its message, along the rows and along the columns (default: 8)."""
    channel_copies: Annotated[int, Range(1)] | None = None
    """And along the channels (default: 1)."""


def run(config: WatermarkConfig) -> int:
    """Writes the file and returns the exit code."""
    names = config.names or tuple(f"key-{i}" for i in range(config.count))
    if len(set(names)) != len(names):
        raise ConfigError("--names: a name is given twice")
    if config.names and config.count != 1:
        raise ConfigError("--names: can't be combined with --count")
    with config_error("--model"):
        _, model = load_model(config.model, config.allow_pickle)
    watermark = _watermark(config, config.fitted(model).latent_shape)
    with config_error("--out"):
        folder, name = file_at(config.out)
        if folder.exists(name):
            raise ConfigError(f"--out: {config.out} exists, and its keys would be lost")
    sides = " x ".join(map(str, watermark.shape))
    keys = f"{len(names)} keys of {watermark.METHOD} for latents of {sides}"
    if config.dry_run:
        print(f"{keys}; one file of some kB to write")
        raise Planned
    with config_error("--out"):
        write_keys(new_keys(watermark, names, config.seed), config.out)
    print(f"{keys} in {config.out}")
    return 0


def _watermark(config: WatermarkConfig, shape: tuple[int, ...]) -> Watermark:
    """Raises ConfigError for options of the other method, and what the latents have no room for."""
    of_rings: dict[str, Any] = {"pattern": config.pattern, "radius": config.radius, "channels": config.channels or None}
    of_shading: dict[str, Any] = {"copies": config.copies, "channel_copies": config.channel_copies}
    is_ring = config.method == TreeRing.METHOD
    for name, value in (of_shading if is_ring else of_rings).items():
        if value is not None:
            raise ConfigError(f"{flag_of(name)}: {config.method} has none")
    channels, height, width = shape
    given = {name: value for name, value in (of_rings if is_ring else of_shading).items() if value is not None}
    with config_error(flag_of(next(iter(given), "model"))):
        return KINDS[config.method]((channels, height, width), **given)
