"""Nodes with addresses of their own: a link that is cut in the middle costs no row."""

import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    clusters = runpy.run_path(str(ROOT / "tests/clusters.py"))
    try:
        clusters["Hosts"](1).remove()
    except OSError as e:
        pytest.skip(f"no network namespaces here: {e}")
    with clusters["ray_cluster"](2, apart=True) as cluster:
        yield cluster


def test_a_link_cut_in_the_middle_costs_no_row(cluster, sample, model, tmp_path):
    out = tmp_path / "run"
    command = ["encode", "--images", sample, "--model", model, "--out", out, "--shard-size", 8, "--batch-size", 4]
    command += ["--steps", 30, "--corrections", 0, "--workers", 2, "--decode", "actor", "--stall", 60]
    command += ["--address", f"{cluster.ip}:{cluster.port}"]
    command = [sys.executable, "-m", "palindrome", *map(str, command)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **cluster.environment}, **pipes)
    until = time.monotonic() + 120
    while not any(title.startswith("ray::shard ") for title in cluster.hosts.titles(2)):  # it is at work
        assert process.poll() is None and time.monotonic() < until, process.communicate()
    cluster.hosts.cut(2)
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said
    assert "encode: 32/32 shards" in said
    assert cluster.alive() == 2  # the head, and the node that is still reached
    count = "select count(*), count(distinct image_id)"
    assert duckdb.sql(f"{count} from '{out}/latents/*.parquet'").fetchall() == [(256, 256)]
