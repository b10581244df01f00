"""The report of a regenerate run: the first images, and the distance of each number of steps to the largest."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from palindrome.pipeline.images.pixels import grid, pixels_of, png
from palindrome.pipeline.reports.page import put_page
from palindrome.pipeline.runs.kinds import IMAGES
from palindrome.pipeline.storage.folder import Folder

SHOWN = 12  # images in the report


def put_report(
    run: Folder, facts: Mapping[str, str], by_steps: Sequence[Mapping[str, Any]], shards: Iterable[str]
) -> None:
    """Writes `images.png`, with one row per image and one column per number of steps or variation, and `report.html`,
    for the first images of the shards."""
    sheet = None
    if pictures := _first(run, shards):
        sheet = grid([p for row in pictures.values() for p in row], len(next(iter(pictures.values()))))
        run.put("images.png", png(sheet))
    put_page(run, "regeneration.html", facts, ids=list(pictures), sheet=sheet, rows=by_steps)


def _first(run: Folder, shards: Iterable[str]) -> dict[str, list[np.ndarray]]:
    """The images of the first ids, uint8 [H, W, C], sorted by variation and steps."""
    found: dict[str, dict[tuple[int, int], np.ndarray]] = defaultdict(dict)
    for shard in shards:
        with run.parquet_file(f"{IMAGES}/{shard}.parquet") as file:
            for batch in file.iter_batches(64):
                for row in batch.to_pylist():
                    if row["image_id"] in found or len(found) < SHOWN:
                        key = (row["variation"], row["steps"])
                        found[row["image_id"]][key] = pixels_of(row["image"]["bytes"])
        if len(found) >= SHOWN:
            break
    return {name: [pictures[key] for key in sorted(pictures)] for name, pictures in found.items()}
