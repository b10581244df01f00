"""report.html of `palindrome reconstruct`: one file that needs nothing else, no script, no font, no network."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from palindrome.pipeline.images.metrics import statistics
from palindrome.pipeline.images.pixels import png
from palindrome.pipeline.reports.page import fixed, page, scientific, share


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


TABLE = """<h2>Round-trip error</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Round-trip error, a row for each number of steps">
<table>
<thead><tr><th>steps<th>network<br>evaluations<th>images<th>mean<br>MSE<th>median<br>MSE<th>p99<br>MSE<th>max<br>MSE
<th>mean<br>PSNR, dB<th>identical<br>values<th>not compared</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
<p class="quiet">MSE: mean squared error per channel value, pixels in [0, 1]. PSNR: averaged over the images,
exact ones (infinite) apart. Identical: 8-bit values that came back the same. Errors that are not finite are in no
figure.</p>"""

CARD = """<figure><div>{images}</div>
<figcaption><div class="id" title="{id}">{id}</div>
<div class="numbers"><span>{steps}</span><span>MSE {mse}</span><span>PSNR {psnr}</span></div></figcaption></figure>"""

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 400, 46, 390, 12, 44  # of a drawing, in its own units


def amplified_difference(original: np.ndarray, reconstruction: np.ndarray, gain: int = 8) -> np.ndarray:
    """128 + gain * (reconstruction - original), clipped: uint8 of the images' shape, 128 where they are equal."""
    return np.clip(128 + gain * (reconstruction.astype(np.int32) - original), 0, 255).astype(np.uint8)


def reconstruction_report(
    title: str, facts: Mapping[str, str], series: Sequence[Series], examples: Mapping[str, Sequence[Example]]
) -> str:
    """The page: facts, a table and charts of the series' errors, grids of the examples. Same input, same bytes."""
    parts = []
    if not any(len(s.mse) for s in series):
        parts.append("<p><strong>No image could be compared.</strong></p>")
    if series:
        parts.append(TABLE.format(rows="\n".join(map(_row, series))))
    charts = [chart for chart in (_curve(series), _histograms(series)) if chart]
    if charts:
        parts.append(f'<div class="charts">{"".join(charts)}</div>')
    parts += [_cards(heading, listed) for heading, listed in examples.items()]
    return page(title, facts, parts)


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


def _row(series: Series) -> str:
    figures, (_, exact, strange) = statistics(series.mse), _kinds(series.mse)
    images = f"{len(series.mse):,}" + (f"<small>{strange:,} not finite</small>" if strange else "")
    psnr = fixed(figures["psnr"])
    if exact and math.isfinite(figures["psnr"]):
        psnr += f"<small>+ {exact:,} exact</small>"
    uncompared = ", ".join(f"{count:,} {escape(reason)}" for reason, count in series.uncompared.items() if count)
    cells = [f"{series.nfe:,}", images, *(scientific(figures[name]) for name in ("mean", "median", "p99", "max"))]
    cells += [psnr, share(series.identical), uncompared or "none"]
    return f'<tr><th scope="row">{series.steps:,}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _kinds(mse: np.ndarray) -> tuple[np.ndarray, int, int]:
    """The errors that have a logarithm, how many are 0, how many are not finite."""
    finite = np.isfinite(mse)
    return mse[finite & (mse > 0)], int((mse == 0).sum()), int((~finite).sum())


def _power(m: int, k: int) -> str:
    power = "10" + str(k).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if m == 1 else f"{m}·{power}"


def _log_axis(low: float, high: float) -> tuple[tuple[float, float], list[tuple[int, int]]]:
    """Limits around low .. high (all log10) at 1, 2 or 5 times a power of ten, and at most seven ticks between them,
    (m, k) for m * 10^k."""
    marks = [(m, k) for k in range(math.floor(low) - 1, math.ceil(high) + 2) for m in (1, 2, 5)]
    at = [k + math.log10(m) for m, k in marks]
    start = max(v for v in at if v <= low + 1e-9)
    stop = min(v for v in at if v >= high - 1e-9 and v > start)
    ticks = [mark for mark, v in zip(marks, at, strict=True) if start <= v <= stop]
    if len(ticks) > 7:
        decades = [(m, k) for m, k in ticks if m == 1]
        ticks = [(m, k) for m, k in decades if k % math.ceil(len(decades) / 7) == 0]
    return (start, stop), ticks


