"""What a run folder says of its run: how far it is, how fast it goes, what went wrong. No Ray and no model are needed.

A listing gives the shards that are done, their bytes and when each was committed. Counts and seconds stand in the
footers; of a run of very many shards only some are read, and the counts are estimates: shards are named by hashes, so
the first so many by name are a fair sample.
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

READ = 4096  # footers read, at most; of more shards these are a sample
NEWEST = 32  # shards of which the pace is learnt
SLOWEST = 5
PATIENCE = 3  # times the longest recent shard's time: a run so long silent stands still
WINDOW = 10  # times that: the pace is of the last so long
AT_LEAST = 60.0  # seconds, both


@dataclass(frozen=True)
class State:
    """What `palindrome status` says; None is unknown."""

    run: str
    job: str
    collection: str
    complete: bool
    shards: int
    shards_total: int | None  # of a sweep, the folder does not say under how many settings
    settings: int | None  # of a sweep: those that have been begun
    images_total: int | None
    latents: int | None
    rejects: int | None
    rejects_by_reason: dict[str, int]
    exact: bool  # else the counts above are estimates
    bytes: int
    images_per_second: float | None
    eta_seconds: float | None
    idle_seconds: float | None  # since the last commit
    standing_still: bool
    slowest: list[dict[str, Any]]
    unreadable: list[str]
    failed_shards: list[dict[str, Any]]


class Footer(NamedTuple):
    """Of one committed shard; `counts` is None where it can't be read."""

    counts: dict[str, int] | None
    seconds: float
    reasons: dict[str, int]


class StateReader:
    """Reads a run's state, again and again for one who watches: what was read of a shard is not read twice."""

    def __init__(self, run: Folder, manifest: Manifest, most: int = READ) -> None:
        self.run, self.manifest, self.most = run, manifest, most
        self.kind = manifest.kind
        self.known: dict[Entry, Footer] = {}

    def read(self, now: float | None = None) -> State:
        shards = [entry for entry in entries(self.run, self.kind.folder) if entry.shard]
        refused = {entry.shard: entry.size for entry in entries(self.run, REJECTS) if entry.shard}
        plan, collection = self._plan()
        total = plan.shards if plan and not self.kind.per_setting else None
        summary, current = self._summary(shards)
        complete = bool(shards) and (current if total is None else len(shards) >= total)

        sample = heapq.nsmallest(self.most, shards) if len(shards) > self.most else shards
        newest = heapq.nlargest(NEWEST, (e for e in shards if e.modified is not None), key=lambda e: e.modified or 0.0)
        footers = self._footers([*sample, *newest], refused.keys())
        read = [footers[e] for e in sample if footers[e].counts is not None]
        scale = len(shards) / len(read) if read else 0.0
        rejects = self._rejects(sample, footers)
        images = sum((f.counts or {}).get("images", 0) for f in read)
        latents = sum((f.counts or {}).get("latents", (f.counts or {}).get("images", 0)) for f in read)
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
        rate, still = pace(times, times[-1] if complete and times else now, longest)
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
            bytes=sum(e.size for e in shards) + sum(refused.values()),
            images_per_second=rate * images / len(read) if rate and read else None,
            eta_seconds=left / rate if rate and left and not complete else None,
            idle_seconds=now - times[-1] if times else None,
            standing_still=still and not complete,
            slowest=[{"shard": name, "seconds": seconds} for seconds, name in timed[:SLOWEST]],
            unreadable=sorted(str(e.shard) for e, f in footers.items() if f.counts is None),
            failed_shards=[s for s in summary.get("failed_shards", []) if s["shard"] not in done],
        )

    def _plan(self) -> tuple[Totals | None, str]:
        """What there is to do, None where that is not known (yet), and of what."""
        uri = self.manifest.source
        if self.kind.plan is Plan.OWN:
            return plan_totals(self.run), uri
        latents = Folder(uri)
        try:
            plan, done = plan_totals(latents), sum(e.shard is not None for e in entries(latents, LATENTS))
        except Exception:  # of whichever store: it may be one that this machine can't reach
            return None, uri
        return plan.part(done) if plan and done else None, uri

    def _summary(self, shards: Sequence[Entry]) -> tuple[dict[str, Any], bool]:
        """`summary.json`, {} where there is none, and whether it is of all the shards that are there now."""
        try:
            summary = json.loads(self.run.read("summary.json"))
            modified = modified_of(self.run.fs.info(self.run.path("summary.json")))
        except (FileNotFoundError, ValueError):
            return {}, False
        if not isinstance(summary, dict):
            return {}, False
        newest = max((entry.modified or 0.0 for entry in shards), default=0.0)
        of_all = summary.get("shards", len(shards)) == len(shards)
        return summary, of_all and (modified is None or modified >= newest) and not summary.get("failed_shards")

    def _footers(self, shards: Iterable[Entry], refused: Iterable[str | None]) -> dict[Entry, Footer]:
        refused = set(refused)

        def read(entry: Entry) -> Footer:
            found = self.known.get(entry)
            if found is None or found.counts is None:  # a store that did not answer may do so now
                found = _footer(self.run, self.kind.folder, str(entry.shard), entry.shard in refused)
            return found

        wanted = list(dict.fromkeys(shards))
        self.known = dict(zip(wanted, in_threads(read, wanted), strict=True))
        return self.known

    def _rejects(self, sample: Sequence[Entry], footers: dict[Entry, Footer]) -> Counter[str]:
        """By reason. A sweep meets each again under every setting: it counts once."""
        by_shard = {self.kind.planned(str(e.shard)): e for e in sample}
        found: Counter[str] = Counter()
        for entry in by_shard.values():
            found.update(footers[entry].reasons)
        return found


