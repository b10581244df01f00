"""The files of a collection: listed in parallel, in any order, and put in order, on disk where they are many."""

import heapq
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache
from itertools import islice, pairwise, product
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from palindrome.pipeline.base.errors import SourceError
from palindrome.pipeline.base.log import say
from palindrome.pipeline.images.sources.base import METADATA, PICTURES
from palindrome.pipeline.storage.folder import Options, is_outage, open_fs

LISTERS = 16  # requests at once
RANGES = 64  # that a bucket's keys are cut into, at most
SPLITTING = 10  # pages of folders read to cut them
IN_MEMORY = 200_000  # entries; more are sorted on disk
SCRATCH = frozenset(["_temporary", "_tmp", "__MACOSX"])  # folders of half-written files, and of what is no file
RUN_FILE = "run.json"  # in the folder of a run
EVERY = 10.0  # seconds between lines that say how far a listing is
BRACES = re.compile(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}")


class Listed(NamedTuple):
    """A file: its path below the collection's root, its URI, size in bytes, and mtime or ETag; `kept` is the columns
    of a list that names it, as JSON."""

    name: str
    uri: str
    size: int = 0
    version: str = ""
    kept: str = ""


@dataclass
class Seen:
    """What a listing met that is no input: how many names are passed over, of files and of folders that are not
    entered; whether one of them is a Delta table's log; each `run.json`, the folder of which may be a run's; what may
    describe pictures, whatever `extensions` were asked for."""

    hidden: int = 0
    delta: bool = False
    runs: list[Listed] = field(default_factory=list)
    metadata: list[Listed] = field(default_factory=list)


class _Found(NamedTuple):
    path: str
    size: int
    version: str


@dataclass(frozen=True)
class _Asked:
    """What a URI asks for of the files below its root."""

    matches: Callable[[str], object] = lambda file: True
    underscores: bool = False  # a part of it begins with one
    by_name: bool = False  # it is one file
    folders: tuple[str, ...] = ()  # that it names

    def may_be_run(self, file: str) -> bool:
        """Whether a `run.json` is below what was named: who names a run's folder wants its files."""
        return not self.by_name and file.rpartition("/")[0] not in self.folders


Step = Callable[[], "tuple[Iterable[_Found], list[Step]]"]  # of a listing: files, and what is to be listed next


def list_files(
    uri: str, options: Options, extensions: Sequence[str] = (), seen: Seen | None = None
) -> Iterator[Listed]:
    """The files of a folder, of a glob, of `{00..99}` and `{a,b}`, or one file, but for those that `is_passed_over`; in
    no order. Only those with one of the `extensions`, where there are some. What is passed over is counted in `seen`,
    and the run folders below the root are noted there. Raises SourceError where nothing is there."""
    fs, path = open_store(uri, options)
    root, found, asked = _files(fs, path, uri)
    wanted = endings(extensions)
    seen = seen if seen is not None else Seen()
    for file, size, version in _announced(uri, found):
        if file.endswith(f"/{RUN_FILE}") and asked.may_be_run(file):
            seen.runs.append(Listed(_below(fs, root, file), _uri(fs, file), size, version))
        if not asked.matches(file):
            continue
        name = _below(fs, root, file)
        if not name or name.endswith("/"):  # some stores keep an object without a name for a folder
            continue
        if not asked.by_name and is_passed_over(name, asked.underscores, wanted or PICTURES):
            seen.hidden += 1
            seen.delta = seen.delta or "_delta_log/" in name
            continue
        if name.lower().endswith(METADATA) and name.lower().rpartition("/")[2] in METADATA:
            seen.metadata.append(Listed(name, _uri(fs, file), size, version))
        if not wanted or name.lower().endswith(wanted):
            yield Listed(name, _uri(fs, file), size, version)


def endings(extensions: Sequence[str]) -> tuple[str, ...]:
    """`jpg` and `.JPG` as names end, in lower case."""
    return tuple("." + extension.lower().lstrip(".") for extension in extensions)


