"""The report of an interpolate run: strips of its first paths, and the norms of the latents along them."""

import math
from collections.abc import Iterable, Mapping
from itertools import chain, islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from palindrome.pipeline.images.pixels import ACROSS, pixels_of, png, stacked, strip
from palindrome.pipeline.reports.charts import LIGHT, inline, new_figure, styled, to_svg
from palindrome.pipeline.reports.page import put_page
from palindrome.pipeline.runs.kinds import IMAGES
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.interpolate import METHODS, paths_of

SHOWN = 12  # paths
MAX_FRAMES = 10 * ACROSS - 1  # after the first one, of a path that is not a grid


def put_report(run: Folder, facts: Mapping[str, str], shards: Iterable[str], dimensions: int) -> None:
    """Writes `strips.png` with the first paths, `norms.svg`, and `report.html` with both; a latent has `dimensions`
    values."""
    strips, norms = [], Markup()
    for _, rows in islice(paths_of(run, shards), SHOWN):
        first = next(rows)
        square = first["down"] is not None
        others = islice(rows, None if square else MAX_FRAMES)
        frames = [pixels_of(row["image"]["bytes"]) for row in chain([first], others)]
        pixels = strip(frames, square)
        ids = (" · " if square else " → ").join(first["ids"])
        width = max(1, min(3, 960 // pixels.shape[1])) * pixels.shape[1]
        strips.append({"path": first["path"], "ids": ids, "pixels": pixels, "width": width})
    if strips:
        run.put("strips.png", png(stacked([shown["pixels"] for shown in strips])))
        plot = norms_plot(run, dimensions)
        run.put("norms.svg", plot)
        norms = inline(plot, "The latents' root mean square along the way, spherical and linear")
    put_page(run, "interpolation.html", facts, strips=strips, norms=norms)


@styled
def norms_plot(run: Folder, dimensions: int) -> bytes:
    """An SVG of the root mean square of the latents against t: the mean and the middle 98 % for each method, and the
    range of 99.7 % of Gaussian noise with `dimensions` values. Reproducible byte by byte."""
    columns = ["t", "down", *(f"rms_{method}" for method in METHODS)]
    tables = [run.read_parquet(f"{IMAGES}/{s}.parquet", columns) for s in sorted(committed(run, IMAGES))]
    rows = pa.concat_tables([table.replace_schema_metadata() for table in tables])
    # Of a grid only the outer rows: the norm of inner frames does not depend on t alone.
    rows = rows.filter(pc.is_in(rows["down"], pa.array([None, 0.0, 1.0])))
    ts, index = np.unique(rows["t"].to_numpy(), return_inverse=True)
    figure = new_figure(380)
    axes = figure.subplots()
    wide = 3 / math.sqrt(2 * dimensions)
    axes.axhspan(1 - wide, 1 + wide, color=LIGHT["line"], label="99.7 % of Gaussian noise")
    for method in METHODS:
        rms = rows[f"rms_{method}"].to_numpy()
        by_t = [rms[index == i] for i in range(len(ts))]
        (line,) = axes.plot(ts, [values.mean() for values in by_t], marker="o", markersize=3, label=method)
        low, high = np.array([np.quantile(values, (0.01, 0.99)) for values in by_t]).T
        label = f"{method}, the middle 98 %"
        axes.fill_between(ts, low, high, color=line.get_color(), alpha=0.2, linewidth=0, label=label)
    axes.set(xlabel="t, from one image to the next", ylabel="root mean square of the latent")
    axes.grid()
    figure.legend(loc="outside lower left")
    return to_svg(figure)
