"""The rows of a reconstruct run that its report shows, and their images."""

from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.pixels import pixels_of
from palindrome.pipeline.images.read import read_batches
from palindrome.pipeline.images.sources import Collection
from palindrome.pipeline.reports.reconstruction import Example, Series
from palindrome.pipeline.runs.kinds import RECONSTRUCTIONS
from palindrome.pipeline.runs.plan import read_plan
from palindrome.pipeline.runs.summary import split_by_status
from palindrome.pipeline.storage.folder import Folder

EXAMPLES = 12  # images under each heading


def series_at(rows: pa.Table, steps: int, nfe_up: float) -> Series:
    """The errors at a number of steps; `nfe_up` is the mean number of network evaluations for encoding."""
    compared, uncompared = split_by_status(rows, steps)
    identical = pc.mean(compared["identical"]).as_py() or 0.0
    return Series(steps, round(nfe_up + steps), compared["mse"].to_numpy(), identical, uncompared)


def choose_examples(
    run: Folder, latents: Folder, collection: Collection, how: Preprocess, rows: pa.Table, steps: int
) -> dict[str, list[Example]]:
    """Images at a number of steps, by heading: evenly spread over the collection, the best and the worst."""
    compared, _ = split_by_status(rows, steps)
    order = np.argsort(compared["mse"].to_numpy(), kind="stable")
    chosen = {
        "A sample of the collection": np.linspace(0, len(order) - 1, min(EXAMPLES, len(order))).astype(int),
        "Best": order[:EXAMPLES],
        "Worst": order[::-1][:EXAMPLES],
    }
    listed = {heading: compared.take(pa.array(indices)).to_pylist() for heading, indices in chosen.items()}
    shards: dict[str, set[str]] = defaultdict(set)
    for row in (row for group in listed.values() for row in group):
        shards[row["shard"]].add(row["image_id"])
    reconstructed = _reconstructed(run, shards, steps)
    originals = _originals(latents, collection, how, shards)
    return {
        heading: [
            Example(name, steps, row["mse"], row["psnr"], originals[name], reconstructed[name])
            for row in group
            if (name := row["image_id"]) in originals
        ]
        for heading, group in listed.items()
    }


def _reconstructed(run: Folder, shards: dict[str, set[str]], steps: int) -> dict[str, np.ndarray]:
    """Reconstructions, uint8 [H, W, C], by id; `shards` has the wanted ids of each shard."""
    pictures: dict[str, np.ndarray] = {}
    for name, wanted in shards.items():
        with run.parquet_file(f"{RECONSTRUCTIONS}/{name}.parquet") as file:
            for batch in file.iter_batches(256, columns=["image_id", "steps", "image"]):
                for row in batch.to_pylist():
                    if row["steps"] == steps and row["image_id"] in wanted:
                        pictures[row["image_id"]] = pixels_of(row["image"]["bytes"])
    return pictures


def _originals(
    latents: Folder, collection: Collection, how: Preprocess, shards: dict[str, set[str]]
) -> dict[str, np.ndarray]:
    """Originals, uint8 [H, W, C], by id, read again; without those that no longer exist."""
    pictures: dict[str, np.ndarray] = {}
    for shard in read_plan(latents):
        wanted = shards.get(shard.name, set())
        for batch in read_batches(collection, shard, how, 64) if wanted else ():
            pictures |= {image.image_id: image.pixels for image in batch.images if image.image_id in wanted}
            if wanted <= pictures.keys():
                break
    return pictures
