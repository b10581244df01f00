"""palindrome rejects: the rejected inputs of a run, as a table, CSV or JSON."""

import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, ClassVar, Literal

from palindrome.jobs.arguments import ConfigError, Options, config_error
from palindrome.pipeline.base.text import printable
from palindrome.pipeline.images.records import REASONS
from palindrome.pipeline.runs.kinds import WITH_REJECTS
from palindrome.pipeline.runs.manifest import open_run
from palindrome.pipeline.runs.schemas import REJECT_SCHEMA
from palindrome.pipeline.runs.shards import rejects

ALIGNED = 200  # rows from which the column widths are computed; later rows may be wider


@dataclass(frozen=True, kw_only=True)
class RejectsConfig(Options):
    """List the rejected inputs of a run with image id, source, reason and detail; counts go to standard error."""

    GROUP: ClassVar[str] = "output"
    EXAMPLES: ClassVar[str] = """
    palindrome rejects runs/photos
    palindrome rejects s3://bucket/run --format csv
    """

    POSITIONAL: ClassVar[frozenset[str]] = frozenset({"run"})

    run: str
    """The run folder of encode, score, sweep or interpolate, a path or an fsspec URI."""
    reason: str | None = None
    """List only rejects with this reason (default: all)."""
    format: Literal["table", "csv", "json"] = "table"
    """A table, CSV, or a JSON list with one row per line. Table and CSV escape control characters."""


def run(config: RejectsConfig) -> int:
    if config.reason is not None and config.reason not in REASONS:
        raise ConfigError(f"--reason: must be one of {', '.join(REASONS)}; got {config.reason!r}")
    with config_error("RUN"):
        folder, manifest = open_run(config.run, *WITH_REJECTS)
    counts: Counter[str] = Counter()

    def counted() -> Iterator[dict[str, Any]]:
        for row in rejects(folder, manifest, config.reason):
            counts[row["reason"]] += 1
            yield row

    try:
        {"table": _table, "csv": _csv, "json": _json}[config.format](counted())
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    reasons = ", ".join(f"{n} {printable(str(reason))}" for reason, n in sorted(counts.items()))
    print(f"{counts.total()} rejects" + (f": {reasons}" if reasons else ""), file=sys.stderr)
    return 0


def _texts(rows: Iterable[dict[str, Any]]) -> Iterator[list[str]]:
    return ([printable(str(row[name])) for name in REJECT_SCHEMA.names] for row in rows)


def _table(rows: Iterable[dict[str, Any]]) -> None:
    texts = _texts(rows)
    first = [REJECT_SCHEMA.names, *islice(texts, ALIGNED)]
    if len(first) == 1:
        return
    widths = [max(map(len, column)) for column in zip(*first, strict=True)]
    for row in chain(first, texts):
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _csv(rows: Iterable[dict[str, Any]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(REJECT_SCHEMA.names)
    writer.writerows(_texts(rows))


def _json(rows: Iterable[dict[str, Any]]) -> None:
    end = "["
    for row in rows:
        print(end + json.dumps(row).replace("\x7f", "\\u007f"), end="")
        end = ",\n"
    print("[]" if end == "[" else "]")
