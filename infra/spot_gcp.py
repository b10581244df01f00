"""Compute Engine nodes for Ray's cluster launcher: Spot VMs, or standard ones when there is no Spot capacity. Ray
itself would request Spot VMs forever (its issues 20774 and 53636).

For `provider: {type: external, module: palindrome.infra.spot_gcp.SpotFirst}`; the other fields
are those of `type: gcp`."""

from typing import Any

from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider

SPOT = ("provisioningModel", "instanceTerminationAction")  # keys of a config's `scheduling` that request a Spot VM


class SpotFirst(GCPNodeProvider):
    def create_node(self, base_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Creates nodes one by one, because a request for several may succeed in part. Raises Compute Engine's error if
        there is no capacity of either kind."""
        created: dict[str, Any] = {}
        for _ in range(count):
            created |= self._one(base_config, tags)
        return created

    def _one(self, config: dict[str, Any], tags: dict[str, str]) -> Any:
        scheduling = config.get("scheduling", {})
        if scheduling.get("provisioningModel") == "SPOT":
            try:
                return super().create_node(config, tags, 1)
            except Exception as e:  # Ray raises a plain Exception for a failed operation
                print(f"no Spot VM, trying a standard one: {e}")
            config = {**config, "scheduling": {k: v for k, v in scheduling.items() if k not in SPOT}}
        return super().create_node(config, tags, 1)
