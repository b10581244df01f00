"""What a cluster has room for: the nodes that are up, and whether there is one that starts more."""

from collections.abc import Mapping, Sequence

import ray
from ray.autoscaler.v2.sdk import get_cluster_status

from palindrome.pipeline.base.errors import SettingError
from palindrome.pipeline.base.ray_private import active_node_types, draining_nodes

UNMANAGED = "node_"  # begins the types of nodes that no autoscaler has started: each is one of its own, named by its id
Node = Mapping[str, float]  # what it has in all, by the resource's name


def nodes_up() -> list[Node]:
    """Those that are there to stay: on a node that is being drained Ray puts nothing new."""
    leaving = draining_nodes()
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def actors_on(node: Node, gpus: float, custom: Mapping[str, float]) -> int:
    """How many actors of a CPU, so much of a GPU and these resources there is room for on a node with nothing else."""
    room = [node.get("CPU", 0), *(node.get(name, 0) / amount + 1e-9 for name, amount in custom.items())]
    if gpus:
        room.append(int(node.get("GPU", 0)) * int(1 / gpus + 1e-9))  # no actor takes parts of two
    return int(min(room))


def cpus_of(nodes: Sequence[Node]) -> int:
    """In all."""
    return int(sum(node.get("CPU", 0) for node in nodes))


def refusal(nodes: Sequence[Node], gpus: float, custom: Mapping[str, float]) -> SettingError:
    """Where there is room for none of these actors on any node, what is missing."""
    none = "and there is no autoscaler that could start one"
    if gpus and not any(node.get("GPU") for node in nodes):
        return SettingError(f"no node of the cluster has a GPU, {none}", "gpus_per_worker")
    kinds = {name for node in nodes for name in node if not name.startswith(("node:", "memory", "object_store_memory"))}
    wanted = [f"{amount:g} {name}" for name, amount in custom.items()] + [f"{gpus:g} GPU"] * bool(gpus) + ["1 CPU"]
    return SettingError(
        f"no node of the cluster has {' and '.join(wanted)}, {none}; there is {', '.join(sorted(kinds))}", "resources"
    )


def grows() -> bool:
    """Whether an autoscaler starts nodes for what waits for room: of either version, the one that there is says which
    types its nodes are of."""
    found = get_cluster_status(ray.get_runtime_context().gcs_address)  # of an autoscaler of the second version
    types = active_node_types() | {node.ray_node_type_name for node in [*found.active_nodes, *found.idle_nodes]}
    return any(not name.startswith(UNMANAGED) for name in types)
