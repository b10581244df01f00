"""A folder on any fsspec store, named by URI: list, read, and put objects atomically."""

import errno
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from pyarrow.fs import LocalFileSystem as ArrowLocalFileSystem

from palindrome.pipeline.base.errors import StoreError
from palindrome.pipeline.storage.uri import WEB, chained, is_chain, local_path, scheme
from palindrome.pipeline.storage.uri import absolute as absolute

AWS_FILES = ("~/.aws/credentials", "~/.aws/config")
TEMPORARY = ".tmp-"  # prefix of the names of unfinished files, which readers ignore
WEB_WAITS = {"total": 300, "sock_connect": 10, "sock_read": 20}  # seconds for a web server that does not answer
FOOTER_BYTES = 1 << 16  # that pyarrow reads at the end of a Parquet file
GROUP_ROWS, GROUP_BYTES = 1024, 32 << 20  # a row group of TableWriter is written at either

Options = Mapping[str, Mapping[str, Any]]  # fsspec's storage options by protocol: {"s3": {"endpoint_url": ...}}
ALIASES = {"s3a": "s3", "gcs": "gs", "https": "http", "local": "file"}  # protocols that share another's options
CLIENTS = {"aiohttp", "aiobotocore", "botocore", "requests", "httpx", "httpcore", "urllib3"}  # HTTP clients
CONDITIONAL_PUT = {"s3", "gs"}  # stores whose put can fail if the object exists

for _protocol in ("s3", "s3a"):
    # By name: the module is imported when it is first used.
    fsspec.register_implementation(_protocol, "palindrome.pipeline.storage.s3.S3", clobber=True)

_current: Options | None = None


@contextmanager
def using(options: Options) -> Iterator[None]:
    """Folders and Collections created within the `with` open their stores with these options, also on other nodes."""
    global _current
    before, _current = _current, _resolved(options)
    try:
        yield
    finally:
        _current = before


def current_options() -> Options:
    """The options of `using`, with those of this process's environment, which other nodes do not share."""
    return _resolved({}) if _current is None else _current


def _resolved(options: Options) -> Options:
    found: dict[str, Mapping[str, Any]] = {}
    # fsspec.config.conf is from fsspec's config files and FSSPEC_* variables; `options` override it.
    for source in (fsspec.config.conf, options):
        for name, values in source.items():
            if isinstance(values, Mapping):
                protocol = ALIASES.get(name, name)
                found[protocol] = {**found.get(protocol, {}), **values}
    if any(name.startswith("AWS_") for name in os.environ) or any(
        map(os.path.exists, map(os.path.expanduser, AWS_FILES))
    ):
        from palindrome.pipeline.storage.s3 import for_other_nodes  # imports botocore and aiohttp

        found["s3"] = for_other_nodes(found.get("s3", {}))
    return found


def options_for(uri: str, options: Options | None = None) -> dict[str, dict[str, Any]]:
    """The options (default: the current ones) of the protocols in a URI, as keyword arguments of fsspec's functions."""
    options = current_options() if options is None else options
    chain = re.findall(r"(?:^|::)([a-z0-9+.-]+)(?=://|::)", uri) if is_chain(uri) else []
    protocols = chain or [scheme(uri) or "file"]
    found = {name: dict(options.get(ALIASES.get(name, name), {})) for name in protocols}
    return {name: values for name, values in found.items() if values}


def by_protocol(options: object) -> bool:
    """Whether the object is valid as Options, with protocols that fsspec supports."""
    if not isinstance(options, Mapping) or not options.keys() <= set(fsspec.available_protocols()):
        return False
    return all(isinstance(values, Mapping) for values in options.values())


