"""Image folders, globs and Parquet files -> references to images, listed without reading a picture; and their bytes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import SourceError
from pipeline.records import LATENT_COLUMNS, Piece, Shard

FILES, PARQUET = "files", "parquet"
TABLES = (".parquet", ".pq")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif", ".ppm", ".pgm")


@dataclass(frozen=True)
class Collection:
    """Where the images are and what is read of them. Made by `open_collection`."""

    uri: str
    kind: str
    image_column: str | None = None
    kept: tuple[pa.Field, ...] = ()
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class RawImage:
    """One input before decoding: its bytes, or None with the reason why there are none."""

    image_id: str
    source: str
    data: bytes | None
    kept: dict[str, Any]
    reason: str = ""
    detail: str = ""


def open_collection(
    uri: str,
    *,
    image_column: str | None = None,
    keep: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> Collection:
    """Recognises what `uri` is: Parquet, where there are Parquet files and no pictures among the first names (a
    README beside them is passed over), else image files in a folder tree or glob, every one of which is an input.

    For Parquet the image column (bytes, or struct with `bytes`, as the Hugging Face hub has it) is found by its type,
    or named by `image_column`; `keep` names further columns. Raises SourceError.
    """
    options = dict(storage_options or {})
    fs, _ = _filesystem(uri, options)
    heads = list(islice(_list(uri, options), 1000))
    if not heads:
        raise SourceError(f"{uri} holds no files")
    tables = [file for file, name, *_ in heads if name.lower().endswith(TABLES)]
    if not tables or any(name.lower().endswith(PICTURES) for _, name, *_ in heads):
        if keep or image_column:
            column, setting = (keep[0], "keep") if keep else (image_column, "image_column")
            raise SourceError(f"column {column!r} is asked for, and {uri} holds files, without columns", setting)
        return Collection(uri, FILES, storage_options=options)
    schema = _open_parquet(fs, tables[0]).schema_arrow
    column = _image_column(schema, image_column, uri)
    for name in keep:
        if name not in schema.names:
            raise SourceError(f"column {name!r} is not in {uri}; it has {', '.join(schema.names)}", "keep")
        if name in LATENT_COLUMNS:
            raise SourceError(f"column {name!r} has the name of a column that every latent row has", "keep")
    kept = tuple(schema.field(name).remove_metadata().with_nullable(True) for name in keep)
    return Collection(uri, PARQUET, column, kept, options)


def list_pieces(collection: Collection, shard_size: int) -> Iterator[Piece]:
    """The collection as pieces of at most `shard_size` images, in the order of their names."""
    fs, _ = _filesystem(collection.uri, collection.storage_options)
    for uri, name, size, version in _list(collection.uri, collection.storage_options):
        if collection.kind == FILES:
            yield Piece(uri, name, size, version)
            continue
        if not name.lower().endswith(TABLES):
            continue
        file = _open_parquet(fs, uri)
        _check_columns(collection, file.schema_arrow, uri)
        for start, stop in _row_ranges(file.metadata, shard_size):
            yield Piece(uri, name, size, version, start, stop)


def read_raw(collection: Collection, shard: Shard) -> Iterator[RawImage]:
    """The shard's inputs, one for each that the plan lists, in its order."""
    fs, _ = _filesystem(collection.uri, collection.storage_options)
    for piece in shard.pieces:
        if shard.kind == FILES:
            yield _read_file(fs, piece)
        else:
            yield from _read_rows(fs, piece, collection)


