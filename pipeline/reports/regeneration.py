"""The report of a regeneration: the first images, a row each, and how far each number of steps is from the longest."""

import base64
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from palindrome.pipeline.images.pixels import grid, pixels_of, png
from palindrome.pipeline.reports.page import page, scientific
from palindrome.pipeline.runs.kinds import IMAGES
from palindrome.pipeline.storage.folder import Folder

SHOWN = 12  # images in the report
TABLE = """<h2>How far each is from the longest</h2>
<div class="scroll" tabindex="0" role="region" aria-label="A row for each number of steps">
<table><thead><tr><th>steps<th>images<th>mean MSE<th>p99 MSE<th></tr></thead><tbody>
{rows}
</tbody></table></div>
<p class="quiet">Mean squared error per channel value to the image of the same latent at the most steps, pixels in
[0, 1].</p>"""


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
