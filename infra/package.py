"""The package of a submitted job: Palindrome's code, files that the command names, and environment variables."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import palindrome

CODE = "palindrome"  # the folder with Palindrome's code in the package
SUBPACKAGES = ("infra", "jobs", "model", "pipeline")
TEMPLATES = "templates/*"  # of the HTML reports
ENVIRONMENT = "environment.json"  # the environment variables for every process of the job
MAX_BYTES = 100 << 20  # Ray's limit for a package
LARGEST_NAMED = 3  # the error for a larger package names that many files


class PackageError(ValueError):
    """The package can't be built; the message names the file at fault."""


def build(into: Path, ship: Iterable[str], environment: Mapping[str, str], code: bool = True) -> int:
    """Fills the empty folder `into`. `ship` are files and folders below the working directory, which keep their paths.
    Returns the size in bytes. Raises PackageError."""
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
    if total > MAX_BYTES:
        first = sorted(sizes, key=lambda path: -sizes[path])[:LARGEST_NAMED]
        named = ", ".join(f"{path.relative_to(into)} ({sizes[path] / 2**20:.1f} MiB)" for path in first)
        raise PackageError(
            f"the package has {total / 2**20:.1f} MiB, and Ray's limit is {MAX_BYTES >> 20}; largest: {named};"
            " put them where the cluster can reach them, such as on S3"
        )
    return total


def _own_code() -> Iterator[tuple[Path, Path]]:
    """Palindrome's files, and the place of each in the package: in an editable install, files lie at other paths than
    their modules' names say."""
    for source in Path(palindrome.__file__).parent.glob("*.py"):
        yield source, Path(CODE, source.name)
    for name in SUBPACKAGES:
        spec = find_spec(f"{CODE}.{name}")
        for folder in (spec and spec.submodule_search_locations) or ():
            for pattern in ("*.py", TEMPLATES):
                for source in Path(folder).rglob(pattern):
                    yield source, Path(CODE, name, source.relative_to(folder))


def _ship(path: Path, into: Path) -> None:
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise PackageError(f"{path}: only files below the working directory can be shipped")
    if path.parts[0] in (CODE, ENVIRONMENT):
        raise PackageError(f"{path}: the name is reserved for Palindrome's own files in the package")
    if not path.exists():
        raise PackageError(f"{path} does not exist")
    for source in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        _copy(source, into / source)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)  # avoids copying a checkpoint
    except OSError:  # a different file system
        shutil.copyfile(source, target)
