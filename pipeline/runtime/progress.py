"""Progress of a long run: one line kept up to date on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

from palindrome.pipeline.base import interrupt
from palindrome.pipeline.base.log import say
from palindrome.pipeline.base.text import duration
from palindrome.pipeline.runs.outcome import Failure, Receipt
from palindrome.pipeline.runs.plan import Totals
from palindrome.pipeline.runtime.scheduler import Heartbeat

EVERY = 10.0  # seconds between lines where there is no terminal


class Progress:
    """done/total shards, images, images/s, ETA, rejects; of a run of `totals`, `done_shards` of which were there.
    Where images do not cost alike, as in a sweep, there is no ETA."""

    def __init__(self, verb: str, totals: Totals, done_shards: int, alike: bool = True) -> None:
        self.verb, self.shards, self.images = verb, totals.shards, totals.images
        self.done_shards, self.done, self.rejects, self.failed = done_shards, 0, 0, 0
        self.in_flight, self.alike = 0, alike
        self.terminal = sys.stdout.isatty()
        self.started = self.printed = time.monotonic()

    def add(self, images: int, rejects: int) -> None:
        self.done_shards += 1
        self.done += images
        self.in_flight = max(0, self.in_flight - images)  # until the next pulse: rather too few than counted twice
        self.rejects += rejects
        self.show()

    def show(self, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self.printed < (0.2 if self.terminal else EVERY):
            return
        self.printed = now
        done = self.done + (0 if last else self.in_flight)
        rate = (done + self.rejects) / max(now - self.started, 1e-9)
        left = (self.shards - self.done_shards - self.failed) * self.images / self.shards - self.in_flight
        eta = left / rate if left > 0 and rate and self.alike and not last else None
        line = f"{self.verb}: {self.done_shards}/{self.shards} shards, {done} images, {rate:.1f} images/s"
        if eta is not None:
            line += f", ETA {duration(eta)}"
        if self.rejects:
            line += f", {self.rejects} rejects"
        if self.failed:
            line += f", {self.failed} shards failed"
        if self.terminal:
            print(f"\r\x1b[K{line}", end="\n" if last else "", flush=True)
            return
        say(
            line,
            "progress",
            job=self.verb,
            shards_done=self.done_shards,
            shards=self.shards,
            images=done,
            images_per_second=round(rate, 3),
            eta_seconds=None if eta is None else round(eta, 1),
            rejects=self.rejects,
            failed_shards=self.failed,
        )


def say_failed(shard: str, error: str) -> None:
    say(f"shard {shard} failed: {error}", "shard_failed", "error", shard=shard, error=error)


@dataclass(frozen=True)
class Budget:
    """How much may go wrong before a run is given up: shards that fail, and the share of the images rejected."""

    failed_shards: float | None = None  # None: go on to the end, and fail if one did
    reject_fraction: float = 1.0

    @property
    def tolerated(self) -> float:
        """Failed shards with which a run succeeds."""
        return self.failed_shards or 0

    def exceeded(self, failed: int, rejects: int, images: int) -> str | None:
        """In words; of a run of so many images."""
        if self.failed_shards is not None and failed > self.failed_shards:
            return f"--max-failed-shards: {failed} shards failed, and {self.failed_shards} may"
        if rejects > self.reject_fraction * images:
            return f"--max-reject-fraction: {rejects} of {images} images are rejected, above {self.reject_fraction:g}"
        return None


def follow(
    progress: Progress, outcomes: Generator[Receipt | Failure | Heartbeat, None, None], budget: Budget | None = None
) -> list[Failure]:
    """Shows the outcomes as they come and returns the failures, each said at once on standard error. A budget that
    is exceeded ends the run."""
    failures = []
    with closing(outcomes):  # actors are given back before the connection is, whatever ends this
        for outcome in outcomes:
            interrupt.check()
            if isinstance(outcome, Failure):
                failures.append(outcome)
                progress.failed += 1
                say_failed(outcome.shard.name, outcome.error)
            elif isinstance(outcome, Heartbeat):
                progress.in_flight = outcome.images
                progress.show()
            else:
                progress.add(outcome.images, outcome.rejects)
            if budget and budget.exceeded(progress.failed, progress.rejects, progress.images):
                break
    progress.show(last=True)
    return failures
