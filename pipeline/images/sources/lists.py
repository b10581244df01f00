"""Files that list URIs of images: text, one a line; CSV or TSV with a header; JSON lines; or tables with a column of
URIs."""

import io
import json
import lzma
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, reduce
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from palindrome.pipeline.base.errors import SourceError
from palindrome.pipeline.images.records import Piece
from palindrome.pipeline.images.sources.base import COMPRESSED, CSV, JSON, LINES, TABLES, Collection, RawImage
from palindrome.pipeline.images.sources.columns import can_be_read_as, is_text, same_or_wider
from palindrome.pipeline.images.sources.files import Place, answers, read_files
from palindrome.pipeline.images.sources.listing import Listed, list_files, path_of
from palindrome.pipeline.images.sources.servers import Servers
from palindrome.pipeline.images.sources.tables import byte_columns, first_schema, kept_fields, open_table
from palindrome.pipeline.images.sources.unpack import compression
from palindrome.pipeline.storage import lfs
from palindrome.pipeline.storage.folder import open_fs
from palindrome.pipeline.storage.uri import absolute, chained, host, is_chain, is_whole, joined, local_path, scheme

COLUMNS = ("uri", "url", "path", "image", "image_uri", "image_url", "image_path", "file", "filename", "file_name")
LINE = "uri"  # what the only column of a text file is called
BLOCK = 8 << 20  # bytes of CSV or JSON read at once: no row is longer
LOOKED_AT, MOST_ASKED = 100_000, 20  # entries and web servers, to find one that answers


def is_list(fs: Any, files: Sequence[str], uri: str, image_column: str | None) -> bool:
    """Whether tables list URIs in place of holding images."""
    schema = first_schema(fs, files, uri, [image_column] if image_column else [])
    found = set(_text_columns(schema))
    return image_column in found if image_column else not byte_columns(schema) and _uri_column(found) is not None


def chosen(files: Sequence[Listed], uri: str) -> list[Listed]:
    """Those of a folder that are its lists, all of one kind; text is none where there is another: it describes that."""
    if len(files) == 1:
        return list(files)
    groups = [[file for file in files if _bare(file.name).endswith(kind)] for kind in (TABLES, CSV, JSON, LINES)]
    found = [group for group in groups[:-1] if group] or [group for group in groups[-1:] if group]
    if len(found) != 1:
        what = (
            "lists of several kinds"
            if found
            else "no list: its files end in none of " + ", ".join((*TABLES, *CSV, *JSON, *LINES))
        )
        raise SourceError(f"{uri} holds {what}" + ("; name those that are meant by a glob" if found else ""))
    return found[0]


def _uri_column(texts: Iterable[str]) -> str | None:
    """Case does not matter: LAION's is `URL`."""
    by_name = {name.lower(): name for name in texts}
    return next((by_name[name] for name in COLUMNS if name in by_name), None)


def columns(
    fs: Any, files: Sequence[str], uri: str, asked: str | None, keep: Sequence[str]
) -> tuple[str, tuple[pa.Field, ...]]:
    """The column of URIs and the fields to keep."""
    schema = _common_schema(fs, files, uri, asked, keep)
    texts = _text_columns(schema)
    column = asked if asked is not None else _uri_column(texts)
    if column not in texts:
        what = f"column {asked!r} of texts" if asked else f"column of URIs (one of {', '.join(COLUMNS)})"
        raise SourceError(f"{uri} has no {what}; it has {', '.join(schema.names)}", "image_column")
    return column, simple_fields(schema, keep, uri)


def simple_fields(schema: pa.Schema, keep: Sequence[str], uri: str) -> tuple[pa.Field, ...]:
    """The fields to keep, which go through JSON."""
    kept = tuple(field.with_type(_simple_type(field.type)) for field in kept_fields(schema, keep, uri))
    for field in kept:
        simple = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, is_text)
        if not any(is_simple(field.type) for is_simple in simple):
            raise SourceError(
                f"column {field.name!r} of {uri} is of type {field.type}, no number or text", "keep", field.name
            )
    return kept


