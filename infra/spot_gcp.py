"""Compute Engine's nodes for Ray's cluster launcher: Spot VMs, or standard ones where there are none. Ray alone asks
for Spot VMs again and again (its issues 20774 and 53636).

For `provider: {type: external, module: palindrome.infra.spot_gcp.SpotFirst}`; the other fields
are those of `type: gcp`."""

from typing import Any

from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider

SPOT = ("provisioningModel", "instanceTerminationAction")  # of a config's `scheduling`


class SpotFirst(GCPNodeProvider):
    def create_node(self, base_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """One by one, for some of several may come up. Raises what Compute Engine answers where it has neither."""
        created: dict[str, Any] = {}
        for _ in range(count):
            created |= self._one(base_config, tags)
        return created

    def _one(self, config: dict[str, Any], tags: dict[str, str]) -> Any:
        scheduling = config.get("scheduling", {})
        if scheduling.get("provisioningModel") == "SPOT":
            try:
                return super().create_node(config, tags, 1)
            except Exception as e:  # Ray raises Exception itself, of an operation that failed
                print(f"no Spot VM, trying a standard one: {e}")
            config = {**config, "scheduling": {k: v for k, v in scheduling.items() if k not in SPOT}}
        return super().create_node(config, tags, 1)