def is_passed_over(name: str, underscores: bool = False, pictures: tuple[str, ...] = PICTURES) -> bool:
    """Whether a path below the root is no input: a part of it begins with `.`; or with `_`, as what Spark, Hadoop,
    Delta and img2dataset leave beside data, unless it is a picture's (`_DSC0001.jpg`) outside of `SCRATCH`, or a
    partition's (`_year=2024`). Where `underscores` were asked for, `_` is a letter."""
    if "/." in name or name.startswith("."):
        return True
    if underscores or not ("/_" in name or name.startswith("_")):
        return False
    parts = name.split("/")
    if not SCRATCH.isdisjoint(parts):
        return True
    return any(part.startswith("_") and "=" not in part for part in parts) and not name.lower().endswith(pictures)


def _below(fs: Any, root: str, file: str) -> str:
    """A file's name below the root."""
    return as_text(_utf8(fs, file[len(root) :]).removeprefix("/"))


def _uri(fs: Any, file: str) -> str:
    return as_text(_utf8(fs, fs.unstrip_protocol(file)))


def in_order(entries: Iterable[Listed]) -> Iterator[Listed]:
    """By name, in the order of code points, those of one name as they came; a bounded number of them in memory."""
    entries = iter(entries)
    chunk = sorted(islice(entries, IN_MEMORY), key=itemgetter(0))
    if len(chunk) < IN_MEMORY:
        yield from chunk
        return
    with tempfile.TemporaryDirectory(prefix="palindrome-") as folder:
        runs: list[Path] = []
        while chunk:
            runs.append(Path(folder, f"{len(runs)}.parquet"))
            columns = dict(zip(Listed._fields, zip(*chunk, strict=True), strict=True))
            pq.write_table(pa.table(columns), runs[-1], compression="zstd", row_group_size=2048)
            chunk = sorted(islice(entries, IN_MEMORY), key=itemgetter(0))
        yield from heapq.merge(*map(_read_run, runs), key=itemgetter(0))


def _read_run(run: Path) -> Iterator[Listed]:
    with pq.ParquetFile(run) as file:
        for batch in file.iter_batches(1024, use_threads=False):
            yield from map(Listed._make, zip(*(column.to_pylist() for column in batch.columns), strict=True))


def as_text(name: str) -> str:
    """A file's name as Arrow can hold it: bytes that are no UTF-8 are written `\\udcXX`, `path_of` reads them back."""
    return name.encode("utf-8", "backslashreplace").decode()


def _utf8(fs: Any, name: str) -> str:
    """A name on this machine's disks as it is in UTF-8, whatever the locale says: ids are the same everywhere."""
    if sys.getfilesystemencoding() == "utf-8" or not isinstance(fs, LocalFileSystem):
        return name
    return os.fsencode(name).decode("utf-8", "surrogateescape")


@cache
def say_once(message: str) -> None:
    """What a listing has to say: a command lists a collection several times."""
    say(message, "listing", stream=sys.stderr)


def path_of(fs: Any, uri: str) -> str:
    path = re.sub(r"\\udc([89a-f][0-9a-f])", lambda m: chr(0xDC00 + int(m[1], 16)), fs._strip_protocol(uri))
    if sys.getfilesystemencoding() == "utf-8" or not isinstance(fs, LocalFileSystem):
        return path
    return os.fsdecode(path.encode("utf-8", "surrogateescape"))


def open_store(uri: str, options: Options) -> tuple[Any, str]:
    """The store and the path on it. Pieces are opened on the collection's own: `::` in a file's name is no chain."""
    try:
        fs, path = open_fs(uri, options)
    except (ValueError, ImportError) as e:
        raise SourceError(f"{uri} can't be opened: {e}") from e
    return fs, path.rstrip("/")


