"""A file that lists URIs of images: text, one a line; CSV or TSV with a header; or Parquet with a column of URIs."""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.csv

from palindrome.pipeline.base.errors import SourceError
from palindrome.pipeline.images.records import Piece
from palindrome.pipeline.images.sources.base import TABLES, Collection, RawImage
from palindrome.pipeline.images.sources.files import read_files
from palindrome.pipeline.images.sources.listing import Listed, path_of
from palindrome.pipeline.images.sources.servers import Servers
from palindrome.pipeline.images.sources.tables import byte_columns, kept_fields, open_parquet
from palindrome.pipeline.storage.folder import open_fs
from palindrome.pipeline.storage.uri import absolute, chained, host, is_chain, is_whole, joined, local_path, scheme

COLUMNS = ("uri", "url", "path", "image", "image_uri", "image_url", "image_path", "file", "filename", "file_name")
LINES = "uri"  # what the only column of a text file is called
CSV = (".csv", ".tsv")
BLOCK = 8 << 20  # bytes of CSV read at once: no row is longer


def is_list(fs: Any, uri: str, image_column: str | None) -> bool:
    """Whether a Parquet file lists URIs in place of holding images."""
    schema = open_parquet(fs, uri).schema_arrow
    found = set(_text_columns(schema))
    return image_column in found if image_column else not byte_columns(schema) and bool(found & set(COLUMNS))


def columns(fs: Any, file: str, uri: str, asked: str | None, keep: Sequence[str]) -> tuple[str, tuple[pa.Field, ...]]:
    """The column of URIs and the fields to keep."""
    schema = _schema(fs, file, asked, keep)
    texts = _text_columns(schema)
    column = asked or next((name for name in COLUMNS if name in texts), None)
    if column not in texts:
        what = f"column {asked!r} of texts" if asked else f"column of URIs (one of {', '.join(COLUMNS)})"
        raise SourceError(f"{uri} has no {what}; it has {', '.join(schema.names)}", "image_column")
    kept = kept_fields(schema, keep, uri)
    for field in kept:
        simple = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string)
        if not any(is_simple(field.type) for is_simple in (*simple, pa.types.is_large_string)):
            raise SourceError(f"column {field.name!r} of {uri} is of type {field.type}, no number or text", "keep")
    return column, kept


def listed(fs: Any, collection: Collection, file: str) -> Iterator[Listed]:
    """An entry a row, named by the URI as it stands there; one without a scheme is below the list's own folder."""
    column, kept = collection.image_column, [field.name for field in collection.kept]
    folder, outer = absolute(file).rpartition("/")[0], ""
    if is_chain(collection.uri):
        outer = f"::{chain[0].partition('::')[2]}" if (chain := chained(collection.uri)) else ""

    def _reference(name: str) -> str:
        if host(file):
            return joined(file, name)
        if is_whole(name):
            return name
        below = f"{folder}/{name}"  # in a file URI % is written %25: this is a path
        return below.replace("%", "%25") if scheme(file) == "file" else f"{below}{outer}"

    for batch in _batches(fs, file, [pa.field(column, pa.string()), *collection.kept]):
        for row in batch.to_pylist():
            name = (row[column] or "").strip()
            if name:
                values = json.dumps({field: row[field] for field in kept}) if kept else ""
                yield Listed(name, _reference(name), kept=values)


def pieces(listed: Iterator[Listed]) -> Iterator[Piece]:
    """One for each URI: a second line with the same one is the same image."""
    before = None
    for entry in listed:
        if entry.name != before:
            yield Piece(entry.uri, entry.name, entry.size, entry.version, kept=entry.kept)
        before = entry.name