def open_fs(uri: str, options: Options) -> tuple[Any, str]:
    """The file system of a URI, opened with the options of its protocols, and the path on it."""
    if is_chain(uri):
        if (inside := chained(uri)) and "::" in inside[1]:  # fsspec would take it for another link
            return open_fs(inside[0], options)[0], inside[1]
        fs, path = fsspec.url_to_fs(uri, **options_for(uri, options))
        return fs, str(path)
    protocol = scheme(uri) or "file"
    path = local_path(uri) if protocol == "file" else protocol + uri[len(protocol) :]
    given = options_for(uri, options).get(protocol, {})
    if protocol in WEB:
        from aiohttp import ClientTimeout  # few commands need it

        client = {"timeout": ClientTimeout(**WEB_WAITS), "trust_env": True, **given.get("client_kwargs", {})}
        given = {**given, "client_kwargs": client}
    kind = fsspec.get_filesystem_class(protocol)
    fs = fsspec.filesystem(protocol, **{**kind._get_kwargs_from_urls(path), **given})
    return fs, str(fs._strip_protocol(path))


def open_ranges(fs: Any, path: str, size: int | None = None) -> Any:
    """Opens a file for a reader that knows the ranges it needs. fsspec's read-ahead cache, which would fetch megabytes
    after each range, is off. With its `size` in bytes, on S3, no request asks for that."""
    if isinstance(fs, LocalFileSystem):
        return fs.open(path, "rb")
    known = {"size": size} if size is not None and "s3" in fs.protocol else {}
    return fs.open(path, "rb", cache_type="none", **known)