def _filesystem(uri: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The store and the path on it. Pieces are opened on the collection's own: `::` in a file's name is no chain."""
    try:
        fs, path = fsspec.url_to_fs(uri, **options)
    except (ValueError, ImportError) as e:
        raise SourceError(f"{uri} can't be opened: {e}") from e
    return fs, str(path).rstrip("/")


def _as_text(name: str) -> str:
    """A file's name as Arrow can hold it: bytes that are no UTF-8 are written `\\udcXX`, `_path` reads them back."""
    return name.encode("utf-8", "backslashreplace").decode()


def _path(fs: Any, uri: str) -> str:
    return re.sub(r"\\udc([89a-f][0-9a-f])", lambda m: chr(0xDC00 + int(m[1], 16)), fs._strip_protocol(uri))


def _list(uri: str, options: Mapping[str, Any]) -> Iterator[tuple[str, str, int, str]]:
    """(uri, name below the root, size, version) of every file, by name; hidden files and folders are left out."""
    fs, path = _filesystem(uri, options)
    if fsspec.core.has_magic(path) and not fs.exists(path):
        root = re.split(r"[*?\[{]", path)[0].rpartition("/")[0]
        infos = fs.glob(path, detail=True)
    else:
        try:
            info = fs.info(path)
        except (FileNotFoundError, NotADirectoryError):
            raise SourceError(f"{uri} does not exist") from None
        if info["type"] == "directory":
            root, infos = path, fs.find(path, detail=True)
        else:
            root, infos = path.rpartition("/")[0], {path: info}
    named = ((_as_text(file[len(root) :].lstrip("/")), file, info) for file, info in infos.items())
    for name, file, info in sorted(named, key=lambda item: item[0]):  # as they come back from a plan
        if info["type"] == "directory" or any(part.startswith(".") for part in name.split("/")):
            continue
        version = str(info.get("ETag") or info.get("etag") or info.get("mtime") or "")
        yield _as_text(fs.unstrip_protocol(file)), name, info.get("size") or 0, version


def _open_parquet(fs: Any, uri: str) -> pq.ParquetFile:
    try:
        file = fs.open(_path(fs, uri), "rb")
    except OSError as e:
        raise SourceError(f"{uri} can't be opened: {e.strerror or e}") from e
    try:
        return pq.ParquetFile(file, pre_buffer=True)
    except (OSError, ValueError, pa.ArrowException) as e:
        raise SourceError(f"{uri} is not a Parquet file: {_one_line(e)}") from e


def _one_line(e: Exception) -> str:
    """Arrow's messages quote bytes of the file, and end with a line feed."""
    return re.sub(r"[\s\x00-\x1f\x7f]+", " ", str(e)).strip()[:200]


def _check_columns(collection: Collection, schema: pa.Schema, uri: str) -> None:
    """Each file has the columns that the first one has, of the same types."""
    if collection.image_column not in _byte_columns(schema):
        raise SourceError(f"{uri} has no column {collection.image_column!r} of bytes, which the first file has")
    for kept in collection.kept:
        if kept.name not in schema.names or schema.field(kept.name).type != kept.type:
            raise SourceError(f"{uri} has no column {kept.name!r} of type {kept.type}, which the first file has")


def _byte_columns(schema: pa.Schema) -> list[str]:
    def holds_images(t: pa.DataType) -> bool:
        if pa.types.is_struct(t):
            return any(f.name == "bytes" and holds_images(f.type) for f in t)
        return pa.types.is_binary(t) or pa.types.is_large_binary(t) or pa.types.is_binary_view(t)

    return [f.name for f in schema if holds_images(f.type)]


def _image_column(schema: pa.Schema, asked: str | None, uri: str) -> str:
    found = _byte_columns(schema)
    if asked is not None:
        if asked in found:
            return asked
        what = "has no bytes" if asked in schema.names else "does not exist"
        raise SourceError(f"column {asked!r} {what} in {uri}; it has {', '.join(schema.names)}", "image_column")
    if len(found) == 1:
        return found[0]
    if not found:
        raise SourceError(f"{uri} has no column of image bytes; it has {', '.join(schema.names)}")
    raise SourceError(
        f"{uri} has several columns of bytes ({', '.join(found)}); name the one with the images", "image_column"
    )


def _row_ranges(metadata: pq.FileMetaData, shard_size: int) -> Iterator[tuple[int, int]]:
    """Row ranges of at most shard_size: whole row groups, or equal parts of one that is larger."""
    row = 0
    for i in range(metadata.num_row_groups):
        rows = metadata.row_group(i).num_rows
        parts = -(-rows // shard_size)
        yield from ((row + rows * k // parts, row + rows * (k + 1) // parts) for k in range(parts))
        row += rows


def _read_file(fs: Any, piece: Piece) -> RawImage:
    path = _path(fs, piece.uri)
    try:
        if isinstance(fs, LocalFileSystem) and fs.info(path)["type"] == "other":
            return RawImage(piece.name, piece.uri, None, {}, "unreadable", "not a regular file")  # a pipe never ends
        return RawImage(piece.name, piece.uri, fs.cat_file(path), {})
    except FileNotFoundError:
        return RawImage(piece.name, piece.uri, None, {}, "missing", "no such file")
    except OSError as e:
        return RawImage(piece.name, piece.uri, None, {}, "unreadable", e.strerror or type(e).__name__)


def _read_rows(fs: Any, piece: Piece, collection: Collection) -> Iterator[RawImage]:
    column = collection.image_column
    kept = [f.name for f in collection.kept]
    done = piece.start
    reason, detail = "missing", "the file has fewer rows than when it was listed"
    try:
        file = _open_parquet(fs, piece.uri)
        _check_columns(collection, file.schema_arrow, piece.uri)
        in_struct = pa.types.is_struct(file.schema_arrow.field(column).type) and column not in kept
        columns = [f"{column}.bytes" if in_struct else column, *kept]
        first, groups = _groups(file.metadata, piece)
        row = first
        for batch in file.iter_batches(64, row_groups=groups, columns=columns):
            for values in batch.to_pylist():
                if piece.start <= row < piece.stop:
                    yield _row(piece, row, values[column], {name: values[name] for name in kept})
                    done = row + 1
                row += 1
    except (OSError, ValueError, pa.ArrowException) as e:  # ValueError: a kept text that is no UTF-8, say
        if isinstance(e.__cause__, FileNotFoundError):
            detail = "no such file"
        else:
            reason, detail = "unreadable", f"{type(e).__name__}: {_one_line(e)}"
    for row in range(done, piece.stop):
        name, source = _row_names(piece, row)
        yield RawImage(name, source, None, dict.fromkeys(kept), reason, detail)


def _groups(metadata: pq.FileMetaData, piece: Piece) -> tuple[int, list[int]]:
    """The row groups that hold the piece, and the row at which the first of them begins."""
    first, row = piece.start, 0
    groups: list[int] = []
    for i in range(metadata.num_row_groups):
        end = row + metadata.row_group(i).num_rows
        if row < piece.stop and end > piece.start:
            first = first if groups else row
            groups.append(i)
        row = end
    return first, groups


def _row(piece: Piece, row: int, value: Any, kept: dict[str, Any]) -> RawImage:
    name, source = _row_names(piece, row)
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        return RawImage(name, source, None, kept, "null", "no bytes in the row")
    return RawImage(name, source, data, kept)


def _row_names(piece: Piece, row: int) -> tuple[str, str]:
    return f"{piece.name}#{row}", f"{piece.uri}#{row}"