def _simple_type(kind: pa.DataType) -> pa.DataType:
    """A column without a value is one of texts."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    return pa.string() if pa.types.is_null(kind) else kind


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

    for batch in batches(fs, file, [pa.field(column, pa.string()), *collection.kept]):
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
    servers.check(lambda failed: _another_answers(collection, place, failed))


def _another_answers(collection: Collection, place: Place, failed: Iterable[str]) -> bool:
    """Whether another web server of the list answers now: then the network works, and those that failed are gone."""
    fs, _ = open_fs(collection.uri, collection.storage_options)
    found = list_files(collection.uri, collection.storage_options, collection.extensions)
    files = chosen(sorted(found), collection.uri)
    entries = pieces(entry for file in files for entry in listed(fs, collection, file.uri))
    asked = set(failed)
    for piece in islice(entries, LOOKED_AT):
        server = host(piece.uri)
        if server and server not in asked and len(asked) < MOST_ASKED:
            asked.add(server)
            if answers(place, piece):
                return True
    return False


def _text_columns(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if is_text(field.type)]


def _common_schema(fs: Any, files: Sequence[str], uri: str, asked: str | None, keep: Sequence[str]) -> pa.Schema:
    """The columns of the lists: of the first, with types to keep that are those of all."""
    if files[0].lower().endswith(TABLES):
        return first_schema(fs, files, uri, [*([asked] if asked else []), *keep])
    schemas = (schema_of(fs, file, asked, keep) for file in (files if keep else files[:1]))
    return reduce(_with_types_of, schemas)


def _with_types_of(schema: pa.Schema, other: pa.Schema) -> pa.Schema:
    """Texts are read as the type that is common to all."""

    def is_number(kind: pa.DataType) -> bool:
        return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))

    def common(field: pa.Field) -> pa.Field:
        at = other.get_field_index(field.name)
        if at == -1:
            return field
        kind = same_or_wider(field.type, other.field(at).type)
        if not can_be_read_as(other.field(at).type, kind):
            kind = pa.float64() if is_number(kind) and is_number(other.field(at).type) else pa.string()
        return field.with_type(kind)

    return pa.schema([common(field) for field in schema])


def schema_of(fs: Any, file: str, asked: str | None, keep: Sequence[str]) -> pa.Schema:
    """The columns; of CSV and JSON, whatever could be URIs is text, and so is what is kept and neither number nor
    boolean."""
    name = _bare(file)
    if name.endswith(TABLES):
        with open_table(fs, file) as table:
            return table.schema
    if not name.endswith((*CSV, *JSON)):
        return pa.schema([(LINE, pa.string())])
    with _opened(fs, file) as opened:
        names = _open(opened, name).schema.names
    texts = {n: pa.string() for n in names if n.lower() in COLUMNS or n == asked}
    named = [n for n in names if n in keep]
    found: Iterable[pa.Field] = []
    if keep:
        with _opened(fs, file) as opened:
            if name.endswith(CSV):
                how = _csv(name, column_types=texts, include_columns=named)
                found = pyarrow.csv.read_csv(opened, **how).schema if named else []  # [] is all columns
            else:  # a row further down may have others than the first ones
                found = [f for f in pyarrow.json.read_json(opened, **_json()).schema if f.name in keep]
                names += [f.name for f in found if f.name not in names]
    types = {field.name: pa.string() if pa.types.is_temporal(field.type) else field.type for field in found}
    return pa.schema([(n, texts.get(n) or types.get(n, pa.null())) for n in names])


def _bare(name: str) -> str:
    """A file's name in lower case, without what says that it is compressed."""
    name = name.lower()
    return next((name.removesuffix(ending) for ending in COMPRESSED if name.endswith(ending)), name)


@contextmanager
def _opened(fs: Any, file: str) -> Iterator[Any]:
    """The list, unpacked as it is read where it is compressed. Raises SourceError where it is none."""
    with _told(file), fs.open(path_of(fs, file), "rb") as opened:
        head = opened.read(lfs.LARGEST)
        if lfs.is_pointer(head):
            raise SourceError(f"{file} is no list: {lfs.WORDS}")
        opened.seek(0)
        packed = compression(head)
        if packed is None:
            yield opened
        elif packed == "xz":
            with lzma.open(opened) as unpacked:
                yield unpacked
        else:
            with pa.CompressedInputStream(pa.PythonFile(opened, mode="r"), packed) as unpacked:
                try:
                    yield unpacked
                except OSError as e:
                    if type(e) is OSError and e.errno is None:  # Arrow's, of what is packed
                        raise EOFError(str(e)) from e
                    raise


def batches(fs: Any, file: str, fields: Sequence[pa.Field]) -> Iterator[pa.RecordBatch]:
    """Those columns, a few rows at a time; none of a table without rows. Raises SourceError where they are no longer of
    these types."""
    names = list(dict.fromkeys(field.name for field in fields))
    if file.lower().endswith(TABLES):
        with open_table(fs, file) as table:
            if not table.has_rows():
                return
            for field in fields:
                types = [f.type for f in table.schema if f.name == field.name]
                if len(types) != 1 or not can_be_read_as(types[0], field.type):
                    raise SourceError(f"{file} has no column {field.name!r} of type {field.type}, which it had")
            yield from table.batches(4096, names)
        return
    with _opened(fs, file) as opened:
        if _bare(file).endswith((*CSV, *JSON)):
            yield from _open(opened, _bare(file), {field.name: field.type for field in fields})
            return
        lines = (line.strip() for line in io.TextIOWrapper(opened, "utf-8-sig"))
        uris = (line for line in lines if line and not line.startswith("#"))
        while some := list(islice(uris, 4096)):
            yield pa.record_batch({LINE: some})


def _open(opened: Any, name: str, types: dict[str, pa.DataType] | None = None) -> Any:
    """A reader of some columns, or of all that the first rows have."""
    if name.endswith(CSV):
        how = _csv(name, **({} if types is None else {"column_types": types, "include_columns": list(types)}))
        return pyarrow.csv.open_csv(opened, **how)
    return pyarrow.json.open_json(opened, **_json(types))


def _json(types: dict[str, pa.DataType] | None = None) -> dict[str, Any]:
    how = {} if types is None else {"explicit_schema": pa.schema(types), "unexpected_field_behavior": "ignore"}
    return {
        "read_options": pyarrow.json.ReadOptions(block_size=BLOCK),
        "parse_options": pyarrow.json.ParseOptions(**how),
    }


def _csv(file: str, **conversion: Any) -> dict[str, Any]:
    delimiter = "\t" if _bare(file).endswith(".tsv") else ","
    return {
        "read_options": pyarrow.csv.ReadOptions(block_size=BLOCK),
        "parse_options": pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        "convert_options": pyarrow.csv.ConvertOptions(**conversion),
    }


@contextmanager
def _told(file: str) -> Iterator[None]:
    try:
        yield
    except (UnicodeDecodeError, pa.ArrowException, lzma.LZMAError, EOFError) as e:
        raise SourceError(f"{file} can't be read as a list of URIs: {' '.join(str(e).split())[:200]}") from e
