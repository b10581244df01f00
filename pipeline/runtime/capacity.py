"""The capacity of a cluster: its nodes, and whether an autoscaler adds more."""

from collections.abc import Mapping, Sequence

import ray
from ray.autoscaler.v2.sdk import get_cluster_status

from palindrome.pipeline.base.errors import SettingError
from palindrome.pipeline.base.ray_private import active_node_types, draining_nodes

STATIC_NODE = "node_"  # prefix of the type of a node that no autoscaler started: each is a type of its own, named by id
Node = Mapping[str, float]  # total resources by name


def schedulable_nodes() -> list[Node]:
    """The nodes that are alive and not draining: on a draining node Ray schedules nothing new."""
    draining = draining_nodes()
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]


def actor_slots(node: Node, gpus: float, custom: Mapping[str, float]) -> int:
    """How many actors, each with 1 CPU, `gpus` GPUs and the `custom` resources, fit on the empty node."""
    slots = [node.get("CPU", 0), *(node.get(name, 0) / amount + 1e-9 for name, amount in custom.items())]
    if gpus:
        slots.append(int(node.get("GPU", 0)) * int(1 / gpus + 1e-9))  # no actor takes fractions of two GPUs
    return int(min(slots))


def total_cpus(nodes: Sequence[Node]) -> int:
    return int(sum(node.get("CPU", 0) for node in nodes))


def no_capacity_error(nodes: Sequence[Node], gpus: float, custom: Mapping[str, float]) -> SettingError:
    """The error for actors that fit on no node; it names what is missing."""
    none = "and there is no autoscaler that could start one"
    if gpus and not any(node.get("GPU") for node in nodes):
        return SettingError(f"no node of the cluster has a GPU, {none}", "gpus_per_worker")
    kinds = {name for node in nodes for name in node if not name.startswith(("node:", "memory", "object_store_memory"))}
    wanted = [f"{amount:g} {name}" for name, amount in custom.items()] + [f"{gpus:g} GPU"] * bool(gpus) + ["1 CPU"]
    return SettingError(
        f"no node of the cluster has {' and '.join(wanted)}, {none}; there is {', '.join(sorted(kinds))}", "resources"
    )


def has_autoscaler() -> bool:
    """Whether an autoscaler, of version 1 or 2, manages the nodes: then it reports types that are not STATIC_NODE."""
    v2 = get_cluster_status(ray.get_runtime_context().gcs_address)
    types = active_node_types() | {node.ray_node_type_name for node in [*v2.active_nodes, *v2.idle_nodes]}
    return any(not name.startswith(STATIC_NODE) for name in types)
