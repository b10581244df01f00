"""Parquet with a column of images: bytes, or a struct with `bytes`, as the Hugging Face hub has it."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from palindrome.pipeline.base.errors import SourceError
from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.images.records import Piece
from palindrome.pipeline.images.sources.base import Collection, RawImage
from palindrome.pipeline.images.sources.listing import Listed, path_of
from palindrome.pipeline.storage.folder import is_outage, open_ranges


def columns(fs: Any, first: str, uri: str, asked: str | None, keep: Sequence[str]) -> tuple[str, tuple[pa.Field, ...]]:
    """The column of images and the fields of the columns to keep, by the first file of the collection."""
    schema = open_parquet(fs, first).schema_arrow
    return _image_column(schema, asked, uri), kept_fields(schema, keep, uri)


def holds_images(fs: Any, uri: str) -> bool:
    """Whether a table has a column of bytes."""
    try:
        return bool(byte_columns(open_parquet(fs, uri).schema_arrow))
    except SourceError:
        return False


def kept_fields(schema: pa.Schema, keep: Sequence[str], uri: str) -> tuple[pa.Field, ...]:
    for name in keep:
        if name not in schema.names:
            raise SourceError(f"column {name!r} is not in {uri}; it has {', '.join(schema.names)}", "keep")
    return tuple(schema.field(name).remove_metadata().with_nullable(True) for name in keep)


def pieces(fs: Any, collection: Collection, listed: Iterable[Listed], shard_size: int) -> Iterator[Piece]:
    """Row ranges of at most `shard_size` rows; only the footers are read, 16 at once."""

    def footer(file: Listed) -> tuple[Listed, pq.FileMetaData]:
        with open_parquet(fs, file.uri) as opened:
            _check_columns(collection, opened.schema_arrow, file.uri)
            return file, opened.metadata

    for file, metadata in in_threads(footer, listed):
        for start, stop in _row_ranges(metadata, shard_size):
            yield Piece(file.uri, file.name, file.size, file.version, start, stop)


def open_parquet(fs: Any, uri: str) -> pq.ParquetFile:
    try:
        file = open_ranges(fs, path_of(fs, uri))
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
    if collection.image_column not in byte_columns(schema):
        raise SourceError(f"{uri} has no column {collection.image_column!r} of bytes, which the first file has")
    for kept in collection.kept:
        if kept.name not in schema.names or schema.field(kept.name).type != kept.type:
            raise SourceError(f"{uri} has no column {kept.name!r} of type {kept.type}, which the first file has")


def byte_columns(schema: pa.Schema) -> list[str]:
    def holds_images(t: pa.DataType) -> bool:
        if pa.types.is_struct(t):
            return any(f.name == "bytes" and holds_images(f.type) for f in t)
        return pa.types.is_binary(t) or pa.types.is_large_binary(t) or pa.types.is_binary_view(t)

    return [f.name for f in schema if holds_images(f.type)]


def _image_column(schema: pa.Schema, asked: str | None, uri: str) -> str:
    found = byte_columns(schema)
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


def read(fs: Any, piece: Piece, collection: Collection) -> Iterator[RawImage]:
    column = collection.image_column
    kept = [f.name for f in collection.kept]
    done = piece.start
    reason, detail = "missing", "the file has fewer rows than when it was listed"
    try:
        file = open_parquet(fs, piece.uri)
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
        cause = e.__cause__ if isinstance(e, SourceError) and e.__cause__ else e
        if is_outage(cause, fs):
            raise cause from None
        if isinstance(cause, FileNotFoundError):
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
