"""A ZIP archive as a folder: its files are read where they stand in it."""

import errno
import threading
import zipfile
import zlib
from typing import Any

from fsspec.archive import AbstractArchiveFileSystem

from palindrome.pipeline.base.errors import SourceError, StoreError
from palindrome.pipeline.images.sources.listing import open_store
from palindrome.pipeline.storage.folder import Options

ENDING = ".zip"
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)  # the last: it is encrypted

_preparing = threading.Lock()


def inside(uri: str, options: Options) -> str:
    """The URI of what is in an archive, where it is one. Raises SourceError where it can't be read."""
    if not uri.lower().endswith(ENDING) or "::" in uri:
        return uri
    fs, path = open_store(uri, options)
    if not fs.isfile(path):
        return uri
    try:
        open_store(found := f"zip://::{uri}", options)
    except DAMAGE as e:
        raise SourceError(f"{uri} is not a ZIP archive: {e}") from e
    return found


def prepare(fs: Any) -> None:
    """Reads an archive's names once, before threads ask for them: fsspec shows them those that it has so far."""
    if isinstance(fs, AbstractArchiveFileSystem):
        with _preparing:
            fs.ls("", detail=False)


class Files:
    """An archive's files; what is wrong with one of them is an error of that file."""

    def __init__(self, fs: Any) -> None:
        self.fs, self.protocol = fs, fs.protocol

    def cat_file(self, path: str) -> bytes:
        try:
            return bytes(self.fs.cat_file(path))
        except DAMAGE as e:
            raise StoreError(errno.EINVAL, " ".join(str(e).split()) or type(e).__name__, path, False) from e
