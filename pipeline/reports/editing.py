"""The report of an edit run: how much changed outside of the masks, the errors, and the first images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from palindrome.pipeline.images.pixels import grid, pixels_of, png
from palindrome.pipeline.reports.comparison import read_originals
from palindrome.pipeline.reports.page import put_page
from palindrome.pipeline.reports.reconstruction import amplified_difference
from palindrome.pipeline.runs.encoded import EncodeRun
from palindrome.pipeline.runs.kinds import IMAGES
from palindrome.pipeline.runs.plan import read_plan
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.storage.folder import Folder

SHOWN = 12  # images
MOST = 6  # edits of each
WIDTH, MOST_WIDE = 96, 720  # CSS pixels of an image, and of a row
GAIN = 2  # of the difference


def put_report(
    run: Folder, facts: Mapping[str, str], summary: Mapping[str, Any], encoded: EncodeRun, strengths: Sequence[float]
) -> None:
    """Writes `images.png`, a row for each of the first images, and `report.html`. The originals are read again, and
    those that are gone since are white."""
    rows, sheet, width = _rows(run, encoded, strengths[:MOST]), None, 0
    if rows:
        across = max(map(len, rows.values()))
        sheet = grid([picture for row in rows.values() for picture in row], across)
        width = min(MOST_WIDE, WIDTH * across)
        run.put("images.png", png(sheet))
    shown = {"ids": list(rows), "sheet": sheet, "width": width, "gain": GAIN, "strengths": strengths[:MOST]}
    put_page(run, "editing.html", facts, summary=summary, **shown)


def _rows(run: Folder, encoded: EncodeRun, strengths: Sequence[float]) -> dict[str, list[np.ndarray]]:
    """By id, uint8 [H, W, C]: the original, what it decodes to itself, the edits, and what the last one changes."""
    edits: dict[str, dict[float, np.ndarray]] = {}
    own: dict[str, np.ndarray] = {}
    wanted: dict[str, set[str]] = {}
    done = committed(run, IMAGES)
    for shard in (shard for shard in read_plan(encoded.folder) if shard.name in done):
        for row in _first(run, shard.name, SHOWN - len(edits)):
            name = row["image_id"]
            edits.setdefault(name, {})[row["strength"]] = pixels_of(row["image"]["bytes"])
            if row["own"] is not None:
                own[name] = pixels_of(row["own"]["bytes"])
            if row["status"] == "compared":
                wanted.setdefault(shard.name, set()).add(name)
        if len(edits) >= SHOWN:
            break
    originals = read_originals(encoded.folder, encoded.collection, encoded.preprocess, wanted)
    rows = {}
    for name, made in edits.items():
        each = [made[strength] for strength in strengths]
        before = originals.get(name, own[name])
        shown = originals.get(name, np.full_like(before, 255))
        rows[name] = [shown, own[name], *each, amplified_difference(before, each[-1], GAIN)]
    return rows


def _first(run: Folder, shard: str, most: int) -> list[dict[str, Any]]:
    """The rows of the first images of a shard."""
    rows: list[dict[str, Any]] = []
    names: set[str] = set()
    with run.parquet_file(f"{IMAGES}/{shard}.parquet") as file:
        for batch in file.iter_batches(64, columns=["image_id", "strength", "status", "image", "own"]):
            for row in batch.to_pylist():
                if row["image_id"] not in names and len(names) == most:
                    return rows
                names.add(row["image_id"])
                rows.append(row)
    return rows
