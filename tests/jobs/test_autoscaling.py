"""A cluster scaled to zero, of its own, whose autoscaler is Ray's: it starts nodes as processes of this machine."""

import json
import os
import runpy
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD = "f" * 51 + "00000"  # the id by which that autoscaler knows the head
NOTHING = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "rsync_exclude")
NOTHING += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_filter")
TWO_GPUS = "Active:\n 1 ray.head.default\n 2 gpu"  # in the autoscaler's log


@pytest.fixture(scope="module")
def scaled_to_zero(forked_workers):
    """Its address, the environment that opens it, and its folder."""
    clusters = runpy.run_path(str(ROOT / "tests/clusters.py"))
    port, client = clusters["free_ports"](2)
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short, as clusters.py says
    node = {"node_config": {}, "max_workers": 0, "resources": {}}
    config = {
        "cluster_name": "processes",
        "max_workers": 4,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 100.0,
        "provider": {"type": "fake_multinode", "use_node_id_as_ip": True, "gcs_address": f"127.0.0.1:{port}"},
        "available_node_types": {
            "ray.head.default": node,
            "gpu": {**node, "max_workers": 2, "resources": {"CPU": 3, "GPU": 1, "h100": 1}},
        },
        "head_node_type": "ray.head.default",
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in NOTHING},
    }
    config["provider"] |= {"disable_node_updaters": True, "disable_launch_config_check": True}
    (folder / "config.json").write_text(json.dumps(config))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | token
    environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD, "RAY_CLOUD_INSTANCE_ID": HEAD}
    flags = ["--num-cpus=0", "--num-gpus=0", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    flags += [f"--port={port}", f"--ray-client-server-port={client}", f"--temp-dir={folder}"]
    flags += [f"--autoscaling-config={folder}/config.json", "--disable-usage-stats"]
    with open(folder / "head.log", "wb") as log:
        head = subprocess.Popen(
            [clusters["RAY"], "start", "--head", "--block", *flags],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + 600  # seconds
        while not _said(folder, "head.log", "Ray runtime started") or not _said(
            folder, "session_latest/logs/monitor.log", "Active:\n 1 ray.head.default"
        ):
            assert head.poll() is None and time.monotonic() < until, (folder / "head.log").read_text()
            time.sleep(0.2)
        time.sleep(2)  # for the first status that the autoscaler puts where all find it
        yield f"127.0.0.1:{port}", token, folder
    finally:
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)  # its nodes are of its group, whatever they call themselves
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _said(folder, name, words):
    with suppress(FileNotFoundError):
        return words in (folder / name).read_text(errors="replace")
    return False


def test_nodes_are_started_for_what_is_asked_for(scaled_to_zero, start, workers, sample, model, tmp_path):
    address, environment, folder = scaled_to_zero
    places = ["--images", sample, "--model", model, "--out", tmp_path / "run", "--address", address]
    flags = ["--workers", 1, 3, "--gpus-per-worker", 0.5, "--resources", '{"h100": 0.5}', "--decode", "tasks"]
    process = start("encode", *places, *flags, "--shard-size", 8, "--steps", 10, **environment)
    held, until = set(), time.monotonic() + 300  # seconds
    while not _said(folder, "session_latest/logs/monitor.log", TWO_GPUS):
        assert process.poll() is None and time.monotonic() < until
        for pid in {*workers("ShardActor", "shard ")} - held:  # one could do it all before the second node is there
            os.kill(pid, signal.SIGSTOP)
            held.add(pid)
        time.sleep(0.02)
    for pid in held:
        os.kill(pid, signal.SIGCONT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "256 latents and 0 rejects" in out, err
    assert _said(folder, "session_latest/logs/monitor.log", TWO_GPUS)
