"""A folder on any store that fsspec knows, by URI: list, read, and put a whole object atomically."""

import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

TEMPORARY = ".tmp-"  # how the name of a file begins that is not yet whole; readers never see one
GROUP_ROWS, GROUP_BYTES = 1024, 32 << 20  # a row group of a table that is written bit by bit


def absolute(uri: str) -> str:
    """A path as every process of the run can open it; URIs with a scheme stay as they are."""
    return uri if "://" in uri or "::" in uri else os.path.abspath(os.path.expanduser(uri))


@dataclass(frozen=True)
class Folder:
    """A folder named by URI (`runs/a`, `s3://bucket/runs/a`). Names below it are relative, with `/`.

    `storage_options` go to fsspec and are never written anywhere. A missing object raises FileNotFoundError.
    """

    uri: str
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def _location(self) -> tuple[Any, str]:
        fs, path = fsspec.url_to_fs(self.uri, **self.storage_options)
        return fs, str(path).rstrip("/")

    @property
    def fs(self) -> Any:
        return self._location[0]

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str = "") -> str:
        return f"{self._location[1]}/{name}" if name else self._location[1]

    def exists(self, name: str = "") -> bool:
        return bool(self.fs.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        return bytes(self.fs.cat_file(self.path(name)))

    def read_parquet(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A whole table; of some columns, only their bytes are read."""
        if columns is None:
            return pq.read_table(pa.BufferReader(self.read(name)))
        with self.parquet_file(name) as file:
            return file.read(columns)

    def parquet_file(self, name: str) -> pq.ParquetFile:
        """Opened for range reads: the footer, or a part of the rows."""
        return pq.ParquetFile(self.fs.open(self.path(name), "rb"), pre_buffer=True)

    def files(self, below: str) -> dict[str, int]:
        """Names of the whole files right below a folder, without it, and their sizes in bytes; {} if it is missing."""
        self.fs.invalidate_cache(self.path(below))
        try:
            infos = self.fs.ls(self.path(below), detail=True)
        except FileNotFoundError:
            return {}
        named = {info["name"].rsplit("/", 1)[1]: info for info in infos if info["type"] == "file"}
        return {name: info["size"] for name, info in sorted(named.items()) if not name.startswith(TEMPORARY)}

    def put(self, name: str, content: bytes | pa.Buffer) -> None:
        """Writes one object whole or not at all, over what was there."""
        if self.is_local:
            with self.create(name) as new:
                new.file.write(content)
                new.commit()
        else:
            self.fs.makedirs(self.path(name).rsplit("/", 1)[0], exist_ok=True)
            self.fs.pipe_file(self.path(name), bytes(content))

    def create(self, name: str) -> "NewObject":
        """An object to be written bit by bit, which is there once it is committed, over what was there."""
        return NewLocalFile(self.path(name)) if self.is_local else NewUpload(self.fs, self.path(name))

    def put_parquet(self, name: str, table: pa.Table, **writer: Any) -> int:
        """Writes a table as one Parquet object; returns its size in bytes."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, **{"compression": "zstd", **writer})
        content = sink.getvalue()
        self.put(name, content)
        return int(content.size)

    def remove(self, name: str) -> None:
        """Where it is there."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def clear_unfinished(self) -> None:
        """Removes what writers that were killed have left, in the folder and the ones right below. On an object store
        a listing shows nothing of the kind."""
        if self.is_local:
            for half in [*Path(self.path()).glob(f"{TEMPORARY}*"), *Path(self.path()).glob(f"*/{TEMPORARY}*")]:
                half.unlink(missing_ok=True)


class NewObject(Protocol):
    """An object under way: `file` takes its bytes. Without `commit` by the end of the `with`, nothing is there."""

    file: Any

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def commit(self) -> None: ...


class NewLocalFile:
    """A temporary file, then fsync and rename."""

    def __init__(self, path: str) -> None:
        folder = os.path.dirname(path)
        os.makedirs(folder, exist_ok=True)
        self.path, self.temporary = path, os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex}")  # no *.parquet
        self.file = open(self.temporary, "xb")  # noqa: SIM115, closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # a full disk says so at each flush; the first one was enough
            self.file.close()
        Path(self.temporary).unlink(missing_ok=True)

    def commit(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        os.replace(self.temporary, self.path)
        directory = os.open(os.path.dirname(self.path), os.O_RDONLY)
        try:
            os.fsync(directory)  # so that the rename, too, outlives a power cut
        finally:
            os.close(directory)


class NewUpload:
    """An upload in parts, which an object store shows once it is complete."""

    def __init__(self, fs: Any, path: str) -> None:
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        self.file, self.committed = fs.open(path, "wb"), False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.committed:
            self.file.discard()
            self.file.closed = True  # else its destructor completes the upload

    def commit(self) -> None:
        self.file.close()
        self.committed = True


class TableWriter:
    """A Parquet object written batch by batch, of which a row group is held in memory; there once it is committed."""

    def __init__(self, folder: Folder, name: str, schema: pa.Schema, **writer: Any) -> None:
        self.new = folder.create(name)
        # Latents hardly compress, so that nothing but a checksum would notice a bit that has flipped.
        options = {"compression": "zstd", "write_page_checksum": True, **writer}
        self.parquet = pq.ParquetWriter(self.new.file, schema, **options)
        self.waiting: list[pa.Table] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError, ValueError, pa.ArrowException):  # what it still writes is dropped below
            self.parquet.close()
        self.new.__exit__()

    def add(self, table: pa.Table) -> None:
        self.waiting.append(table)
        held = sum(t.num_rows for t in self.waiting), sum(t.nbytes for t in self.waiting)
        if held[0] >= GROUP_ROWS or held[1] >= GROUP_BYTES:
            self._flush()

    def commit(self, footer: Mapping[bytes, str]) -> int:
        """Puts key and value pairs into the footer, completes the object, and returns its size in bytes."""
        self._flush()
        self.parquet.add_key_value_metadata(dict(footer))
        self.parquet.close()
        size = int(self.new.file.tell())
        self.new.commit()
        return size

    def _flush(self) -> None:
        if self.waiting:
            group = pa.concat_tables(self.waiting)
            self.parquet.write_table(group, row_group_size=GROUP_ROWS)
            self.waiting = []
