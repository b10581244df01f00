"""HTML reports: self-contained files without scripts, fonts or network requests."""

import base64
import math
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from palindrome.pipeline.images.pixels import png
from palindrome.pipeline.reports.charts import COLOURS
from palindrome.pipeline.storage.folder import Folder

MISSING = "–"


def render(template: str, facts: Mapping[str, str], **values: Any) -> str:
    """Renders a template of templates/, which documents the `values` it needs. Reproducible byte by byte."""
    return ENVIRONMENT.get_template(template).render(facts=facts, colours=COLOURS, **values)


def put_page(run: Folder, template: str, facts: Mapping[str, str], **values: Any) -> None:
    """Writes `report.html` of a run."""
    run.put("report.html", render(template, facts, **values).encode())


def scientific(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return fixed(value)
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits}e{int(exponent)}" if value else "0"


def fixed(value: float | None, digits: int = 2) -> str:
    if value is None or not math.isfinite(value):
        return "∞" if value and value > 0 else MISSING
    return f"{value:.{digits}f}"


def share(value: float | None) -> str:
    """A fraction as a percentage; only 1 is shown as 100%."""
    if value is None or not math.isfinite(value):
        return MISSING
    return "100%" if value == 1 else f"{min(value, 0.9999):.2%}"


def significant(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}g}"


def count(value: int) -> str:
    return f"{value:,}"


def data_uri(pixels: Any) -> str:
    """An image, uint8 [H, W, C], as a data URI of a PNG."""
    return f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"


ENVIRONMENT = Environment(
    loader=PackageLoader("palindrome.pipeline.reports"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {f.__name__: f for f in (scientific, fixed, share, significant, count, data_uri)}
