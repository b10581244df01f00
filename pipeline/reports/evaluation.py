"""The report of an evaluate run: its numbers, as a page and as CSV, and the pictures that are the furthest off."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from palindrome.pipeline.images.distances import Neighbours
from palindrome.pipeline.reports.comparison import read_originals
from palindrome.pipeline.reports.page import put_page
from palindrome.pipeline.reports.sweep import as_csv
from palindrome.pipeline.runs.kinds import FEATURES
from palindrome.pipeline.runs.moments import done
from palindrome.pipeline.runs.pictures import Pictures
from palindrome.pipeline.storage.folder import Folder

SHOWN = 12  # pictures under each heading
LARGEST = 192  # CSS pixels of a picture


@dataclass(frozen=True)
class Result:
    """One number: its name in files, in words, its value, and the standard deviation over parts or subsets."""

    metric: str
    named: str
    value: float
    spread: float | None


@dataclass(frozen=True)
class _Card:
    caption: str
    ids: tuple[str, ...]


def put_report(
    run: Folder,
    places: Mapping[str, str],
    of: Mapping[str, Any],
    results: Sequence[Result],
    rejects: Mapping[str, int],
    sets: Mapping[str, Pictures],
    near: tuple[Sequence[str], Sequence[str], Neighbours] | None,
) -> None:
    """Writes `table.csv` and `report.html`. `of` names the network, the resizing and the numbers of images; `near` has
    the ids of the real and the generated images, and their neighbours, where these were looked for."""
    rows = [{**vars(result), **of} for result in results]
    if rows:
        run.put("table.csv", as_csv(rows))
    headings = _nearest(near) if near else _by_entropy(run)
    pixels = _read(run, sets, {image_id for cards in headings.values() for card in cards for image_id in card.ids})
    shown = {
        heading: [
            {"caption": card.caption, "ids": card.ids, "pictures": [picture_of(pixels[i]) for i in card.ids]}
            for card in cards
            if all(image_id in pixels for image_id in card.ids)
        ]
        for heading, cards in headings.items()
    }
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in rejects.items())
    network = f"{of['features']} ({of['weights'][:16]}), resized {of['resize']}"
    facts = {**places, "features": network, "rejected": rejected or "none"}
    put_page(run, "evaluation.html", facts, results=results, of=of, headings=shown)


def _nearest(near: tuple[Sequence[str], Sequence[str], Neighbours]) -> dict[str, list[_Card]]:
    real, generated, found = near
    order = np.argsort(found.distance, kind="stable")

    def cards(rows: Iterable[int]) -> list[_Card]:
        return [
            _Card(f"{found.distance[i]:.4g} from its nearest", (generated[i], real[int(found.nearest[i])]))
            for i in rows
        ]

    return {
        "Furthest from all real images, each beside its nearest": cards(order[::-1][:SHOWN]),
        "Nearest to a real image, each beside it": cards(order[:SHOWN]),
    }


def _by_entropy(run: Folder) -> dict[str, list[_Card]]:
    """The generated images whose class is the least and the most certain; none without classes."""
    tables = [run.read_parquet(f"{FEATURES}/{s}.parquet", ["image_id", "entropy"]) for s in done(run, "generated")]
    rows = pa.concat_tables(table.replace_schema_metadata() for table in tables) if tables else None
    if rows is None or rows["entropy"].null_count == len(rows):
        return {}
    ids, entropy = rows["image_id"].to_pylist(), rows["entropy"].to_numpy()
    order = np.argsort(entropy, kind="stable")

    def cards(places: Iterable[int]) -> list[_Card]:
        return [_Card(f"entropy {entropy[i]:.4g} nats", (ids[i],)) for i in places]

    return {"Of the least certain class": cards(order[::-1][:SHOWN]), "Of the most certain class": cards(order[:SHOWN])}


def _read(run: Folder, sets: Mapping[str, Pictures], wanted: set[str]) -> dict[str, np.ndarray]:
    """Pictures, uint8 [H, W, C], by id, read again; without those that no longer exist."""
    found: dict[str, np.ndarray] = {}
    for which, pictures in sets.items() if wanted else ():
        found |= read_originals(run, pictures.collection, pictures.how, _shards_of(run, which, wanted))
    return found


def _shards_of(run: Folder, which: str, wanted: set[str]) -> dict[str, set[str]]:
    """Those of the wanted images that each shard of a set has."""
    ids = {s: run.read_parquet(f"{FEATURES}/{s}.parquet", ["image_id"])["image_id"] for s in done(run, which)}
    return {shard: wanted.intersection(column.to_pylist()) for shard, column in ids.items()}


def picture_of(pixels: np.ndarray) -> dict[str, Any]:
    """Small ones enlarged by an integer, large ones made smaller by leaving out pixels."""
    step = -(-max(pixels.shape[:2]) // (2 * LARGEST))
    pixels = pixels[::step, ::step]
    scale = min(max(1, round(96 / max(pixels.shape[:2]))), LARGEST / max(pixels.shape[:2]))
    return {"pixels": pixels, "width": max(1, round(scale * pixels.shape[1])), "small": scale >= 1}
