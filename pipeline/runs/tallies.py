"""What the committed shards of a run add up to, read once for each block of shards.

Blocks are cut by the plan, which only grows: a shard that is added, removed or written again concerns one block. The
tally of a block is kept in `tallies/`, named by a digest of the block's listing, and a block whose listing has that
digest is not read again.

A kept tally can't be stale. The digest covers the name, size and version of each shard's file and of its rejects' file.
The version is the store's entity tag, which changes with the content; on a disk it is the inode with its times of
modification and of change to the nanosecond, and shards are only ever replaced by new files. It is taken before the
shards are read: if one of them is replaced in between, its tally is kept under a digest that no later listing has. What
is counted is in the digest too, by FORMAT and `about`. Where a listing has no such version nothing is kept.
"""

import gzip
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.runs.entries import entries
from palindrome.pipeline.runs.errors import Errors
from palindrome.pipeline.runs.kinds import REJECTS
from palindrome.pipeline.runs.plan import shard_names
from palindrome.pipeline.runs.schemas import SHARD_KEY
from palindrome.pipeline.storage.folder import Folder

TALLIES = "tallies"
FORMAT = 1  # another number whenever a tally of the same shards is another, or is written otherwise
BLOCK = 1000  # shards of the plan
READS = 32  # shards read at once, of those that are too large to be read whole
WHOLE = 64  # shards read at once, of the others
GROUPS = 64  # row groups of a shard, in memory at once
AT_ONCE = 256  # files of a disk, that a thread asks for their versions


class Stored(NamedTuple):
    """A file as a listing has it. `version` is another whenever the content is; "" if that is not known."""

    size: int
    version: str


class Committed(NamedTuple):
    """A committed shard, and its rejects, if it has some that are to be counted."""

    name: str
    file: Stored
    rejects: Stored | None = None


@dataclass
class Tally:
    """What shards add up to. Tallies of two sets of shards merge to that of both, whatever the order."""

    shards: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """Of the footers."""
    seconds: Counter[str] = field(default_factory=Counter)
    """Of the footers."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Of rejects."""
    errors: defaultdict[str, Errors] = field(default_factory=lambda: defaultdict(Errors))
    """By what tells rows with one image_id apart, such as the number of steps."""

    @classmethod
    def of_footer(cls, file: pq.ParquetFile) -> Self:
        """The tally of one shard, without errors and rejects."""
        found = json.loads(file.metadata.metadata.get(SHARD_KEY, b"{}"))
        return cls(1, Counter(found["counts"]), Counter(found["timings"]))

    def merge(self, other: "Tally") -> None:
        self.shards += other.shards
        self.counts.update(other.counts)
        self.seconds.update(other.seconds)
        self.reasons.update(other.reasons)
        for key, errors in other.errors.items():
            self.errors[key].merge(errors)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "errors": {key: errors.record() for key, errors in self.errors.items()}}

    @classmethod
    def of(cls, record: dict[str, Any]) -> Self:
        """What `record` wrote. Raises an error of any type where it did not."""
        counts, seconds, reasons = (Counter(record[name]) for name in ("counts", "seconds", "reasons"))
        errors = {key: Errors.of(found) for key, found in record["errors"].items()}
        return cls(record["shards"], counts, seconds, reasons, defaultdict(Errors, errors))


Read = Callable[[Committed, pq.ParquetFile], Tally]  # the tally of one shard


