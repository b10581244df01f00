"""palindrome calibrate: fit a ladder to a model and write it to a file for --ladder."""

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch

from palindrome.jobs.arguments import ConfigError, Range, config_error
from palindrome.jobs.config import (
    CollectionOptions,
    ComputeConfig,
    ConditionOptions,
    LatentEncodingOptions,
    PictureOptions,
    Planned,
    open_model,
)
from palindrome.jobs.estimate import executor_of
from palindrome.model.families import Checkpoint
from palindrome.model.fit import candidates, fit_ladder
from palindrome.model.inversion import evaluations
from palindrome.model.ladder import Ladder, default_top
from palindrome.pipeline.base.log import note
from palindrome.pipeline.images.metrics import round_trip_error, statistics, to_model
from palindrome.pipeline.images.read import first_images
from palindrome.pipeline.images.sources import open_collection
from palindrome.pipeline.runs.ladders import KINDS, ladder_of_kind
from palindrome.pipeline.runtime.device import Model, tune_process
from palindrome.pipeline.storage.folder import absolute, file_at

BATCH = 64  # images on the device at once


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(CollectionOptions, PictureOptions, LatentEncodingOptions, ConditionOptions, ComputeConfig):
    """Fit a ladder to some images of a collection: the levels with the least round-trip error for a number of steps."""

    GROUP: ClassVar[str] = "inversion"
    EXAMPLES: ClassVar[str] = """
    palindrome calibrate --images photos/ --model checkpoints/cifar10-32 --steps 10 --out ladder.json
    palindrome encode --images photos/ --model checkpoints/cifar10-32 --ladder ladder.json --out runs/photos
    """

    OUT_IS_FILE: ClassVar[bool] = True

    out: str
    """The ladder file to write, JSON; a path or an fsspec URI that ends in .json."""
    model: str
    """The checkpoint: a folder in diffusers' layout, also of a latent diffusion pipeline, or with EDM's config, or a
    .pt file of OpenAI's, a path or an fsspec URI; or a Hugging Face repository, ORG/NAME or ORG/NAME@REVISION, if
    huggingface_hub is installed."""
    steps: Annotated[int, Range(1)]
    """The number of steps of the ladder."""
    corrections: Annotated[int, Range(0, 100)] = 3
    """The corrections per step with which the ladder will be used."""
    top: Annotated[int, Range(0)] | None = None
    """The highest timestep (default: where the log-SNR is -6.5, or the last one). A lower one leaves more of the image
    in the latent."""
    limit: Annotated[int, Range(1)] = 32
    """The number of images to calibrate on, from the first one that can be decoded."""


def run(config: CalibrateConfig) -> int:
    """Writes the ladder and returns the exit code."""
    if not config.out.endswith(".json"):
        raise ConfigError(f"--out: {config.out} does not end in .json, by which --ladder recognises a ladder file")
    _, model, how = open_model(config)
    process = model.process
    top = default_top(process, config.steps) if config.top is None else config.top
    with config_error("--steps" if config.top is None else "--top"):
        fine = candidates(process, config.steps, top)
        ladders = {kind: ladder_of_kind(kind, config.steps, process, top) for kind in KINDS}
    with config_error("--images"):
        collection = open_collection(absolute(config.images), **config.reading())
        pixels = first_images(collection, how, config.limit)
    if config.dry_run:
        each = len(fine) - 1 + (len(ladders) + 1) * (evaluations(config.steps, config.corrections) + config.steps)
        print(
            f"{len(pixels):,} images can be decoded; {len(ladders) + 1} ladders of {config.steps} steps:"
            f" {', '.join(ladders)}, and one fitted on {len(fine) - 1} levels; {each:,} network evaluations"
            f" an image, {each * len(pixels):,} in all; one file of some kB to write"
        )
        raise Planned
    with executor_of(config) as executor:
        resources = executor.choose_resources([1], "actor", None, {})
        errors = executor.call(resources, _calibrate, model, pixels, fine, ladders, config, resources.threads)
    ranked = sorted(errors, key=lambda kind: np.nan_to_num(errors[kind]["mean"], nan=np.inf))
    best = ranked[0]
    for kind in ranked:
        figures = errors[kind]
        print(f"{kind:>10}: round-trip error {figures['mean']:.3g}, p99 {figures['p99']:.3g}")
    content: dict[str, Any] = {
        "levels": errors[best]["levels"],
        "kind": best,
        "model_digest": model.digest,
        "corrections": config.corrections,
        "nfe": [evaluations(config.steps, config.corrections), config.steps],
        "images": len(pixels),
        "round_trip": errors,
        "preprocess": how.record(),
    }
    with config_error("--out"):
        folder, name = file_at(config.out)
        folder.put(name, (json.dumps(content, indent=2) + "\n").encode())
    note(summary={name: content[name] for name in ("kind", "nfe", "images", "round_trip")})
    print(f"{best} ladder, calibrated on {len(pixels)} images, in {config.out}")
    return 0


def _calibrate(
    checkpoint: Checkpoint,
    pixels: np.ndarray,
    fine: Ladder,
    ladders: dict[str, Ladder],
    config: CalibrateConfig,
    threads: int | None,
) -> dict[str, dict[str, Any]]:
    """By ladder, including the fitted one: its levels and the round trip's statistics on the images."""
    model, x = Model(checkpoint, threads), to_model(pixels)
    tune_process(model)
    parts = [(part, model.condition_of_all(len(part))) for part in x.split(BATCH)]
    products = torch.cat([model.epsilon_products(part, fine, condition) for part, condition in parts]).mean(0).numpy()
    fitted = fit_ladder(products, fine, checkpoint.process, config.steps, config.corrections)
    found: dict[str, dict[str, Any]] = {}
    attainable = [model.attainable(part) for part, _ in parts]
    for kind, levels in {**ladders, "fitted": fitted}.items():
        errors = []
        for (part, condition), wanted in zip(parts, attainable, strict=True):
            latents, *_ = model.encode(part, levels, config.corrections, condition=condition)
            errors.append(round_trip_error(wanted, model.decode(latents, levels, condition)))
        found[kind] = {"levels": list(levels), **statistics(np.concatenate(errors))}
    return found
