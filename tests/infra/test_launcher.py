"""The manifests of Ray's cluster launcher: against Ray's own schema and what EC2 and Compute Engine take; and workers
that Ray's autoscaler starts on moto's EC2, and from Compute Engine's answers, with and without spot capacity."""

import json
import re
from pathlib import Path

import boto3
import botocore.session
import httplib2
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from googleapiclient.discovery_cache import get_static_doc
from moto import mock_aws
from ray.autoscaler._private.providers import _get_node_provider_cls
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import FileConfigReader
from ray.autoscaler.v2.instance_manager.node_provider import LaunchNodeError, NodeProviderAdapter

ROOT = Path(__file__).parents[2]
AWS = ROOT / "infra/launcher/aws.yaml"
GCP = ROOT / "infra/launcher/gcp.yaml"
BOTH = pytest.mark.parametrize("manifest", [AWS, GCP], ids=lambda path: path.stem)
NO_CAPACITY = {"Error": {"Code": "InsufficientInstanceCapacity", "Message": "no capacity"}}


def prepared(manifest):
    """As `ray up` prepares it, before it asks the cloud."""
    return prepare_config(yaml.safe_load(manifest.read_text()))


def node_config(manifest, name):
    return prepared(manifest)["available_node_types"][name]["node_config"]


@BOTH
def test_it_is_what_ray_s_schema_asks_for(manifest):
    config = prepared(manifest)
    validate_config(config)
    with pytest.raises(jsonschema.ValidationError, match="'max_worker' was unexpected"):
        validate_config({**config, "max_worker": 3})


@BOTH
def test_only_workers_are_spot_and_all_scale_to_zero(manifest):
    config = prepared(manifest)
    types = config["available_node_types"]
    for name, kind in types.items():
        on_spot = "spot" in yaml.dump(kind["node_config"]).lower()
        assert on_spot == (name != config["head_node_type"]), name
        assert kind["min_workers"] == 0, name
    assert sum(kind["max_workers"] for kind in types.values()) == config["max_workers"]
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["head"]["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]


@BOTH
def test_the_token_comes_from_the_user_s_own_file(manifest):
    config = prepared(manifest)
    assert config["file_mounts"] == {"/home/palindrome/.ray/auth_token": "~/.ray/auth_token"}
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]


def started(config, provider, kind, folder, count=1):
    """Has Ray's autoscaler start workers; the errors that it then knows of."""
    file = folder / "cluster.yaml"
    file.write_text(yaml.dump(config))
    adapter = NodeProviderAdapter(provider, FileConfigReader(str(file), skip_content_hash=True))
    adapter.launch({kind: count}, "request")
    adapter._main_executor.shutdown()
    adapter._node_launcher_executors.shutdown()
    return adapter.poll_errors()


# AWS


@pytest.mark.parametrize("name", ["head", "gpu", "cpu"])
def test_ec2_takes_the_nodes(name):
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape

    def errors(node):
        return ParamValidator().validate({**node, "MinCount": 1, "MaxCount": 1}, shape).generate_report()

    node = node_config(AWS, name)
    assert errors(node) == ""
    assert "Unknown parameter" in errors({**node, "InstanceMarketOptions": {"Spot": True}})


