"""Collections -> references to images, listed without reading a picture; and the bytes behind each of them.

A collection is files in a folder tree or of a glob, Parquet with a column of images, WebDataset tars, or a list of
URIs.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from palindrome.pipeline.base.errors import SourceError
from palindrome.pipeline.images.records import Piece, Shard
from palindrome.pipeline.images.sources import files, lists, tables, tars
from palindrome.pipeline.images.sources.base import FILES, LIST, PARQUET, TABLES, TARS, WEBDATASET
from palindrome.pipeline.images.sources.base import FORMATS as FORMATS
from palindrome.pipeline.images.sources.base import ONE_EACH as ONE_EACH
from palindrome.pipeline.images.sources.base import Collection as Collection
from palindrome.pipeline.images.sources.base import RawImage as RawImage
from palindrome.pipeline.images.sources.listing import Listed, Seen, in_order, list_files, open_store, path_of, say_once
from palindrome.pipeline.images.sources.recognise import Tally, recognised
from palindrome.pipeline.images.sources.runs import RunFolders
from palindrome.pipeline.storage.folder import Options, current_options, open_fs

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
    fs, seen = open_store(uri, options)[0], Seen()
    names = list_files(uri, options, extensions, seen)
    runs = RunFolders(fs, seen)
    heads = sorted(runs.without(list(islice(names, HEADS))))
    if not heads:
        ending = f" that end in {', '.join(extensions)}" if extensions else ""
        raise SourceError(f"{uri} holds no files{ending}" + _in_brackets(_passed_over(seen, runs)))
    for name in keep:
        if name in reserved:
            raise SourceError(f"column {name!r} has the name of a column that every latent row has", "keep")
    found = kind or recognised(fs, _tally(heads), uri, image_column)
    if found == FILES and (keep or image_column):
        column, setting = (keep[0], "keep") if keep else (image_column, "image_column")
        raise SourceError(f"column {column!r} is asked for, and {uri} holds files, without columns", setting)
    column, kept = image_column, ()
    if found == PARQUET:
        some = _some(heads, runs.without(names), TABLES, uri)
        column, kept = tables.columns(fs, some[0], uri, image_column, keep)
    elif found == WEBDATASET:
        column, kept = tars.columns(fs, _some(heads, runs.without(names), TARS, uri), uri, image_column, keep)
    elif found == LIST:
        column, kept = lists.columns(fs, _only(heads, uri), uri, image_column, keep)
    return Collection(uri, found, column, kept, tuple(extensions), options, kind is None)


def list_pieces(collection: Collection, shard_size: int) -> Iterator[Piece]:
    """The collection as pieces of at most `shard_size` images, in the order of their names."""
    fs, _ = open_fs(collection.uri, collection.storage_options)
    listed = _in_order(fs, collection)
    if collection.kind == PARQUET:
        yield from tables.pieces(fs, collection, _with(listed, TABLES), shard_size)
    elif collection.kind == WEBDATASET:
        yield from tars.pieces(fs, collection, _with(listed, TARS), shard_size)
    elif collection.kind == LIST:
        entries = lists.listed(fs, collection, _only(listed, collection.uri))
        yield from lists.pieces(in_order(entries))
    else:
        yield from (Piece(file.uri, file.name, file.size, file.version) for file in listed)


def _in_order(fs: Any, collection: Collection) -> Iterator[Listed]:
    """The collection's files by name. Before the first of them comes, all are listed: what is passed over is said then,
    and a collection that was recognised by its first names is looked at as a whole."""
    seen, tally = Seen(), Tally()
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
        counts[f"files beside the {kind}"] = tally.files.total() - tally.files[kind]
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
    if shard.kind == LIST:
        yield from lists.read(collection, shard.pieces)
    elif shard.kind == FILES:
        yield from files.read_files(shard.pieces, lambda p: (fs, path_of(fs, p.uri)), isinstance(fs, LocalFileSystem))
    else:
        read = tables.read if shard.kind == PARQUET else tars.read
        for piece in shard.pieces:
            yield from read(fs, piece, collection)


def _only(listed: Iterable[Listed], uri: str) -> str:
    first, *others = islice(listed, 2)
    if others:
        raise SourceError(f"{uri} is several files, and a list of URIs is one")
    return first.uri


def _some(heads: Iterable[Listed], others: Iterator[Listed], endings: tuple[str, ...], uri: str) -> list[str]:
    """Those of the heads that end so, or the first of the others."""
    found = list(_with(heads, endings)) or list(islice(_with(others, endings), 1))
    if not found:
        raise SourceError(f"{uri} has no file that ends in {' or '.join(endings)}", "format")
    return [file.uri for file in found]


def _with(listed: Any, endings: tuple[str, ...]) -> Iterator[Listed]:
    return (file for file in listed if file.name.lower().endswith(endings))
