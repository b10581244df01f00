"""Who may import whom, as DESIGN's table of rooms has it. Read from the source, so no import hides in a function."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = {"pipeline.base"}
IMAGES = BASE | {"pipeline.storage", "pipeline.images"}
RUNS = IMAGES | {"pipeline.runs", "model"}
RUNTIME = RUNS | {"pipeline.runtime"}
TASKS = RUNTIME | {"pipeline.tasks"}
PIPELINE = TASKS | {"pipeline.reports"}
ALLOWED = {  # by room, each itself included
    "model": {"model"},
    "infra": {"infra", "palindrome", "pipeline.base"},
    "pipeline.base": BASE,
    "pipeline.storage": BASE | {"pipeline.storage"},
    "pipeline.images": IMAGES,
    "pipeline.runs": RUNS,
    "pipeline.runtime": RUNTIME,
    "pipeline.tasks": TASKS,
    "pipeline.reports": RUNS | {"pipeline.tasks", "pipeline.reports"},
    "jobs": PIPELINE | {"jobs", "infra"},
    "api": PIPELINE | {"api", "jobs"},
}
SHARED = {"arguments", "config", "command", "estimate", "holding", "sharded"}  # what every command may use
NO_COMMANDS = SHARED | {"__main__", "__init__"}
ROOMS = ("model", "infra", "pipeline", "jobs", "api")
FILES = sorted(path.relative_to(ROOT) for name in ROOMS for path in (ROOT / name).rglob("*.py"))


def imported(source: str, package: str) -> Iterator[tuple[str, ...]]:
    """Every module or name that the source imports, as its dotted parts; relative ones from `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = (*above, *(node.module or "").split(".")) if node.module else tuple(above)
            yield from ((*base, alias.name) for alias in node.names)


def imports_of(file: Path) -> set[tuple[str, ...]]:
    return set(imported((ROOT / file).read_text(), ".".join(("palindrome", *file.parent.parts))))


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a file by its path, or of an import by its parts after `palindrome`."""
    if parts[0] == "pipeline" and len(parts) > 1:
        return f"pipeline.{parts[1]}"
    return "api" if parts[0] == "notebook" else parts[0]


def ours(file: Path) -> set[str]:
    """The rooms that a file imports from."""
    found = (path for path in imports_of(file) if path[0] == "palindrome")
    return {room_of(path[1:]) if len(path) > 1 else "palindrome" for path in found}


def test_every_room_is_walked_and_nothing_is_loose():
    rooms = {room_of(file.parts) for file in FILES if file != Path("pipeline/__init__.py")}
    assert rooms == set(ALLOWED)


@pytest.mark.parametrize("file", [f for f in FILES if f != Path("pipeline/__init__.py")], ids=str)
def test_imports_follow_the_table(file):
    assert ours(file) <= ALLOWED[room_of(file.parts)]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_everything_is_imported_as_installed(file):
    """As `palindrome.…`: a bare `model` or `jobs` would be whatever lies in the working directory."""
    assert not {path[0] for path in imports_of(file)} & {*ROOMS, "tests", "benchmarks"}


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[0] == "model"], ids=str)
def test_the_model_does_not_know_ray(file):
    known = {"torch", "numpy", "safetensors", "fsspec", "palindrome"} | sys.stdlib_module_names
    of_extra = {"diffusers", "transformers"} if file.parent == Path("model/families/latent") else set()
    of_extra |= {"torch_fidelity"} if file == Path("model/features.py") else set()
    of_extra |= {"scipy"} if file == Path("model/watermarks.py") else set()
    assert {path[0] for path in imports_of(file)} <= known | of_extra


ADAPTERS = {
    Path("pipeline/base/ray_private.py"),
    Path("infra/spot_aws.py"),  # Ray's node providers, which external ones extend
    Path("infra/spot_gcp.py"),
    Path("pipeline/images/tiff.py"),  # Pillow's libtiff
}


@pytest.mark.parametrize("file", [f for f in FILES if f not in ADAPTERS], ids=str)
def test_private_modules_are_imported_by_adapters_alone(file):
    private = {path for path in imports_of(file) if any(part.startswith("_") and part[1] != "_" for part in path)}
    assert not {path for path in private if path[0] != "palindrome" and path != ("__future__",)}


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[:2] == ("pipeline", "runs")], ids=str)
def test_a_run_folder_is_read_without_ray(file):
    assert "ray" not in {path[0] for path in imports_of(file)}


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[0] == "jobs" and f.stem not in NO_COMMANDS], ids=str)
def test_no_command_imports_another(file):
    assert {path[2] for path in imports_of(file) if path[:2] == ("palindrome", "jobs")} <= SHARED


def test_every_package_is_installed():
    """setuptools finds none by itself where the folders are mapped to other names."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {file.parent for file in FILES}
    assert set(setuptools["package-dir"].values()) == {folder.parts[0] for folder in folders}
    named = {".".join(("palindrome", *folder.parts)) for folder in folders if folder != Path("api")} | {"palindrome"}
    assert set(setuptools["packages"]) == named


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import jobs.encode as e", ("jobs", "encode")),
        ("from jobs import encode", ("jobs", "encode")),
        ("def f():\n    from jobs.encode import run", ("jobs", "encode", "run")),
        ("from . import encode", ("jobs", "encode")),
        ("from .encode import run", ("jobs", "encode", "run")),
    ],
)
def test_the_walk_sees_each_way_to_import(source, expected):
    assert list(imported(source, "jobs")) == [expected]
