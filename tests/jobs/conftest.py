"""Jobs as a person runs them, in a process of their own, and what they leave behind."""

import os
import runpy
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def commands():
    """commands(environment) -> tests/commands.py, which starts `palindrome encode ...` and others in processes."""
    return runpy.run_path(str(ROOT / "tests/commands.py"))["Commands"]


@pytest.fixture(scope="session")
def here(commands, forked_workers):
    """Those of this environment, but for what a test changes."""
    with commands({**os.environ, "OMP_NUM_THREADS": "1"}) as commands:
        yield commands


@pytest.fixture
def start(here):
    """start("encode", ...) -> the process of `palindrome encode ...`, on its own Ray; ended afterwards."""
    started = []

    def start(*arguments, **environment):
        started.append(here.start(arguments, {**os.environ, "OMP_NUM_THREADS": "1", **environment}))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def workers():
    """workers("ShardActor", ...) -> pids of the workers of the tests' Ray that are at work on what is named so: a
    class, or the name of a task."""

    def workers(*names):
        titles, found = tuple(f"ray::{name}".encode() for name in names), []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):  # it has ended meanwhile
                title = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
                if title.startswith(titles) and _descends(int(entry.name), os.getpid()):
                    found.append(int(entry.name))
        return found

    return workers


@pytest.fixture
def kill_workers(workers):
    """kill_workers(process, folder, pattern) kills the actors at work for a command once the folder has such a file."""

    def kill_workers(process, folder, pattern):
        found = []
        while not found:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
            found = workers("ShardActor", "shard ") if list(folder.glob(pattern)) else []
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    return kill_workers


def _descends(pid, ancestor):
    while pid > 1 and pid != ancestor:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid == ancestor


@dataclass(frozen=True)
class Latents:
    """All rows of an encode run by image id: the latents [N, C, H, W] as stored, and the other columns."""

    rows: list
    latents: np.ndarray

    @property
    def ids(self):
        return [row["image_id"] for row in self.rows]


@pytest.fixture(scope="session")
def read_run():
    """Reads an encode run with bare pyarrow."""

    def read_run(run):
        files = sorted(Path(run, "latents").glob("*.parquet"))
        table = pa.concat_tables([pq.read_table(f).replace_schema_metadata() for f in files]).sort_by("image_id")
        latents = table["latent"].combine_chunks().to_numpy_ndarray()
        return Latents(table.drop_columns(["latent"]).to_pylist(), latents)

    return read_run


@pytest.fixture(scope="session")
def times():
    """The files below a folder and when each was last written, but for those that every run writes at its end."""

    def times(folder):
        again = {"summary.json", "report.html"}
        files = (path for path in Path(folder).rglob("*") if path.is_file() and path.parent.name != "tallies")
        return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in files if p.name not in again}

    return times
