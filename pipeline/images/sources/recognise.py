"""What kind a collection is of: that of the files which hold the data, by their names' endings and their sizes."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from palindrome.pipeline.base.errors import SourceError
from palindrome.pipeline.images.sources import lists, tables
from palindrome.pipeline.images.sources.base import (
    ARROW,
    ARROWS,
    FILES,
    LIST,
    LISTS,
    PARQUET,
    PARQUETS,
    PICTURES,
    TARS,
    WEBDATASET,
)
from palindrome.pipeline.images.sources.listing import Listed

ENDINGS = {FILES: PICTURES, WEBDATASET: TARS, PARQUET: PARQUETS, ARROW: ARROWS, LIST: LISTS}
WORDS = {FILES: "pictures", WEBDATASET: "tars", PARQUET: "Parquet files", ARROW: "Arrow files"}
BESIDE = (".md", ".rst", ".html", ".json", ".yaml", ".yml", ".py", "license", "readme")  # data, without being any
SOME = 16  # files of a kind that are looked into
ZIP = ".zip"
MOST = 0.9  # of the bytes: what holds so many of them is the data, and the rest is beside it


class Tally:
    """How many files of each kind, how many bytes they are, and some of them. Others count as None."""

    def __init__(self) -> None:
        self.files: Counter[str | None] = Counter()
        self.bytes: Counter[str | None] = Counter()
        self.some: dict[str | None, list[Listed]] = {}
        self.beside = self.zips = 0

    def adding(self, files: Iterable[Listed]) -> Iterator[Listed]:
        for file in files:
            self.add(file)
            yield file

    def add(self, file: Listed) -> None:
        name = file.name.lower()
        kind = next((kind for kind, endings in ENDINGS.items() if name.endswith(endings)), None)
        self.files[kind] += 1
        self.bytes[kind] += max(file.size, 1)
        if len(some := self.some.setdefault(kind, [])) < SOME:
            some.append(file)
        self.zips += name.endswith(ZIP)
        if kind is None:
            self.beside += name.endswith(BESIDE)


def recognised(fs: Any, found: Tally, uri: str, image_column: str | None) -> str:
    """The kind. Where files of several kinds could be the data, the one that holds MOST of the bytes. Raises
    SourceError where none does: a guess would reject images, or leave them out."""
    sizes = {kind: found.bytes[kind] for kind in WORDS if found.files[kind]}
    if len(sizes) > 1 and image_column is not None:
        sizes.pop(FILES, None)  # they have no columns
    for kind in (PARQUET, ARROW):
        unclear = len(sizes) > 1 and kind in sizes and not _is_most(sizes, FILES)
        if unclear and not any(tables.holds_images(fs, file.uri) for file in found.some[kind]):
            del sizes[kind]  # they describe the others
    if not sizes:
        if found.zips and found.zips + found.beside == found.files.total():
            raise SourceError(f"{uri} holds {found.zips} ZIP archives; name one of them, it is read like a folder")
        others = found.files.total() - found.files[LIST] - found.beside
        return LIST if found.files[LIST] and not others else FILES
    best = max(sizes, key=lambda kind: sizes[kind])
    if not _is_most(sizes, best):
        words = " and ".join(f"{found.files[kind]} {WORDS[kind]}" for kind in sizes)
        raise SourceError(f"{uri} holds {words}; say which of them are meant: {', '.join(sizes)}", "format")
    if best in (PARQUET, ARROW):
        files = sorted(file.uri for file in found.some[best])
        return LIST if lists.is_list(fs, files, uri, image_column) else best
    return best


def _is_most(sizes: dict[str, int], kind: str) -> bool:
    return sizes.get(kind, 0) >= MOST * sum(sizes.values())
