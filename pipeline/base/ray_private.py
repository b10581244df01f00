"""All of Ray's private API that Palindrome uses, since there is no public call for it.

tests/pipeline/base/test_ray_private.py holds each against the Ray that is installed, and says what would break.
"""

import json

import ray
from ray._private.state import state
from ray._private.worker import global_worker


def draining_nodes() -> set[str]:
    """The ids of the nodes that are about to leave: Ray puts nothing new on them, and `ray.nodes()` does not say so."""
    return set(state.get_draining_nodes())


def active_node_types() -> set[str]:
    """The node types that the autoscaler of the first version reports; none where it is another or there is none.
    `ray.experimental.internal_kv` loses its client when another Ray of this process ends."""
    status = json.loads(global_worker.gcs_client.internal_kv_get(b"__autoscaling_status", None) or "{}")
    return set((status.get("autoscaler_report") or {}).get("active_nodes") or ())


def stop_monitor() -> None:
    """Ends the monitor of the Ray that this process has started, if it has: told to end after the server that it says
    goodbye to, as `ray.shutdown` does it, it takes 1 s."""
    if ray.is_initialized() and global_worker.node:
        global_worker.node.kill_monitor(check_alive=False)
