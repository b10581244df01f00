"""WebDataset: tars whose members `<key>.<extension>` make up samples, an image and what belongs to it.

A sample's id is its place in the tar; its source names the key. The members of one key need not stand together: such
a tar is one piece, however large. Of an archive that breaks off, the sample that it breaks off in is a reject that says
so, or, where no sample is known there, one sample more. Each further image of a sample is a row behind all of these.
"""

import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby, islice, pairwise
from typing import Any, NamedTuple

import pyarrow as pa

from palindrome.pipeline.base.errors import SourceError
from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.images.records import Piece
from palindrome.pipeline.images.sources.base import PICTURES, Collection, RawImage
from palindrome.pipeline.images.sources.listing import Listed, as_text, path_of, say_once
from palindrome.pipeline.images.sources.unpack import TooLargeError, compression, unpack
from palindrome.pipeline.storage import lfs
from palindrome.pipeline.storage.folder import is_outage

KEY = "__key__"  # what the WebDataset library calls a sample's key; it can be kept
CLASS = "cls"  # the extension of a class, a number unless they are names
LOOK = 100  # samples by which a collection's extensions are known
HEADERS = 1 << 20  # bytes fetched at once to go from header to header
SAMPLES = 8 << 20  # and to read what is between them
LAST = "*"  # how an image column begins where a member's extension is what follows the last dot: `*.png`, `*`


class _Broken(Exception):
    """The archive can't be read on from here."""

    def __init__(self, detail: str, reason: str = "truncated") -> None:
        super().__init__(detail)
        self.reason = reason


class _Member(NamedTuple):
    """A file in a tar: its path there, where its header begins, where its bytes begin and how many they are, in bytes;
    whether they all are there."""

    path: str
    header: int
    offset: int
    size: int
    whole: bool


class Names:
    """How members' paths are read, by a collection's image column: `png`, `left.png`, `*.png`, `*`, or None for any
    picture's. A key ends at the first dot of the name, as the WebDataset library has it, or at the last."""

    def __init__(self, image_column: str | None) -> None:
        self.last = image_column is not None and image_column.startswith(LAST)
        self.extension = (image_column or "").removeprefix(LAST).removeprefix("." if self.last else "").lower() or None

    def split(self, path: str) -> tuple[str, str]:
        """Key and extension."""
        folder, slash, name = path.rpartition("/")
        stem, dot, extension = name.rpartition(".") if self.last else name.partition(".")
        return folder + slash + (stem if dot else name), extension.lower() if dot else ""

    def key(self, member: _Member) -> str:
        return self.split(member.path)[0]

    def is_image(self, path: str) -> bool:
        extension = self.split(path)[1]
        return extension == self.extension if self.extension else _is_picture(extension)

    def images(self, members: Iterable[_Member]) -> list[_Member]:
        """Those of a sample: first the one that gives the sample's own row."""
        found = [member for member in members if self.is_image(member.path)]
        order = {m.path: (e.count("."), e) for m in found for e in [self.split(m.path)[1]]}
        found.reverse()  # the later of x.png and x.PNG
        return sorted(found, key=lambda member: order[member.path])

    def samples(self, paths: Iterable[str]) -> dict[str, list[str]]:
        """The extensions of each key's members."""
        found: dict[str, list[str]] = {}
        for key, extension in map(self.split, paths):
            found.setdefault(key, []).append(extension)
        return found


FIRST_DOT, LAST_DOT = Names(None), Names(LAST)


