"""Tables with a column of images: bytes, or a struct with `bytes`, as the Hugging Face hub has it. They are Parquet
files, or Arrow's own, as `save_to_disk` of the datasets library and Feather write them."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from palindrome.pipeline.base.errors import SourceError
from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.images.records import Piece
from palindrome.pipeline.images.sources.base import ARROWS, Collection, RawImage
from palindrome.pipeline.images.sources.columns import can_be_read_as, kept_type, same_or_wider, values
from palindrome.pipeline.images.sources.listing import Listed, path_of
from palindrome.pipeline.storage import lfs
from palindrome.pipeline.storage.folder import is_outage, open_ranges

LOOK = 8  # files with rows by which the columns' types are known, unless a column is null in all of them
ROWS = 64  # read at once
IPC_FILE = b"ARROW1\0\0"  # how Arrow's format of files begins
FEATHER_1 = b"FEA1"
DAMAGE = (OSError, ValueError, EOFError, pa.ArrowException)  # ValueError: a kept text that is no UTF-8, say

Range = tuple[int, int, int, int]  # start, stop, offset and length of a Piece


class Table(Protocol):
    """A file with rows, of either format."""

    schema: pa.Schema

    def __enter__(self) -> "Table": ...

    def __exit__(self, *error: object) -> None: ...

    def has_rows(self) -> bool: ...

    def ranges(self, shard_size: int) -> Iterator[Range]:
        """Row ranges of at most `shard_size`: whole groups of rows, or equal parts of one that is larger."""

    def batches(self, rows: int, columns: Sequence[str], piece: Piece | None = None) -> Iterator[pa.RecordBatch]:
        """At most so many `rows` at a time, of all of the file or of a piece of it."""


class ParquetTable:
    def __init__(self, file: Any) -> None:
        self.parquet = pq.ParquetFile(file, pre_buffer=True)
        self.schema: pa.Schema = self.parquet.schema_arrow

    def __enter__(self) -> "ParquetTable":
        return self

    def __exit__(self, *error: object) -> None:
        self.parquet.close()

    def has_rows(self) -> bool:
        return bool(self.parquet.metadata.num_rows)

    def ranges(self, shard_size: int) -> Iterator[Range]:
        row = 0
        for i in range(self.parquet.metadata.num_row_groups):
            rows = self.parquet.metadata.row_group(i).num_rows
            yield from ((start, stop, 0, 0) for start, stop in _parts(row, rows, shard_size))
            row += rows

    def batches(self, rows: int, columns: Sequence[str], piece: Piece | None = None) -> Iterator[pa.RecordBatch]:
        if piece is None:
            yield from self.parquet.iter_batches(rows, columns=columns)
            return
        row, groups = _groups(self.parquet.metadata, piece)
        for batch in self.parquet.iter_batches(rows, row_groups=groups, columns=columns):
            yield _within(batch, row, piece)
            row += batch.num_rows


class ArrowTable:
    """Of Arrow's format of files, where batches of rows are reached by their numbers, or of streams: there one is
    reached by those before it, or, as a piece of a plan, by the byte at which it begins."""

    def __init__(self, file: Any) -> None:
        head = file.read(len(IPC_FILE))
        if head.startswith(FEATHER_1):
            raise ValueError("Feather's version 1 is not supported: write it again by pyarrow.feather")
        file.seek(0)
        self.file, self.source = file, pa.PythonFile(file, mode="r")
        self.is_stream = head != IPC_FILE
        self.reader = (pa.ipc.open_stream if self.is_stream else pa.ipc.open_file)(self.source)
        self.schema: pa.Schema = self.reader.schema

    def __enter__(self) -> "ArrowTable":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def has_rows(self) -> bool:
        return any(batch.num_rows for _, batch in self._read())

    def _read(self, first: int = 0) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The batches, and the number of each, or the byte at which it begins."""
        if not self.is_stream:
            yield from ((i, self.reader.get_batch(i)) for i in range(first, self.reader.num_record_batches))
            return
        self.file.seek(first)
        if first:
            yield first, pa.ipc.read_record_batch(pa.ipc.read_message(self.source), self.schema)
            return
        reader = pa.ipc.open_stream(self.source)  # from the start, whoever has read of it before
        while True:
            offset = self.file.tell()
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                return
            yield offset, batch

    def ranges(self, shard_size: int) -> Iterator[Range]:
        row = 0
        alone = not (self.is_stream and any(map(_has_dictionary, self.schema.types)))  # else it needs those before it
        for place, batch in self._read():
            for start, stop in _parts(row, batch.num_rows, shard_size):
                yield (start, stop, place, start - row) if alone else (start, stop, 0, start)
            row += batch.num_rows

    def batches(self, rows: int, columns: Sequence[str], piece: Piece | None = None) -> Iterator[pa.RecordBatch]:
        row = piece.start - piece.length if piece else 0
        for _, batch in self._read(piece.offset if piece else 0):
            if piece and row >= piece.stop:
                return
            batch.validate()
            wanted = batch.select([name if name in self.schema.names else name[: -len(".bytes")] for name in columns])
            if piece:
                wanted = _within(wanted, row, piece)
            yield from (wanted.slice(i, rows) for i in range(0, wanted.num_rows, rows))
            row += batch.num_rows