def tables(file: pq.ParquetFile, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """The rows of a shard, some thousands at a time, each time with the number of the first."""
    first, groups = 0, range(file.num_row_groups)
    for start in groups[::GROUPS]:
        # In this thread alone: many shards are read at once.
        rows = file.read_row_groups(groups[start : start + GROUPS], columns, use_threads=False)
        yield first, rows
        first += len(rows)


def reasons(run: Folder, sizes: Mapping[str, int]) -> Counter[str]:
    """How many rejects there are for each reason, in shards whose files of rejects have these sizes in bytes."""

    def read(shard: Committed, file: pq.ParquetFile) -> Tally:
        found = pc.value_counts(file.read(["reason"], use_threads=False)["reason"])
        return Tally(reasons=Counter({row["values"]: row["counts"] for row in found.to_pylist()}))

    return _read(run, REJECTS, [Committed(name, Stored(size, "")) for name, size in sizes.items()], read).reasons


def committed_shards(run: Folder, below: str, with_rejects: bool = False) -> list[Committed]:
    """The committed shards of a folder, sorted by name; without their rejects unless these are to be counted too."""
    files, rejects = _stored(run, below), _stored(run, REJECTS) if with_rejects else {}
    return [Committed(name, files[name], rejects.get(name)) for name in sorted(files)]


def tally(
    run: Folder, below: str, shards: Sequence[Committed], read: Read, about: str, plan: Folder, keep: Folder
) -> Tally:
    """The tally of `shards` of a folder, which are part of the plan in `plan`. `read` is called for those of blocks
    whose tally is not kept in the run folder `keep`; `about`, a name for a file, says what it counts."""

    def of(shards: Sequence[Committed]) -> Tally:
        found = _read(run, below, shards, read)
        found.reasons += reasons(run, {shard.name: shard.rejects.size for shard in shards if shard.rejects})
        return found

    if not shards or not all(_is_versioned(shard) for shard in shards):
        return of(shards)
    kept = {name for name in keep.files(TALLIES) if name.startswith(f"{about}-")}
    blocks = _blocks(shards, plan)
    names = [_name(about, block) for block in blocks]
    # That of all blocks is kept too: to repeat a summary changes not even its estimates.
    whole = _name(about, names) if len(names) > 1 else names[0]
    found = _load(keep, whole, kept)
    if found is None:
        found = Tally()
        for block, name, known in zip(blocks, names, in_threads(lambda n: _load(keep, n, kept), names), strict=True):
            if known is None:
                known = of(block)
                _put(keep, name, known)
            found.merge(known)
        if len(names) > 1:
            _put(keep, whole, found)
    for name in kept - {whole, *names}:
        with suppress(OSError):  # then a later summary removes it
            keep.remove(f"{TALLIES}/{name}")
    return found


def _read(run: Folder, below: str, shards: Sequence[Committed], read: Read) -> Tally:
    """Many at once, as an object store takes tens of milliseconds each."""
    found = Tally()

    def path(shard: Committed) -> str:
        return f"{below}/{shard.name}.parquet"

    def one(shard: Committed) -> Tally:
        with run.parquet_file(path(shard), shard.file.size) as file:
            return read(shard, file)

    small = [shard for shard in shards if run.reads_whole(shard.file.size)]
    parts = [small[i : i + WHOLE] for i in range(0, len(small), WHOLE)]
    # In a thread, so that the next arrive while these are counted.
    opened = in_threads(lambda part: run.small_parquet_files([path(shard) for shard in part]), parts, 1)
    for part, files in zip(parts, opened, strict=True):
        for shard, file in zip(part, files, strict=True):
            found.merge(read(shard, file))
    large = [shard for shard in shards if not run.reads_whole(shard.file.size)]
    for its in in_threads(one, large, READS):
        found.merge(its)
    return found


def _blocks(shards: Sequence[Committed], plan: Folder) -> list[list[Committed]]:
    """The shards by their places in the plan, BLOCK places each. What the plan does not have is after its end."""
    wanted = {shard.name.partition("-")[0] for shard in shards}
    places: dict[str, int] = {}
    with suppress(OSError, ValueError):  # without a plan, or with a damaged one, which verify reports, by name
        places = {name: place for place, name in enumerate(shard_names(plan)) if name in wanted}
    end = max(places.values(), default=0) + BLOCK

    def block(numbered: tuple[int, Committed]) -> int:
        number, shard = numbered
        return places.get(shard.name.partition("-")[0], end + number) // BLOCK

    return [[shard for _, shard in group] for _, group in groupby(sorted(enumerate(shards), key=block), key=block)]


def _name(about: str, content: Sequence[Any]) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, about, content]).encode()).hexdigest()[:32]
    return f"{about}-{digest}.json.gz"


def _load(keep: Folder, name: str, kept: Iterable[str]) -> Tally | None:
    """A kept tally; None if there is none, or it can't be read: gzip has a checksum."""
    if name not in kept:
        return None
    try:
        return Tally.of(json.loads(gzip.decompress(keep.read(f"{TALLIES}/{name}"))))
    except Exception:  # damaged files raise errors of many types
        return None


def _put(keep: Folder, name: str, found: Tally) -> None:
    with suppress(OSError):  # the next summary reads the shards again
        keep.put(f"{TALLIES}/{name}", gzip.compress(json.dumps(found.record()).encode(), mtime=0))


def _is_versioned(shard: Committed) -> bool:
    return bool(shard.file.version and (shard.rejects is None or shard.rejects.version))


def _stored(run: Folder, below: str) -> dict[str, Stored]:
    """The files of the shards in a folder, by the shard's name."""
    found = [(entry.shard, entry) for entry in entries(run, below)]
    shards = {shard: Stored(entry.size, entry.tag) for shard, entry in found if shard}
    if not run.is_local:
        return shards
    names = list(shards)
    parts = (names[i : i + AT_ONCE] for i in range(0, len(names), AT_ONCE))
    return dict(item for part in in_threads(lambda part: _on_disk(run, below, part), parts) for item in part)


def _on_disk(run: Folder, below: str, shards: Iterable[str]) -> list[tuple[str, Stored]]:
    """Each file is opened: an NFS client asks the server then, where stat may answer from what it knew."""
    found = []
    for shard in shards:
        with suppress(FileNotFoundError), open(run.path(f"{below}/{shard}.parquet"), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            version = f"{status.st_ino}-{status.st_mtime_ns}-{status.st_ctime_ns}"
            found.append((shard, Stored(status.st_size, version)))
    return found
