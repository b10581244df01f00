"""Collections -> references to images, listed without reading a picture; and the bytes behind each of them.

A collection is files in a folder tree or of a glob, Parquet with a column of images, WebDataset tars, or a list of
URIs.
"""

import json
from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from palindrome.pipeline.base.errors import SourceError
from palindrome.pipeline.images.records import Piece, Shard
from palindrome.pipeline.images.sources import files, lists, metadata, tables, tars, zips
from palindrome.pipeline.images.sources.base import ARROW, FILES, LIST, METADATA, PARQUET, TARS, WEBDATASET
from palindrome.pipeline.images.sources.base import FORMATS as FORMATS
from palindrome.pipeline.images.sources.base import ONE_EACH as ONE_EACH
from palindrome.pipeline.images.sources.base import Collection as Collection
from palindrome.pipeline.images.sources.base import RawImage as RawImage
from palindrome.pipeline.images.sources.listing import Listed, Seen, in_order, list_files, open_store, path_of, say_once
from palindrome.pipeline.images.sources.recognise import ENDINGS, Tally, recognised
from palindrome.pipeline.images.sources.runs import RunFolders
from palindrome.pipeline.storage import lfs
from palindrome.pipeline.storage.folder import Options, current_options, open_fs

TABULAR = (PARQUET, ARROW)
CAPTION = "txt"  # kept of pictures: what the text file of the same name holds
HEADS = 10_000  # names by which a collection is recognised


def open_collection(
    uri: str,
    *,
    kind: str | None = None,
    image_column: str | None = None,
    keep: Sequence[str] = (),
    reserved: Container[str] = (),
    extensions: Sequence[str] = (),
    storage_options: Options | None = None,
) -> Collection:
    """Recognises what `uri` is, unless `kind` says it, by the names and sizes of the files listed first: the kind of
    those that hold the data. Of image files every one is an input; `extensions` narrows them. What is beside tars and
    Parquet is passed over.

    `image_column` names the column of images or URIs, or the extension of a tar's members; else it is found. `keep`
    names further columns, or a tar's other members; none of the `reserved` names, which the run's rows have already.
    Raises SourceError.
    """
    options = current_options() if storage_options is None else storage_options
    uri = zips.inside(uri, options)
    fs, seen = open_store(uri, options)[0], Seen()
    names = list_files(uri, options, extensions, seen)
    runs = RunFolders(fs, seen)
    heads = sorted(runs.without(list(islice(names, HEADS))))
    if not heads:
        ending = f" that end in {', '.join(extensions)}" if extensions else ""
        raise SourceError(f"{uri} holds no files{ending}" + _in_brackets(_passed_over(seen, runs)))
    for name in keep:
        if name in reserved:
            raise SourceError(f"column {name!r} has the name of a column that every latent row has", "keep", name)
    found = kind or recognised(fs, _tally(heads), uri, image_column)
    column, kept = image_column, ()
    every = chain(heads, runs.without(names))
    if found == FILES:
        kept = _described(fs, every, seen, uri, image_column, keep)
    elif found in TABULAR:
        column, kept = tables.columns(fs, _some(every, found, uri), uri, image_column, keep)
    elif found == WEBDATASET:
        column, kept = tars.columns(fs, _some(every, found, uri), uri, image_column, keep)
    elif found == LIST:
        files = [file.uri for file in lists.chosen(sorted(every), uri)]
        column, kept = lists.columns(fs, files, uri, image_column, keep)
    return Collection(uri, found, column, kept, tuple(extensions), options, kind is None)


def list_pieces(collection: Collection, shard_size: int) -> Iterator[Piece]:
    """The collection as pieces of at most `shard_size` images, in the order of their names."""
    fs, _ = open_fs(collection.uri, collection.storage_options)
    seen, tally = Seen(), Tally()
    listed = _in_order(fs, collection, seen, tally)
    if collection.kind in TABULAR:
        yield from tables.pieces(fs, collection, _with(listed, ENDINGS[collection.kind]), shard_size)
    elif collection.kind == WEBDATASET:
        yield from tars.pieces(fs, collection, _with(listed, TARS), shard_size)
    elif collection.kind == LIST:
        files = lists.chosen(list(listed), collection.uri)
        entries = chain.from_iterable(lists.listed(fs, collection, file.uri) for file in files)
        yield from lists.pieces(in_order(entries))
    else:
        first = list(islice(listed, 1))  # by now all are listed
        inputs: Iterator[Listed] = chain(first, listed)
        if files := metadata.of_pictures(fs, seen.metadata if tally.files[FILES] else []):
            say_once(f"passed over in {collection.uri}: files of metadata: {len(files)}")
            inputs = metadata.described(fs, collection, files, inputs)
        elif collection.kept:
            inputs = _without_captions(inputs, collection.uri)
        yield from (Piece(f.uri, f.name, f.size, f.version, kept=f.kept if collection.kept else "") for f in inputs)


def _without_captions(files: Iterable[Listed], uri: str) -> Iterator[Listed]:
    passed = 0
    for file in files:
        if file.name.lower().endswith(f".{CAPTION}"):
            passed += 1
        else:
            yield file
    if passed:
        say_once(f"passed over in {uri}: files of captions: {passed}")