@pytest.fixture(scope="module")
def ec2(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray puts the key that it makes into ~/.ssh
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        with mock_aws():
            yield boto3.client("ec2", region_name="us-west-2")


@pytest.fixture(scope="module")
def on_aws(ec2):
    """The manifest as `ray up` completes it."""
    config = prepared(AWS)
    boto3.client("iam").create_instance_profile(InstanceProfileName="palindrome-worker")
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    for kind in config["available_node_types"].values():
        kind["node_config"]["ImageId"] = image  # moto resolves no parameters
        kind["node_config"]["IamInstanceProfile"] = {"Name": "palindrome-worker"}  # Ray would wait for one it makes
    return _get_node_provider_cls(config["provider"]).bootstrap_config(config)


@pytest.mark.parametrize(
    ("kind", "refused", "expected"),
    [
        ("gpu", (), [("g6.2xlarge", "spot")]),
        ("cpu", (), [("c6i.4xlarge", "spot")]),
        ("gpu", ("spot",), [("g6.2xlarge", None)]),
        ("gpu", ("spot", None), []),
    ],
)
def test_ec2_is_asked_for_spot_instances_first(ec2, on_aws, tmp_path, kind, refused, expected):
    provider = _get_node_provider_cls(on_aws["provider"])(on_aws["provider"], on_aws["cluster_name"])

    class Refusal:  # of a response, all that botocore's client looks at
        status_code = 500

    def before_call(params, **_):
        kind = params["body"].get("InstanceMarketOptions.MarketType")
        return (Refusal, NO_CAPACITY) if kind in refused else None

    provider.ec2_fail_fast.meta.client.meta.events.register("before-call.ec2.RunInstances", before_call)
    errors = started(on_aws, provider, kind, tmp_path)
    found = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    alive = [i for i in found if i["State"]["Name"] == "running"]
    assert [(i["InstanceType"], i.get("InstanceLifecycle")) for i in alive] == expected
    assert [type(error) for error in errors] == ([] if expected else [LaunchNodeError])
    if alive:
        ec2.terminate_instances(InstanceIds=[i["InstanceId"] for i in alive])


# Google Cloud


@pytest.mark.parametrize("name", ["head", "gpu", "cpu"])
def test_compute_engine_takes_the_nodes(name):
    """By the description of its API that Google's own client has."""
    schemas = json.loads(get_static_doc("compute", "v1"))["schemas"]

    def closed(schema):
        if not isinstance(schema, dict):
            return schema
        made = {k: closed(v) for k, v in schema.items() if k not in ("$ref", "annotations", "enumDescriptions")}
        if isinstance(schema.get("$ref"), str):
            made["$ref"] = f"#/$defs/{schema['$ref']}"
        if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
            made.setdefault("additionalProperties", False)
        if schema.get("format") in ("int64", "uint64"):
            made["type"] = ["string", "integer"]  # JSON has no such integers: they are written as text, or as they are
        return made

    known = {"$ref": "#/$defs/Instance", "$defs": {name: closed(schema) for name, schema in schemas.items()}}

    def errors(node):
        return [error.message for error in jsonschema.Draft202012Validator(known).iter_errors(node)]

    node = node_config(GCP, name)
    assert errors(node) == []
    assert errors({**node, "scheduling": {"provisioningModel": "CHEAP"}}) != []
    assert errors({**node, "preemptible": True}) != []


class ComputeEngine:
    """What it answers to those who start instances; of those whose kind is in `refused`, that there is no capacity."""

    def __init__(self, refused):
        self.refused = refused
        self.instances = []
        self.operations = {}

    def request(self, http, uri, method="GET", body=None, **_):
        if method == "POST" and re.search(r"/zones/us-central1-a/instances\?", uri):
            instance = json.loads(body)
            name, kind = f"operation-{len(self.operations)}", instance["scheduling"].get("provisioningModel")
            failed = {"errors": [{"code": "ZONE_RESOURCE_POOL_EXHAUSTED"}]}
            self.operations[name] = {"status": "DONE"} | ({"error": failed} if kind in self.refused else {})
            if kind not in self.refused:
                self.instances.append(instance)
            answer = {"name": name}
        else:
            answer = self.operations[re.search(r"/operations/([^?]*)", uri).group(1)]
        return httplib2.Response({"status": 200, "content-type": "application/json"}), json.dumps(answer).encode()


@pytest.mark.parametrize(
    ("kind", "refused", "expected"),
    [
        ("gpu", (), ["SPOT", "SPOT"]),
        ("cpu", (), ["SPOT", "SPOT"]),
        ("gpu", ("SPOT",), [None, None]),
        ("gpu", ("SPOT", None), []),
    ],
)
def test_compute_engine_is_asked_for_spot_vms_first(monkeypatch, tmp_path, kind, refused, expected):
    config = prepared(GCP)
    config["provider"]["gcp_credentials"] = {"type": "credentials_token", "credentials": "testing"}
    engine = ComputeEngine(refused)
    monkeypatch.setattr(httplib2.Http, "request", lambda http, *a, **k: engine.request(http, *a, **k))
    provider = _get_node_provider_cls(config["provider"])(config["provider"], config["cluster_name"])
    errors = started(config, provider, kind, tmp_path, count=2)
    assert [i["scheduling"].get("provisioningModel") for i in engine.instances] == expected
    assert [type(error) for error in errors] == ([] if expected else [LaunchNodeError])
    machine = node_config(GCP, kind)["machineType"]
    for instance in engine.instances:
        assert instance["machineType"].endswith(f"/{machine}")
        assert instance["scheduling"]["onHostMaintenance"] == "TERMINATE"
        assert ("instanceTerminationAction" in instance["scheduling"]) == ("SPOT" in expected)
