"""What a sweep shows to people: its table as CSV, the plot of error against network evaluations, and a page of both."""

import base64
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import pyarrow as pa
from matplotlib.figure import Figure
from pyarrow import csv

from palindrome.pipeline.reports.page import page, scientific, share
from palindrome.pipeline.tasks.sweep import TABLE_2

Row = Mapping[str, Any]  # of pipeline.sweep.read_sweep

TABLE = """<h2>Every setting</h2>
<div class="scroll" tabindex="0" role="region" aria-label="A row for each setting">
<table>
<thead><tr><th>ladder<th>steps<th>correc-<br>tions<th>toler-<br>ance<th>stored<th>network<br>evaluations<th>images
<th>mean<br>MSE<th>median<br>MSE<th>p99<br>MSE<th>identical<br>values<th>identical<br>images<th>noise<br>missed
<th>latent<br>mean<th>latent<br>std<th>latent<br>kurtosis<th>latent<br>correlation<th>seconds<br>an image
<th>paper,<br>Table 2</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
<p class="quiet">MSE: mean squared error per channel value of image, latent, image; pixels in [0, 1]. Noise missed:
mean squared error of noise, image, noise. Latents of pure noise have mean 0, standard deviation 1, kurtosis 3, and
correlation of neighbours 0. Seconds: on the device, up and down. The paper's Table 2 is for its own model.</p>"""


def as_csv(rows: Sequence[Row]) -> bytes:
    """One line a setting, with a header."""
    sink = io.BytesIO()
    csv.write_csv(pa.Table.from_pylist([dict(row) for row in rows]), sink)
    return sink.getvalue()


def error_plot(rows: Sequence[Row]) -> bytes:
    """SVG: mean MSE (p99 as a thin line) against network evaluations, up and down, log-log, a line for each ladder,
    corrections, tolerance and dtype; the DDIM paper's Table 2 drawn in. Same input, same bytes."""
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["mse_mean"]:  # none, and zero, have no logarithm
            lines[_label(row)].append(row)
    with matplotlib.rc_context({"svg.hashsalt": "palindrome", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(8, 5.2), layout="constrained")
        axes = figure.subplots()
        for label, points in lines.items():
            nfe = [row["nfe"] for row in points]
            (line,) = axes.plot(nfe, [row["mse_mean"] for row in points], marker="o", markersize=4, label=label)
            p99 = [row["mse_p99"] for row in points]
            axes.plot(nfe, p99, color=line.get_color(), linewidth=0.7, linestyle=":", marker=".", markersize=3)
        paper = [(2 * steps, mse) for steps, mse in TABLE_2.items()]
        axes.plot(*zip(*paper, strict=True), color="black", linestyle="--", marker="x", label="DDIM paper, Table 2")
        axes.set(xscale="log", yscale="log", xlabel="network evaluations an image, up and down")
        axes.set_ylabel("round-trip mean squared error; dotted: 99th percentile")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        sink = io.BytesIO()
        figure.savefig(sink, format="svg", metadata={"Date": None})
    return sink.getvalue()


def sweep_report(facts: Mapping[str, str], rows: Sequence[Row], rejects: Mapping[str, int], plot: bytes) -> str:
    """The page. Same input, same bytes."""
    words = "The round-trip error against the network evaluations; the table below has the figures."
    image = f'<img alt="{words}" src="data:image/svg+xml;base64,{base64.b64encode(plot).decode()}">'
    refused = ", ".join(f"{count:,} {reason}" for reason, count in rejects.items())
    parts = [image, TABLE.format(rows="\n".join(map(_cells, rows)))]
    return page("Error against network evaluations", {**facts, "rejected": refused or "none"}, parts)


def _label(row: Row) -> str:
    words = "plain" if not row["corrections"] else f"{row['corrections']} correction" + "s" * (row["corrections"] > 1)
    words += f", tolerance {row['tolerance']:g}" if row["tolerance"] else ""
    return f"{row['ladder']}, {words}" + ("" if row["dtype"] == "float32" else f", {row['dtype']}")


def _cells(row: Row) -> str:
    cells = [row["steps"], row["corrections"], f"{row['tolerance']:g}" if row["tolerance"] else "–", row["dtype"]]
    cells += ["–" if row["nfe"] is None else f"{row['nfe_up']:.4g} + {row['nfe_down']}", f"{row['images']:,}"]
    cells += [_figure(row[name]) for name in ("mse_mean", "mse_median", "mse_p99")]
    cells += ["–" if row[name] is None else share(row[name]) for name in ("values_identical", "images_identical")]
    cells.append(_figure(row["noise_mse"]))
    moments = ("latent_mean", "latent_std", "latent_kurtosis", "latent_correlation")
    cells += ["–" if row[name] is None else f"{row[name]:.3f}" for name in moments]
    cells.append("–" if row["seconds_an_image"] is None else f"{row['seconds_an_image']:.3g}")
    cells.append(row["paper_mse"] or "")
    listed = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{escape(row["ladder"])}</th>{listed}</tr>'


def _figure(value: float | None) -> str:
    return "–" if value is None else scientific(value)