def columns(
    fs: Any, tars: Iterable[str], uri: str, asked: str | None, keep: Sequence[str]
) -> tuple[str | None, tuple[pa.Field, ...]]:
    """The extension of the images (None: any of a picture's) and the fields to keep, by the samples of the first tar
    that has some."""
    asked, wanted = asked and asked.lower().lstrip("."), {name.lower() for name in keep if name != KEY}
    named = wanted | ({asked.removeprefix(LAST).lstrip(".")} if asked else set())
    why = ""
    first, paths, types = uri, list[str](), dict[str, pa.DataType]()
    for tar in tars:
        paths, types, broken = _look(fs, tar, named)
        why = why or (f": {tar}: {broken}" if broken else "")
        if paths:
            first, why = tar, ""
            break
    column = _column(paths, asked, wanted, first, why, uri)
    seen = set().union(*Names(column).samples(paths).values())
    for name in keep:
        if name != KEY and name.lower() not in seen:
            there = ", ".join(sorted(seen))
            raise SourceError(f"no sample of {first} has a member .{name}; there is {there}", "keep", name)
    kept = tuple(pa.field(name, types.get(name.lower(), pa.string())) for name in keep)
    return column, kept


def _column(paths: Sequence[str], asked: str | None, keep: set[str], first: str, why: str, uri: str) -> str | None:
    """The image column. Keys end at the first dot; at the last one where the first leaves no image, or several whose
    names differ in numbers: `22.05.png`, `22.10.png`."""
    by_first, by_last = FIRST_DOT.samples(paths), LAST_DOT.samples(paths)
    seen, at_last = set().union(*by_first.values()), set().union(*by_last.values())
    members = ", ".join(sorted(seen)) or "nothing"
    if asked is not None:
        if asked in seen:
            return asked
        extension = asked.removeprefix(LAST).lstrip(".")
        if extension in at_last or (not extension and any(map(_is_picture, at_last))):
            return f"{LAST}.{extension}" if extension else LAST
        raise SourceError(f"no sample of {first} has a member .{asked}; there is {members}{why}", "image_column")
    pictures = sorted(filter(_is_picture, seen))
    if not pictures:
        raise SourceError(f"no sample of {first} has an image; there is {members}{why}")
    several = any(sum(map(_is_picture, extensions)) > 1 for extensions in by_first.values())
    one_each = all(sum(map(_is_picture, extensions)) == 1 for extensions in by_last.values())
    if several and one_each and all(map(_is_numbered, (p for p in pictures if "." in p))):
        return LAST
    if several:
        there = ", ".join(pictures[:10]) + (", …" if len(pictures) > 10 else "")
        kinds = " ".join(sorted({f"'{LAST}.{picture.rpartition('.')[2]}'" for picture in pictures}))
        message = f"{uri} has several images a sample ({there}), as a name's first dot ends its key; name one of them"
        raise SourceError(f"{message}, or end keys at the last dot: {kinds}", "image_column")
    return LAST if not keep <= seen and keep <= at_last and one_each else None


def _is_numbered(extension: str) -> bool:
    """`05.png` is more likely a part of a name than what the member is, as in `left.png`."""
    return any(part.isdigit() for part in extension.split(".")[:-1])


def _look(fs: Any, uri: str, named: set[str]) -> tuple[list[str], dict[str, pa.DataType], str]:
    """The paths of the first samples' members, and of more until those that are `named` were met; the types of members
    that are no texts: classes where they are numbers; what is wrong with the archive."""
    keys: set[str] = set()
    paths: list[str] = []
    left, numbers, wrong = set(named), True, ""
    try:
        with _opened(fs, uri, HEADERS) as (file, size, _):
            for member in _members(file, size):
                key = FIRST_DOT.key(member)
                if len(keys) >= LOOK and not left and key not in keys:
                    break
                keys.add(key)
                paths.append(member.path)
                extensions = {FIRST_DOT.split(member.path)[1], LAST_DOT.split(member.path)[1]}
                left -= extensions
                if CLASS in extensions & named and (content := _content(file, member)) is not None:
                    numbers = numbers and _number(content) is not None
    except _Broken as e:
        wrong = str(e)
    return paths, {CLASS: pa.int64()} if numbers else {}, wrong


