"""WebDataset: tars whose members `<key>.<extension>` make up samples, an image and what belongs to it.

A sample's id is its place in the tar; its source names the key. The members of one key need not stand together: such
a tar is one piece, however large. Of an archive that breaks off, the sample that it breaks off in is a reject that says
so, or, where no sample is known there, one sample more.
"""

import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby, islice, pairwise
from typing import Any, NamedTuple

import pyarrow as pa

from palindrome.pipeline.base.errors import SourceError
from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.images.records import Piece
from palindrome.pipeline.images.sources.base import PICTURES, Collection, RawImage
from palindrome.pipeline.images.sources.listing import Listed, as_text, path_of
from palindrome.pipeline.storage.folder import is_outage

KEY = "__key__"  # what the WebDataset library calls a sample's key; it can be kept
CLASS = "cls"  # the extension of a class, a number unless they are names
LOOK = 100  # samples by which a collection's extensions are known
HEADERS = 1 << 20  # bytes fetched at once to go from header to header
SAMPLES = 8 << 20  # and to read what is between them
GZIP = b"\x1f\x8b\x08"  # how a compressed tar begins, whatever its name ends in
PACKED = 1 << 16  # bytes unpacked at once, into a thousand times as many at most


class _Broken(Exception):
    """The archive can't be read on from here."""


class _Member(NamedTuple):
    """A file in a tar: where its header begins, where its bytes begin and how many they are, in bytes; whether they
    all are there."""

    key: str
    extension: str
    header: int
    offset: int
    size: int
    whole: bool


def columns(
    fs: Any, tars: Iterable[str], uri: str, asked: str | None, keep: Sequence[str]
) -> tuple[str | None, tuple[pa.Field, ...]]:
    """The extension of the images (None: any of a picture's) and the fields to keep, by the samples of the first tar
    that has some."""
    named = {name.lower() for name in (asked, *keep) if name and name != KEY}
    looks = ((tar, *_look(fs, tar, named)) for tar in tars)
    first, samples, types = next((look for look in looks if look[1]), (uri, [], {}))
    seen = set().union(*samples)
    pictures = set(filter(_is_picture, seen))
    members = ", ".join(sorted(seen)) or "nothing"
    if asked is not None and asked.lower() not in seen:
        raise SourceError(f"no sample of {first} has a member .{asked}; there is {members}", "image_column")
    if asked is None and not pictures:
        raise SourceError(f"no sample of {first} has an image; there is {members}")
    if asked is None and any(len(sample & pictures) > 1 for sample in samples):
        several = ", ".join(sorted(pictures))
        raise SourceError(f"{uri} has several images a sample ({several}); name one", "image_column")
    for name in keep:
        if name != KEY and name.lower() not in seen:
            raise SourceError(f"no sample of {first} has a member .{name}; there is {members}", "keep")
    kept = tuple(pa.field(name, types.get(name.lower(), pa.string())) for name in keep)
    return asked and asked.lower(), kept


def _look(fs: Any, uri: str, named: set[str]) -> tuple[list[set[str]], dict[str, pa.DataType]]:
    """The extensions of the first samples, and of more until those that are `named` were met; the types of members that
    are no texts: classes where they are numbers."""
    samples: dict[str, set[str]] = {}
    left, numbers = set(named), True
    with _opened(fs, uri, HEADERS) as (file, size, _), suppress(_Broken):
        for member in _members(file, size):
            if len(samples) >= LOOK and not left and member.key not in samples:
                break
            samples.setdefault(member.key, set()).add(member.extension)
            left.discard(member.extension)
            if member.extension == CLASS and CLASS in named and (content := _content(file, member)) is not None:
                numbers = numbers and _number(content) is not None
    return list(samples.values()), {CLASS: pa.int64()} if numbers else {}


