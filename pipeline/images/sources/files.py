"""Image files, each an object of its own: the bytes, of many at a time where the store is far away."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.images.records import Piece
from palindrome.pipeline.images.sources.base import RawImage
from palindrome.pipeline.storage.folder import is_outage

READS = 32  # at once from a store that is no disk: each waits for tens of milliseconds
AHEAD_BYTES = 64 << 20  # of files that wait to be decoded, by their sizes when they were listed


Place = Callable[[Piece], tuple[Any, str]]  # the filesystem of a piece, and its path there


def read_files(pieces: Iterable[Piece], place: Place, local: bool) -> Iterator[RawImage]:
    """One RawImage a piece, in their order; many at once unless all of them are on this machine's disks."""
    if local:
        return (_read(place, piece) for piece in pieces)
    return in_threads(lambda piece: _read(place, piece), pieces, READS, lambda piece: piece.size, AHEAD_BYTES)


def _read(place: Place, piece: Piece) -> RawImage:
    fs = None
    try:
        fs, path = place(piece)
        if isinstance(fs, LocalFileSystem) and fs.info(path)["type"] == "other":
            return RawImage(piece.name, piece.uri, None, {}, "unreadable", "not a regular file")  # a pipe never ends
        return RawImage(piece.name, piece.uri, fs.cat_file(path), {})
    except FileNotFoundError:
        return RawImage(piece.name, piece.uri, None, {}, "missing", "no such file")
    except Exception as e:  # of whichever store
        status = getattr(e, "status", None) or getattr(e, "code", None)  # of an answer over HTTP
        if is_outage(e, fs) or not (status or isinstance(e, OSError | ValueError | ImportError)):
            raise
        words = getattr(e, "strerror", None) or (f"HTTP status {status}" if status else "")
        if fs is None:  # of a list: no URI, or of a store that nothing here knows
            words = words or " ".join(str(e).split())
        return RawImage(piece.name, piece.uri, None, {}, "unreadable", words or type(e).__name__)
