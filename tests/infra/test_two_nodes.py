"""infra/two-nodes.sh for real: an encode on a head and a worker node, what is handed on, and that nothing is left."""

import os
import shlex
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "infra/two-nodes.sh"
pytestmark = pytest.mark.usefixtures("workers_as_started")

# In the cluster, after the encode: the folder of its nodes, their addresses, and what a wrong token is worth.
LOOK = r"""
import os, pathlib, ray, subprocess, sys
script = os.environ["SCRIPT_PID"]
for child in pathlib.Path(f"/proc/{script}/task/{script}/children").read_text().split():
    words = pathlib.Path(f"/proc/{child}/cmdline").read_text().split("\0")
    folders = [word.removeprefix("--temp-dir=") for word in words if word.startswith("--temp-dir=")]
    print("folder", *folders)
ray.init(logging_level=40)
print("nodes", len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}))
ray.shutdown()
wrong = {**os.environ, "RAY_AUTH_TOKEN": "0" * 64}
other = subprocess.Popen([sys.executable, "-c", "import ray; ray.init()"], env=wrong, stderr=subprocess.PIPE, text=True)
for line in other.stderr:
    if "InvalidAuthToken" in line:
        print("token refused")
        other.kill()
"""


@pytest.fixture
def two_nodes():
    """two_nodes(*command) -> the script's process, with the command on its cluster. Nothing of it may be left."""
    marker = f"PALINDROME_TEST={uuid.uuid4()}"
    name, value = marker.split("=")
    started = []

    def two_nodes(*command):
        env = {**os.environ, name: value, "CPUS": "1", "OMP_NUM_THREADS": "1"}
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen([SCRIPT, *map(str, command)], env=env, **pipes))
        return started[-1]

    yield two_nodes
    ended = [process.poll() is not None for process in started]
    left = dict(processes_with(marker))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert all(ended)
    assert left == {}


def processes_with(variable):
    """Those on this machine that have it in their environment, and what they call themselves."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name), (folder / "cmdline").read_text().replace("\0", " ")


def test_a_command_runs_on_two_nodes_and_is_sent_sigterm_and_its_exit_code_is_handed_on(
    two_nodes, model, pictures, tmp_path
):
    run = tmp_path / "run"
    encode = ["palindrome", "encode", "--images", pictures, "--model", model, "--out", run, "--workers", 2]
    encode += ["--steps", 2, "--corrections", 0, "--shard-size", 6]
    command = f"""{shlex.join(map(str, encode))} || exit 3
        SCRIPT_PID=$PPID python -c {shlex.quote(LOOK)} || exit 4
        python -m palindrome.infra.wait --gpus 1000 --timeout 0 && exit 6
        trap 'echo asked; exit 5' TERM; echo ready; while :; do sleep 0.1; done"""
    process, said = two_nodes("bash", "-c", command), ""
    while not said.endswith("ready\n"):
        line = process.stdout.readline()
        assert line, said
        said += line
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert (process.returncode, rest.splitlines()[-1]) == (5, "asked")
    assert "24 images in 4 shards" in said
    assert "nodes 2" in said
    assert "token refused" in said
    assert "gave up waiting: 0 of 1000 gpus up" in said
    rows = pq.read_table(run / "latents")["image_id"].to_pylist()
    assert sorted(rows) == [f"{i:03d}.png" for i in range(24)]
    folders = {line.split()[1] for line in said.splitlines() if line.startswith("folder /")}
    assert len(folders) == 1
    assert not Path(*folders).exists()


def test_without_a_command_it_says_what_it_is_for():
    said = subprocess.run([SCRIPT], capture_output=True, text=True, check=False)
    assert said.returncode == 2
    assert said.stdout.startswith("Runs one command on a cluster of two nodes")
    assert "infra/two-nodes.sh palindrome encode" in said.stdout
