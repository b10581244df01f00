"""The plan of a run: pieces of the input, packed into shards that are named by their content.

A plan is append-only: images that are new in the collection get shards of their own after the existing ones, so that no
shard changes its name. Each listing that added shards is a *generation*.
"""

import heapq
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from palindrome.pipeline.base.errors import RunError, writing
from palindrome.pipeline.images.records import Piece, Shard, pack
from palindrome.pipeline.images.sources import ONE_EACH, Collection, SourceError, list_pieces
from palindrome.pipeline.runs.manifest import COMPLETE
from palindrome.pipeline.runs.schemas import shard_of, shards_table
from palindrome.pipeline.storage.folder import Folder

SAMPLES, PATHS = "samples", "paths"  # kinds of shards whose input is no image collection
MAX_NAMES = 10  # of changed or removed files, in Changes

PIECES_PER_FILE = 100_000  # bounds the memory for writing a plan
SHARDS_PER_ROW_GROUP = 64  # bounds the memory for reading it


@dataclass(frozen=True)
class Totals:
    """The size of a complete plan."""

    shards: int
    images: int

    def part(self, shards: int) -> "Totals":
        """The approximate size of a part with that many shards."""
        return Totals(shards, self.images * shards // self.shards)


@dataclass
class Changes:
    """What a new listing changes: images added, files changed or removed since, and the first of those files' names."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    names: list[str] = field(default_factory=list)

    def add_lost(self, name: str, removed: bool) -> None:
        """Counts a planned file that was removed, or has changed."""
        self.removed, self.changed = self.removed + removed, self.changed + (not removed)
        if len(self.names) < MAX_NAMES:
            self.names.append(name)


def write_plan(run: Folder, collection: Collection, shard_size: int, limit: int | None = None) -> Totals:
    """Lists the collection and writes `plan/*.parquet`. Raises SourceError if it has no images."""
    totals = add_pieces(run, collection.kind, list_pieces(collection, shard_size), shard_size, limit)
    if not totals.shards:
        raise SourceError(f"{collection.uri} holds no images")
    return totals


def extend_plan(run: Folder, collection: Collection, shard_size: int) -> tuple[Totals, Changes]:
    """Lists the collection again and appends what is new. Files that changed or were removed stay in the plan and are
    counted in the Changes."""
    changes = Changes()
    pieces = _new_pieces(list_pieces(collection, shard_size), _planned(run), changes)
    return add_pieces(run, collection.kind, pieces, shard_size), changes


def _new_pieces(listed: Iterable[Piece], planned: Iterable[Piece], changes: Changes) -> Iterator[Piece]:
    """The listed pieces of files that are not in the plan; both iterables are sorted by name. Files are compared as a
    whole: the rows of a rewritten Parquet file are a change, not new pieces."""
    plan = groupby(planned, lambda piece: piece.name)
    known = next(plan, None)
    for name, group in groupby(listed, lambda piece: piece.name):
        while known is not None and known[0] < name:
            changes.add_lost(known[0], removed=True)
            known = next(plan, None)
        if known is None or known[0] != name:
            for piece in group:
                changes.added += piece.stop - piece.start
                yield piece
            continue
        if list(group) != list(known[1]):
            changes.add_lost(name, removed=False)
        known = next(plan, None)
    while known is not None:
        changes.add_lost(known[0], removed=True)
        known = next(plan, None)


def _planned(run: Folder) -> Iterator[Piece]:
    """Every piece of the plan, sorted by name, as each generation already is."""

    def pieces(start: int, stop: int) -> Iterator[Piece]:
        return (piece for shard in _read_files(run, range(start, stop)) for piece in shard.pieces)

    ends = _complete(run)["generations"]
    return heapq.merge(*map(pieces, [0, *ends], ends), key=lambda piece: (piece.name, piece.start))


def add_pieces(run: Folder, kind: str, pieces: Iterable[Piece], shard_size: int, limit: int | None = None) -> Totals:
    """Packs the pieces into shards and appends them to the plan. Returns the totals of the whole plan."""
    before = _complete(run)
    first = files = before["files"]
    total, images, buffered = before["shards"], before["images"], 0
    shards: list[Shard] = []

    def flush() -> None:
        nonlocal files, shards, buffered
        with writing(f"{run.uri}/plan"):
            run.put_parquet(f"plan/{files:06d}.parquet", shards_table(shards), row_group_size=SHARDS_PER_ROW_GROUP)
        files, shards, buffered = files + 1, [], 0

    for group in pack(pieces, shard_size, limit):
        shard = Shard.of(kind, group)
        shards.append(shard)
        total, images, buffered = total + 1, images + shard.images, buffered + len(group)
        if buffered >= PIECES_PER_FILE:
            flush()
    if shards:
        flush()
    if files > first:
        content = {"shards": total, "images": images, "files": files, "generations": [*before["generations"], files]}
        with writing(f"{run.uri}/{COMPLETE}"):
            run.put(COMPLETE, json.dumps(content).encode())
    return Totals(total, images)


def plan_totals(run: Folder) -> Totals | None:
    """The size of the plan; None if there is no complete one."""
    found = _complete(run)
    return Totals(found["shards"], found["images"]) if found["files"] else None


def read_plan(run: Folder) -> Iterator[Shard]:
    """The shards in the plan's order, one row group in memory at a time. Raises FileNotFoundError if there is no
    plan."""
    return _read_files(run, range(json.loads(run.read(COMPLETE))["files"]))


def shard_names(run: Folder) -> Iterator[str]:
    """The names of the shards in the plan's order, without reading the rest. Raises FileNotFoundError if there is no
    plan."""
    for i in range(json.loads(run.read(COMPLETE))["files"]):
        yield from run.read_parquet(f"plan/{i:06d}.parquet", ["name"])["name"].to_pylist()


def _read_files(run: Folder, numbers: range) -> Iterator[Shard]:
    for i in numbers:
        try:
            opened = run.parquet_file(f"plan/{i:06d}.parquet")
        except FileNotFoundError:
            raise RunError(f"{run.uri}/plan/{i:06d}.parquet is missing: the run can't be resumed without it") from None
        with opened as file:
            for group in range(file.metadata.num_row_groups):
                for row in file.read_row_group(group).to_pylist():
                    yield shard_of(row)


def _complete(run: Folder) -> dict[str, Any]:
    """The content of COMPLETE; that of an empty plan if there is none."""
    try:
        found = dict(json.loads(run.read(COMPLETE)))
    except FileNotFoundError:
        return {"shards": 0, "images": 0, "files": 0, "generations": []}
    return {"generations": [found["files"]], **found}  # plans of the first version are one generation


def sample_id(index: int) -> str:
    """The image id of a generated sample."""
    return f"{index:09d}"


def frame_id(path: str, frame: int) -> str:
    """The image id of a frame of an interpolation."""
    return f"{path}/{frame:06d}"


def ids_of(shard: Shard) -> Iterator[str]:
    """The image ids of a shard, in its order."""
    for piece in shard.pieces:
        if shard.kind in ONE_EACH:
            yield piece.name
            continue
        for number in range(piece.start, piece.stop):
            if shard.kind == SAMPLES:
                yield sample_id(number)
            else:
                yield frame_id(piece.name, number) if shard.kind == PATHS else f"{piece.name}#{number}"
