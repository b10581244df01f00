"""report.html of `palindrome reconstruct`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from palindrome.pipeline.reports.charts import (
    LIGHT,
    WIDTH,
    inline,
    log_axis,
    new_figure,
    number,
    styled,
    to_svg,
    tooltip,
)
from palindrome.pipeline.reports.page import fixed, render, scientific
from palindrome.pipeline.runs.errors import BINS, Errors
from palindrome.pipeline.runs.schemas import APART

WIDTHS = (1, 2, 4, 5, 10, 20)  # of the histogram's bars, in bins of runs.errors


@dataclass(frozen=True)
class Example:
    """One compared image. `steps`: decoding steps. `mse`: mean over channel values with pixels in [0, 1]; `psnr`: dB,
    may be inf. `original` and `reconstruction`: uint8 [H, W, C] of one shape, C is 1 or 3."""

    image_id: str
    steps: int
    mse: float
    psnr: float
    original: np.ndarray
    reconstruction: np.ndarray
    vae: np.ndarray | None = None
    """What the autoencoder of a latent diffusion model makes of the original."""


@dataclass(frozen=True)
class Series:
    """All images at one number of decoding steps. `nfe`: network evaluations per image, encoding and decoding together.
    `errors`: mean squared errors of the compared images, pixels in [0, 1]. `identical`: the fraction of identical 8-bit
    values. `uncompared`: number of images that were not compared, by reason (missing, changed, ...)."""

    steps: int
    nfe: int
    errors: Errors
    identical: float
    uncompared: Mapping[str, int]


def amplified_difference(original: np.ndarray, reconstruction: np.ndarray, gain: int = 8) -> np.ndarray:
    """128 + gain * (reconstruction - original), clipped to uint8; 128 where the images are equal."""
    return np.clip(128 + gain * (reconstruction.astype(np.int32) - original), 0, 255).astype(np.uint8)


def reconstruction_report(
    title: str, facts: Mapping[str, str], series: Sequence[Series], examples: Mapping[str, Sequence[Example]]
) -> str:
    """The page: facts, a table and charts of the series' errors, grids of the examples. Reproducible byte by byte."""
    rows = [_row(s) for s in series]
    curve, absent = _curve(series)
    return render(
        "reconstruction.html",
        facts,
        title=title,
        rows=rows,
        compared=any(row["images"] for row in rows),
        autoencoded=any(row["apart"] for row in rows),
        all_exact=any(row["exact"] for row in rows) and not any(row["not_finite"] for row in rows),
        curve=curve,
        absent=absent,
        histograms=_histograms(series),
        examples={heading: [_card(example) for example in listed] for heading, listed in examples.items()},
    )