def _in_order(fs: Any, collection: Collection, seen: Seen, tally: Tally) -> Iterator[Listed]:
    """The collection's files by name. Before the first of them comes, all are listed: what is passed over is said then,
    and a collection that was recognised by its first names is looked at as a whole."""
    listed = list_files(collection.uri, collection.storage_options, collection.extensions, seen)
    files = in_order(tally.adding(listed))
    first = list(islice(files, 1))
    runs = RunFolders(fs, seen)
    rest = runs.without(chain(first, files))
    first = list(islice(rest, 1))
    if not runs.names:  # else it counts what is in them, too
        if collection.recognised:
            _check_kind(fs, tally, collection)
        passed = _passed_over(seen, runs, tally, collection.kind)
    else:
        passed = _passed_over(seen, runs)
    if seen.delta:
        say_once(f"warning: {collection.uri} is a Delta table: files that its log has removed are read as well")
    if passed:
        say_once(f"passed over in {collection.uri}: {passed}")
    yield from chain(first, rest)


def _check_kind(fs: Any, tally: Tally, collection: Collection) -> None:
    kind = recognised(fs, tally, collection.uri, collection.image_column)
    if kind != collection.kind:
        message = f"{collection.uri} looked like {collection.kind} by the first names listed, and by all like {kind}"
        raise SourceError(f"{message}; say which it is", "format")


def _passed_over(seen: Seen, runs: RunFolders, tally: Tally | None = None, kind: str = FILES) -> str:
    """What of a listing is no input, in words."""
    counts = {"names that begin with . or _": seen.hidden, "folders of runs": len(runs.names)}
    if tally is not None and kind != FILES:
        of_kind = tally.files[kind] if kind != LIST else sum(tally.files[k] for k in (LIST, *TABULAR))
        counts[f"files beside the {kind}"] = tally.files.total() - of_kind
    return ", ".join(f"{words}: {count}" for words, count in counts.items() if count)


def _in_brackets(words: str) -> str:
    return f" (passed over: {words})" if words else ""


def _tally(files: Iterable[Listed]) -> Tally:
    tally = Tally()
    for file in files:
        tally.add(file)
    return tally


def read_raw(collection: Collection, shard: Shard) -> Iterator[RawImage]:
    """The shard's inputs, one for each that the plan lists, in its order. Raises OSError where a store is out of order;
    what is wrong with an input is said of that input."""
    fs, _ = open_fs(collection.uri, collection.storage_options)
    for raw in _read(fs, collection, shard):
        if raw.data is not None and lfs.is_pointer(raw.data):
            raw = replace(raw, data=None, reason="not_an_image", detail=lfs.WORDS)
        yield raw


def _read(fs: Any, collection: Collection, shard: Shard) -> Iterator[RawImage]:
    zips.prepare(fs)
    if shard.kind == LIST:
        yield from lists.read(collection, shard.pieces)
    elif shard.kind == FILES:
        store = zips.Files(fs) if "zip" in fs.protocol else fs
        described = any(piece.kept for piece in shard.pieces)
        beside = [] if described else [field.name for field in collection.kept]
        local = isinstance(fs, LocalFileSystem)
        found = files.read_files(shard.pieces, lambda p: (store, path_of(fs, p.uri)), local, beside=beside)
        for piece, raw in zip(shard.pieces, found, strict=True):
            raw.kept.update(json.loads(piece.kept) if piece.kept else {})
            yield raw
    else:
        read = tables.read if shard.kind in TABULAR else tars.read
        for piece in shard.pieces:
            yield from read(fs, piece, collection)


def _described(
    fs: Any, files: Iterable[Listed], seen: Seen, uri: str, image_column: str | None, keep: Sequence[str]
) -> tuple[pa.Field, ...]:
    """The fields to keep of what stands beside pictures."""
    found: list[Listed] = []
    if keep and not image_column:
        deque(files, 0)  # all are listed then
        found = metadata.of_pictures(fs, seen.metadata)
    if found:
        return metadata.columns(fs, found, uri, keep)
    if list(keep) == [CAPTION] and not image_column:
        return (pa.field(CAPTION, pa.string()),)
    if keep or image_column:
        column, setting = (keep[0], "keep") if keep else (image_column, "image_column")
        words = f"{uri} holds files, without columns but {CAPTION}: there is no {' or '.join(METADATA)}"
        raise SourceError(f"column {column!r} is asked for, and {words} with a column file_name", setting, column)
    return ()


def _some(files: Iterable[Listed], kind: str, uri: str) -> Iterator[str]:
    """The files of a kind. Raises SourceError where there is none."""
    found = _with(files, ENDINGS[kind])
    first = next(found, None)
    if first is None:
        raise SourceError(f"{uri} has no file that ends in {' or '.join(ENDINGS[kind])}", "format")
    return (file.uri for file in chain([first], found))


def _with(listed: Iterable[Listed], endings: tuple[str, ...]) -> Iterator[Listed]:
    return (file for file in listed if file.name.lower().endswith(endings))
