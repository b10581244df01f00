"""The report of a sweep: its table as CSV, a plot of error against network evaluations, and a page with both."""

import io
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv

from palindrome.pipeline.reports.charts import LIGHT, inline, log_axis, new_figure, number, styled, to_svg
from palindrome.pipeline.reports.page import put_page
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.sweep import TABLE_2

Row = Mapping[str, Any]  # of tasks.sweep.read_sweep


def put_report(run: Folder, facts: Mapping[str, str], rows: Sequence[Row], rejects: Mapping[str, int]) -> None:
    """Writes `table.csv`, `error.svg`, and `report.html` with both. Reproducible byte by byte."""
    plot = error_plot(rows)
    run.put("table.csv", as_csv(rows))
    run.put("error.svg", plot)
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in rejects.items())
    label = "The round-trip error against the network evaluations; the table below has the figures."
    put_page(run, "sweep.html", {**facts, "rejected": rejected or "none"}, plot=inline(plot, label), rows=rows)


def as_csv(rows: Sequence[Row]) -> bytes:
    """One line per setting, with a header."""
    sink = io.BytesIO()
    csv.write_csv(pa.Table.from_pylist([dict(row) for row in rows]), sink)
    return sink.getvalue()


@styled
def error_plot(rows: Sequence[Row]) -> bytes:
    """An SVG of the mean MSE (p99 as a thin line) against the network evaluations of encoding and decoding, log-log,
    with one line per ladder, corrections, tolerance and dtype, and the DDIM paper's Table 2. Reproducible byte by
    byte."""
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["mse_mean"]:  # None and 0 have no logarithm
            lines[textwrap.fill(_label(row), 46)].append(row)
    figure = new_figure(290 + 20 * (sum(label.count("\n") + 1 for label in lines) + 2))  # 20 points per legend line
    axes = figure.subplots()
    for label, points in lines.items():
        mean, p99 = (
            np.log10([(row["nfe"], row[name]) for row in points if row[name]]).reshape(-1, 2).T
            for name in ("mse_mean", "mse_p99")
        )
        (line,) = axes.plot(*mean, marker="o", markersize=4, label=label)
        axes.plot(*p99, color=line.get_color(), linewidth=1, linestyle=":", marker=".", markersize=3)
    paper = np.log10([(2 * steps, mse) for steps, mse in TABLE_2.items()]).T
    axes.plot(*paper, color=LIGHT["text"], linestyle="--", marker="x", label="DDIM paper, Table 2")
    axes.plot([], [], color=LIGHT["quiet"], linewidth=1, linestyle=":", marker=".", label="dotted: 99th percentile")
    x, y = (np.concatenate([line.get_data()[i] for line in axes.lines]) for i in (0, 1))
    axes.set(**log_axis("x", x, number), **log_axis("y", y))
    axes.set(xlabel="network evaluations an image, up and down", ylabel="round-trip mean squared error")
    axes.grid()
    figure.legend(loc="outside lower left")
    return to_svg(figure)


def _label(row: Row) -> str:
    count = row["corrections"]
    label = f"{count} correction" + "s" * (count > 1) if count else "plain"
    label += f", tolerance {row['tolerance']:g}" if row["tolerance"] else ""
    return f"{row['ladder']}, {label}" + ("" if row["dtype"] == "float32" else f", {row['dtype']}")
