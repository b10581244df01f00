"""A set of pictures as a person names it: a collection, or a run, whose pictures or whose input is meant."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from palindrome.pipeline.base.errors import ManifestError, SettingError
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.records import Piece
from palindrome.pipeline.images.sources import Collection, list_pieces, open_collection
from palindrome.pipeline.images.sources.base import FILES, PARQUET, WEBDATASET
from palindrome.pipeline.images.sources.tables import open_table
from palindrome.pipeline.runs.exports import TABLES
from palindrome.pipeline.runs.kinds import DATA, IMAGES, WITH_PICTURES
from palindrome.pipeline.runs.manifest import Manifest, read_manifest
from palindrome.pipeline.runs.plan import read_plan
from palindrome.pipeline.storage.folder import Folder, open_fs

NATIVE = Preprocess(0)  # the images as they are


@dataclass(frozen=True)
class Pictures:
    """Where the pictures are, how they are read, and the pieces of at most so many images that they come in."""

    collection: Collection
    how: Preprocess
    pieces: Callable[[int], Iterator[Piece]]


def open_pictures(uri: str, how: Preprocess | None, steps: int | None, image_column: str | None = None) -> Pictures:
    """The pictures of a run that has some (kinds.WITH_PICTURES), or an export of one; the images of an
    encode run, as it read them; or a collection. `how` is a preprocessing of one's own. Of a run with several numbers
    of steps, only the pictures of `steps`. Raises ManifestError for another run, SettingError, and SourceError."""
    folder = Folder(uri)
    manifest = read_manifest(folder) if folder.exists("run.json") else None
    if manifest is None:
        return _of_collection(open_collection(uri, image_column=image_column), how or NATIVE)
    if manifest.job == "encode":
        collection, made = Collection(**manifest.content["collection"]), Preprocess(**manifest.content["preprocess"])
        return Pictures(collection, how or made, lambda _: _planned(folder))
    if manifest.job == "export":
        form = manifest.config["format"]
        kind = {"webdataset": WEBDATASET, "parquet": PARQUET}.get(form, FILES)
        inside = f"{uri.rstrip('/')}/{DATA if form in TABLES else IMAGES}"
        return _of_collection(open_collection(inside, kind=kind), how or NATIVE)
    if manifest.job in WITH_PICTURES:
        return _of_run(uri, manifest, how or NATIVE, steps)
    raise ManifestError(f"{uri} is a run of {manifest.job}, which has no pictures")


def _of_collection(collection: Collection, how: Preprocess) -> Pictures:
    return Pictures(collection, how, lambda size: list_pieces(collection, size))


def _planned(run: Folder) -> Iterator[Piece]:
    for shard in read_plan(run):
        yield from shard.pieces


def _of_run(uri: str, manifest: Manifest, how: Preprocess, steps: int | None) -> Pictures:
    kind = manifest.kind
    there = [len(levels) - 1 for levels in manifest.ladders] if "steps" in kind.variants else []
    if steps is not None and steps not in there:
        raise SettingError(f"{uri} holds images of {' and '.join(map(str, there)) or 'no'} steps, not {steps}", "steps")
    if steps is None and len(there) > 1:
        raise SettingError(f"{uri} holds images of {' and '.join(map(str, there))} steps: say which", "steps")
    found = f"{uri.rstrip('/')}/{kind.folder}"
    if not Folder(uri).files(kind.folder):
        raise ManifestError(f"{uri} holds no images yet")
    collection = Collection(found, PARQUET, "image", (pa.field("image_id", pa.string()),))

    def pieces(size: int) -> Iterator[Piece]:
        listed = list_pieces(collection, size)
        return listed if len(there) < 2 else (part for piece in listed for part in _at(collection, piece, steps))

    return Pictures(collection, how, pieces)


def _at(collection: Collection, piece: Piece, steps: int | None) -> Iterator[Piece]:
    """The rows of a piece that have that number of steps, as pieces."""
    fs, _ = open_fs(collection.uri, collection.storage_options)
    with open_table(fs, piece.uri) as table:
        batches = list(table.batches(1024, ["steps"], piece))
    there = np.concatenate([[False], *(_equal(batch, steps) for batch in batches), [False]])
    edges = np.flatnonzero(there[1:] != there[:-1]).reshape(-1, 2)
    yield from (replace(piece, start=piece.start + int(a), stop=piece.start + int(b)) for a, b in edges)


def _equal(batch: pa.RecordBatch, steps: int | None) -> Sequence[bool]:
    return [value == steps for value in batch.column("steps").to_pylist()]
