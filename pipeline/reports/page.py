"""What every HTML report is made of: one file that needs nothing else, no script, no font, no network."""

import math
from collections.abc import Mapping, Sequence
from html import escape

CSS = """
:root { color-scheme: light dark; --back: #fff; --panel: #f6f7f8; --line: #dfe2e5; --text: #1c1e21; --quiet: #5d646c;
  --mean: #0b6a8f; --p99: #b4560b; }
@media (prefers-color-scheme: dark) { :root { --back: #131517; --panel: #1c1f22; --line: #33383d; --text: #e7e9eb;
  --quiet: #a0a8b0; --mean: #63b9dc; --p99: #e8a25c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 16px 64px; max-width: 1352px; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
h1 { margin: 0 0 20px; font-size: 25px; line-height: 1.25; font-weight: 650; text-wrap: balance; }
h2 { margin: 44px 0 8px; font-size: 18px; line-height: 1.3; font-weight: 650; }
h2 small { display: inline-block; margin-right: 8px; font-size: 14px; font-weight: 400; color: var(--quiet); }
p { margin: 8px 0; max-width: 92ch; }
.quiet, dt, th { color: var(--quiet); font-size: 13px; }
dl { margin: 0; display: grid; gap: 10px 28px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 230px), 1fr));
  padding: 14px 0; border: solid var(--line); border-width: 1px 0; }
dd { margin: 0; }
.scroll { overflow-x: auto; overscroll-behavior-x: contain; }
table { border-collapse: collapse; width: 100%; overflow-wrap: normal; }
th, td { padding: 7px 0 7px 16px; text-align: right; vertical-align: baseline; border-bottom: 1px solid var(--line); }
th { font-weight: 500; line-height: 1.3; }
td { white-space: nowrap; }
td small { display: block; color: var(--quiet); font-size: 12px; }
thead th { vertical-align: bottom; }
tr > :first-child { width: 1%; padding: 7px 8px 7px 0; position: sticky; left: 0; background: var(--back); }
tbody th { font-size: 15px; font-weight: 600; color: var(--text); }
tr > :last-child { text-align: left; white-space: normal; min-width: 112px; }
.charts { display: grid; gap: 0 28px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
figure { margin: 0; }
.charts figcaption { color: var(--quiet); }
.charts figure { container-type: inline-size; max-width: 660px; }
svg { display: block; width: 100%; height: auto; }
/* Drawings grow with the page, their letters should not: the unit here is the drawing's, 400 across. */
svg text { font-size: 12.5px; fill: var(--quiet); }
@container (min-width: 400px) { svg text { font-size: 11.5px; } }
@container (min-width: 470px) { svg text { font-size: 10px; } }
@container (min-width: 560px) { svg text { font-size: 8.5px; } }
svg .name { fill: var(--text); font-weight: 600; }
svg line { stroke: var(--line); vector-effect: non-scaling-stroke; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
polyline.mean { stroke: var(--mean); } polyline.p99 { stroke: var(--p99); stroke-dasharray: 5 4; }
svg .mean:not(polyline), rect { fill: var(--mean); } svg .p99:not(polyline) { fill: var(--p99); }
svg text.mean, svg text.p99 { font-weight: 600; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, min(100%, var(--card))); }
.cards figure { padding: 12px; background: var(--panel); border-radius: 8px; min-width: 0; }
.cards figure > div { display: flex; gap: 4px; }
img { display: block; min-width: 0; max-width: 100%; height: auto; flex: 0 1 auto; align-self: flex-start; }
img.small { image-rendering: pixelated; }
sub { font-size: 0.75em; line-height: 0; }
figcaption { margin-top: 8px; font-size: 13px; line-height: 1.45; }
.id { overflow: hidden; white-space: nowrap; text-overflow: ellipsis; font-weight: 600; }
.numbers { display: flex; flex-wrap: wrap; gap: 0 14px; color: var(--quiet); }
"""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{css}</style>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page(title: str, facts: Mapping[str, str], parts: Sequence[str]) -> str:
    """The whole file: the facts, then blocks of HTML."""
    listed = [_facts(facts)] if facts else []
    return PAGE.format(title=escape(title), css=CSS, body="\n".join([*listed, *parts]))


def scientific(value: float) -> str:
    if not math.isfinite(value):
        return fixed(value)
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits}e{int(exponent)}" if value else "0"


def fixed(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "∞" if value > 0 else "–"


def share(value: float) -> str:
    """A share that is not 1 must not read as 100 %."""
    if not math.isfinite(value):
        return "–"
    return "100%" if value == 1 else f"{min(value, 0.9999):.2%}"


def _facts(facts: Mapping[str, str]) -> str:
    pairs = (f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items())
    return f"<dl>{''.join(pairs)}</dl>"
