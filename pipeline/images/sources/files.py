"""Image files, each an object of its own: the bytes, of many at a time where the store is far away."""

import lzma
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.images.records import Piece
from palindrome.pipeline.images.sources.base import RawImage
from palindrome.pipeline.images.sources.servers import Servers
from palindrome.pipeline.storage.folder import is_outage
from palindrome.pipeline.storage.uri import host, is_chain, scheme

READS = 32  # at once from a store that is no disk: each waits for tens of milliseconds
AGAIN = (1.0, 4.0)  # seconds between tries of a web server that answers
BUSY = (None, 408, 429, 502, 503, 504)  # its statuses, None without an answer, that are not of the one image
AHEAD_BYTES = 64 << 20  # of files that wait to be decoded, by their sizes when they were listed


UNREADABLE = (  # what a store says of one file, and an archive of one in it
    *(OSError, ValueError, ImportError, EOFError, NotImplementedError),
    *(zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError),
)

Place = Callable[[Piece], tuple[Any, str]]  # the filesystem of a piece, and its path there


def read_files(
    pieces: Iterable[Piece],
    place: Place,
    local: bool,
    servers: Servers | None = None,
    beside: Sequence[str] = (),
) -> Iterator[RawImage]:
    """One RawImage a piece, in their order; many at once unless all of them are on this machine's disks. Where the
    pieces are a list's, each on a store of its own, `servers` remembers who answers. `beside` are the endings of files
    of text beside each, which are kept with it; None where there is no such file."""

    def read(piece: Piece) -> RawImage:
        return _read(place, piece, beside) if servers is None else _read_of_list(place, piece, servers)

    if local:
        return map(read, pieces)
    return in_threads(read, pieces, READS, lambda piece: piece.size, AHEAD_BYTES)


def _read(place: Place, piece: Piece, beside: Sequence[str] = ()) -> RawImage:
    fs = None
    try:
        fs, path = place(piece)
        if isinstance(fs, LocalFileSystem) and fs.info(path)["type"] == "other":
            return _none(piece, "unreadable", "not a regular file")  # a pipe never ends
        return RawImage(piece.name, piece.uri, fs.cat_file(path), {e: _text(fs, path, e) for e in beside})
    except Exception as e:  # of whichever store
        if is_outage(e, fs) or not (_status(e) or isinstance(e, UNREADABLE)):
            raise
        return _told(piece, e, fs)


def _text(fs: Any, path: str, ending: str) -> str | None:
    """What the file of the same name with that ending holds, None where there is none."""
    try:
        content = bytes(fs.cat_file(f"{path.rpartition('.')[0]}.{ending}"))
    except FileNotFoundError:
        return None
    return content.decode("utf-8-sig", "replace")


def _read_of_list(place: Place, piece: Piece, servers: Servers) -> RawImage:
    """As `_read`; whatever else is wrong with a list's entry is said of that entry, and what is wrong with a web server
    of the images that it has."""
    server = host(piece.uri)
    if server and (why := servers.gone(server)):
        return _none(piece, "unreadable", why)
    fs = None if scheme(piece.uri) not in ("", "file") or is_chain(piece.uri) else LocalFileSystem()
    for wait in (*AGAIN, None):
        try:
            found = _read(place, piece)
        except Exception as e:
            if not is_outage(e, fs):
                found = _told(piece, e, None)
            elif not server or isinstance(e, MemoryError):
                raise
            elif wait is not None and (_status(e) or servers.answers(server)) and not isinstance(e, TimeoutError):
                time.sleep(wait)
                continue
            else:
                servers.failed(server, _words(e), _status(e) in BUSY)
                return _none(piece, "unreadable", _words(e))
        if server:
            servers.answered(server)
        break
    return found


def answers(place: Place, piece: Piece) -> bool:
    """Whether the web server of an image answers, be it that the image is not there."""
    try:
        _read(place, piece)
    except Exception:  # an outage, or a URI that names no server
        return False
    return True


def _told(piece: Piece, e: Exception, fs: Any) -> RawImage:
    if isinstance(e, FileNotFoundError):
        return _none(piece, "missing", "HTTP status 404" if host(piece.uri) else "no such file")
    words = _words(e) if fs is not None or _status(e) else " ".join(str(e).split())[:300]
    return _none(piece, "unreadable", words or type(e).__name__)


def _none(piece: Piece, reason: str, detail: str) -> RawImage:
    return RawImage(piece.name, piece.uri, None, {}, reason, detail)


def _status(e: BaseException) -> int | None:
    """Of an answer over HTTP."""
    found = getattr(e, "status", None) or getattr(e, "code", None)
    return found if isinstance(found, int) else None


def _words(e: BaseException) -> str:
    if status := _status(e):
        return f"HTTP status {status}"
    if isinstance(e, TimeoutError):
        return "timed out"
    return str(getattr(e, "strerror", None) or type(e).__name__)