def read(collection: Collection, pieces: Sequence[Piece]) -> Iterator[RawImage]:
    @cache
    def store(of: str) -> Any:
        return open_fs(of, collection.storage_options)[0]

    def place(piece: Piece) -> tuple[Any, str]:
        uri = piece.uri
        if inside := chained(uri):
            return store(inside[0]), inside[1]
        if is_chain(uri):
            return open_fs(uri, collection.storage_options)
        if scheme(uri) in ("", "file"):
            return store("/"), path_of(store("/"), local_path(uri) if scheme(uri) else uri)
        protocol, _, rest = uri.partition("://")
        # A web server is named in the path, and may be one that no URL can name.
        fs = store(f"{protocol}://" if host(uri) else f"{protocol}://{rest.partition('/')[0]}")
        return fs, path_of(fs, protocol.lower() + uri[len(protocol) :])

    servers = Servers()
    local = all(scheme(piece.uri) in ("", "file") and not is_chain(piece.uri) for piece in pieces)
    for piece, raw in zip(pieces, read_files(pieces, place, local, servers), strict=True):
        raw.kept.update(json.loads(piece.kept) if piece.kept else {})
        yield raw
    servers.check()


def _text_columns(schema: pa.Schema) -> list[str]:
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return [field.name for field in schema if any(is_text(field.type) for is_text in texts)]


def _schema(fs: Any, file: str, asked: str | None, keep: Sequence[str]) -> pa.Schema:
    """The columns; of CSV, whatever could be URIs is text, and so is what is kept and neither number nor boolean."""
    if file.lower().endswith(TABLES):
        return open_parquet(fs, file).schema_arrow
    if not file.lower().endswith(CSV):
        return pa.schema([(LINES, pa.string())])
    texts = dict.fromkeys([*COLUMNS, *([asked] if asked else [])], pa.string())
    with _told(file), fs.open(path_of(fs, file), "rb") as opened:
        names = pyarrow.csv.open_csv(opened, **_csv(file)).schema.names
        opened.seek(0)
        named = [name for name in names if name in keep]
        how = _csv(file, column_types=texts, include_columns=named)
        found = pyarrow.csv.read_csv(opened, **how).schema if named else []  # [] is all columns
    others = (pa.types.is_temporal, pa.types.is_null)
    types = {
        field.name: pa.string() if any(is_other(field.type) for is_other in others) else field.type for field in found
    }
    return pa.schema([(name, types.get(name, pa.string() if name in texts else pa.null())) for name in names])


def _batches(fs: Any, file: str, fields: Sequence[pa.Field]) -> Iterator[pa.RecordBatch]:
    """Those columns, a few rows at a time. Raises SourceError where they are no longer of these types."""
    names = list(dict.fromkeys(field.name for field in fields))
    if file.lower().endswith(TABLES):
        opened = open_parquet(fs, file)
        texts = _text_columns(opened.schema_arrow)
        for field in fields:
            types = [f.type for f in opened.schema_arrow if f.name == field.name]
            if types != [field.type] and not (field.name in texts and field.type == pa.string()):
                raise SourceError(f"{file} has no column {field.name!r} of type {field.type}, which it had")
        yield from opened.iter_batches(4096, columns=names)
        return
    with _told(file), fs.open(path_of(fs, file), "rb") as opened:
        if file.lower().endswith(CSV):
            how = _csv(file, column_types={field.name: field.type for field in fields}, include_columns=names)
            yield from pyarrow.csv.open_csv(opened, **how)
            return
        lines = (line.strip() for line in io.TextIOWrapper(opened, "utf-8-sig"))
        uris = (line for line in lines if line and not line.startswith("#"))
        while some := list(islice(uris, 4096)):
            yield pa.record_batch({LINES: some})


def _csv(file: str, **conversion: Any) -> dict[str, Any]:
    delimiter = "\t" if file.lower().endswith(".tsv") else ","
    return {
        "read_options": pyarrow.csv.ReadOptions(block_size=BLOCK),
        "parse_options": pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        "convert_options": pyarrow.csv.ConvertOptions(**conversion),
    }


@contextmanager
def _told(file: str) -> Iterator[None]:
    try:
        yield
    except (UnicodeDecodeError, pa.ArrowException) as e:
        raise SourceError(f"{file} can't be read as a list of URIs: {' '.join(str(e).split())[:200]}") from e