class _Ranges(FSSpecHandler):
    """Lets pyarrow open files with `open_ranges`."""

    def open_input_file(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(open_ranges(self.fs, path), mode="r")


@dataclass(frozen=True)
class Folder:
    """A folder named by URI (`runs/a`, `s3://bucket/runs/a`). Names of its files are relative to it, with `/`.

    `storage_options`, by protocol (default: the current ones), are passed to fsspec and never written to disk. A
    missing object raises FileNotFoundError; a store that refuses or fails raises another OSError.
    """

    uri: str
    storage_options: Options = field(default_factory=current_options, repr=False)

    @cached_property
    def _location(self) -> tuple[Any, str]:
        fs, path = open_fs(self.uri, self.storage_options)
        return fs, path.rstrip("/")

    @property
    def fs(self) -> Any:
        return self._location[0]

    @property
    def arrow_fs(self) -> Any:
        """The file system for pyarrow's datasets."""
        return ArrowLocalFileSystem() if self.is_local else PyFileSystem(_Ranges(self.fs))

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str = "") -> str:
        return f"{self._location[1]}/{name}" if name else self._location[1]

    def exists(self, name: str = "") -> bool:
        return bool(self.fs.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        return bytes(self.fs.cat_file(self.path(name)))

    def read_parquet(self, name: str, columns: list[str] | None = None, size: int | None = None) -> pa.Table:
        """A table; with `columns`, reads only their bytes; with `size`, as parquet_file."""
        if columns is None:
            return pq.read_table(pa.BufferReader(self.read(name)))
        with self.parquet_file(name, size) as file:
            return file.read(columns)

    def parquet_file(self, name: str, size: int | None = None) -> pq.ParquetFile:
        """A Parquet file opened for range reads: of the footer, or of some rows. With its `size` in bytes, as a listing
        has it, no request asks for that, and a small file takes one."""
        if size is not None and self.reads_whole(size):
            return pq.ParquetFile(pa.BufferReader(self.read(name)))
        return pq.ParquetFile(open_ranges(self.fs, self.path(name), size), pre_buffer=True)

    def reads_whole(self, size: int) -> bool:
        """Whether a Parquet file of that size in bytes is read whole: an object store would take as long for a part."""
        return size <= FOOTER_BYTES and not self.is_local

    def small_parquet_files(self, names: Sequence[str]) -> list[pq.ParquetFile]:
        """Several Parquet files, read whole. An object store is asked for all at once, by one event loop: that takes a
        third less CPU time than a thread for each."""
        found = self.fs.cat_ranges([self.path(name) for name in names], None, None)
        for content in found:
            if isinstance(content, Exception):
                raise content
        return [pq.ParquetFile(pa.BufferReader(content)) for content in found]

    def files(self, below: str) -> dict[str, int]:
        """Sizes in bytes, by name, of the finished files in a folder, not of its subfolders; {} if it is missing."""
        named = {info["name"].rsplit("/", 1)[1]: info for info in self.infos(below) if info["type"] == "file"}
        # Some stores have an object without a name that represents the folder.
        finished = ((name, info) for name, info in sorted(named.items()) if name and not name.startswith(TEMPORARY))
        return {name: info["size"] for name, info in finished}

    def infos(self, below: str) -> list[dict[str, Any]]:
        """What fsspec says of the files and subfolders in a folder, listed anew; [] if it is missing."""
        self.fs.invalidate_cache(self.path(below))
        try:
            return list(self.fs.ls(self.path(below), detail=True))
        except FileNotFoundError:
            return []

    def put(self, name: str, content: bytes | pa.Buffer) -> None:
        """Writes or replaces one object atomically."""
        if self.is_local:
            with self.create(name) as new:
                new.file.write(content)
                new.commit()
        else:
            self.fs.makedirs(self.path(name).rsplit("/", 1)[0], exist_ok=True)
            self.fs.pipe_file(self.path(name), bytes(content))

    def put_new(self, name: str, content: bytes) -> bool:
        """Writes one small object where there is none, and says whether it did. A store without conditional puts may
        let two writers through: whose object it is then shows when it is read."""
        path = self.path(name)
        self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        try:
            if self.is_local:
                with open(path, "xb") as file:
                    file.write(content)
            else:
                self.fs.pipe_file(path, content, mode="create")
        except FileExistsError:
            return False
        return True

    def create(self, name: str, once: bool = False) -> "NewObject":
        """An object to write in pieces. Its commit atomically creates or replaces it. With `once`, on stores with
        conditional puts, a commit does not replace an existing object."""
        return NewLocalFile(self.path(name)) if self.is_local else NewUpload(self.fs, self.path(name), once)

    def put_parquet(self, name: str, table: pa.Table, **writer: Any) -> int:
        """Writes a table as one Parquet object; returns its size in bytes."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, **{"compression": "zstd", **writer})
        content = sink.getvalue()
        self.put(name, content)
        return int(content.size)

    def remove(self, name: str) -> None:
        """Removes an object if it exists."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def clear_unfinished(self) -> None:
        """Removes temporary files or uploads of killed writers, in the folder and its direct subfolders."""
        if self.is_local:
            for file in [*Path(self.path()).glob(f"{TEMPORARY}*"), *Path(self.path()).glob(f"*/{TEMPORARY}*")]:
                file.unlink(missing_ok=True)
        elif hasattr(self.fs, "abort_uploads"):
            with suppress(OSError):  # permission may be lacking; readers never see unfinished uploads
                self.fs.abort_uploads(self.path())


def file_at(uri: str) -> tuple[Folder, str]:
    """The folder of a single file, and the file's name in it."""
    folder, _, name = absolute(uri).rpartition("/")
    return Folder(folder or "/"), name


class NewObject(Protocol):
    """An object being written to `file`. Without `commit` by the end of the `with`, it is discarded."""

    file: Any

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def commit(self) -> None: ...


class NewLocalFile:
    """Writes a temporary file; commit is fsync and rename."""

    def __init__(self, path: str) -> None:
        folder = os.path.dirname(path)
        os.makedirs(folder, exist_ok=True)
        # Without the extension, so that it never matches *.parquet.
        self.path, self.temporary = path, os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex}")
        self.file = open(self.temporary, "xb")  # noqa: SIM115, closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # a full disk raises at each flush; the first error is already on its way
            self.file.close()
        Path(self.temporary).unlink(missing_ok=True)

    def commit(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        if self.file.tell() >= GROUP_BYTES and hasattr(os, "posix_fadvise"):
            # Drops the file from the page cache: a run writes more than fits, and would evict the input.
            os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.replace(self.temporary, self.path)
        directory = os.open(os.path.dirname(self.path), os.O_RDONLY)
        try:
            os.fsync(directory)  # makes the rename durable too
        finally:
            os.close(directory)


class NewUpload:
    """A multipart upload, which an object store shows once it is complete."""

    def __init__(self, fs: Any, path: str, once: bool = False) -> None:
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        protocols = [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
        once = once and bool(CONDITIONAL_PUT.intersection(protocols))
        self.file, self.committed = fs.open(path, "xb" if once else "wb"), False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.committed:
            with suppress(OSError):  # readers never see an upload that could not be aborted
                self.file.discard()
            self.file.closed = True  # otherwise the destructor would complete the upload

    def commit(self) -> None:
        try:
            self.file.close()
        except FileExistsError:  # another attempt has committed the same content
            return
        self.committed = True


class TableWriter:
    """Writes a Parquet object batch by batch, with one row group in memory. It exists once it is committed."""

    def __init__(self, folder: Folder, name: str, schema: pa.Schema, once: bool = False, **writer: Any) -> None:
        self.new = folder.create(name, once)
        # Latents hardly compress, so only a checksum detects flipped bits.
        options = {"compression": "zstd", "write_page_checksum": True, **writer}
        self.parquet = pq.ParquetWriter(self.new.file, schema, **options)
        self.buffered: list[pa.Table] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError, ValueError, pa.ArrowException):  # the object is discarded below
            self.parquet.close()
        self.new.__exit__()

    def add(self, table: pa.Table) -> None:
        self.buffered.append(table)
        rows, size = sum(t.num_rows for t in self.buffered), sum(t.nbytes for t in self.buffered)
        if rows >= GROUP_ROWS or size >= GROUP_BYTES:
            self._flush()

    def commit(self, footer: Mapping[bytes, str]) -> int:
        """Adds key-value pairs to the footer, commits the object, and returns its size in bytes."""
        self._flush()
        self.parquet.add_key_value_metadata(dict(footer))
        self.parquet.close()
        size = int(self.new.file.tell())
        self.new.commit()
        return size

    def _flush(self) -> None:
        if self.buffered:
            group = pa.concat_tables(self.buffered)
            self.parquet.write_table(group, row_group_size=GROUP_ROWS)
            self.buffered = []


# What is wrong with the one file: its path, or that it may not be read.
FAULTS = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
FAULTS |= {errno.EEXIST, errno.EINVAL, errno.EILSEQ, errno.ENXIO, errno.EOVERFLOW, errno.EFBIG}
# What is wrong with this machine, whichever store is read, and with a mounted store's server.
MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
MACHINE |= {errno.ENOTCONN, errno.EAGAIN, errno.ENODEV, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH}


def is_outage(error: BaseException | None, fs: Any) -> bool:
    """Whether an error does not concern the requested object: the store throttles, fails, can't be reached, or rejects
    the credentials; a disk or a mounted server fails; the machine lacks memory or file handles. False for objects that
    are missing, archived, or forbidden, and for what is no readable path."""
    while error is not None:
        if isinstance(error, StoreError):
            return error.outage
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, FileNotFoundError | PermissionError | FileExistsError):
            return False
        number = error.errno if isinstance(error, OSError) else None
        if number is not None and (number in MACHINE or (isinstance(fs, LocalFileSystem) and number not in FAULTS)):
            return True
        code = getattr(error, "status", None) or getattr(error, "code", None)  # of aiohttp, of gcsfs
        code = code or getattr(getattr(error, "response", None), "status_code", None)  # of requests and httpx
        if str(code).isdigit() and int(str(code)) >= 400:
            return int(str(code)) in (401, 408, 425, 429) or int(str(code)) >= 500
        of_client = type(error).__module__.split(".")[0] in CLIENTS and not isinstance(error, ValueError)  # of no URL
        if of_client or isinstance(error, ConnectionError | TimeoutError):
            return True
        error = error.__cause__
    return False
