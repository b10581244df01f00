"""report.html of `palindrome reconstruct`: one file that needs nothing else, no script, no font, no network."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from palindrome.pipeline.images.metrics import statistics
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


@dataclass(frozen=True)
class Series:
    """All images at one number of decoding steps. `nfe`: network evaluations an image, up and down together. `mse`:
    float64 [N], one a compared image, pixels in [0, 1]. `identical`: the share of 8-bit values that came back the
    same, 0 .. 1. `uncompared`: reason -> count of the images that were not compared (missing, changed, ...)."""

    steps: int
    nfe: int
    mse: np.ndarray
    identical: float
    uncompared: Mapping[str, int]


def amplified_difference(original: np.ndarray, reconstruction: np.ndarray, gain: int = 8) -> np.ndarray:
    """128 + gain * (reconstruction - original), clipped: uint8 of the images' shape, 128 where they are equal."""
    return np.clip(128 + gain * (reconstruction.astype(np.int32) - original), 0, 255).astype(np.uint8)


def reconstruction_report(
    title: str, facts: Mapping[str, str], series: Sequence[Series], examples: Mapping[str, Sequence[Example]]
) -> str:
    """The page: facts, a table and charts of the series' errors, grids of the examples. Same input, same bytes."""
    rows = [_row(s) for s in series]
    curve, absent = _curve(series)
    return render(
        "reconstruction.html",
        facts,
        title=title,
        rows=rows,
        compared=any(row["images"] for row in rows),
        all_exact=any(row["exact"] for row in rows) and not any(row["strange"] for row in rows),
        curve=curve,
        absent=absent,
        histograms=_histograms(series),
        examples={heading: [_card(example) for example in listed] for heading, listed in examples.items()},
    )


def histogram(errors: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Finite positive errors, a float array [N_s] a series -> edges float64 [B + 1] in log10, counts int64 [S, B].
    Every error is in one bin; all series share the bins, which are few where images are few."""
    logs = [np.log10(e) for e in errors]
    everything = np.concatenate(logs)
    most = np.clip(2 * math.sqrt(max(map(len, logs))), 8, 48)
    span = np.ptp(everything)
    width = next((w for w in (0.05, 0.1, 0.2, 0.25, 0.5, 1.0) if span <= w * most), 1.0 * math.ceil(span / most))
    # Whole numbers of bins, not edges, are compared: an error on an edge cannot fall between two bins.
    first, last = (math.floor(v / width) for v in (everything.min(), everything.max()))
    counts = [np.bincount(np.floor(v / width).astype(int) - first, minlength=last - first + 1) for v in logs]
    return np.arange(first, last + 2) * width, np.stack(counts)


def _row(series: Series) -> dict[str, Any]:
    positive, exact, strange = _kinds(series.mse)
    return {
        **vars(series),
        "images": len(series.mse),
        "figures": statistics(series.mse),
        "positive": len(positive),
        "exact": exact,
        "strange": strange,
        "uncompared": {reason: count for reason, count in series.uncompared.items() if count},
    }


def _kinds(mse: np.ndarray) -> tuple[np.ndarray, int, int]:
    """The errors that have a logarithm, how many are 0, how many are not finite."""
    finite = np.isfinite(mse)
    return mse[finite & (mse > 0)], int((mse == 0).sum()), int((~finite).sum())


def _plot_height(series: Sequence[Series]) -> float:
    """Of both charts, which stand side by side: a series is a row of the histograms, with room for words and bars."""
    return max(220, 54 * min(len(series), 7))


@styled
def _curve(series: Sequence[Series]) -> tuple[Markup | None, list[str]]:
    """Mean and p99 of the error against the network evaluations, log-log, None where there is no curve to draw; and
    which series are not in it."""
    figures = [(s, statistics(s.mse)) for s in sorted(series, key=lambda s: s.nfe)]
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
        for s, value, *place in points:
            (dot,) = axes.plot(*([v] for v in place), marker="o", markersize=6, color=LIGHT[name], zorder=3)
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
    figure.draw_without_rendering()  # sets the layout: only then is it known how far apart the names are
    heights = [axes.transData.transform(name.xy)[1] for name in names]
    if len(names) == 2:
        names[1].set_position((6, -4 - max(0, 13 - (heights[0] - heights[1]))))
    spoken = "; ".join(f"{s.nfe:,}: mean {scientific(f['mean'])}, p99 {scientific(f['p99'])}" for s, f in drawn)
    absent = [f"{s.steps:,} steps" for s, f in figures if not f["mean"] > 0]
    return inline(to_svg(figure), f"Error against network evaluations: {spoken}"), absent


@styled
def _histograms(series: Sequence[Series]) -> Markup | None:
    """A row of bars for each series over one axis of log10 MSE, so that distributions are compared by eye."""
    compared = [(s, *_kinds(s.mse)) for s in series if len(s.mse)]
    if not any(len(positive) for _, positive, *_ in compared):
        return None
    edges, counts = histogram([positive for _, positive, *_ in compared])
    most, row = int(counts.max()), max(54.0, _plot_height(series) / len(compared))
    figure = new_figure(len(compared) * row + 56)
    rows = figure.subplots(len(compared), sharex=True, squeeze=False)[:, 0]
    spoken = []
    for axes, (s, positive, exact, strange), inside in zip(rows, compared, counts, strict=True):
        words = f"{len(positive):,} images" + (f" + {exact:,} exact" if exact else "")
        words += f" + {strange:,} not finite" if strange else ""
        axes.set_title(f"{s.steps:,} steps", loc="left", color=LIGHT["text"], fontweight="bold")
        axes.set_title(words, loc="right")
        some = inside.nonzero()[0]
        # One image among thousands stays visible, as 1.5 points: it is the one to look for.
        heights = np.maximum(inside[some], 1.5 / (row - 24) * most)
        gap = 0.8 / WIDTH * (edges[-1] - edges[0])
        bars = axes.bar(edges[some] + gap / 2, heights, np.diff(edges)[some] - gap, align="edge", color=LIGHT["mean"])
        for bar, b in zip(bars, some, strict=True):
            tooltip(bar, f"{inside[b]:,} from {scientific(10 ** edges[b])} to {scientific(10 ** edges[b + 1])}")
        axes.set(**log_axis("x", (edges[0], edges[-1])), ylim=(0, most), yticks=[most], yticklabels=[f"{most:,}"])
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        axes.tick_params(labelbottom=axes is rows[-1])
        spoken.append(f"{s.steps:,} steps: {words}, median {scientific(statistics(s.mse)['median'])}")
    figure.supxlabel("mean squared error, logarithmic", fontsize="medium")
    figure.supylabel("images", fontsize="medium")
    return inline(to_svg(figure), f"Histogram of log10 MSE: {'; '.join(spoken)}")


def _card(example: Example) -> dict[str, Any]:
    """One image's pictures beside one another: small ones by a whole factor, so that their pixels stay square."""
    height, width, _ = example.original.shape
    scale = min(max(1, round(96 / max(height, width))), 192 / max(height, width))
    size = max(1, round(scale * width)), max(1, round(scale * height))  # CSS pixels
    return {
        "id": example.image_id,
        "steps": example.steps,
        "mse": example.mse,
        "psnr": fixed(example.psnr) + " dB" * math.isfinite(example.psnr),
        "pictures": {
            "original": example.original,
            "reconstruction": example.reconstruction,
            "difference × 8": amplified_difference(example.original, example.reconstruction),
        },
        "size": size,
        "small": scale >= 1,
        "width": max(280, 3 * size[0] + 32),  # three images, two gaps, the padding
    }
