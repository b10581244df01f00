"""What an interpolation shows to people: strips of its first paths, and the latents' norms along the way."""

import base64
import io
import math
from collections.abc import Iterable, Mapping
from html import escape
from itertools import chain, islice
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure

from palindrome.pipeline.images.pixels import ACROSS, pixels_of, png, stacked, strip
from palindrome.pipeline.reports.page import page
from palindrome.pipeline.runs.kinds import IMAGES
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.interpolate import METHODS, paths_of

SHOWN = 12  # paths
LONGEST = 10 * ACROSS - 1  # frames of a path that is no grid, behind the first

NORMS = """<h2>The latents' norms along the way</h2>
<p>Noise of a Gaussian lies on a shell: the root mean square of a latent is 1, nearly. A model has not seen what lies
within.</p>
<img alt="The latents' root mean square along the way, spherical and linear" style="width: min(100%, 660px)"
 src="data:image/svg+xml;base64,{plot}">"""


def put_report(run: Folder, facts: Mapping[str, str], shards: Iterable[str], dimensions: int) -> None:
    """`strips.png`, the first paths, `norms.svg`, and `report.html` with both; of latents of so many values."""
    parts, strips = [], []
    for _, rows in islice(paths_of(run, shards), SHOWN):
        first = next(rows)
        square = first["down"] is not None
        frames = [pixels_of(row["image"]["bytes"]) for row in chain([first], islice(rows, None if square else LONGEST))]
        strips.append((first, strip(frames, square)))
    if strips:
        run.put("strips.png", png(stacked([picture for _, picture in strips])))
        plot = norms_plot(run, dimensions)
        run.put("norms.svg", plot)
        parts = ["<h2>The first paths</h2>", *(_figure(first, picture) for first, picture in strips)]
        parts.append(NORMS.format(plot=base64.b64encode(plot).decode()))
    run.put("report.html", page("Interpolation", facts, parts).encode())


def _figure(row: Mapping[str, Any], picture: np.ndarray) -> str:
    scale = max(1, min(3, 960 // picture.shape[1]))
    data = base64.b64encode(png(picture)).decode()
    named = escape(" → ".join(row["ids"]) if row["down"] is None else " · ".join(row["ids"]))
    width = f"min(100%, {scale * picture.shape[1]}px)"
    return (
        f'<figure style="margin-bottom: 12px"><img class="small" alt="Path {row["path"]}" style="width: {width}"'
        f' src="data:image/png;base64,{data}"><figcaption class="quiet">{row["path"]}: {named}</figcaption></figure>'
    )


def norms_plot(run: Folder, dimensions: int) -> bytes:
    """SVG: the mean of the latents' root mean squares against t, and the middle 98 % of them, for each method; behind
    them the shell that holds 99.7 % of Gaussian noise of so many values. Same input, same bytes."""
    columns = ["t", "down", *(f"rms_{method}" for method in METHODS)]
    tables = [run.read_parquet(f"{IMAGES}/{s}.parquet", columns) for s in sorted(committed(run, IMAGES))]
    rows = pa.concat_tables([table.replace_schema_metadata() for table in tables])
    rows = rows.filter(pc.is_in(rows["down"], pa.array([None, 0.0, 1.0])))  # within a grid t is not all
    ts, place = np.unique(rows["t"].to_numpy(), return_inverse=True)
    with matplotlib.rc_context({"svg.hashsalt": "palindrome", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        wide = 3 / math.sqrt(2 * dimensions)
        axes.axhspan(1 - wide, 1 + wide, color="0.85", label="99.7 % of Gaussian noise")
        for method in METHODS:
            rms = rows[f"rms_{method}"].to_numpy()
            by_t = [rms[place == i] for i in range(len(ts))]
            (line,) = axes.plot(ts, [values.mean() for values in by_t], marker="o", markersize=3, label=method)
            low, high = np.array([np.quantile(values, (0.01, 0.99)) for values in by_t]).T
            axes.fill_between(ts, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(xlabel="t, from one image to the next", ylabel="root mean square of the latent; bands: middle 98 %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        sink = io.BytesIO()
        figure.savefig(sink, format="svg", metadata={"Date": None})
    return sink.getvalue()