def _footer(run: Folder, below: str, shard: str, refused: bool) -> Footer:
    try:
        about = shard_metadata(run, shard, below)
        counts, seconds = dict(about["counts"]), float(about["timings"]["seconds"])
        reasons: Counter[str] = Counter()
        if refused and counts.get("rejects"):
            reasons.update(run.read_parquet(f"{REJECTS}/{shard}.parquet", ["reason"])["reason"].to_pylist())
        return Footer(counts, seconds, dict(reasons))
    except Exception:  # damage shows as errors of many kinds; verify says what it is
        return Footer(None, 0.0, {})


def pace(times: Sequence[float], now: float, longest: float) -> tuple[float | None, bool]:
    """Shards a second up to `now`, None where there is no telling yet, and whether the run stands still.

    `times` are the commits', sorted, and `longest` the time that one of the last shards took. Counted are those of the
    last minutes, without what lies before a pause. As the time since the last commit counts, a run that slows down
    shows it; many workers' shards, committed all at once, are no pace before a shard's time is over.
    """
    if not times:
        return None, False
    patience, window = max(AT_LEAST, PATIENCE * longest), max(AT_LEAST, WINDOW * longest)
    if now - times[-1] > patience:
        return None, True
    first = len(times) - 1
    oldest = bisect_left(times, now - window)
    while first > oldest and times[first] - times[first - 1] <= patience:
        first -= 1
    spent, shards = now - times[first], len(times) - 1 - first
    return (shards / spent if shards and spent > 0 and spent >= longest else None), False


def describe(state: State) -> list[str]:
    """The state in lines for people."""
    kind = KINDS[state.job]
    about = "" if state.exact else "about "
    of = (
        f" of {state.shards_total} shards ({state.shards / state.shards_total:.1%})"
        if state.shards_total
        else " shards"
    )
    lines = [f"{state.job} of {state.collection}", f"{state.shards}{of} done, {size(state.bytes)} written"]
    if state.settings is not None:
        lines[-1] += f", under {state.settings} settings so far"
    elif not state.shards_total:
        lines[-1] += "; how many there are to do is not known" + (" yet" if kind.plan is Plan.OWN else "")
    if state.latents is not None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in state.rejects_by_reason.items())
        lines.append(
            f"{about}{state.latents} {kind.noun}, {state.rejects} rejects" + (f" ({reasons})" if reasons else "")
        )
    if state.complete:
        lines.append("complete")
    elif state.standing_still:
        lines.append(f"stands still: the last shard was committed {duration(state.idle_seconds or 0)} ago")
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
    """One line."""
    return json.dumps(asdict(state), allow_nan=False)
