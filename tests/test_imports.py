"""Imports run one way: jobs -> pipeline -> model, jobs -> infra. Read from the source, so none hides in a function."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "model": {"model"},
    "infra": {"infra"},
    "pipeline": {"pipeline", "model"},
    "jobs": {"jobs", "pipeline", "model", "infra"},
    "palindrome": {"pipeline", "model"},  # a module, for notebooks, which nothing here imports
}
SHARED = {"config", "command", "estimate"}  # what every job may use
NO_JOBS = SHARED | {"__main__", "__init__"}
MODULE = Path("palindrome.py")
FILES = sorted([MODULE, *(path.relative_to(ROOT) for name in ALLOWED for path in (ROOT / name).rglob("*.py"))])
FOREIGN = {"tests", "benchmarks"}


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
    return set(imported((ROOT / file).read_text(), ".".join(file.parent.parts)))


def in_house(file: Path) -> str:
    """Which of ALLOWED a file belongs to."""
    return file.parts[0].removesuffix(".py")


def test_every_package_is_walked():
    assert {in_house(file) for file in FILES} == set(ALLOWED)
    assert {Path("jobs/encode.py"), Path("pipeline/run.py"), Path("model/ddim.py")} <= set(FILES)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_run_one_way(file):
    ours = {path[0] for path in imports_of(file)} & (ALLOWED.keys() | FOREIGN)
    assert ours <= ALLOWED[in_house(file)]


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[0] == "model"], ids=str)
def test_the_model_does_not_know_ray(file):
    known = {"torch", "numpy", "safetensors", "fsspec", "model"} | sys.stdlib_module_names
    assert {path[0] for path in imports_of(file)} <= known


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[0] == "jobs" and f.stem not in NO_JOBS], ids=str)
def test_no_job_imports_another(file):
    assert {path[1] for path in imports_of(file) if path[0] == "jobs"} <= SHARED


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
