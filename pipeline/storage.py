"""A folder on any store that fsspec knows, by URI: list, read, and put a whole object atomically."""

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

TEMPORARY = ".tmp-"  # how the name of a file begins that is not yet whole; readers never see one


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
        """Writes one object whole or not at all, over what was there: on a disk a temporary file, fsync and rename;
        on an object store a single put."""
        path = self.path(name)
        if not self.is_local:
            self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            self.fs.pipe_file(path, bytes(content))
            return
        folder, file = os.path.split(path)
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex}-{file}")
        try:
            with open(temporary, "xb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)  # so that the rename, too, outlives a power cut
        finally:
            os.close(directory)

    def put_parquet(self, name: str, table: pa.Table, **writer: Any) -> int:
        """Writes a table as one Parquet object; returns its size in bytes."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, **{"compression": "zstd", **writer})
        content = sink.getvalue()
        self.put(name, content)
        return int(content.size)
