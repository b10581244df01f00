"""The report of judged scores: a table, also as CSV, histograms of both runs, and the images that are told wrong."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.sources import Collection
from palindrome.pipeline.reports.charts import LIGHT, inline, new_figure, styled, to_svg
from palindrome.pipeline.reports.comparison import read_originals
from palindrome.pipeline.reports.evaluation import picture_of
from palindrome.pipeline.reports.page import put_page
from palindrome.pipeline.reports.sweep import as_csv
from palindrome.pipeline.runs.detection import MEASURES, Scores, Separation
from palindrome.pipeline.storage.folder import Folder

NAMES = dict(zip(MEASURES, ("AUROC", "AP", "TPR at 1 % FPR", "TPR at 5 % FPR", "ASR"), strict=True))
SHOWN = 8  # pictures under each heading
BINS = 40


def put_judgement(
    run: Folder,
    facts: Mapping[str, str],
    results: Sequence[Separation],
    positive: Scores,
    negative: Scores,
    files: Mapping[str, float],
) -> None:
    """Writes `table.csv` and `report.html`. The pictures are by the column with the largest AUROC."""
    if results:
        run.put("table.csv", as_csv([_row(result) for result in results]))
    charts = [(r, histogram(positive.values[r.column], negative.values[r.column], r.column)) for r in results]
    best = max(results, key=lambda r: r.measures["auroc"], default=None)
    headings = {} if best is None else _extremes(best, positive, negative)
    put_page(
        run,
        "detection.html",
        facts,
        results=results,
        names=NAMES,
        charts=charts,
        files=files,
        best=best.column if best else "",
        headings=headings,
    )


def _row(result: Separation) -> dict[str, Any]:
    positive = "lower" if result.sign < 0 else "higher"
    counts = {name: getattr(result, name) for name in ("positives", "negatives", "missing")}
    bounds = {f"{name}_low": low for name, (low, _) in result.intervals.items()}
    bounds |= {f"{name}_high": high for name, (_, high) in result.intervals.items()}
    return {"column": result.column, "positive": positive, **counts, **result.measures, **bounds}


@styled
def histogram(positive: np.ndarray, negative: np.ndarray, label: str) -> Markup:
    """The shares of both runs over common bins, which hold the middle 99 % of all finite values; the outermost bins
    have the rest."""
    finite = [values[np.isfinite(values)] for values in (positive, negative)]
    every = np.concatenate(finite)
    low, high = np.quantile(every, (0.005, 0.995))
    edges = np.linspace(low, high if high > low else low + max(abs(low), 1) * 1e-6, BINS + 1)
    figure = new_figure(190)
    axes = figure.subplots()
    for name, values, colour in zip(("positive", "negative"), finite, ("p99", "mean"), strict=True):
        counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
        axes.stairs(counts / max(1, len(values)), edges, fill=True, color=LIGHT[colour], alpha=0.55, label=name)
    axes.set(xlabel=label, ylabel="share of the images", xlim=(edges[0], edges[-1]))
    axes.locator_params(axis="x", nbins=5)
    axes.legend()
    return inline(to_svg(figure), f"Histogram of {label} for the positive and the negative run")


def _extremes(result: Separation, positive: Scores, negative: Scores) -> dict[str, list[dict[str, Any]]]:
    """By heading, the images of either run that are the most and the least like positives, read again."""
    chosen: dict[str, tuple[Scores, np.ndarray]] = {}
    for name, scores in (("positive", positive), ("negative", negative)):
        values = result.sign * scores.values[result.column]
        order = np.argsort(values, kind="stable")
        order = order[np.isfinite(values[order])]
        wrong, right = (order, order[::-1]) if name == "positive" else (order[::-1], order)
        chosen[f"The {name} images that look least {name}"] = scores, wrong[:SHOWN]
        chosen[f"The {name} images that look most {name}"] = scores, right[:SHOWN]
    found = {}
    for heading, (scores, rows) in chosen.items():
        pixels = _read(scores, rows)
        cards = [(scores.ids[i], scores.values[result.column][i]) for i in rows if scores.ids[i] in pixels]
        found[heading] = [{"id": i, "value": value, "picture": picture_of(pixels[i])} for i, value in cards]
    return found


def _read(scores: Scores, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Pictures, uint8 [H, W, C], by id, read again from the run's collection; none of a run without one of its own."""
    content = scores.manifest.content
    if not {"collection", "preprocess"} <= content.keys():
        return {}
    collection, how = Collection(**content["collection"]), Preprocess(**content["preprocess"])
    wanted: dict[str, set[str]] = defaultdict(set)
    for i in rows:
        wanted[scores.shards[i].partition("-")[0]].add(scores.ids[i])
    return read_originals(scores.run, collection, how, wanted)
