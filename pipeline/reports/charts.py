"""Charts: drawn by matplotlib as SVG, and inlined in a page with the page's colours and font."""

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

WIDTH = 400  # points, of every chart; style.css sets font sizes for it, so that text stays readable on a phone
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
TITLE = "title: "  # prefix of the id of an artist with a tooltip
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"

#: Decorates functions that draw; `new_figure` and `to_svg` are called inside them.
styled = matplotlib.rc_context(
    {
        "svg.hashsalt": "palindrome",  # makes the output reproducible
        "svg.fonttype": "none",
        "font.size": 12.5,  # the largest size in style.css, so that the layout fits all of them
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
    """An empty figure of WIDTH by `height` points, with 1 pixel per point."""
    return Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout="constrained")


def to_svg(figure: Figure) -> bytes:
    """An SVG file without a date."""
    sink = io.BytesIO()
    figure.savefig(sink, format="svg", metadata={"Date": None})
    return sink.getvalue()


def tooltip(artist: Artist, text: str) -> None:
    """Gives the artist a tooltip, which `inline` writes."""
    artist.set_gid(TITLE + text)


def inline(svg: bytes, label: str) -> Markup:
    """The SVG of `to_svg` as an element of a page; `label` describes it to screen readers. Ids of several charts would
    clash in one page, so ids and references to them are removed: markers are copied, clipping is dropped. Colours
    become the page's CSS variables; style.css sets the fonts."""
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
    """m * 10^k as text with a superscript: 5·10⁻³."""
    written = "10" + str(k).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return written if m == 1 else f"{m}·{written}"


def number(m: int, k: int) -> str:
    """m * 10^k as a number with thousands separators."""
    return f"{m * 10.0**k:,.10g}"


def log_axis(axis: str, logs: Iterable[float], label: Callable[[int, int], str] = power) -> dict[str, Any]:
    """Arguments of `Axes.set` for the axis "x" or "y" of values given as log10: limits around the finite ones at 1, 2
    or 5 times a power of ten, and at most seven ticks. matplotlib's own log scale writes labels as mathtext, whose font
    size CSS can't set, and fails for subnormal numbers. Raises ValueError if no value is finite."""
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
    labels = [label(*mark) for mark in ticks]
    return {f"{axis}lim": (start, stop), f"{axis}ticks": [at[mark] for mark in ticks], f"{axis}ticklabels": labels}
