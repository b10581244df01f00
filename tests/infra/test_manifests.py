"""The manifests under infra/ against what reads them: KubeRay's and Kubernetes' schemas, Ray's autoscaler, Palindrome's
own command line, Docker's rules of what is copied. Those of Ray's cluster launcher are in test_launcher.py."""

import argparse
import copy
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser
from packaging.version import Version
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint, ResourceRequestByCount

from palindrome.infra import wait
from palindrome.jobs.arguments import add_arguments, from_arguments
from palindrome.jobs.encode import EncodeConfig

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
RAYJOB = ROOT / "infra/kuberay/rayjob.yaml"
SBATCH = ROOT / "infra/slurm/encode.sbatch"
DOCKERFILE = ROOT / "infra/Dockerfile"
MANIFESTS = [RAYJOB, SBATCH, ROOT / "infra/launcher/aws.yaml", ROOT / "infra/launcher/gcp.yaml"]
PLACEHOLDERS = r"registry\.example\.com|s3://bucket|my-project|palindrome-worker|gke-spot: \"true\"|\$HOME/"


def encode(words):
    """The config of a command `palindrome encode ...`, as its command line makes it."""
    assert words[:2] == ["palindrome", "encode"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser, EncodeConfig)
    return from_arguments(EncodeConfig, parser.parse_args(words[2:]))


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_what_a_user_must_edit_is_marked(manifest):
    lines = manifest.read_text().splitlines()
    code = [(n, line) for n, line in enumerate(lines) if not line.lstrip().startswith("#")]
    found = [(n, line) for n, line in code if re.search(PLACEHOLDERS, line)]
    assert found
    for n, line in found:
        assert any("EDIT" in near for near in lines[max(0, n - 6) : n + 3]), line


# KubeRay


@pytest.fixture
def rayjob():
    return yaml.safe_load(RAYJOB.read_text())


@pytest.fixture
def cluster(rayjob):
    return rayjob["spec"]["rayClusterSpec"]


@pytest.fixture(scope="module")
def schema():
    """Of a RayJob's spec, with Kubernetes' definitions; fields it does not list are errors."""
    spec = yaml.safe_load((HERE / "ray.io_rayjobs.yaml").read_text())

    def close(schema):
        if isinstance(schema, dict):
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)
            for value in schema.values():
                close(value)

    close(spec)
    return jsonschema.Draft202012Validator({**spec, "$defs": json.loads((HERE / "kubernetes.json").read_text())})


def test_the_rayjob_is_what_kuberay_s_and_kubernetes_schemas_ask_for(rayjob, schema):
    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    assert [error.message for error in schema.iter_errors(rayjob["spec"])] == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("submitMode",), "SidecarMode", "'submitMode' was unexpected"),
        (("backoffLimit",), "2", "not of type 'integer'"),
        (("rayClusterSpec", "autoscalerOptions", "version"), "v3", "not one of"),
        (("rayClusterSpec", "workerGroupSpecs", 0, "groupName"), None, "'groupName' is a required property"),
        (("rayClusterSpec", "headGroupSpec", "template", "spec", "restart"), "Never", "'restart' was unexpected"),
        (
            ("rayClusterSpec", "workerGroupSpecs", 1, "template", "spec", "containers", 0, "env", 0, "valueOf"),
            "x",
            "'valueOf' was unexpected",
        ),
    ],
)
def test_the_schema_notices(rayjob, schema, path, value, message):
    spec = copy.deepcopy(rayjob["spec"])
    *outer, last = path
    place = spec
    for step in outer:
        place = place[step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    assert any(message in error.message for error in schema.iter_errors(spec))


def test_the_operator_takes_it(rayjob, cluster):
    """What KubeRay's validation.go checks beside the schema, where it says anything of what is used here."""
    spec = rayjob["spec"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", rayjob["metadata"]["name"])
    assert spec["submissionMode"] == "SidecarMode"
    assert not spec.keys() & {"submitterPodTemplate", "submitterConfig", "clusterSelector", "deletionStrategy"}
    assert spec["shutdownAfterJobFinishes"] is True  # else there must be no ttlSecondsAfterFinished
    assert cluster["authOptions"] == {"mode": "token"}
    assert Version(cluster["rayVersion"]) >= Version("2.52")
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"
        assert "RAY_enable_autoscaler_v2" not in str(group)
        assert "labels" not in group["rayStartParams"]


def test_the_image_has_the_ray_that_kuberay_is_told_of(cluster):
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
    assert cluster["rayVersion"] == pinned == ray.__version__


def test_the_entrypoint_is_two_commands_that_are_there(rayjob, cluster):
    """KubeRay puts it into a line of its own for the shell."""
    entrypoint = rayjob["spec"]["entrypoint"]
    assert not re.search(r"[;&|<>$`\n]", entrypoint)
    python, dash_m, module, *arguments = shlex.split(entrypoint)
    assert (python, dash_m, module) == ("python", "-m", wait.__name__)
    config = encode(wait.parse(arguments).command)
    gpu = next(group for group in cluster["workerGroupSpecs"] if group["groupName"] == "gpu")
    assert config.workers == (1, gpu["maxReplicas"])


def test_ray_s_autoscaler_starts_from_nothing_what_the_entrypoint_waits_for(rayjob, cluster):
    wanted = wait.parse(shlex.split(rayjob["spec"]["entrypoint"])[3:])
    config = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "c", "namespace": "n"}, "spec": cluster})
    assert {name: kind["min_workers"] for name, kind in config["available_node_types"].items()} == {
        "headgroup": 0,
        "gpu": 0,
        "cpu": 0,
    }
    autoscaling = AutoscalingConfig(config, skip_content_hash=True)
    bundles = [({"GPU": 1}, wanted.gpus), ({"CPU": 1}, wanted.cpus)]
    requests = [ResourceRequestByCount(request=ResourceRequestUtil.make(b), count=count) for b, count in bundles]
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=autoscaling.get_node_type_configs(),
            max_num_nodes=autoscaling.get_max_num_nodes(),
            cluster_resource_constraints=[ClusterResourceConstraint(resource_requests=requests)],
        )
    )
    assert reply.infeasible_cluster_resource_constraints == []
    assert {launch.instance_type: launch.count for launch in reply.to_launch} == {"gpu": 1, "cpu": 1}


