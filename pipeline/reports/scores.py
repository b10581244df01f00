"""The report of a score run: of each score its figures, a histogram, and the images with the lowest and the highest."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.sources import Collection
from palindrome.pipeline.reports.charts import LIGHT, inline, new_figure, styled, to_svg, tooltip
from palindrome.pipeline.reports.comparison import read_originals
from palindrome.pipeline.reports.page import put_page
from palindrome.pipeline.runs.errors import Errors, Measured
from palindrome.pipeline.runs.tallies import Tally
from palindrome.pipeline.storage.folder import Folder

EXTREMES = 8  # images at each end
BARS = 40
WIDTH = 96  # CSS pixels of an image


def put_report(
    run: Folder,
    facts: Mapping[str, str],
    summary: Mapping[str, Any],
    found: Tally,
    collection: Collection,
    how: Preprocess,
) -> None:
    """Writes `report.html`, from the summary and the tally that it was made of. The images are read again."""
    chosen = {name: _extremes(found.errors[name]) for name in summary["scores"] if found.errors[name].count}
    wanted: dict[str, set[str]] = defaultdict(set)
    for image in (image for ends in chosen.values() for images in ends.values() for image in images):
        wanted[image.shard].add(image.image_id)
    originals = read_originals(run, collection, how, wanted)
    columns = [
        {
            "name": name,
            **summary["scores"][name],
            "histogram": _histogram(name, found.errors[name]),
            "ends": {heading: _cards(images, originals) for heading, images in ends.items()},
        }
        for name, ends in chosen.items()
    ]
    put_page(run, "scores.html", facts, columns=columns, width=WIDTH)


def _extremes(values: Errors) -> dict[str, list[Measured]]:
    return {"lowest": values.best[:EXTREMES], "highest": values.worst[:EXTREMES]}


def _cards(images: list[Measured], originals: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Those whose image still exists."""
    there = (image for image in images if image.image_id in originals)
    return [{"id": image.image_id, "value": image.error, "pixels": originals[image.image_id]} for image in there]


@styled
def _histogram(name: str, values: Errors) -> Markup:
    edges, counts = values.linear_histogram(BARS)
    figure = new_figure(150)
    axes = figure.subplots()
    widths = np.diff(edges) if edges[-1] > edges[0] else np.ones(1)
    filled = counts.nonzero()[0]
    heights = np.maximum(counts[filled], counts.max() / 80)  # one image among thousands stays visible
    bars = axes.bar(edges[filled], heights, widths[filled] * 0.9, align="edge", color=LIGHT["mean"])
    for bar, b in zip(bars, filled, strict=True):
        tooltip(bar, f"{counts[b]:,.0f} from {edges[b]:.5g} to {edges[b + 1]:.5g}")
    axes.set(xlabel=name, ylabel="images")
    axes.locator_params(axis="x", nbins=6)
    axes.locator_params(axis="y", nbins=3)
    label = f"Histogram of {name} over {values.count:,} images, from {edges[0]:.5g} to {edges[-1]:.5g}"
    return inline(to_svg(figure), label)
