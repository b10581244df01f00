"""References -> content-named shards, and the files of a plan."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from pipeline.manifest import COMPLETE
from pipeline.records import Piece, Shard, shard_of, shards_table
from pipeline.sources import Collection, SourceError, list_pieces
from pipeline.storage import Folder

PIECES_A_FILE = 100_000  # bounds what planning and reading a plan hold in memory


@dataclass(frozen=True)
class Totals:
    """What a complete plan holds."""

    shards: int
    images: int


def pack(pieces: Iterable[Piece], shard_size: int, limit: int | None = None) -> Iterator[tuple[Piece, ...]]:
    """Consecutive pieces, as many to a group as stay within shard_size images; only the first `limit` images."""
    group: list[Piece] = []
    count, left = 0, limit
    for piece in pieces:
        if left is not None:
            piece = replace(piece, stop=min(piece.stop, piece.start + left))
            left -= piece.stop - piece.start
        size = piece.stop - piece.start
        if group and count + size > shard_size:
            yield tuple(group)
            group, count = [], 0
        if size:
            group.append(piece)
            count += size
        if left == 0:
            break
    if group:
        yield tuple(group)


def write_plan(run: Folder, collection: Collection, shard_size: int, limit: int | None = None) -> Totals:
    """Lists the collection and writes `plan/*.parquet`. Raises SourceError when there is no image in it."""
    shards: list[Shard] = []
    files = total = images = held = 0

    def flush() -> None:
        nonlocal files, shards, held
        run.put_parquet(f"plan/{files:06d}.parquet", shards_table(shards))
        files, shards, held = files + 1, [], 0

    for pieces in pack(list_pieces(collection, shard_size), shard_size, limit):
        shard = Shard.of(collection.kind, pieces)
        shards.append(shard)
        total, images, held = total + 1, images + shard.images, held + len(pieces)
        if held >= PIECES_A_FILE:
            flush()
    if not total:
        raise SourceError(f"{collection.uri} holds no images")
    if shards:
        flush()
    run.put(COMPLETE, json.dumps({"shards": total, "images": images, "files": files}).encode())
    return Totals(total, images)


def plan_totals(run: Folder) -> Totals | None:
    """None when there is no complete plan."""
    try:
        content = json.loads(run.read(COMPLETE))
    except FileNotFoundError:
        return None
    return Totals(content["shards"], content["images"])


def read_plan(run: Folder) -> Iterator[Shard]:
    """The shards in the plan's order, one plan file in memory at a time."""
    for i in range(json.loads(run.read(COMPLETE))["files"]):
        for row in run.read_parquet(f"plan/{i:06d}.parquet").to_pylist():
            yield shard_of(row)
