"""References -> content-named shards, and the files of a plan.

A plan is made once and only grows: images that are new in the collection come in shards of their own, behind those that
are there, so that no shard changes its name. Each listing that added some is a *generation*.
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

SAMPLES, PATHS = "samples", "paths"  # kinds of shards that are not of an image collection
NAMED = 10  # names said of the inputs that changed or are gone

PIECES_A_FILE = 100_000  # bounds what planning holds in memory
SHARDS_A_GROUP = 64  # bounds what reading a plan does


@dataclass(frozen=True)
class Totals:
    """What a complete plan holds."""

    shards: int
    images: int

    def part(self, shards: int) -> "Totals":
        """Of so many of the shards, about."""
        return Totals(shards, self.images * shards // self.shards)


@dataclass
class Changes:
    """What a new listing says of a plan: images added, files that changed or are gone, the first of their names."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    names: list[str] = field(default_factory=list)

    def lost(self, name: str, gone: bool) -> None:
        self.removed, self.changed = self.removed + gone, self.changed + (not gone)
        if len(self.names) < NAMED:
            self.names.append(name)


def write_plan(run: Folder, collection: Collection, shard_size: int, limit: int | None = None) -> Totals:
    """Lists the collection and writes `plan/*.parquet`. Raises SourceError when there is no image in it."""
    totals = add_pieces(run, collection.kind, list_pieces(collection, shard_size), shard_size, limit)
    if not totals.shards:
        raise SourceError(f"{collection.uri} holds no images")
    return totals


def extend_plan(run: Folder, collection: Collection, shard_size: int) -> tuple[Totals, Changes]:
    """Lists the collection again and adds what is new. What changed or is gone stays in the plan: it is counted."""
    changes = Changes()
    pieces = _new_pieces(list_pieces(collection, shard_size), _planned(run), changes)
    return add_pieces(run, collection.kind, pieces, shard_size), changes


def _new_pieces(listed: Iterable[Piece], planned: Iterable[Piece], changes: Changes) -> Iterator[Piece]:
    """Of the pieces listed, those of files that are not planned; both come by name. A file is the same as a whole or
    not at all: rows of a Parquet file that was rewritten are no new ones."""
    plan = groupby(planned, lambda piece: piece.name)
    known = next(plan, None)
    for name, group in groupby(listed, lambda piece: piece.name):
        while known is not None and known[0] < name:
            changes.lost(known[0], gone=True)
            known = next(plan, None)
        if known is None or known[0] != name:
            for piece in group:
                changes.added += piece.stop - piece.start
                yield piece
            continue
        if list(group) != list(known[1]):
            changes.lost(name, gone=False)
        known = next(plan, None)
    while known is not None:
        changes.lost(known[0], gone=True)
        known = next(plan, None)


def _planned(run: Folder) -> Iterator[Piece]:
    """Every piece of the plan, by name; each generation was listed in that order."""

    def pieces(start: int, stop: int) -> Iterator[Piece]:
        return (piece for shard in _read_files(run, range(start, stop)) for piece in shard.pieces)

    ends = _complete(run)["generations"]
    return heapq.merge(*map(pieces, [0, *ends], ends), key=lambda piece: (piece.name, piece.start))


def add_pieces(run: Folder, kind: str, pieces: Iterable[Piece], shard_size: int, limit: int | None = None) -> Totals:
    """Writes the pieces as shards behind those of the plan, whose totals it returns."""
    before = _complete(run)
    first = files = before["files"]
    total, images, held = before["shards"], before["images"], 0
    shards: list[Shard] = []

    def flush() -> None:
        nonlocal files, shards, held
        with writing(f"{run.uri}/plan"):
            run.put_parquet(f"plan/{files:06d}.parquet", shards_table(shards), row_group_size=SHARDS_A_GROUP)
        files, shards, held = files + 1, [], 0

    for group in pack(pieces, shard_size, limit):
        shard = Shard.of(kind, group)
        shards.append(shard)
        total, images, held = total + 1, images + shard.images, held + len(group)
        if held >= PIECES_A_FILE:
            flush()
    if shards:
        flush()
    if files > first:
        content = {"shards": total, "images": images, "files": files, "generations": [*before["generations"], files]}
        with writing(f"{run.uri}/{COMPLETE}"):
            run.put(COMPLETE, json.dumps(content).encode())
    return Totals(total, images)


def plan_totals(run: Folder) -> Totals | None:
    """None when there is no complete plan."""
    found = _complete(run)
    return Totals(found["shards"], found["images"]) if found["files"] else None


def read_plan(run: Folder) -> Iterator[Shard]:
    """The shards in the plan's order, a few at a time in memory. Raises FileNotFoundError where there is no plan."""
    return _read_files(run, range(json.loads(run.read(COMPLETE))["files"]))


def _read_files(run: Folder, numbers: range) -> Iterator[Shard]:
    for i in numbers:
        try:
            opened = run.parquet_file(f"plan/{i:06d}.parquet")
        except FileNotFoundError:
            raise RunError(f"{run.uri}/plan/{i:06d}.parquet is missing: the run can't go on without its plan") from None
        with opened as file:
            for group in range(file.metadata.num_row_groups):
                for row in file.read_row_group(group).to_pylist():
                    yield shard_of(row)


def _complete(run: Folder) -> dict[str, Any]:
    """What is said of the plan as a whole; of an empty one where there is none."""
    try:
        found = dict(json.loads(run.read(COMPLETE)))
    except FileNotFoundError:
        return {"shards": 0, "images": 0, "files": 0, "generations": []}
    return {"generations": [found["files"]], **found}  # those of a first version have one


def sample_id(index: int) -> str:
    """The image id of a generated sample."""
    return f"{index:09d}"


def frame_id(path: str, frame: int) -> str:
    """The image id of a frame of an interpolation."""
    return f"{path}/{frame:06d}"


def ids_of(shard: Shard) -> Iterator[str]:
    """The image ids that a shard stands for, in its order."""
    for piece in shard.pieces:
        if shard.kind in ONE_EACH:
            yield piece.name
            continue
        for number in range(piece.start, piece.stop):
            if shard.kind == SAMPLES:
                yield sample_id(number)
            else:
                yield frame_id(piece.name, number) if shard.kind == PATHS else f"{piece.name}#{number}"
