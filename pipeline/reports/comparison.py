"""The rows of a reconstruct run that its report shows, and their images."""

from collections import defaultdict

import numpy as np

from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.metrics import psnr
from palindrome.pipeline.images.pixels import pixels_of
from palindrome.pipeline.images.read import read_batches
from palindrome.pipeline.images.sources import Collection
from palindrome.pipeline.reports.reconstruction import Example, Series
from palindrome.pipeline.runs.errors import Errors
from palindrome.pipeline.runs.kinds import RECONSTRUCTIONS
from palindrome.pipeline.runs.plan import read_plan
from palindrome.pipeline.storage.folder import Folder

EXAMPLES = 12  # images under each heading, at most those that Errors names


def series_at(errors: Errors, steps: int, nfe_up: float) -> Series:
    """The errors at a number of steps; `nfe_up` is the mean number of network evaluations for encoding."""
    uncompared = dict(sorted(errors.uncompared.items()))
    return Series(steps, round(nfe_up + steps), errors, errors.mean("identical") or 0.0, uncompared)


def choose_examples(
    run: Folder, latents: Folder, collection: Collection, how: Preprocess, errors: Errors, steps: int
) -> dict[str, list[Example]]:
    """Images at a number of steps, by heading: drawn from the collection, the best and the worst."""
    drawn = sorted(errors.sample, key=lambda image: (image.shard, image.row))
    chosen = {"A sample of the collection": drawn, "Best": errors.best, "Worst": errors.worst}
    listed = {heading: images[:EXAMPLES] for heading, images in chosen.items()}
    shards: dict[str, set[str]] = defaultdict(set)
    for image in (image for group in listed.values() for image in group):
        shards[image.shard].add(image.image_id)
    reconstructed, vae = _reconstructed(run, shards, steps)
    originals = read_originals(latents, collection, how, shards)
    return {
        heading: [
            Example(name, steps, image.error, psnr(image.error), originals[name], reconstructed[name], vae.get(name))
            for image in group
            if (name := image.image_id) in originals
        ]
        for heading, group in listed.items()
    }


def _reconstructed(
    run: Folder, shards: dict[str, set[str]], steps: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Reconstructions, and what an autoencoder makes of the originals, if there is one: uint8 [H, W, C] by id; `shards`
    has the wanted ids of each shard."""
    pictures: dict[str, np.ndarray] = {}
    vae: dict[str, np.ndarray] = {}
    for name, wanted in shards.items():
        with run.parquet_file(f"{RECONSTRUCTIONS}/{name}.parquet") as file:
            columns = [c for c in ("image_id", "steps", "image", "vae_image") if c in file.schema_arrow.names]
            for batch in file.iter_batches(256, columns=columns):
                for row in batch.to_pylist():
                    if row["steps"] == steps and row["image_id"] in wanted:
                        pictures[row["image_id"]] = pixels_of(row["image"]["bytes"])
                        if row.get("vae_image"):
                            vae[row["image_id"]] = pixels_of(row["vae_image"]["bytes"])
    return pictures, vae


def read_originals(
    planned: Folder, collection: Collection, how: Preprocess, shards: dict[str, set[str]]
) -> dict[str, np.ndarray]:
    """Originals, uint8 [H, W, C], by id, read again; without those that no longer exist. `planned` is the run whose
    plan has them, and `shards` the wanted ids of each shard."""
    pictures: dict[str, np.ndarray] = {}
    for shard in read_plan(planned):
        wanted = shards.get(shard.name, set())
        for batch in read_batches(collection, shard, how, 64) if wanted else ():
            pictures |= {image.image_id: image.pixels for image in batch.images if image.image_id in wanted}
            if wanted <= pictures.keys():
                break
    return pictures
