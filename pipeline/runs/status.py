"""The state of a run, read from its folder: progress, speed, failures. Needs neither Ray nor the model.

A listing gives the committed shards, their bytes and commit times. Counts and seconds are in the footers. Of a run with
many shards only some footers are read, and the counts are estimates: shards are named by hashes, so the first ones by
name are a random sample.
"""

import heapq
import json
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from palindrome.pipeline.base.text import duration, printable, size
from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.runs.entries import Entry, entries, modified_of
from palindrome.pipeline.runs.kinds import KINDS, LATENTS, REJECTS, Plan
from palindrome.pipeline.runs.manifest import Manifest
from palindrome.pipeline.runs.plan import Totals, plan_totals
from palindrome.pipeline.runs.shards import shard_metadata
from palindrome.pipeline.storage.folder import Folder

MAX_FOOTERS = 4096  # read at most; of more shards these are a sample
NEWEST = 32  # shards whose longest time defines the two intervals below
SLOWEST = 5  # shards listed
STALLED_AFTER = 3  # times the longest recent shard's time without a commit
WINDOW = 10  # times the longest recent shard's time, over which the pace is measured
MIN_INTERVAL = 60.0  # seconds, for both


@dataclass(frozen=True)
class State:
    """The output of `palindrome status --json`; None means unknown."""

    run: str
    job: str
    collection: str
    complete: bool
    shards: int
    shards_total: int | None  # None for a sweep: its folder does not record the number of settings
    settings: int | None  # for a sweep: those with a committed shard
    images_total: int | None
    latents: int | None
    rejects: int | None
    rejects_by_reason: dict[str, int]
    exact: bool  # otherwise the counts above are estimates
    bytes: int
    images_per_second: float | None
    eta_seconds: float | None
    idle_seconds: float | None  # since the last commit
    standing_still: bool
    slowest: list[dict[str, Any]]
    unreadable: list[str]
    failed_shards: list[dict[str, Any]]


class Footer(NamedTuple):
    """The footer of a committed shard; `counts` is None if it can't be read."""

    counts: dict[str, int] | None
    seconds: float
    reasons: dict[str, int]


class StateReader:
    """Reads a run's state, repeatedly for --watch: each footer is read once."""

    def __init__(self, run: Folder, manifest: Manifest, max_footers: int = MAX_FOOTERS) -> None:
        self.run, self.manifest, self.max_footers = run, manifest, max_footers
        self.kind = manifest.kind
        self.known: dict[Entry, Footer] = {}

    def read(self, now: float | None = None) -> State:
        shards = [entry for entry in entries(self.run, self.kind.folder) if entry.shard]
        with_rejects = {entry.shard: entry.size for entry in entries(self.run, REJECTS) if entry.shard}
        plan, collection = self._plan()
        total = plan.shards if plan and not self.kind.per_setting else None
        summary, current = self._summary(shards)
        complete = bool(shards) and (current if total is None else len(shards) >= total)

        sample = heapq.nsmallest(self.max_footers, shards) if len(shards) > self.max_footers else shards
        newest = heapq.nlargest(NEWEST, (e for e in shards if e.modified is not None), key=lambda e: e.modified or 0.0)
        footers = self._footers([*sample, *newest], with_rejects.keys())
        read = [footers[e] for e in sample if footers[e].counts is not None]
        scale = len(shards) / len(read) if read else 0.0
        rejects = self._rejects(sample, footers)
        images = sum((f.counts or {}).get("images", 0) for f in read)
        latents = sum((f.counts or {}).get(self.kind.row_count, (f.counts or {}).get("images", 0)) for f in read)
        counts: dict[str, Any] = {
            "latents": round(latents * scale) if read or not shards else None,
            "rejects": round(sum(rejects.values()) * scale) if read or not shards else None,
            "rejects_by_reason": {k: round(v * scale) for k, v in sorted(rejects.items())},
            "exact": len(read) == len(shards),
        }
        if current and not counts["exact"] and counts.keys() <= summary.keys() | {"exact"}:
            counts = {k: summary[k] for k in ("latents", "rejects", "rejects_by_reason")} | {"exact": True}

        times = sorted(entry.modified for entry in shards if entry.modified is not None)
        now = max([now or time.time(), *times[-1:]])
        longest = max((footers[e].seconds for e in newest), default=0.0)
        rate, stalled = pace(times, times[-1] if complete and times else now, longest)
        left = None if total is None else total - len(shards)
        timed = sorted(((f.seconds, e.shard) for e, f in footers.items() if f.counts), reverse=True)
        done = {entry.shard for entry in shards}
        return State(
            run=self.run.uri,
            job=self.kind.name,
            collection=collection,
            complete=complete,
            shards=len(shards),
            shards_total=total,
            settings=len({str(e.shard).partition("-")[2] for e in shards}) if self.kind.per_setting else None,
            images_total=plan.images if plan else None,
            **counts,
            bytes=sum(e.size for e in shards) + sum(with_rejects.values()),
            images_per_second=rate * images / len(read) if rate and read else None,
            eta_seconds=left / rate if rate and left and not complete else None,
            idle_seconds=now - times[-1] if times else None,
            standing_still=stalled and not complete,
            slowest=[{"shard": name, "seconds": seconds} for seconds, name in timed[:SLOWEST]],
            unreadable=sorted(str(e.shard) for e, f in footers.items() if f.counts is None),
            failed_shards=[s for s in summary.get("failed_shards", []) if s["shard"] not in done],
        )

    def _plan(self) -> tuple[Totals | None, str]:
        """The size of the plan, None if it is not known (yet), and the URI of the run's input."""
        uri = self.manifest.source
        if self.kind.plan is Plan.OWN:
            return plan_totals(self.run), uri
        latents = Folder(uri)
        try:
            plan, done = plan_totals(latents), sum(e.shard is not None for e in entries(latents, LATENTS))
        except Exception:  # stores raise errors of many types; this machine may not reach the store
            return None, uri
        return plan.part(done) if plan and done else None, uri

    def _summary(self, shards: Sequence[Entry]) -> tuple[dict[str, Any], bool]:
        """`summary.json`, {} if there is none, and whether it covers all the current shards."""
        try:
            summary = json.loads(self.run.read("summary.json"))
            modified = modified_of(self.run.fs.info(self.run.path("summary.json")))
        except (FileNotFoundError, ValueError):
            return {}, False
        if not isinstance(summary, dict):
            return {}, False
        newest = max((entry.modified or 0.0 for entry in shards), default=0.0)
        all_shards = summary.get("shards", len(shards)) == len(shards)
        return summary, all_shards and (modified is None or modified >= newest) and not summary.get("failed_shards")

    def _footers(self, shards: Iterable[Entry], with_rejects: Iterable[str | None]) -> dict[Entry, Footer]:
        with_rejects = set(with_rejects)

        def read(entry: Entry) -> Footer:
            found = self.known.get(entry)
            if found is None or found.counts is None:  # retry after an error of the store
                found = _footer(self.run, self.kind.folder, str(entry.shard), entry.shard in with_rejects)
            return found

        wanted = list(dict.fromkeys(shards))
        self.known = dict(zip(wanted, in_threads(read, wanted), strict=True))
        return self.known

    def _rejects(self, sample: Sequence[Entry], footers: dict[Entry, Footer]) -> Counter[str]:
        """Rejects by reason. Each reject of a sweep recurs with every setting and is counted once."""
        by_shard = {self.kind.planned(str(e.shard)): e for e in sample}
        found: Counter[str] = Counter()
        for entry in by_shard.values():
            found.update(footers[entry].reasons)
        return found


