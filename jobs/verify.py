"""palindrome verify: check a run folder against its plan."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from math import inf
from typing import Annotated, ClassVar

from palindrome.jobs.arguments import ConfigError, Options, Range, config_error
from palindrome.pipeline.base.status_line import StatusLine
from palindrome.pipeline.base.text import printable
from palindrome.pipeline.runs.kinds import VERIFIED
from palindrome.pipeline.runs.manifest import open_run
from palindrome.pipeline.runs.verify import Account, Finding, verify

MAX_PRINTED = 100  # findings, and warnings


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Options):
    """Check that a run or an export is complete, readable and consistent; the exit code is 1 if it is not."""

    GROUP: ClassVar[str] = "checks"
    EXAMPLES: ClassVar[str] = """
    palindrome verify runs/photos
    palindrome verify s3://bucket/run --deep 100
    """

    POSITIONAL: ClassVar[frozenset[str]] = frozenset({"run"})

    run: str
    """The run folder of encode, score, reconstruct, sweep, generate, regenerate, interpolate, evaluate or export, a
    path or an fsspec URI."""
    deep: Annotated[int, Range(1)] | None = None
    """For encode runs: also decode this number of latents, spread evenly over the run, on this machine, and compare
    them with the originals."""


def run(config: VerifyConfig) -> int:
    with config_error("RUN"):
        folder, manifest = open_run(config.run, *VERIFIED)
    if config.deep and manifest.job != "encode":
        raise ConfigError(f"--deep: {config.run} is a run of {manifest.job}, which holds no latents")
    account = Account()
    noun = manifest.kind.noun
    line = StatusLine(sys.stderr, log_interval=inf)

    def show_progress() -> None:
        if line.due():
            line.show(f"{account.shards} shards, {account.rows} {noun}")

    findings = verify(folder, manifest, account, show_progress)
    if config.deep:
        from palindrome.pipeline.tasks.verify_deep import verify_decoding  # imports torch, which nothing else needs

        findings = chain(findings, verify_decoding(folder, config.deep, account))
    with config_error("RUN", OSError):
        wrong = _print_findings(findings, line)
    if config.deep:
        errors = account.errors
        figures = f": mean {sum(errors) / len(errors):.3g}, largest {max(errors):.3g}" if errors else ""
        print(f"{len(errors)} latents decoded, round-trip error{figures}")
    found = "all well" if not wrong else f"{wrong} things are wrong" if wrong > 1 else "1 thing is wrong"
    print(f"{account.shards} shards, {account.rows} {noun}, {account.rejects} rejects: {found}")
    return 1 if wrong else 0


def _print_findings(findings: Iterator[Finding], line: StatusLine) -> int:
    """Prints the findings and returns their number, without warnings."""
    wrong = warnings = 0
    for finding in findings:
        text = printable(f"{finding.where}: {finding.what}")
        line.clear()
        if finding.warning:
            warnings += 1
            if warnings <= MAX_PRINTED:
                print(f"warning: {text}", file=sys.stderr)
        else:
            wrong += 1
            if wrong <= MAX_PRINTED:
                print(text, flush=True)
    line.clear()
    if wrong > MAX_PRINTED:
        print(f"and {wrong - MAX_PRINTED} more")
    if warnings > MAX_PRINTED:
        print(f"and {warnings - MAX_PRINTED} more warnings", file=sys.stderr)
    return wrong