def pieces(fs: Any, listed: Iterable[Listed], shard_size: int) -> Iterator[Piece]:
    """Ranges of at most `shard_size` samples. The headers are read, 16 tars at once."""
    for file, ranges in in_threads(lambda file: (file, _ranges(fs, file.uri, shard_size)), listed):
        for start, stop, offset, length in ranges:
            yield Piece(file.uri, file.name, file.size, file.version, start, stop, offset, length)


def _ranges(fs: Any, uri: str, shard_size: int) -> list[tuple[int, int, int, int]]:
    """(first sample, the one behind the last, first byte, bytes) of each piece; no bytes where all of the tar has to be
    read to know its samples."""
    starts: list[int] = []
    keys: set[str] = set()
    last, end, cut, broken = None, 0, False, False
    with _opened(fs, uri, HEADERS) as (file, size, packed):
        try:
            for member in _members(file, size):
                if member.key != last:
                    starts.append(member.header)
                    keys.add(member.key)
                last, end, cut = member.key, member.offset + member.size, not member.whole
        except _Broken:
            broken = not cut  # else its sample says so
    if packed or len(keys) < len(starts):
        return [(0, len(keys) + broken, 0, 0)] if keys or broken else []
    if broken:
        starts.append(-(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        end = max(size, starts[-1]) + 1
    count = len(starts)
    parts = -(-count // shard_size)
    bounds = [count * k // parts for k in range(parts + 1)] if parts else [0]
    places = [*starts, end]
    return [(i, k, places[i], places[k] - places[i]) for i, k in pairwise(bounds)]


def read(fs: Any, piece: Piece, collection: Collection) -> Iterator[RawImage]:
    done = piece.start
    reason, detail = "missing", "the archive has fewer samples than when it was listed"
    kept = [field.name for field in collection.kept]

    def wanted(extension: str) -> bool:
        return extension in (collection.image_column, *map(str.lower, kept)) or (
            collection.image_column is None and _is_picture(extension)
        )

    try:
        with _opened(fs, piece.uri, SAMPLES) as (file, size, _):
            samples = _window(file, size, piece, wanted) if piece.length else _anywhere(file, size, piece, wanted)
            for key, contents in samples:
                yield _sample(piece, done, key, contents, collection)
                done += 1
    except FileNotFoundError:
        detail = "no such file"
    except _Broken as e:
        reason, detail = "truncated", str(e)
    except OSError as e:
        if is_outage(e, fs):
            raise
        reason, detail = "unreadable", e.strerror or type(e).__name__
    for row in range(done, piece.stop):
        yield RawImage(f"{piece.name}#{row}", f"{piece.uri}#{row}", None, dict.fromkeys(kept), reason, detail)


Sample = tuple[str, dict[str, bytes | None]]  # a key, and contents by extension: None where the archive breaks off


def _window(file: Any, size: int, piece: Piece, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """The samples of a part of a tar, each read where it stands."""
    broken: list[_Broken] = []

    def members() -> Iterator[_Member]:
        try:
            yield from _members(file, size, piece.offset, piece.offset + piece.length)
        except _Broken as e:  # once the sample before it is given
            broken.append(e)

    for key, group in islice(groupby(members(), lambda m: m.key), piece.stop - piece.start):
        yield key, _contents(file, group, wanted)
    if broken:
        raise broken[0]


def _anywhere(file: Any, size: int, piece: Piece, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """The samples of a whole tar, whose members stand in any order; of two of one name the later one is meant."""
    found: dict[str, dict[str, _Member]] = {}
    broken = None
    try:
        for member in _members(file, size):
            found.setdefault(member.key, {})[member.extension] = member
    except _Broken as e:
        broken = e
    for key, members in islice(found.items(), piece.start, piece.stop):
        yield key, _contents(file, members.values(), wanted)
    if broken:
        raise broken


def _contents(file: Any, members: Iterable[_Member], wanted: Callable[[str], bool]) -> dict[str, bytes | None]:
    return {m.extension: _content(file, m) for m in members if wanted(m.extension) or not m.whole}


def _sample(piece: Piece, row: int, key: str, contents: Mapping[str, bytes | None], collection: Collection) -> RawImage:
    name, source = f"{piece.name}#{row}", f"{piece.uri}#{key}"
    kept = {f.name: key if f.name == KEY else _value(f, contents.get(f.name.lower())) for f in collection.kept}
    if None in contents.values():
        return RawImage(name, source, None, kept, "truncated", f"the archive breaks off in sample {key}")
    pictures = sorted(filter(_is_picture, contents), key=lambda extension: (extension.count("."), extension))
    column = collection.image_column or next(iter(pictures), None)
    if column is None or column not in contents:
        return RawImage(name, source, None, kept, "null", f"sample {key} has no image")
    return RawImage(name, source, contents[column], kept)


def _is_picture(extension: str) -> bool:
    """`jpg` is one, and `left.jpg`."""
    return f".{extension.rpartition('.')[2]}" in PICTURES


def _value(field: pa.Field, content: bytes | None) -> Any:
    """A member as a column's value; None where the sample has none, or a class is no number."""
    if content is None:
        return None
    return _number(content) if field.type == pa.int64() else content.decode("utf-8", "replace")


def _number(content: bytes) -> int | None:
    with suppress(ValueError):
        if abs(number := int(content)) < 1 << 63:
            return number
    return None


def _content(file: Any, member: _Member) -> bytes | None:
    """None where the archive breaks off in it."""
    file.seek(member.offset)
    content = bytes(file.read(member.size)) if member.whole else b""
    return content if len(content) == member.size else None


def _members(file: Any, size: int, start: int = 0, stop: int | None = None) -> Iterator[_Member]:
    """The files of a tar whose headers are from `start` to before `stop`; hidden ones are left out. Raises _Broken
    where it can't be read on, which tarfile takes for the end of the archive, or behind the file that is cut."""
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                if stop is not None and info.offset >= stop:
                    return
                if info.size < 0:
                    raise _Broken(f"the archive can't be read: a size of {info.size}")
                path = as_text(info.name)
                has_bytes = info.isreg() and not info.issparse()  # which stand otherwise than they are
                whole = not has_bytes or info.offset_data + info.size <= size
                if has_bytes and not any(part.startswith(".") for part in path.removeprefix("./").split("/")):
                    folder, slash, name = path.rpartition("/")
                    stem, _, extension = name.partition(".")
                    key = folder + slash + stem
                    yield _Member(key, extension.lower(), info.offset, info.offset_data, info.size, whole)
                if not whole:
                    raise _Broken(f"the archive breaks off in {path}")
            file.seek(archive.offset)
            block = file.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE or any(block):
                raise _Broken(f"the archive breaks off at byte {archive.offset}")
    except (tarfile.TarError, EOFError, ValueError, RecursionError) as e:  # ValueError: of a header's numbers
        raise _Broken(f"the archive can't be read: {as_text(str(e))}") from e


@contextmanager
def _opened(fs: Any, uri: str, block: int) -> Iterator[tuple[Any, int, bool]]:
    """The tar, open for reading anywhere, its size, and whether it was compressed: then it is unpacked to a file."""
    with fs.open(path_of(fs, uri), "rb", block_size=block, cache_type="readahead") as file:
        packed = file.read(len(GZIP)) == GZIP
        if not packed:
            yield file, file.seek(0, 2), packed
            return
        file.seek(0)
        with tempfile.TemporaryFile(prefix="palindrome-") as unpacked:
            _unpack(file, unpacked)
            yield unpacked, unpacked.tell(), packed


def _unpack(packed: Any, unpacked: Any) -> None:
    """As far as it goes: where it breaks off or is damaged, so does the tar."""
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
    with suppress(zlib.error):
        while content := packed.read(PACKED):
            while content:
                unpacked.write(unpacker.decompress(content))
                content = unpacker.unused_data
                if unpacker.eof:  # another may follow
                    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
