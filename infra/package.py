"""What a job takes along to a cluster: Palindrome's own code, files that the command names, and the environment."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import palindrome

CODE = "palindrome"  # the folder of the package that holds Palindrome itself
ROOMS = ("infra", "jobs", "model", "pipeline")  # its parts
TEMPLATES = "templates/*"  # of the reports' pages
ENVIRONMENT = "environment.json"  # in the package: what is set for every process of the job
LARGEST = 100 << 20  # bytes that Ray takes
NAMED = 3  # files named where that is too much


class PackageError(ValueError):
    """A package that can't be made; the message names the file at fault."""


def build(into: Path, ship: Iterable[str], environment: Mapping[str, str], code: bool = True) -> int:
    """Fills an empty folder: `ship` are files and folders below the current one, which keep their names. Returns the
    bytes. Raises PackageError."""
    for source, target in _own_code() if code else ():
        _copy(source, into / target)
    for name in ship:
        _ship(Path(name), into)
    if environment:
        file = into / ENVIRONMENT
        file.touch(mode=0o600)
        file.write_text(json.dumps(dict(environment)))
    sizes = {path: path.stat().st_size for path in into.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    if total > LARGEST:
        first = sorted(sizes, key=lambda path: -sizes[path])[:NAMED]
        named = ", ".join(f"{path.relative_to(into)} ({sizes[path] / 2**20:.1f} MiB)" for path in first)
        raise PackageError(
            f"the package has {total / 2**20:.1f} MiB, and Ray takes {LARGEST >> 20}; largest: {named};"
            " put them where the cluster reaches them, as on S3"
        )
    return total


def _own_code() -> Iterator[tuple[Path, Path]]:
    """Palindrome's files, and where each belongs in the package: the folders of an editable install lie elsewhere than
    they are imported from."""
    for source in Path(palindrome.__file__).parent.glob("*.py"):
        yield source, Path(CODE, source.name)
    for room in ROOMS:
        spec = find_spec(f"{CODE}.{room}")
        for folder in (spec and spec.submodule_search_locations) or ():
            for pattern in ("*.py", TEMPLATES):
                for source in Path(folder).rglob(pattern):
                    yield source, Path(CODE, room, source.relative_to(folder))


def _ship(path: Path, into: Path) -> None:
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise PackageError(f"{path}: only what lies below the current folder can be sent along")
    if path.parts[0] in (CODE, ENVIRONMENT):
        raise PackageError(f"{path}: Palindrome's own files have that name in the package")
    if not path.exists():
        raise PackageError(f"{path} does not exist")
    for source in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        _copy(source, into / source)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)  # a checkpoint need not be copied to be sent
    except OSError:  # another file system
        shutil.copyfile(source, target)