def _footer(run: Folder, below: str, shard: str, has_rejects: bool) -> Footer:
    try:
        metadata = shard_metadata(run, shard, below)
        counts, seconds = dict(metadata["counts"]), float(metadata["timings"]["seconds"])
        reasons: Counter[str] = Counter()
        if has_rejects and counts.get("rejects"):
            reasons.update(run.read_parquet(f"{REJECTS}/{shard}.parquet", ["reason"])["reason"].to_pylist())
        return Footer(counts, seconds, dict(reasons))
    except Exception:  # damaged files raise errors of many types; verify reports them
        return Footer(None, 0.0, {})


def pace(times: Sequence[float], now: float, longest: float) -> tuple[float | None, bool]:
    """Shards per second up to `now`, None if unknown, and whether the run is stalled.

    `times` are the sorted commit times, `longest` is the longest time of a recent shard. The pace is that of the
    commits within WINDOW and after the last pause. It includes the time since the last commit, so it drops when a run
    slows down; and it is unknown until `longest` has passed, since many workers commit their first shards at once.
    """
    if not times:
        return None, False
    pause, window = max(MIN_INTERVAL, STALLED_AFTER * longest), max(MIN_INTERVAL, WINDOW * longest)
    if now - times[-1] > pause:
        return None, True
    first = len(times) - 1
    oldest = bisect_left(times, now - window)
    while first > oldest and times[first] - times[first - 1] <= pause:
        first -= 1
    spent, shards = now - times[first], len(times) - 1 - first
    return (shards / spent if shards and spent > 0 and spent >= longest else None), False


def describe(state: State) -> list[str]:
    """The state as lines of text."""
    kind = KINDS[state.job]
    about = "" if state.exact else "about "
    of = (
        f" of {state.shards_total} shards ({state.shards / state.shards_total:.1%})"
        if state.shards_total
        else " shards"
    )
    lines = [f"{state.job} of {state.collection}", f"{state.shards}{of} done, {size(state.bytes)} written"]
    if state.settings is not None:
        lines[-1] += f", with {state.settings} settings so far"
    elif not state.shards_total:
        lines[-1] += "; the total is not known" + (" yet" if kind.plan is Plan.OWN else "")
    if state.latents is not None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in state.rejects_by_reason.items())
        lines.append(
            f"{about}{state.latents} {kind.noun}, {state.rejects} rejects" + (f" ({reasons})" if reasons else "")
        )
    if state.complete:
        lines.append("complete")
    elif state.standing_still:
        lines.append(f"stalled: the last shard was committed {duration(state.idle_seconds or 0)} ago")
    elif state.images_per_second is None:
        lines.append("no estimate yet")
    else:
        eta = "" if state.eta_seconds is None else f", ETA {duration(state.eta_seconds)}"
        lines.append(f"{state.images_per_second:.1f} images/s{eta}")
    if state.slowest:
        lines.append("slowest: " + ", ".join(f"{s['shard']} {s['seconds']:.1f} s" for s in state.slowest))
    if state.unreadable:
        lines.append(f"{len(state.unreadable)} shards can't be read: {', '.join(state.unreadable[:SLOWEST])}")
    lines += [f"failed: shard {s['shard']}: {s['error']}" for s in state.failed_shards[:SLOWEST]]
    if len(state.failed_shards) > SLOWEST:
        lines.append(f"and {len(state.failed_shards) - SLOWEST} more failed")
    return [printable(line) for line in lines]


def as_json(state: State) -> str:
    """The state as one line of JSON."""
    return json.dumps(asdict(state), allow_nan=False)