def _scale(limits: tuple[float, float], start: float, stop: float) -> Callable[[float], float]:
    """From limits to a place between `start` and `stop` in the drawing."""
    low, high = limits
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, style: str, words: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{words}</text>'


def _plot_height(series: Sequence[Series]) -> float:
    """Of both charts, which stand side by side: a series is a row of the histograms, with room for words and bars."""
    return max(220, 54 * min(len(series), 7))


def _curve(series: Sequence[Series]) -> str:
    """Mean and p99 of the error against the network evaluations, log-log; "" where there is no curve to draw."""
    figures = [(s, statistics(s.mse)) for s in sorted(series, key=lambda s: s.nfe)]
    drawn = [(s, f) for s, f in figures if s.nfe > 0 and f["mean"] > 0]
    if len(drawn) < 2:
        return ""
    right, bottom = RIGHT - 34, TOP + _plot_height(series)  # room for the names of the lines
    values = [math.log10(v) for _, f in drawn for v in (f["mean"], f["p99"]) if v > 0]
    x_limits, x_ticks = _log_axis(math.log10(drawn[0][0].nfe), math.log10(drawn[-1][0].nfe))
    y_limits, y_ticks = _log_axis(min(values), max(values))
    across, up = _scale(x_limits, LEFT + 6, right - 6), _scale(y_limits, bottom, TOP)
    content = ""
    for m, k in y_ticks:
        y = up(k + math.log10(m))
        content += _line(LEFT, y, right, y) + _text(LEFT - 6, y + 4, "end", _power(m, k))
    for m, k in x_ticks:
        x = across(k + math.log10(m))
        content += _line(x, bottom, x, bottom + 4) + _text(x, bottom + 18, "middle", f"{m * 10.0**k:,.10g}")
    ends: dict[str, float] = {}
    for name in ("p99", "mean"):
        points = [(s, f[name], across(math.log10(s.nfe)), up(math.log10(f[name]))) for s, f in drawn if f[name] > 0]
        content += f'<polyline class="{name}" points="{" ".join(f"{x:.1f},{y:.1f}" for *_, x, y in points)}"/>'
        for s, value, x, y in points:
            words = f"{s.steps:,} steps, {s.nfe:,} evaluations: {name} {scientific(value)}"
            content += f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{words}</title></circle>'
            ends[name] = y
    upper, *lower = sorted(ends, key=lambda name: ends[name])
    for name in lower:  # where the lines end together, their names stand apart
        ends[name] = max(ends[name], ends[upper] + 13)
    content += "".join(_text(right + 4, y + 4, name, name) for name, y in ends.items())
    spoken = "; ".join(f"{s.nfe:,}: mean {scientific(f['mean'])}, p99 {scientific(f['p99'])}" for s, f in drawn)
    absent = ", ".join(f"{s.steps:,} steps" for s, f in figures if not f["mean"] > 0)
    note = f"Not drawn, having no error above 0: {absent}." if absent else ""
    axes = ("network evaluations an image", "mean squared error")
    return _chart("Error against network evaluations", spoken, right, bottom, axes, content, note)


