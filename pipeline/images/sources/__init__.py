"""Collections -> references to images, listed without reading a picture; and the bytes behind each of them.

A collection is files in a folder tree or of a glob, Parquet with a column of images, WebDataset tars, or a list of
URIs.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from palindrome.pipeline.base.errors import SourceError
from palindrome.pipeline.images.records import Piece, Shard
from palindrome.pipeline.images.sources import files, lists, tables, tars
from palindrome.pipeline.images.sources.base import FILES, LIST, LISTS, PARQUET, PICTURES, TABLES, TARS, WEBDATASET
from palindrome.pipeline.images.sources.base import FORMATS as FORMATS
from palindrome.pipeline.images.sources.base import ONE_EACH as ONE_EACH
from palindrome.pipeline.images.sources.base import Collection as Collection
from palindrome.pipeline.images.sources.base import RawImage as RawImage
from palindrome.pipeline.images.sources.listing import Listed, in_order, list_files, path_of
from palindrome.pipeline.storage.folder import Options, current_options, open_fs

HEADS = 1000  # names by which a collection is recognised


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
    """Recognises what `uri` is by the first names listed, unless `kind` says it. Where there are no pictures among
    them: WebDataset tars, Parquet (a README beside either is passed over), or one text, CSV or Parquet file that lists
    URIs. Else image files, every one of which is an input; `extensions` narrows them.

    `image_column` names the column of images or URIs, or the extension of a tar's members; else it is found. `keep`
    names further columns, or a tar's other members; none of the `reserved` names, which the run's rows have already.
    Raises SourceError.
    """
    options = current_options() if storage_options is None else storage_options
    names = list_files(uri, options, extensions)
    heads = sorted(islice(names, HEADS))
    if not heads:
        raise SourceError(f"{uri} holds no files" + (f" that end in {', '.join(extensions)}" if extensions else ""))
    for name in keep:
        if name in reserved:
            raise SourceError(f"column {name!r} has the name of a column that every latent row has", "keep")
    fs, _ = open_fs(uri, options)
    found = kind or _recognised(fs, heads, image_column)
    if found == FILES and (keep or image_column):
        column, setting = (keep[0], "keep") if keep else (image_column, "image_column")
        raise SourceError(f"column {column!r} is asked for, and {uri} holds files, without columns", setting)
    column, kept = image_column, ()
    if found == PARQUET:
        column, kept = tables.columns(fs, _some(heads, names, TABLES, uri)[0], uri, image_column, keep)
    elif found == WEBDATASET:
        column, kept = tars.columns(fs, _some(heads, names, TARS, uri), uri, image_column, keep)
    elif found == LIST:
        column, kept = lists.columns(fs, _only(heads, uri), uri, image_column, keep)
    return Collection(uri, found, column, kept, tuple(extensions), options)


def list_pieces(collection: Collection, shard_size: int) -> Iterator[Piece]:
    """The collection as pieces of at most `shard_size` images, in the order of their names."""
    fs, _ = open_fs(collection.uri, collection.storage_options)
    if collection.kind == LIST:
        file = _only(list_files(collection.uri, collection.storage_options), collection.uri)
        listed = lists.listed(fs, collection, file)
    else:
        listed = list_files(collection.uri, collection.storage_options, collection.extensions)
    if collection.kind == PARQUET:
        yield from tables.pieces(fs, collection, _with(in_order(listed), TABLES), shard_size)
    elif collection.kind == WEBDATASET:
        yield from tars.pieces(fs, _with(in_order(listed), TARS), shard_size)
    elif collection.kind == LIST:
        yield from lists.pieces(in_order(listed))
    else:
        yield from (Piece(file.uri, file.name, file.size, file.version) for file in in_order(listed))


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


def _recognised(fs: Any, heads: Sequence[Listed], image_column: str | None) -> str:
    def there(endings: tuple[str, ...]) -> list[Listed]:
        return [file for file in heads if file.name.lower().endswith(endings)]

    if there(PICTURES):
        return FILES
    if there(TARS):
        return WEBDATASET
    if tables_there := there(TABLES):
        of_uris = len(heads) == 1 and lists.is_list(fs, tables_there[0].uri, image_column)
        return LIST if of_uris else PARQUET
    return LIST if len(heads) == 1 and there(LISTS) else FILES


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
