"""palindrome verify: whether a run folder holds what its plan says."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, ClassVar

from palindrome.jobs.arguments import ConfigError, Options, Range, config_error
from palindrome.pipeline.base.text import printable
from palindrome.pipeline.runs.kinds import VERIFIED
from palindrome.pipeline.runs.manifest import open_run
from palindrome.pipeline.runs.verify import Account, Finding, verify

SAID = 100  # findings printed


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Options):
    """Check that a run, or an export, is complete, readable and consistent; exit code 1 where it is not."""

    GROUP: ClassVar[str] = "checks"
    EXAMPLES: ClassVar[str] = """
    palindrome verify runs/photos
    palindrome verify s3://bucket/run --deep 100
    """

    POSITIONAL: ClassVar[frozenset[str]] = frozenset({"run"})

    run: str
    """The run folder of encode, reconstruct, sweep, generate, regenerate, interpolate or export, a path or an fsspec
    URI."""
    deep: Annotated[int, Range(1)] | None = None
    """Of encode: decode so many latents too, evenly over the run, on this machine, and compare with the originals."""


def run(config: VerifyConfig) -> int:
    with config_error("RUN"):
        folder, manifest = open_run(config.run, *VERIFIED)
    if config.deep and manifest.job != "encode":
        raise ConfigError(f"--deep: {config.run} is a run of {manifest.job}, which holds no latents")
    account = Account()
    noun = manifest.kind.noun
    progress = _Progress(account, noun)
    findings = verify(folder, manifest, account, progress.show)
    if config.deep:
        from palindrome.pipeline.tasks.verify_deep import verify_decoding  # brings torch, which nothing else here needs

        findings = chain(findings, verify_decoding(folder, config.deep, account))
    with config_error("RUN", OSError):
        wrong = _say(findings, progress)
    if config.deep:
        errors = account.errors
        figures = f": mean {sum(errors) / len(errors):.3g}, largest {max(errors):.3g}" if errors else ""
        print(f"{len(errors)} latents decoded, round-trip error{figures}")
    found = "all well" if not wrong else f"{wrong} things are wrong" if wrong > 1 else "1 thing is wrong"
    print(f"{account.shards} shards, {account.rows} {noun}, {account.rejects} rejects: {found}")
    return 1 if wrong else 0


class _Progress:
    """On a terminal, how many shards were read, in a line that gives way to others."""

    def __init__(self, account: Account, noun: str) -> None:
        self.account, self.noun, self.shown = account, noun, time.monotonic()
        self.terminal = sys.stderr.isatty()

    def show(self) -> None:
        if self.terminal and time.monotonic() - self.shown > 0.2:
            self.shown = time.monotonic()
            counted = f"{self.account.shards} shards, {self.account.rows} {self.noun}"
            print(f"\r\x1b[K{counted}", end="", file=sys.stderr)

    def clear(self) -> None:
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _say(findings: Iterator[Finding], progress: _Progress) -> int:
    """Prints what is wrong, and returns how much is."""
    wrong = warnings = 0
    for finding in findings:
        line = printable(f"{finding.where}: {finding.what}")
        progress.clear()
        if finding.warning:
            warnings += 1
            if warnings <= SAID:
                print(f"warning: {line}", file=sys.stderr)
        else:
            wrong += 1
            if wrong <= SAID:
                print(line, flush=True)
    progress.clear()
    if wrong > SAID:
        print(f"and {wrong - SAID} more")
    if warnings > SAID:
        print(f"and {warnings - SAID} more warnings", file=sys.stderr)
    return wrong