def histogram(series: Sequence[Errors]) -> tuple[np.ndarray, np.ndarray]:
    """Errors, at least one of them above 0 -> edges float64 [B + 1] in log10, counts int64 [S, B] of those above 0.
    Every error is in exactly one bin. All series share the bins; their number grows with the number of images."""
    most = np.clip(2 * math.sqrt(max(errors.positive for errors in series)), 8, 48)
    drawn = [errors for errors in series if errors.positive]
    span = math.log10(max(errors.most for errors in drawn)) - math.log10(min(errors.least for errors in drawn))
    width = next((w for w in WIDTHS if span * BINS <= w * most), BINS * math.ceil(span / most))
    # Bins are joined by their numbers, as integers, so that no error on an edge falls between two bins.
    bins = [{b // width: 0 for b in errors.bins} for errors in series]
    for joined, errors in zip(bins, series, strict=True):
        for b, count in errors.bins.items():
            joined[b // width] += count
    numbers = range(min(min(joined) for joined in bins if joined), max(max(joined) for joined in bins if joined) + 1)
    counts = np.array([[joined.get(b, 0) for b in numbers] for joined in bins])
    return np.arange(numbers.start, numbers.stop + 1) * (width / BINS), counts


def _row(series: Series) -> dict[str, Any]:
    errors = series.errors
    return {
        **vars(series),
        "images": errors.count,
        "figures": errors.figures(),
        "positive": errors.positive,
        "exact": errors.exact,
        "not_finite": errors.not_finite,
        "uncompared": {reason: count for reason, count in series.uncompared.items() if count},
        "apart": [errors.mean(name) for name in APART] if APART.keys() <= errors.sums.keys() else [],
    }


def _plot_height(series: Sequence[Series]) -> float:
    """The height of both charts, which are side by side, in points: each series needs a row of the histograms."""
    return max(220, 54 * min(len(series), 7))


@styled
def _curve(series: Sequence[Series]) -> tuple[Markup | None, list[str]]:
    """Mean and p99 of the error against the network evaluations, log-log, None with fewer than two points; and the
    series that are not drawn."""
    figures = [(s, s.errors.figures()) for s in sorted(series, key=lambda s: s.nfe)]
    drawn = [(s, f) for s, f in figures if s.nfe > 0 and f["mean"] > 0]
    if len(drawn) < 2:
        return None, []
    figure = new_figure(_plot_height(series) + 56)
    axes = figure.subplots()
    ends: dict[str, tuple[float, float]] = {}
    for name in ("p99", "mean"):
        points = [(s, f[name], math.log10(s.nfe), math.log10(f[name])) for s, f in drawn if f[name] > 0]
        if not points:
            continue
        *_, x, y = zip(*points, strict=True)
        axes.plot(x, y, linestyle="--" if name == "p99" else "-", color=LIGHT[name])
        for s, value, *point in points:
            (dot,) = axes.plot(*([v] for v in point), marker="o", markersize=6, color=LIGHT[name], zorder=3)
            tooltip(dot, f"{s.steps:,} steps, {s.nfe:,} evaluations: {name} {scientific(value)}")
        ends[name] = (x[-1], y[-1])
    axes.set(**log_axis("x", (math.log10(s.nfe) for s, _ in drawn), number))
    axes.set(**log_axis("y", (math.log10(v) for _, f in drawn for v in (f["mean"], f["p99"]) if v > 0)))
    axes.set(xlabel="network evaluations an image", ylabel="mean squared error")
    axes.grid(axis="y")
    names = [
        axes.annotate(name, end, (6, -4), textcoords="offset points", color=LIGHT[name], fontweight="bold")
        for name, end in sorted(ends.items(), key=lambda item: -item[1][1])
    ]
    figure.draw_without_rendering()  # computes the layout, which the distance of the names depends on
    heights = [axes.transData.transform(name.xy)[1] for name in names]
    if len(names) == 2:
        names[1].set_position((6, -4 - max(0, 13 - (heights[0] - heights[1]))))
    label = "; ".join(f"{s.nfe:,}: mean {scientific(f['mean'])}, p99 {scientific(f['p99'])}" for s, f in drawn)
    absent = [f"{s.steps:,} steps" for s, f in figures if not f["mean"] > 0]
    return inline(to_svg(figure), f"Error against network evaluations: {label}"), absent


@styled
def _histograms(series: Sequence[Series]) -> Markup | None:
    """One histogram per series, with a shared axis of log10 MSE."""
    compared = [s for s in series if s.errors.count]
    if not any(s.errors.positive for s in compared):
        return None
    edges, counts = histogram([s.errors for s in compared])
    most, row = int(counts.max()), max(54.0, _plot_height(series) / len(compared))
    figure = new_figure(len(compared) * row + 56)
    rows = figure.subplots(len(compared), sharex=True, squeeze=False)[:, 0]
    labels = []
    for axes, s, in_bins in zip(rows, compared, counts, strict=True):
        errors = s.errors
        title = f"{errors.positive:,} images" + (f" + {errors.exact:,} exact" if errors.exact else "")
        title += f" + {errors.not_finite:,} not finite" if errors.not_finite else ""
        axes.set_title(f"{s.steps:,} steps", loc="left", color=LIGHT["text"], fontweight="bold")
        axes.set_title(title, loc="right")
        filled = in_bins.nonzero()[0]
        # A bar is at least 1.5 points high, so that a single outlier among thousands of images stays visible.
        heights = np.maximum(in_bins[filled], 1.5 / (row - 24) * most)
        gap = 0.8 / WIDTH * (edges[-1] - edges[0])
        widths = np.diff(edges)[filled] - gap
        bars = axes.bar(edges[filled] + gap / 2, heights, widths, align="edge", color=LIGHT["mean"])
        for bar, b in zip(bars, filled, strict=True):
            tooltip(bar, f"{in_bins[b]:,} from {scientific(10 ** edges[b])} to {scientific(10 ** edges[b + 1])}")
        axes.set(**log_axis("x", (edges[0], edges[-1])), ylim=(0, most), yticks=[most], yticklabels=[f"{most:,}"])
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        axes.tick_params(labelbottom=axes is rows[-1])
        labels.append(f"{s.steps:,} steps: {title}, median {scientific(errors.quantile(0.5))}")
    figure.supxlabel("mean squared error, logarithmic", fontsize="medium")
    figure.supylabel("images", fontsize="medium")
    return inline(to_svg(figure), f"Histogram of log10 MSE: {'; '.join(labels)}")


def _card(example: Example) -> dict[str, Any]:
    """The images of one example, side by side. Small ones are enlarged by an integer, so that their pixels stay
    square."""
    height, width, _ = example.original.shape
    scale = min(max(1, round(96 / max(height, width))), 192 / max(height, width))
    size = max(1, round(scale * width)), max(1, round(scale * height))  # CSS pixels
    pictures, wanted = {"original": example.original}, example.original
    if example.vae is not None:
        pictures["autoencoder"] = wanted = example.vae
    pictures["reconstruction"] = example.reconstruction
    pictures["difference × 8"] = amplified_difference(wanted, example.reconstruction)
    return {
        "id": example.image_id,
        "steps": example.steps,
        "mse": example.mse,
        "psnr": fixed(example.psnr) + " dB" * math.isfinite(example.psnr),
        "pictures": pictures,
        "size": size,
        "small": scale >= 1,
        "width": max(280, len(pictures) * (size[0] + 8) + 8),  # images, the gaps, the padding
    }
