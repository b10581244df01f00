"""Charts: drawn by matplotlib as SVG, shown inline in a page, which gives them its colours and its font."""

import io
import math
import re
from collections.abc import Callable, Iterable
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.figure import Figure

WIDTH = 400  # points, of every chart: style.css sets font sizes for it, so that text stays readable on a phone
COLOURS = {  # CSS variable -> light, dark
    "back": ("#ffffff", "#131517"),
    "panel": ("#f6f7f8", "#1c1f22"),
    "line": ("#dfe2e5", "#33383d"),
    "text": ("#1c1e21", "#e7e9eb"),
    "quiet": ("#5d646c", "#a0a8b0"),
    "mean": ("#0b6a8f", "#63b9dc"),
    "p99": ("#b4560b", "#e8a25c"),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
TITLE = "title: "  # how the id of an artist starts that has a tooltip
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"

#: Decorates functions that draw; `new_figure` and `to_svg` are called inside them.
styled = matplotlib.rc_context(
    {
        "svg.hashsalt": "palindrome",  # same input, same bytes
        "svg.fonttype": "none",
        "font.size": 12.5,  # the largest that style.css sets: the layout has room for it
        "axes.titlesize": "medium",
        "legend.fontsize": "medium",
        "legend.frameon": False,
        "lines.linewidth": 2,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), LIGHT["quiet"]),
        **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), LIGHT["line"]),
    }
)


def new_figure(height: float) -> Figure:
    """An empty figure, WIDTH by `height` points; its pixels are points."""
    return Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout="constrained")


def to_svg(figure: Figure) -> bytes:
    """An SVG file without a date."""
    sink = io.BytesIO()
    figure.savefig(sink, format="svg", metadata={"Date": None})
    return sink.getvalue()


def tooltip(artist: Artist, words: str) -> None:
    """Words that `inline` shows where the pointer rests on the artist."""
    artist.set_gid(TITLE + words)


def inline(svg: bytes, label: str) -> Markup:
    """A file of `to_svg` as an element of a page; `label` describes it to screen readers. The ids of several charts
    would clash in one page, so none are left, nor what refers to them: markers are copied, clipping is dropped. Colours
    become the page's variables, fonts are left to style.css."""
    root = ElementTree.fromstring(svg)
    shapes = {f"#{path.get('id')}": path for path in root.iter(f"{SVG}path")}
    for element in root.iter():
        for child in [c for c in element if c.tag in (f"{SVG}defs", f"{SVG}metadata")]:
            element.remove(child)
        old = element.attrib
        new = {name: value for name, value in old.items() if name in ("d", "x", "y", "transform", "style")}
        if element.tag == f"{SVG}use":
            shape = shapes[old[f"{XLINK}href"]]
            element.tag = "path"
            styles = f"{old.get('style', '')}; {shape.get('style', '')}"
            new = {"d": shape.attrib["d"], "transform": f"translate({old['x']} {old['y']})", "style": styles}
        if "style" in new:
            new["style"] = re.sub("#[0-9a-f]{6}", _variable, re.sub("font-(size|family): [^;]*;? ?", "", new["style"]))
        if old.get("id", "").startswith(TITLE):
            title = ElementTree.Element("title")
            title.text = old["id"].removeprefix(TITLE)
            element.insert(0, title)
        element.attrib = new
        element.tag = element.tag.removeprefix(SVG)
        element.tail = None
        element.text = element.text if (element.text or "").strip() else None
    root.attrib = {"viewBox": ElementTree.fromstring(svg).attrib["viewBox"], "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _variable(colour: re.Match[str]) -> str:
    return next((f"var(--{name})" for name, light in LIGHT.items() if light == colour[0]), colour[0])


def power(m: int, k: int) -> str:
    """m * 10^k in words."""
    written = "10" + str(k).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return written if m == 1 else f"{m}·{written}"


def number(m: int, k: int) -> str:
    """m * 10^k as a number with commas."""
    return f"{m * 10.0**k:,.10g}"


def log_axis(axis: str, logs: Iterable[float], words: Callable[[int, int], str] = power) -> dict[str, Any]:
    """What `Axes.set` takes for the axis "x" or "y" of values given as log10: limits around the finite ones at 1, 2 or
    5 times a power of ten, and at most seven ticks. matplotlib's own log scale writes its labels as mathematics, whose
    font size a page can't set, and fails for subnormal numbers. Raises ValueError where no value is finite."""
    finite = [value for value in logs if math.isfinite(value)]
    low, high = min(finite), max(finite)
    marks = [(m, k) for k in range(math.floor(low) - 1, math.ceil(high) + 2) for m in (1, 2, 5)]
    at = {mark: mark[1] + math.log10(mark[0]) for mark in marks}
    start = max(v for v in at.values() if v <= low + 1e-9)
    stop = min(v for v in at.values() if v >= high - 1e-9 and v > start)
    ticks = [mark for mark in marks if start <= at[mark] <= stop]
    if len(ticks) > 7:
        decades = [(m, k) for m, k in ticks if m == 1]
        ticks = [(m, k) for m, k in decades if k % math.ceil(len(decades) / 7) == 0]
    labels = [words(*mark) for mark in ticks]
    return {f"{axis}lim": (start, stop), f"{axis}ticks": [at[mark] for mark in ticks], f"{axis}ticklabels": labels}
