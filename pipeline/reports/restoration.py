"""The report of a restore run: the errors beside those of the observations alone, and the first images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.metrics import to_pixels
from palindrome.pipeline.images.pixels import grid, pixels_of, png
from palindrome.pipeline.images.read import read_batches
from palindrome.pipeline.images.records import Image
from palindrome.pipeline.images.sources import Collection
from palindrome.pipeline.reports.page import put_page
from palindrome.pipeline.runs.kinds import IMAGES
from palindrome.pipeline.runs.plan import read_plan
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.restore import Degradation

SHOWN = 12  # images
MOST = 6  # results of each
WIDTH, MOST_WIDE = 96, 720  # CSS pixels of an image, and of a row


def put_report(
    run: Folder,
    facts: Mapping[str, str],
    summary: Mapping[str, Any],
    collection: Collection,
    how: Preprocess,
    degradation: Degradation,
) -> None:
    """Writes `images.png`, a row for each of the first images, and `report.html`. The images are read again, and those
    that are gone since are left out."""
    rows, sheet, width = _rows(run, collection, how, degradation), None, 0
    if rows:
        across = max(map(len, rows.values()))
        sheet, width = (
            grid([picture for row in rows.values() for picture in row], across),
            min(MOST_WIDE, WIDTH * across),
        )
        run.put("images.png", png(sheet))
    shown = {"columns": _columns(degradation), "ids": list(rows), "sheet": sheet, "width": width}
    put_page(run, "restoration.html", facts, summary=summary, **shown)


def _columns(degradation: Degradation) -> list[str]:
    """What the pictures of a row are, from left to right, but for the results."""
    alone = ["A⁺ y"] if degradation.factor else []  # else it is the observation
    return [*([] if degradation.degraded else ["original"]), "observation", *alone]


def _rows(
    run: Folder, collection: Collection, how: Preprocess, degradation: Degradation
) -> dict[str, list[np.ndarray]]:
    """The pictures of the first images, uint8 [H, W, C], by id."""
    rows: dict[str, list[np.ndarray]] = {}
    done = committed(run, IMAGES)
    for shard in read_plan(run):
        if shard.name not in done:
            continue
        results = _results(run, shard.name, SHOWN - len(rows))
        left = set(results)
        for batch in read_batches(collection, shard, how, 64):
            there = [image for image in batch.images if image.image_id in left]
            images, known, _ = degradation.usable(there)
            for image, before in zip(images, _before(degradation, images, known), strict=True):
                rows[image.image_id] = [*before, *results[image.image_id]]
            left -= {image.image_id for image in there}
            if not left:
                break
        if len(rows) >= SHOWN:
            break
    return rows


def _results(run: Folder, shard: str, most: int) -> dict[str, list[np.ndarray]]:
    """The results of the first images of a shard, by id, in the order of the variations."""
    found: dict[str, list[np.ndarray]] = {}
    with run.parquet_file(f"{IMAGES}/{shard}.parquet") as file:
        for batch in file.iter_batches(64, columns=["image_id", "variation", "image"]):
            for row in batch.to_pylist():
                if row["image_id"] not in found and len(found) == most:
                    return found
                if row["variation"] < MOST:
                    found.setdefault(row["image_id"], []).append(pixels_of(row["image"]["bytes"]))
    return found


def _before(
    degradation: Degradation, images: Sequence[Image], known: Sequence[np.ndarray | None]
) -> list[list[np.ndarray]]:
    """The pictures of each image that come before its results: what is not known of the observation is white."""
    if not images:
        return []
    x, y, operator = degradation.observed(images, known)
    alone, channels, side = to_pixels(operator.invert(y)), degradation.shape[0], degradation.shape[-1]
    rows = []
    for i, mask in enumerate(known):
        if mask is not None:
            observation = np.where(mask[:, :, None], alone[i], 255).astype(np.uint8)
        else:
            small = to_pixels(y[i : i + 1].expand(-1, channels, -1, -1))[0]
            observation = np.full((side, side, channels), 255, np.uint8)
            observation[: small.shape[0], : small.shape[1]] = small
        originals = [] if degradation.degraded else [to_pixels(x[i : i + 1])[0]]
        rows.append([*originals, observation, *([alone[i]] if degradation.factor else [])])
    return rows