def test_pods_have_longer_than_what_they_wait_for(cluster):
    def seconds(group, name):
        (container,) = group["template"]["spec"]["containers"]
        return float(next(variable["value"] for variable in container["env"] if variable["name"] == name))

    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert seconds(head, "RAY_JOB_STOP_WAIT_TIME_S") < head["template"]["spec"]["terminationGracePeriodSeconds"]
    for group in workers:
        drain = seconds(group, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
        # Ray then gives its processes a moment more.
        assert drain + 10 <= group["template"]["spec"]["terminationGracePeriodSeconds"] <= 120


def test_no_pod_is_root_and_no_secret_is_in_the_manifest(cluster):
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["envFrom"] == [{"secretRef": {"name": "palindrome-credentials", "optional": True}}]
            assert not [v["name"] for v in container["env"] if re.search("KEY|TOKEN|SECRET|PASSWORD", v["name"])]


# Slurm


def test_the_batch_script_is_a_script_whose_command_is_there():
    text = SBATCH.read_text()
    subprocess.run(["bash", "-n", SBATCH], check=True)
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]  # sbatch would not see it
    words = shlex.split(re.search(r"^command=\((.*?)^\)", text, re.MULTILINE | re.DOTALL).group(1), comments=True)
    assert encode(words).out == "s3://bucket/runs/photos"
    arguments = re.search(r"python -m palindrome\.infra\.wait (.*) -- ", text).group(1)
    assert wait.parse(shlex.split(arguments.replace('"$SLURM_NNODES"', "2"))).nodes == 2


# Docker


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    """Of the Dockerfile, as (name, value), in order."""
    parser = DockerfileParser(path=str(tmp_path_factory.mktemp("docker")))
    parser.content = DOCKERFILE.read_text()
    return [(part["instruction"], part["value"]) for part in parser.structure if part["instruction"] != "COMMENT"]


def copied(instructions):
    """What each COPY takes, and where it stands."""
    for n, (name, value) in enumerate(instructions):
        if name == "COPY":
            *sources, _ = value.split()
            yield from ((n, source.removesuffix("/")) for source in sources)


def test_what_is_copied_is_there_and_not_ignored(instructions):
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    context = exclude_paths(str(ROOT), patterns)
    for _, source in copied(instructions):
        assert source in context
    assert not {".git", ".venv", "samples", "checkpoints", "tests"} & {path.split("/")[0] for path in context}


def test_the_whole_package_is_copied(instructions):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = set(project["tool"]["setuptools"]["package-dir"].values())
    needed = folders | {"pyproject.toml", "constraints.txt", project["project"]["readme"]}
    assert {source for _, source in copied(instructions)} == needed


def test_a_change_of_the_code_installs_no_library_again(instructions):
    code = min(n for n, source in copied(instructions) if source == "jobs")
    installs = [n for n, (name, value) in enumerate(instructions) if name == "RUN" and "install" in value]
    assert all("--no-deps" in instructions[n][1] for n in installs if n > code)
    assert sum(n < code for n in installs) == 3  # the system's packages, PyTorch, the other libraries
    for n in installs[1:3]:
        assert "-c constraints.txt" in instructions[n][1]


def test_the_image_is_not_root_s_and_is_for_cpus_or_gpus(instructions):
    users = [value for name, value in instructions if name == "USER"]
    assert users == ["1000:1000"]
    assert ("ARG", "ACCELERATOR=cuda") in instructions
    torch = next(value for name, value in instructions if name == "RUN" and value.endswith(" torch"))
    choice = torch.split("&&")[0] + '&& echo "$@"'

    def options(accelerator):
        return subprocess.run(
            ["sh", "-c", choice], env={"ACCELERATOR": accelerator}, capture_output=True, text=True, check=False
        )

    assert (options("cuda").returncode, options("cuda").stdout.strip()) == (0, "")
    assert options("cpu").stdout.strip().endswith("/whl/cpu")
    assert options("rocm").returncode == 1


@pytest.mark.parametrize("extras", ["", "latent films"])
def test_the_image_has_the_extras_that_are_asked_for(instructions, extras):
    assert ("ARG", "EXTRAS=") in instructions
    command = next(value for name, value in instructions if name == "RUN" and "requirements.txt" in value)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    listed = command.partition("> requirements.txt")[0]
    env = {"EXTRAS": extras, "PATH": path}
    said = subprocess.run(["sh", "-c", listed], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    more = [one for extra in extras.split() for one in project["optional-dependencies"][extra]]
    assert said.stdout.split() == project["dependencies"] + more


def test_the_image_starts_whatever_it_is_given(instructions):
    """KubeRay and the cluster launcher run shells in it, and look for its HOME."""
    names = [name for name, _ in instructions]
    assert "ENTRYPOINT" not in names
    assert any(name == "ENV" and "HOME=/home/palindrome" in value for name, value in instructions)
