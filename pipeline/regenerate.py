"""Stored latents -> images: on one ladder or several, as they were or as variations. `images/<shard>.parquet`."""

import base64
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from model.schedule import Ladder
from pipeline.actors import noise_index
from pipeline.device import Model, stopwatch
from pipeline.generate import IMAGES
from pipeline.latents import ShardWriter, check_made, committed, read_latents
from pipeline.metrics import round_trip_error, to_pixels
from pipeline.page import page, scientific
from pipeline.pictures import grid, pixels_of, png
from pipeline.records import Shard
from pipeline.selection import Selection
from pipeline.storage import Folder
from pipeline.worker import Receipt

SHOWN = 12  # images in the report

REGENERATED_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("source", pa.string()),
        ("steps", pa.int32()),
        ("variation", pa.int32()),
        ("to_longest", pa.float64()),  # mean squared error to the same at the most steps, pixels in [0, 1]
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ]
)

TABLE = """<h2>How far each is from the longest</h2>
<div class="scroll" tabindex="0" role="region" aria-label="A row for each number of steps">
<table><thead><tr><th>steps<th>images<th>mean MSE<th>p99 MSE<th></tr></thead><tbody>
{rows}
</tbody></table></div>
<p class="quiet">Mean squared error per channel value to the image of the same latent at the most steps, pixels in
[0, 1].</p>"""


@dataclass(frozen=True)
class Regenerate:
    """`how` goes to model.ddim.sample: with eta above 0 or sigma-hat, each of the variations has its own noise."""

    run: Folder
    latents: Folder
    which: Selection
    ladders: tuple[Ladder, ...]
    variations: int
    seed: int
    how: Mapping[str, Any]
    batch_size: int
    metadata: Mapping[str, Any]

    def process(self, model: Model, shard: Shard) -> Receipt:
        spent = stopwatch(model)
        check_made(self.latents, shard.name)
        latents = images = 0
        with ShardWriter(self.run, IMAGES, shard.name, REGENERATED_SCHEMA, self.metadata, once=True) as out:
            for stored, x in read_latents(self.latents, shard.name, self.batch_size, self.which):
                for variation in range(self.variations):
                    for rows in self._decoded(model, stored, torch.from_numpy(x), variation):
                        out.add(pa.Table.from_pylist(rows, REGENERATED_SCHEMA))
                        images += len(rows)
                latents += len(stored)
                model.advance(len(stored))
            seconds = spent()
            written = out.commit(seconds, {"latents": latents, "images": images})
            return Receipt(shard.name, latents, 0, **seconds, bytes=written)

    def _decoded(
        self, model: Model, stored: Sequence[dict[str, Any]], x: Tensor, variation: int
    ) -> Iterator[list[dict[str, Any]]]:
        """Rows of one variation of a batch, ladder by ladder, the longest first."""
        indices = [noise_index(f"{variation}/{row['image_id']}") for row in stored]
        longest = None
        for levels in sorted(self.ladders, key=len, reverse=True):
            images = model.vary(x, levels, self.seed, indices, **self.how).clamp(-1, 1)  # as they are seen
            longest = images if longest is None else longest
            distances = round_trip_error(longest, images)
            yield [
                {
                    "image_id": row["image_id"],
                    "source": row["source"],
                    "steps": len(levels) - 1,
                    "variation": variation,
                    "to_longest": float(distance),
                    "image": {"bytes": png(pixels), "path": None},
                }
                for row, pixels, distance in zip(stored, to_pixels(images), distances, strict=True)
            ]


def consistency(run: Folder) -> list[dict[str, Any]]:
    """For each number of steps: images, mean and 99th percentile of `to_longest`."""
    nothing = REGENERATED_SCHEMA.empty_table().select(["steps", "to_longest"])
    tables = [run.read_parquet(f"{IMAGES}/{s}.parquet", nothing.column_names) for s in sorted(committed(run, IMAGES))]
    rows = pa.concat_tables([nothing, *(table.replace_schema_metadata() for table in tables)])
    found = []
    for steps in sorted(pc.unique(rows["steps"]).to_pylist()):
        distances = rows.filter(pc.equal(rows["steps"], steps))["to_longest"].to_numpy()
        about = {"steps": steps, "images": len(distances), "mean": float(distances.mean())}
        found.append({**about, "p99": float(np.quantile(distances, 0.99))})
    return found


def put_report(
    run: Folder, facts: Mapping[str, str], by_steps: Sequence[Mapping[str, Any]], shards: Iterable[str]
) -> None:
    """`images.png`, a row an image and a column for each number of steps or variation, and `report.html`, of the first
    images of those shards."""
    parts = []
    if pictures := _first(run, shards):
        sheet = png(grid([p for row in pictures.values() for p in row], len(next(iter(pictures.values())))))
        run.put("images.png", sheet)
        named = ", ".join(map(escape, pictures))
        parts.append(
            "<h2>The first images</h2><p>A row an image; from left to right: variations, and of each the numbers of"
            f' steps, rising.</p><img class="small" alt="The images" src="data:image/png;base64,'
            f'{base64.b64encode(sheet).decode()}" style="width: min(100%, 720px)"><p class="quiet">{named}</p>'
        )
    rows = "\n".join(
        f'<tr><th scope="row">{row["steps"]}</th><td>{row["images"]:,}<td>{scientific(row["mean"])}'
        f"<td>{scientific(row['p99'])}<td></tr>"
        for row in by_steps
    )
    if len(by_steps) > 1:
        parts.append(TABLE.format(rows=rows))
    run.put("report.html", page("Regenerated images", facts, parts).encode())


def _first(run: Folder, shards: Iterable[str]) -> dict[str, list[np.ndarray]]:
    """The pictures of the first ids, uint8 [H, W, C], by variation and steps."""
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