def _files(fs: Any, path: str, uri: str) -> tuple[str, Iterator[_Found], _Asked]:
    """The root below which names begin, the files there, and which of them are meant."""
    magic = fsspec.core.has_magic(path)
    if (magic or BRACES.search(path)) and not _exists(fs, path):
        root = re.split(r"[*?\[{]", path)[0].rpartition("/")[0]
        if root and not _exists(fs, _as_folder(fs, root)):
            raise SourceError(f"{uri} does not exist: there is no {root}")
        paths = _expanded(path)
        underscores = any("/_" in expanded[len(root) :] for expanded in paths)
        if magic:
            try:
                matches = re.compile("|".join(map(glob_translate, paths))).match
            except ValueError as e:
                raise SourceError(f"{uri} is no glob: {e}") from e
            depth = None if "**" in path else path[len(root) :].strip("/").count("/")
            return root, _walk(fs, root, depth), _Asked(matches, underscores, folders=(root,))
        return root, _named(fs, paths, uri), _Asked(underscores=underscores, folders=(root, *paths))
    try:
        info = fs.info(path)
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError(f"{uri} does not exist") from None
    if info["type"] == "directory" or _is_marker(fs, path, info):
        return path, _walk(fs, path), _Asked(folders=(path,))
    return path.rpartition("/")[0], iter([_found(info, path)]), _Asked(by_name=True)


def _exists(fs: Any, path: str) -> bool:
    """Raises OSError where a disk or a mounted server does not say."""
    if not isinstance(fs, LocalFileSystem):
        return bool(fs.exists(path))
    try:
        os.stat(path)
    except (OSError, ValueError) as e:
        if is_outage(e, fs):
            raise
        return False
    return True


