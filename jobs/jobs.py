"""palindrome jobs: the jobs submitted to a cluster."""

import json
import time
from dataclasses import asdict, dataclass
from typing import ClassVar

from palindrome.infra.submission import Job, SubmissionError
from palindrome.jobs.arguments import config_error
from palindrome.jobs.config import ClusterOptions
from palindrome.pipeline.base.text import duration, printable


@dataclass(frozen=True, kw_only=True)
class JobsConfig(ClusterOptions):
    """List the jobs submitted to a Ray cluster, newest first."""

    GROUP: ClassVar[str] = "output"
    EXAMPLES: ClassVar[str] = """
    palindrome jobs --address http://head:8265
    palindrome jobs --json
    """

    json: bool = False
    """Print a JSON list instead of a table."""


def run(config: JobsConfig) -> int:
    cluster = config.cluster()
    with config_error("--address", SubmissionError):
        found = cluster.jobs()
    if config.json:
        print(json.dumps([asdict(job) for job in found], indent=2))
        return 0
    rows = [("job", "status", "exit", "started", "took", "command"), *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _row(job: Job) -> tuple[str, ...]:
    started, took = "", ""
    if job.started is not None:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started))
        took = duration((job.ended or time.time()) - job.started)
    return (
        job.id,
        job.status.lower(),
        str(job.exit_code or 0) if job.ended else "",
        started,
        took,
        printable(job.command),
    )
