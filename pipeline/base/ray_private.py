"""Ray's private API that Palindrome uses for lack of a public one.

tests/pipeline/base/test_ray_private.py checks each function against the installed Ray, and says what would break.
"""

import json

import ray
from ray._private.state import state
from ray._private.worker import global_worker


def draining_nodes() -> set[str]:
    """The ids of draining nodes, on which Ray schedules nothing new. `ray.nodes()` does not report the draining."""
    return set(state.get_draining_nodes())


def active_node_types() -> set[str]:
    """The node types that autoscaler version 1 reports; empty for version 2 or without an autoscaler. Not through
    `ray.experimental.internal_kv`, which loses its client when an earlier Ray of this process is shut down."""
    status = json.loads(global_worker.gcs_client.internal_kv_get(b"__autoscaling_status", None) or "{}")
    return set((status.get("autoscaler_report") or {}).get("active_nodes") or ())


def stop_monitor() -> None:
    """Kills the monitor process of a Ray that this process has started. `ray.shutdown` would end it after the server to
    which it reports its end, which takes 1 s."""
    if ray.is_initialized() and global_worker.node:
        global_worker.node.kill_monitor(check_alive=False)
