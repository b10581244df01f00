"""EC2 nodes for Ray's cluster launcher: spot instances, or on-demand ones when there is no spot capacity. Ray itself
would request spot instances forever (its issues 20774 and 53636).

For `provider: {type: external, module: palindrome.infra.spot_aws.SpotFirst}`; the other fields
are those of `type: aws`."""

from typing import Any

from botocore.exceptions import ClientError
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

MARKET = "InstanceMarketOptions"


class SpotFirst(AWSNodeProvider):
    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> Any:
        """Raises EC2's error if there is no capacity of either kind."""
        try:
            return super().create_node(node_config, tags, count)
        except (NodeLaunchException, ClientError):
            if MARKET not in node_config:
                raise
        return super().create_node({k: v for k, v in node_config.items() if k != MARKET}, tags, count)