def _has_dictionary(kind: pa.DataType) -> bool:
    return pa.types.is_dictionary(kind) or any(_has_dictionary(kind.field(i).type) for i in range(kind.num_fields))


def _parts(row: int, rows: int, shard_size: int) -> Iterator[tuple[int, int]]:
    parts = -(-rows // shard_size)
    return ((row + rows * k // parts, row + rows * (k + 1) // parts) for k in range(parts))


def _within(batch: pa.RecordBatch, row: int, piece: Piece) -> pa.RecordBatch:
    """What a piece has of a batch that begins with a row of its file."""
    first = max(piece.start - row, 0)
    return batch.slice(first, max(piece.stop - row - first, 0))


def open_table(fs: Any, uri: str) -> Table:
    """Raises SourceError where it can't be opened, or is no table."""
    arrow = uri.lower().endswith(ARROWS)
    try:
        path = path_of(fs, uri)
        file = fs.open(path, "rb", cache_type="readahead") if arrow else open_ranges(fs, path)
    except OSError as e:
        raise SourceError(f"{uri} can't be opened: {e.strerror or e}") from e
    try:
        return ArrowTable(file) if arrow else ParquetTable(file)
    except DAMAGE as e:
        if not is_outage(e, fs):
            file.seek(0)
            if lfs.is_pointer(file.read(lfs.LARGEST)):
                raise PointerError(f"{uri} is no table: {lfs.WORDS}") from e
        raise SourceError(f"{uri} is not {'an Arrow' if arrow else 'a Parquet'} file: {_one_line(e)}") from e


@contextmanager
def _reading(fs: Any, uri: str) -> Iterator[None]:
    """What a listing reads of a table. Raises SourceError where it is damaged."""
    try:
        yield
    except DAMAGE as e:
        if isinstance(e, SourceError) or is_outage(e, fs):
            raise
        raise SourceError(f"{uri} breaks off or is damaged: {_one_line(e)}") from e


class PointerError(SourceError):
    """A Git LFS pointer in place of a table."""


def columns(
    fs: Any, files: Iterable[str], uri: str, asked: str | None, keep: Sequence[str]
) -> tuple[str, tuple[pa.Field, ...]]:
    """The column of images and the fields of the columns to keep, by the first files that have rows."""
    schema = first_schema(fs, files, uri, [*keep, *([asked] if asked else [])])
    return _image_column(schema, asked, uri), kept_fields(schema, keep, uri)


def first_schema(fs: Any, files: Iterable[str], uri: str, wanted: Sequence[str]) -> pa.Schema:
    """That of the first file with rows, with the types that the wanted columns have in the next files too: where a
    column is null throughout a file, writers have no type for it. Where it is null in the first files, all are looked
    at."""
    schemas: list[pa.Schema] = []
    empty: pa.Schema | None = None
    looked = 0
    for file in files:
        with open_table(fs, file) as table, _reading(fs, file):
            if not table.has_rows():
                empty = empty or table.schema
                continue
            schemas = [_merged(schemas[0], table.schema)] if schemas else [table.schema]
        looked += 1
        types = [field.type for field in schemas[0] if field.name in wanted or not byte_columns(schemas[0])]
        if not any(map(_is_untyped, types)) and (looked >= LOOK or not wanted):
            break
    found = [*schemas, *([empty] if empty else [])]
    if not found:
        raise SourceError(f"{uri} holds no table")
    return found[0]


def _merged(schema: pa.Schema, other: pa.Schema) -> pa.Schema:
    def field(mine: pa.Field) -> pa.Field:
        at = other.get_field_index(mine.name)
        return mine if at == -1 else mine.with_type(same_or_wider(mine.type, other.field(at).type))

    return pa.schema([field(mine) for mine in schema])


def holds_images(fs: Any, uri: str) -> bool:
    """Whether a table has a column of bytes. Raises PointerError."""
    try:
        with open_table(fs, uri) as table:
            return bool(byte_columns(table.schema))
    except PointerError:
        raise
    except SourceError:
        return False


def kept_fields(schema: pa.Schema, keep: Sequence[str], uri: str) -> tuple[pa.Field, ...]:
    for name in keep:
        if name not in schema.names:
            raise SourceError(f"column {name!r} is not in {uri}; it has {', '.join(schema.names)}", "keep", name)
    fields = (schema.field(name) for name in keep)
    return tuple(pa.field(field.name, kept_type(field.type)) for field in fields)


def pieces(fs: Any, collection: Collection, listed: Iterable[Listed], shard_size: int) -> Iterator[Piece]:
    """Row ranges of at most `shard_size` rows; of Parquet, only the footers are read, 16 at once."""

    def ranges(file: Listed) -> tuple[Listed, list[Range]]:
        with open_table(fs, file.uri) as table:
            with _reading(fs, file.uri):
                found = list(table.ranges(shard_size))
            if found:
                _check_columns(collection, table.schema, file.uri)
            return file, found

    for file, found in in_threads(ranges, listed):
        for start, stop, offset, length in found:
            yield Piece(file.uri, file.name, file.size, file.version, start, stop, offset, length)


def _one_line(e: Exception) -> str:
    """Arrow's messages quote bytes of the file, and end with a line feed."""
    return re.sub(r"[\s\x00-\x1f\x7f]+", " ", str(e)).strip()[:200]


def _check_columns(collection: Collection, schema: pa.Schema, uri: str) -> None:
    """Each file has the columns that the first one has, of the same types, or null throughout."""
    untyped = [field.name for field in schema if _is_untyped(field.type)]
    if collection.image_column not in byte_columns(schema) + untyped:
        raise SourceError(f"{uri} has no column {collection.image_column!r} of bytes, which the first file has")
    for kept in collection.kept:
        if schema.names.count(kept.name) != 1 or not can_be_read_as(schema.field(kept.name).type, kept.type):
            raise SourceError(f"{uri} has no column {kept.name!r} of type {kept.type}, which the first file has")


def byte_columns(schema: pa.Schema) -> list[str]:
    def holds_images(t: pa.DataType) -> bool:
        if pa.types.is_struct(t):
            return any(f.name == "bytes" and holds_images(f.type) for f in t)
        return pa.types.is_binary(t) or pa.types.is_large_binary(t) or pa.types.is_binary_view(t)

    return [f.name for f in schema if holds_images(f.type)]


def _is_untyped(t: pa.DataType) -> bool:
    """What images are in a file where all are null."""
    if pa.types.is_struct(t):
        return any(f.name == "bytes" and pa.types.is_null(f.type) for f in t)
    return bool(pa.types.is_null(t))


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
        message = f"{uri} has no column of image bytes, and none of URIs by its name; it has {', '.join(schema.names)}"
        raise SourceError(message, "image_column")
    raise SourceError(
        f"{uri} has several columns of bytes ({', '.join(found)}); name the one with the images", "image_column"
    )


def read(fs: Any, piece: Piece, collection: Collection) -> Iterator[RawImage]:
    column = collection.image_column
    kept = [f.name for f in collection.kept]
    done = piece.start
    reason, detail = "missing", "the file has fewer rows than when it was listed"
    try:
        with open_table(fs, piece.uri) as table:
            _check_columns(collection, table.schema, piece.uri)
            in_struct = pa.types.is_struct(table.schema.field(column).type) and column not in kept
            columns = [f"{column}.bytes" if in_struct else column, *kept]
            for batch in table.batches(ROWS, columns, piece):
                images = batch.column(column).to_pylist()
                others = {name: values(batch.column(name)) for name in kept}
                for i, image in enumerate(images):
                    yield _row(piece, done, image, {name: others[name][i] for name in kept})
                    done += 1
    except DAMAGE as e:
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