def _is_marker(fs: Any, path: str, info: dict[str, Any]) -> bool:
    """Whether an object is an empty one, with the name of the folder of others."""
    if info.get("size") or isinstance(fs, LocalFileSystem):
        return False
    try:
        return any(below["name"].startswith(f"{path}/") for below in fs.ls(path, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _expanded(path: str) -> list[str]:
    """`{00..12}` and `{a,b}` as a shell expands them."""
    literal, braces = BRACES.split(path)[::2], BRACES.findall(path)

    def values(brace: str) -> list[str]:
        first, dots, last = brace.partition("..")
        if not dots or "," in brace:
            return brace.split(",")
        step = 1 if int(first) <= int(last) else -1
        return [str(n).zfill(len(first)) for n in range(int(first), int(last) + step, step)]

    chosen = product(*map(values, braces))
    return list(dict.fromkeys("".join(map("".join, zip(literal, [*parts, ""], strict=True))) for parts in chosen))


def _named(fs: Any, paths: Sequence[str], uri: str) -> Iterator[_Found]:
    """Those paths, each of which must be there, and the files below those that are folders."""

    def files(path: str) -> Iterator[_Found]:
        try:
            info = fs.info(path)
        except FileNotFoundError:
            raise SourceError(f"{fs.unstrip_protocol(path)} of {uri} does not exist") from None
        return _walk(fs, path) if info["type"] == "directory" else iter([_found(info, path)])

    with ThreadPoolExecutor(LISTERS) as pool:
        for found in pool.map(files, paths):
            yield from found


def _found(info: dict[str, Any], path: str) -> _Found:
    version = info.get("ETag") or info.get("etag") or info.get("mtime") or ""
    return _Found(path, info.get("size") or 0, str(version))


def _walk(fs: Any, root: str, depth: int | None = None) -> Iterator[_Found]:
    """The files below a folder; `depth` is how many folders down."""
    if isinstance(fs, LocalFileSystem):
        return _walk_local(root, depth)
    if "s3" in fs.protocol and depth is None:
        bucket, _, folder = root.partition("/")
        return _explore(_step(_split_bucket, fs, bucket, f"{folder}/" if folder else ""))
    return _explore(_step(_list_folder, fs, _as_folder(fs, root), depth))


def _as_folder(fs: Any, path: str) -> str:
    """Web servers know `a/`, and by `a` what they please."""
    return f"{path}/" if "http" in fs.protocol else path


def _explore(first: Step) -> Iterator[_Found]:
    """What the steps find, of which LISTERS go at once, and few are ahead of who takes the files."""
    steps, waiting = [first], set[Future[tuple[Iterable[_Found], list[Step]]]]()
    with ThreadPoolExecutor(LISTERS) as pool:

        def go_on() -> None:
            while steps and len(waiting) < 2 * LISTERS:
                waiting.add(pool.submit(steps.pop()))

        try:
            go_on()
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    waiting.discard(future)
                    found, further = future.result()
                    steps += further
                    go_on()
                    yield from found
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _list_folder(fs: Any, folder: str, depth: int | None) -> tuple[Iterable[_Found], list[Step]]:
    infos = fs.ls(folder, detail=True)
    files = [_found(info, info["name"]) for info in infos if info["type"] != "directory"]
    names = {info["name"].rstrip("/") for info in infos if info["type"] == "directory"} - {folder.rstrip("/")}
    closed = {name for name in names if _is_closed(name)}
    files += [_Found(name, 0, "") for name in closed]
    if depth == 0:
        return files, []
    deeper = None if depth is None else depth - 1
    return files, [_step(_list_folder, fs, _as_folder(fs, name), deeper) for name in names - closed]


def _split_bucket(fs: Any, bucket: str, prefix: str) -> tuple[Iterable[_Found], list[Step]]:
    """The keys that begin with the prefix, cut into the folders right below it; or, where these are many, into ranges
    of several. Each is listed flat: a request for each of very many small folders would take forever."""
    folders: list[str] = []
    files: list[_Found] = []
    page: dict[str, Any] = {}
    for _ in range(SPLITTING):
        token = {"ContinuationToken": page["NextContinuationToken"]} if page else {}
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter="/", **token)
        folders += [common["Prefix"] for common in page.get("CommonPrefixes", [])]
        files += _found_on(page, bucket)
        if not folders or not page.get("IsTruncated"):
            break
    if page.get("IsTruncated") or len(folders) > RANGES:
        bounds = ["", *folders[:: -(-len(folders) // RANGES) or 1], None]
        return [], [_step(_list_range, fs, bucket, prefix, start, end) for start, end in pairwise(bounds)]
    if len(folders) == 1 and not files:
        return _split_bucket(fs, bucket, folders[0])
    return files, [_step(_list_range, fs, bucket, folder, "", None) for folder in folders]


def _list_range(fs: Any, bucket: str, prefix: str, after: str, end: str | None) -> tuple[Iterable[_Found], list[Step]]:
    """A page of the keys behind `after` and before `end`."""
    page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, StartAfter=after)
    contents = page.get("Contents", [])
    here = [item for item in contents if end is None or item["Key"] < end]
    files = _found_on({"Contents": here}, bucket)
    if not page.get("IsTruncated") or len(here) < len(contents):
        return files, []
    return files, [_step(_list_range, fs, bucket, prefix, here[-1]["Key"], end)]


def _found_on(page: dict[str, Any], bucket: str) -> list[_Found]:
    return [_Found(f"{bucket}/{i['Key']}", i["Size"], i.get("ETag", "")) for i in page.get("Contents", [])]


def _step(function: Callable[..., Any], *arguments: Any) -> Step:
    return lambda: function(*arguments)


def _is_closed(folder: str) -> bool:
    """Whether nothing in it is an input: it is listed in place of what it holds."""
    name = folder.rpartition("/")[2]
    return name.startswith(".") or name in SCRATCH


def _walk_local(root: str, depth: int | None) -> Iterator[_Found]:
    """Symbolic links are followed, but for those to a folder that they are in: its files are listed anyway."""
    pending: list[tuple[str, int | None, frozenset[tuple[int, int]]]] = [(root, depth, frozenset())]
    while pending:
        folder, left, above = pending.pop()
        about = os.stat(folder)
        here = above | {(about.st_dev, about.st_ino)}
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    about = entry.stat()
                except OSError as e:  # a link to nothing, or gone since: it is missing when it is read
                    if is_outage(e, LocalFileSystem()):  # it may be a folder
                        raise
                    yield _Found(entry.path, 0, "")
                    continue
                if not entry.is_dir():
                    yield _Found(entry.path, about.st_size, str(about.st_mtime))
                elif _is_closed(entry.path):
                    yield _Found(entry.path, 0, "")
                elif left != 0 and (about.st_dev, about.st_ino) not in here:
                    pending.append((entry.path, None if left is None else left - 1, here))


def _announced(uri: str, found: Iterator[_Found]) -> Iterator[_Found]:
    """Says now and then how far a long listing is."""
    said = time.monotonic()
    for count, file in enumerate(found):
        if count % 1024 == 0 and time.monotonic() - said > EVERY:
            said = time.monotonic()
            say(f"listing {uri}: {count} files", "listing", stream=sys.stderr, files=count)
        yield file
