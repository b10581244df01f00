"""What Palindrome takes of Ray's private API, against the Ray that is installed. A failure names what would break."""

import subprocess
import sys
import time

import pytest
import ray

from palindrome.pipeline.base import ray_private

LOCAL = """
import ray
from palindrome.infra import cluster
from palindrome.pipeline.base.ray_private import global_worker, stop_monitor
with cluster.connect("local"):
    processes = global_worker.node.all_processes
    monitor = processes["monitor"][0].process
    stop_monitor()
    print(monitor.wait(10) is not None, "monitor" in global_worker.node.all_processes)
stop_monitor()  # of none
"""


@pytest.mark.usefixtures("ray_here")
def test_draining_nodes_are_known_by_their_ids():
    """Else actors would be counted on nodes that take none (runtime/capacity.py)."""
    assert ray_private.draining_nodes() == set()
    assert {node["NodeID"] for node in ray.nodes()}.isdisjoint(ray_private.draining_nodes())


@pytest.mark.usefixtures("ray_here")
def test_the_autoscaler_s_report_is_read_as_it_writes_it():
    """Else a cluster that grows would be refused what no node has yet (runtime/capacity.py)."""
    deadline = time.monotonic() + 60
    while not (types := ray_private.active_node_types()) and time.monotonic() < deadline:
        time.sleep(0.2)  # the monitor writes its first report some seconds after the start
    # The tests' Ray has one node, which no autoscaler has started: its type is named by its id.
    assert types == {f"node_{node['NodeID']}" for node in ray.nodes()}


def test_the_monitor_of_a_local_ray_is_ended():
    """Else each command would end a second later (infra/cluster.py)."""
    said = subprocess.run([sys.executable, "-c", LOCAL], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["True", "False"]
