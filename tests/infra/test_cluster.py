"""A Ray of one's own: there within the `with`, and gone after it with all its processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from palindrome.infra import cluster

ROOT = Path(__file__).parents[2]
OWN = """
import os, signal, subprocess, sys
from pathlib import Path
from palindrome.infra.cluster import connect

def below():
    parents, states = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)], states[int(stat.parent.name)] = int(words[1]), words[0]
    def ours(process):
        return process is not None and (process == os.getpid() or ours(parents.get(process)))
    return [p for p in parents if p != os.getpid() and states[p] != "Z" and ours(p)]

def gets_in(**env):
    gcs = ray.get_runtime_context().gcs_address
    asked = f"from ray._raylet import GcsClient; GcsClient({gcs!r}).get_all_node_info(timeout=5); print('in')"
    done = subprocess.run([sys.executable, "-c", asked], env={**os.environ, **env}, capture_output=True, text=True)
    return done.stdout == "in\\n"

signal.signal(signal.SIGTERM, mine := lambda *_: None)
with connect():
    import ray
    assert ray.get(ray.remote(lambda: os.environ["RAY_AUTH_TOKEN"]).remote()) == os.environ["RAY_AUTH_TOKEN"]
    assert len(below()) > 5
    assert signal.getsignal(signal.SIGTERM) is mine
    folder = ray._private.worker._global_node.get_session_dir_path()
    assert len(os.environ["TMPDIR"]) < 100 or not folder.startswith(os.environ["TMPDIR"])
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert gets_in()
    assert not gets_in(RAY_AUTH_TOKEN="0" * 64)
assert not Path.home().joinpath(".ray").exists()
print(len(below()), ray.is_initialized())
"""


def test_it_ends_with_all_its_processes_and_only_its_own_get_in(tmp_path):
    """TMPDIR as Slurm has it, too long a path for sockets, and a home that others may read, where no token may be."""
    folder = tmp_path / ("slurm_jobdir_1355700_" + "x" * 60)
    folder.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    env |= {"TMPDIR": str(folder), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", OWN], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "False"]


def test_without_any_short_folder_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/" + "x" * 60)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(cluster, "SHORT_FOLDERS", ())
    with pytest.raises(cluster.ClusterError, match=r"^\$TMPDIR is too long a path for Ray's sockets: set RAY_TMPDIR"):
        cluster._short_folder()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert cluster._short_folder() is None


GONE = """
import os, sys
from palindrome.infra import cluster
for address in sys.argv[1:]:
    os.environ["RAY_ADDRESS"] = address
    try:
        with cluster.connect():
            print("connected")
    except cluster.ClusterError as e:
        print(e)
"""


def test_cluster_of_the_environment_that_is_gone_is_named(stores):
    port = stores.free_port()
    addresses = [f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "garbage"]
    said = subprocess.check_output([sys.executable, "-c", GONE, *addresses], cwd=ROOT, text=True)
    lines = said.splitlines()
    assert len(lines) == len(addresses), said
    for line, address in zip(lines, addresses, strict=True):
        assert re.search(rf"{address}: .*; \$RAY_ADDRESS names it", line), line