def _histograms(series: Sequence[Series]) -> str:
    """A row of bars a series over one axis of log10 MSE, so that distributions are compared by eye."""
    compared = [(s, *_kinds(s.mse)) for s in series if len(s.mse)]
    if not any(len(positive) for _, positive, *_ in compared):
        all_exact = compared and not any(strange for *_, strange in compared)
        return "<p>Every compared image came back exactly: there is no error to draw.</p>" if all_exact else ""
    edges, counts = histogram([positive for _, positive, *_ in compared])
    limits, ticks = _log_axis(edges[0], edges[-1])
    across = _scale(limits, LEFT, RIGHT - 10)  # room for the second half of the last tick's label
    most, row = int(counts.max()), max(54.0, _plot_height(series) / len(compared))
    bars, bottom = row - 24, TOP + len(compared) * row  # of a row, 24 are for the words above its bars
    content, spoken = "", []
    for i, (s, positive, exact, strange) in enumerate(compared):
        base = TOP + (i + 1) * row
        words = f"{len(positive):,} images" + (f" + {exact:,} exact" if exact else "")
        words += f" + {strange:,} not finite" if strange else ""
        content += "".join(_line(x, base - bars, x, base) for x in (across(k + math.log10(m)) for m, k in ticks))
        content += _line(LEFT, base, RIGHT, base) + _text(LEFT - 6, base - bars + 4, "end", f"{most:,}")
        content += _text(LEFT, base - bars - 6, "", f'<tspan class="name">{s.steps:,} steps</tspan> {words}')
        content += "".join(
            _bar(edges[b], edges[b + 1], int(counts[i, b]), across, base, bars / most) for b in counts[i].nonzero()[0]
        )
        spoken.append(f"{s.steps:,} steps: {words}, median {scientific(statistics(s.mse)['median'])}")
    content += "".join(_text(across(k + math.log10(m)), bottom + 18, "middle", _power(m, k)) for m, k in ticks)
    note = "Exact: error 0, which has no logarithm; counted, not drawn." if any(e for _, _, e, _ in compared) else ""
    axes = ("mean squared error, logarithmic", "images")
    return _chart("Histogram of log<sub>10</sub> MSE", "; ".join(spoken), RIGHT, bottom, axes, content, note)


def _bar(start: float, stop: float, count: int, across: Callable[[float], float], base: float, unit: float) -> str:
    x, width = across(start) + 0.4, max(across(stop) - across(start) - 0.8, 0.5)
    height = max(count * unit, 1.5)  # one image among thousands stays visible: it is the one to look for
    words = f"{count:,} from {scientific(10**start)} to {scientific(10**stop)}"
    place = f'x="{x:.1f}" y="{base - height:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f"<rect {place}><title>{words}</title></rect>"


def _chart(
    heading: str, spoken: str, right: float, bottom: float, axes: tuple[str, str], content: str, note: str
) -> str:
    """A drawing whose plot ends at `right` and `bottom`; `spoken` tells it to those who do not see it."""
    label = escape(f"{heading}: {spoken}".replace("<sub>", "").replace("</sub>", ""))
    return (
        f'<figure><h2>{heading}</h2><svg viewBox="0 0 {WIDTH} {bottom + BOTTOM:.0f}" role="img" aria-label="{label}">'
        f"{content}{_text((LEFT + right) / 2, bottom + BOTTOM - 6, 'middle', axes[0])}"
        f'<text transform="translate(9 {(TOP + bottom) / 2:.1f}) rotate(-90)" class="middle">{axes[1]}</text></svg>'
        f"{f'<figcaption>{note}</figcaption>' if note else ''}</figure>"
    )


def _cards(heading: str, examples: Sequence[Example]) -> str:
    if not examples:
        return f'<h2>{escape(heading)}</h2><p class="quiet">No images.</p>'
    card = max(280, 3 * max(_shown(e.original)[0] for e in examples) + 32)  # three images, two gaps, the padding
    return (
        f"<h2>{escape(heading)} <small>original, reconstruction, difference × 8 (gray: equal)</small></h2>"
        f'<div class="cards" style="--card: {card}px">{"".join(map(_card, examples))}</div>'
    )


def _card(example: Example) -> str:
    difference = amplified_difference(example.original, example.reconstruction)
    images = {"original": example.original, "reconstruction": example.reconstruction, "difference × 8": difference}
    return CARD.format(
        images="".join(_image(name, pixels) for name, pixels in images.items()),
        id=escape(example.image_id),
        steps=f"{example.steps:,} step" + "s" * (example.steps != 1),
        mse=scientific(example.mse),
        psnr=fixed(example.psnr) + " dB" * math.isfinite(example.psnr),
    )


def _shown(pixels: np.ndarray) -> tuple[int, int]:
    """Width and height on the page (CSS pixels): small images by a whole factor, so that their pixels stay square."""
    height, width, _ = pixels.shape
    scale = min(max(1, round(96 / max(height, width))), 192 / max(height, width))
    return max(1, round(scale * width)), max(1, round(scale * height))


def _image(name: str, pixels: np.ndarray) -> str:
    width, height = _shown(pixels)
    small = ' class="small"' if max(width, height) >= max(pixels.shape[:2]) else ""
    data = base64.b64encode(png(pixels)).decode()
    return f'<img{small} alt="{name}" width="{width}" height="{height}" src="data:image/png;base64,{data}">'
