"""What is compressed, whatever its name ends in: recognised by its first bytes, and unpacked as far as it goes."""

import bz2
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from palindrome.pipeline.base.errors import writing

HEAD = 10  # bytes by which a compression is known
STARTS = {
    "gzip": rb"\x1f\x8b\x08",
    "bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\0",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",  # a frame, or one that is skipped
    "lz4": rb"\x04\x22\x4d\x18",
}
PACKED = 1 << 16  # bytes read at once
CHUNK = 1 << 20  # bytes unpacked at once
RATIO, FREE = 100, 256 << 20  # the most bytes that one byte unpacks to, in what is larger than FREE
DAMAGE = (zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)  # of what is unpacked: reads are not in the try


class TooLargeError(ValueError):
    """It unpacks to more than anybody would have packed."""


def compression(head: bytes) -> str | None:
    """By the first HEAD bytes of a file; None where it is not compressed."""
    return next((name for name, start in STARTS.items() if re.match(start, head, re.DOTALL)), None)


def unpack(packed: Any, unpacked: Any, name: str) -> None:
    """Writes `packed`, a file at its beginning, to another. Where it breaks off or is damaged, so does the other.
    Raises TooLargeError, and OSError or RunError where one of the files can't be read or written."""
    size = 0
    read = _Reads(packed)
    for content in (_arrow if name in ("zstd", "lz4") else _standard)(read, name):
        with writing("the temporary folder"):
            size += unpacked.write(content)
        if size > max(FREE, RATIO * read.bytes):
            raise TooLargeError(f"it unpacks to more than {RATIO} times its size")


class _Reads:
    """A file that keeps the error of the store it is read from, and counts."""

    closed = False

    def __init__(self, file: Any) -> None:
        self.file, self.bytes = file, 0
        self.error: OSError | None = None

    def read(self, size: int) -> bytes:
        try:
            content = bytes(self.file.read(size))
        except OSError as e:
            self.error = e
            raise
        self.bytes += len(content)
        return content

    def close(self) -> None:
        """The file stays open."""


def _standard(read: _Reads, name: str) -> Iterator[bytes]:
    """By zlib, bz2 and lzma; several streams may follow each other."""
    new: Callable[[], Any] = {
        "gzip": lambda: zlib.decompressobj(zlib.MAX_WBITS | 16),
        "bz2": bz2.BZ2Decompressor,
        "xz": lzma.LZMADecompressor,
    }[name]
    unpacker = new()
    while content := read.read(PACKED):
        while content or not getattr(unpacker, "needs_input", True):
            try:
                found = unpacker.decompress(content, CHUNK)
            except DAMAGE:
                return
            yield found
            content = getattr(unpacker, "unconsumed_tail", b"")  # of zlib; the others keep it
            if unpacker.eof:  # another may follow
                content, unpacker = unpacker.unused_data, new()


def _arrow(read: _Reads, name: str) -> Iterator[bytes]:
    """By Arrow, of which a read that meets damage gives nothing: then again, with reads as small as a tar's blocks."""
    done = 0
    for size in (CHUNK, 512):
        read.file.seek(0)
        stream = pa.CompressedInputStream(pa.PythonFile(read, mode="r"), name)
        try:
            for skipped in range(0, done, CHUNK):
                stream.read(min(CHUNK, done - skipped))
            while content := stream.read(size):
                yield content
                done += len(content)
            return
        except DAMAGE:
            if read.error:
                raise read.error from None
