"""Files that say something of the pictures beside them: `metadata.csv`, `.jsonl` or `.parquet` with a column
`file_name`, as the Hugging Face hub's image folders have them."""

import json
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from palindrome.pipeline.base.errors import SourceError
from palindrome.pipeline.images.sources import lists
from palindrome.pipeline.images.sources.base import Collection
from palindrome.pipeline.images.sources.listing import Listed, in_order, say_once

FILE_NAME = "file_name"


def of_pictures(fs: Any, files: Iterable[Listed]) -> list[Listed]:
    """Those of the files that name pictures."""
    return [file for file in files if _names(fs, file)]


def _names(fs: Any, file: Listed) -> bool:
    try:
        return FILE_NAME in lists.schema_of(fs, file.uri, FILE_NAME, ()).names
    except SourceError:
        return False  # an input like others


def columns(fs: Any, files: Sequence[Listed], uri: str, keep: Sequence[str]) -> tuple[pa.Field, ...]:
    """The fields to keep."""
    schemas = [lists.schema_of(fs, file.uri, FILE_NAME, keep) for file in files]
    found = pa.unify_schemas([_simple(schema) for schema in schemas], promote_options="permissive")
    return lists.simple_fields(found, keep, uri)


def _simple(schema: pa.Schema) -> pa.Schema:
    """Each name once."""
    return pa.schema([field for i, field in enumerate(schema) if schema.names.index(field.name) == i])


def described(fs: Any, collection: Collection, files: Sequence[Listed], inputs: Iterator[Listed]) -> Iterator[Listed]:
    """The inputs, in order, without those files, each with what they say of it. A bounded number is in memory."""
    names = {file.name for file in files}
    entries = in_order(_entries(fs, collection, files))
    entry, lost = next(entries, None), 0
    nothing = json.dumps(dict.fromkeys(field.name for field in collection.kept))
    for file in inputs:
        if file.name in names:
            continue
        while entry is not None and entry.name < file.name:
            lost, entry = lost + 1, next(entries, None)
        kept = nothing
        while entry is not None and entry.name == file.name:  # the last that names it
            kept, entry = entry.kept, next(entries, None)
        yield file._replace(kept=kept)
    lost += (entry is not None) + sum(1 for _ in entries)
    if lost:
        say_once(f"{collection.uri}: {lost} rows of metadata name pictures that are not there")


def _entries(fs: Any, collection: Collection, files: Sequence[Listed]) -> Iterator[Listed]:
    for file in files:
        folder = file.name.rpartition("/")[0]
        there = lists.schema_of(fs, file.uri, FILE_NAME, ()).names
        kept = [field for field in collection.kept if field.name in there]
        for batch in lists.batches(fs, file.uri, [pa.field(FILE_NAME, pa.string()), *kept]):
            for row in batch.to_pylist():
                if row[FILE_NAME]:
                    values = {field.name: row.get(field.name) for field in collection.kept}
                    name = posixpath.normpath(posixpath.join(folder, row[FILE_NAME]))
                    yield Listed(name, "", kept=json.dumps(values))