def pieces(fs: Any, collection: Collection, listed: Iterable[Listed], shard_size: int) -> Iterator[Piece]:
    """Ranges of at most `shard_size` samples, then of the further images. The headers are read, 16 tars at once."""
    names = Names(collection.image_column)
    more = others = 0
    for file, ranges, further, links in in_threads(
        lambda file: (file, *_ranges(fs, file.uri, shard_size, names)), listed
    ):
        more, others = more + further, others + links
        for start, stop, offset, length in ranges:
            yield Piece(file.uri, file.name, file.size, file.version, start, stop, offset, length)
    if others:
        say_once(f"passed over in {collection.uri}: links and sparse files in tars: {others}")
    if more:
        say_once(f"{collection.uri}: {more} images are further ones of their samples, rows behind those of the samples")


def _ranges(fs: Any, uri: str, shard_size: int, names: Names) -> tuple[list[tuple[int, int, int, int]], int, int]:
    """(first sample, the one behind the last, first byte, bytes) of each piece; no bytes where all of the tar has to be
    read to know its samples. How many images are further ones. How many members are passed over."""
    starts: list[int] = []
    images: dict[str, str | None] = {}  # the first of each key
    further: set[str] = set()
    links: list[str] = []
    last, end, cut, broken, packed, size = None, 0, False, False, False, 0
    try:
        with _opened(fs, uri, HEADERS) as (file, size, packed):
            for member in _members(file, size, links=links):
                key = names.key(member)
                if key != last:
                    starts.append(member.header)
                    images.setdefault(key, None)
                if names.is_image(member.path):
                    if images[key] is None:
                        images[key] = member.path
                    elif images[key] != member.path:
                        further.add(member.path)
                last, end, cut = key, member.offset + member.size, not member.whole
    except _Broken:
        broken = not cut  # else its sample says so
    count = len(images) + broken
    behind = [(start, stop, 0, 0) for start, stop in _cut(count, count + len(further), shard_size)]
    if packed or len(images) < len(starts):
        return [(0, count, 0, 0), *behind] if count else [], len(further), len(links)
    if broken:
        starts.append(-(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        end = max(size, starts[-1]) + 1
    places = [*starts, end]
    windows = [(i, k, places[i], places[k] - places[i]) for i, k in _cut(0, len(starts), shard_size)]
    return windows + behind, len(further), len(links)


def _cut(start: int, stop: int, shard_size: int) -> Iterator[tuple[int, int]]:
    """Equal parts of at most `shard_size`."""
    count = stop - start
    parts = -(-count // shard_size)
    return pairwise(start + count * k // parts for k in range(parts + 1)) if parts else iter(())


def read(fs: Any, piece: Piece, collection: Collection) -> Iterator[RawImage]:
    done = piece.start
    reason, detail = "missing", "the archive has fewer samples than when it was listed"
    names = Names(collection.image_column)
    try:
        with _opened(fs, piece.uri, SAMPLES) as (file, size, _):
            for sample in (_window if piece.length else _anywhere)(file, size, piece, names):
                yield _row(file, piece, done, sample, names, collection)
                done += 1
    except FileNotFoundError:
        detail = "no such file"
    except _Broken as e:
        reason, detail = e.reason, str(e)
    except OSError as e:
        if is_outage(e, fs):
            raise
        reason, detail = "unreadable", e.strerror or type(e).__name__
    for row in range(done, piece.stop):
        kept = dict.fromkeys(field.name for field in collection.kept)
        yield RawImage(f"{piece.name}#{row}", f"{piece.uri}#{row}", None, kept, reason, detail)


class _Sample(NamedTuple):
    """A sample of a tar, and which of its images is meant: None for that of its own row."""

    key: str
    members: list[_Member]
    image: _Member | None = None


def _window(file: Any, size: int, piece: Piece, names: Names) -> Iterator[_Sample]:
    """The samples of a part of a tar, each read where it stands."""
    broken: list[_Broken] = []

    def members() -> Iterator[_Member]:
        try:
            yield from _members(file, size, piece.offset, piece.offset + piece.length)
        except _Broken as e:  # once the sample before it is given
            broken.append(e)

    for key, group in islice(groupby(members(), names.key), piece.stop - piece.start):
        yield _Sample(key, _latest(group))
    if broken:
        raise broken[0]


def _anywhere(file: Any, size: int, piece: Piece, names: Names) -> Iterator[_Sample]:
    """The samples of a whole tar, whose members stand in any order, or the further images of them."""
    found: dict[str, list[_Member]] = {}
    broken = None
    try:
        for member in _members(file, size):
            found.setdefault(names.key(member), []).append(member)
    except _Broken as e:
        broken = e
    samples = (_Sample(key, _latest(members)) for key, members in found.items())
    first = piece.start
    if first and first >= len(found):  # a piece of samples that is no window begins with the first
        more = (s._replace(image=image) for s in samples for image in names.images(s.members)[1:])
        cut = broken is not None and all(m.whole for members in found.values() for m in members)
        yield from islice(more, max(first - len(found) - cut, 0), piece.stop - len(found) - cut)
    else:
        yield from islice(samples, first, piece.stop)
    if broken:
        raise broken


def _latest(members: Iterable[_Member]) -> list[_Member]:
    """Of several of one path the last is meant, as tar has it."""
    return list({member.path: member for member in members}.values())


def _row(file: Any, piece: Piece, row: int, sample: _Sample, names: Names, collection: Collection) -> RawImage:
    images = names.images(sample.members)
    image = sample.image or next(iter(images), None)
    by_extension = {names.split(member.path)[1]: member for member in sample.members}
    key, within = sample.key, names.split(image.path)[1].rpartition(".")[0] if image else ""
    if within and len(images) > 1:  # 22.05.png and 22.10.png: to each what is called like it
        key = f"{key}.{within}"
        by_extension |= {
            extension.removeprefix(f"{within}."): member
            for extension, member in by_extension.items()
            if extension.startswith(f"{within}.")
        }
    sidecars = {f.name: by_extension.get(f.name.lower()) for f in collection.kept if f.name != KEY}
    parts = [m for m in (image, *sidecars.values()) if m is not None]
    contents = {member.path: _content(file, member) for member in parts}
    kept = {
        f.name: key if f.name == KEY else _value(f, (m := sidecars[f.name]) and contents[m.path])
        for f in collection.kept
    }
    name, source = f"{piece.name}#{row}", f"{piece.uri}#{key}"
    if None in contents.values() or not (sample.image or all(member.whole for member in sample.members)):
        return RawImage(name, source, None, kept, "truncated", f"the archive breaks off in sample {key}")
    if image is None:
        return RawImage(name, source, None, kept, "null", f"sample {key} has no image")
    return RawImage(name, source, contents[image.path], kept)


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


def _members(
    file: Any, size: int, start: int = 0, stop: int | None = None, links: list[str] | None = None
) -> Iterator[_Member]:
    """The files of a tar whose headers are from `start` to before `stop`; hidden ones are left out, and `links`, which
    have no bytes there. Raises _Broken where it can't be read on, which tarfile takes for the end of the archive, or
    behind the file that is cut."""
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
                hidden = any(part.startswith(".") for part in path.split("/") if part not in (".", ".."))
                if not (has_bytes or hidden or info.isdir()) and links is not None:
                    links.append(path)
                if has_bytes and not hidden:
                    yield _Member(path, info.offset, info.offset_data, info.size, whole)
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
    """The tar, open for reading anywhere, its size, and whether it was compressed: then it is unpacked to a file.
    Raises _Broken where it is none."""
    with fs.open(path_of(fs, uri), "rb", block_size=block, cache_type="readahead") as file:
        head = file.read(lfs.LARGEST)
        if lfs.is_pointer(head):
            raise _Broken(lfs.WORDS, "unreadable")
        packed = compression(head)
        if not packed:
            yield file, file.seek(0, 2), False
            return
        file.seek(0)
        with tempfile.TemporaryFile(prefix="palindrome-") as unpacked:
            try:
                unpack(file, unpacked, packed)
            except TooLargeError as e:
                raise _Broken(str(e), "unreadable") from e
            yield unpacked, unpacked.tell(), True
