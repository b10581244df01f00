"""Progress of a sharded run, and the limits at which it is aborted."""

import sys
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

from palindrome.pipeline.base import interrupt
from palindrome.pipeline.base.log import say
from palindrome.pipeline.base.status_line import StatusLine
from palindrome.pipeline.base.text import duration
from palindrome.pipeline.runs.outcome import Failure, Receipt
from palindrome.pipeline.runs.plan import Totals
from palindrome.pipeline.runtime.scheduler import Heartbeat


class Progress:
    """Shards done, images, images per second, ETA, rejects and failed shards of a run of `totals`, of which
    `done_shards` were done before. Without `uniform_cost`, as in a sweep, images differ in cost and there is no ETA."""

    def __init__(self, verb: str, totals: Totals, done_shards: int, uniform_cost: bool = True) -> None:
        self.verb, self.shards, self.images = verb, totals.shards, totals.images
        self.done_shards, self.done, self.rejects, self.failed = done_shards, 0, 0, 0
        self.in_flight, self.uniform_cost = 0, uniform_cost
        self.line = StatusLine(sys.stdout)
        self.started = time.monotonic()

    def add(self, images: int, rejects: int) -> None:
        """Counts a committed shard."""
        self.done_shards += 1
        self.done += images
        self.in_flight = max(0, self.in_flight - images)  # until the next heartbeat; counts no image twice
        self.rejects += rejects
        self.show()

    def show(self, last: bool = False) -> None:
        if not last and not self.line.due():
            return
        done = self.done + (0 if last else self.in_flight)
        rate = (done + self.rejects) / max(time.monotonic() - self.started, 1e-9)
        left = (self.shards - self.done_shards - self.failed) * self.images / self.shards - self.in_flight
        eta = left / rate if left > 0 and rate and self.uniform_cost and not last else None
        line = f"{self.verb}: {self.done_shards}/{self.shards} shards, {done} images, {rate:.1f} images/s"
        if eta is not None:
            line += f", ETA {duration(eta)}"
        if self.rejects:
            line += f", {self.rejects} rejects"
        if self.failed:
            line += f", {self.failed} shards failed"
        self.line.show(
            line,
            last,
            job=self.verb,
            shards_done=self.done_shards,
            shards=self.shards,
            images=done,
            images_per_second=round(rate, 3),
            eta_seconds=None if eta is None else round(eta, 1),
            rejects=self.rejects,
            failed_shards=self.failed,
        )


def log_failed_shard(shard: str, error: str) -> None:
    say(f"shard {shard} failed: {error}", "shard_failed", "error", shard=shard, error=error)


@dataclass(frozen=True)
class Budget:
    """How much may go wrong before a run is aborted: number of failed shards, fraction of images rejected."""

    failed_shards: float | None = None  # None: never abort; the run then fails if a shard did
    reject_fraction: float = 1.0

    @property
    def tolerated(self) -> float:
        """Failed shards with which a run still succeeds."""
        return self.failed_shards or 0

    def exceeded(self, failed: int, rejects: int, images: int) -> str | None:
        """The message if a run of `images` images exceeds the budget."""
        if self.failed_shards is not None and failed > self.failed_shards:
            return f"--max-failed-shards: {failed} shards failed, and {self.failed_shards} may"
        if rejects > self.reject_fraction * images:
            return f"--max-reject-fraction: {rejects} of {images} images are rejected, above {self.reject_fraction:g}"
        return None


def follow(
    progress: Progress,
    outcomes: Generator[Receipt | Failure | Heartbeat, None, None],
    budget: Budget | None = None,
    earlier_rejects: int = 0,
) -> list[Failure]:
    """Shows the outcomes as they come, logs each failure at once and returns the failures. Ends the run early if the
    budget is exceeded, to which the rejects of the shards committed earlier count too."""
    failures = []
    with closing(outcomes):  # kills the actors before the connection to Ray is closed, also after an exception
        for outcome in outcomes:
            interrupt.check()
            if isinstance(outcome, Failure):
                failures.append(outcome)
                progress.failed += 1
                log_failed_shard(outcome.shard.name, outcome.error)
            elif isinstance(outcome, Heartbeat):
                progress.in_flight = outcome.images
                progress.show()
            else:
                progress.add(outcome.images, outcome.rejects)
            if budget and budget.exceeded(progress.failed, earlier_rejects + progress.rejects, progress.images):
                break
    progress.show(last=True)
    return failures
