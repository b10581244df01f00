"""Clusters of several kinds of nodes, of their own, with GPUs that are but numbers: which of them a run takes."""

import re
import signal
import time
from collections import Counter

import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

import palindrome.infra.cluster  # noqa: F401, sets Ray up before it is started


@pytest.fixture(scope="module")
def cluster(forked_workers):
    """A head without CPUs, a node of GPU and `a100`, one of a GPU of another kind, and one of CPUs."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "include_log_monitor": False}
    )
    cluster.kinds = {
        cluster.add_node(num_cpus=3, num_gpus=1, resources={"a100": 1}).node_id: "a100",
        cluster.add_node(num_cpus=3, num_gpus=1).node_id: "other",
        cluster.add_node(num_cpus=2).node_id: "cpus",
    }
    yield cluster
    cluster.shutdown()


@pytest.fixture
def encode(cluster, start, sample, model, tmp_path):
    """encode(flags...) -> the process of a run that would take long."""

    def encode(*flags):
        places = ["--images", sample, "--model", model, "--out", tmp_path / "run", "--address", cluster.address]
        work = ["--shard-size", 1, "--steps", 100, "--corrections", 0, "--decode", "actor"]
        return start("encode", *places, *work, *flags)

    return encode


@pytest.fixture
def actors(cluster, encode, tmp_path):
    """actors(count, flags...) -> how many actors were on nodes of which kind, of a run that is interrupted once so many
    are up and a shard is done. None stands for those that were not up."""

    def actors(count, *flags, out="run"):
        before = cluster.global_state.actor_table(None).keys()
        process = encode(*flags, "--out", tmp_path / out)
        places = []
        while sum(place is not None for place in places) < count or not list(tmp_path.glob(f"{out}/latents/*.parquet")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
            found = [a for name, a in cluster.global_state.actor_table(None).items() if name not in before]
            places = [cluster.kinds.get(a["Address"]["NodeID"]) for a in found]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 130, out + err
        return Counter(places)

    return actors


def test_two_share_a_gpu(actors):
    assert actors(4, "--gpus-per-worker", 0.5) == {"a100": 2, "other": 2}


def test_without_it_each_gpu_has_one(actors):
    assert actors(2, "--decode", "tasks") == {"a100": 1, "other": 1}


def test_actors_are_on_nodes_of_the_resources_they_take(actors):
    assert actors(2, "--resources", '{"a100": 0.5}', "--gpus-per-worker", 0.25) == {"a100": 2}


@pytest.mark.parametrize(
    ("flags", "tried"),
    [(["--count", 1000], True), (["--count", 999], False), (["--count", 1000, "--batch-size", 32], False)],
)
def test_how_many_a_gpu_is_given_at_once_is_tried(cluster, start, model, tmp_path, flags, tried):
    places = ["--model", model, "--out", tmp_path / "run", "--address", cluster.address]
    out, err = start("generate", *places, "--steps", 2, *flags).communicate(timeout=300)
    assert f"{flags[1]} samples in " in out, err
    assert bool(re.search(r"^batch size: 64 \(64: [\d,]+ network evaluations a second\)$", out, re.M)) == tried


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--resources", '{"h100": 1}'],
            [
                "--resources: no node of the cluster has 1 h100 and 1 GPU and 1 CPU, and ",
                "could start one; there is CPU, GPU, a100",
            ],
        ),
        (["--resources", '{"a100": 2}'], ["--resources: no node of the cluster has 2 a100 and 1 GPU and 1 CPU, and "]),
        (
            ["--decode", "tasks", "--workers", 8],
            ["--decode: 8 actors take all 8 CPUs of the cluster, and tasks need one"],
        ),
    ],
)
def test_what_no_node_has_is_refused(cluster, encode, flags, words):
    before = cluster.global_state.actor_table(None).keys()
    process = encode(*flags)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and cluster.global_state.actor_table(None).keys() == before
    assert err.startswith("palindrome encode: error: --") and err.count("\n") == 1
    assert all(part in err for part in words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpus-per-worker", 2], "--gpus-per-worker: 2.0 is out of range; it takes 0.01 to 1"),
        (["--gpus-per-worker", 0], "--gpus-per-worker: 0.0 is out of range"),
        (["--resources", "a100"], '--resources: must be JSON of names and numbers, as {"a100": 1}; got a100'),
        (["--resources", '["a100"]'], "must be JSON of names and numbers"),
        (["--resources", '{"a100": "1"}'], "must be JSON of names and numbers"),
        (["--resources", '{"a100": 0}'], "must be JSON of names and numbers"),
        (["--resources", '{"GPU": 1}'], "--resources: GPU is not a custom resource; for GPUs, use --gpus-per-worker"),
    ],
)
def test_what_makes_no_sense_is_refused(palindrome, sample, model, tmp_path, flags, words):
    said = palindrome("encode", "--images", sample, "--model", model, "--out", tmp_path / "run", *flags)
    assert said.code == 2 and words in said.err and not (tmp_path / "run").exists()


def test_a_gpu_that_nothing_can_start_is_refused(palindrome, sample, model, tmp_path):
    flags = ["--gpus-per-worker", 0.5]
    said = palindrome("encode", "--images", sample, "--model", model, "--out", tmp_path / "run", *flags)
    assert said.code == 2 and "--gpus-per-worker: no node of the cluster has a GPU, and there is no auto" in said.err


def test_a_node_that_is_leaving_gets_none(cluster, actors):
    leaving = next(node for node, kind in cluster.kinds.items() if kind == "other")
    soon = int((time.time() + 600) * 1000)
    taken, why = GcsClient(cluster.address).drain_node(
        leaving, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "", soon
    )
    assert taken, why
    assert actors(2, "--gpus-per-worker", 0.5) == {"a100": 2}
    found = actors(2, "--gpus-per-worker", 0.5, "--workers", 1, 4, out="more")
    assert found["a100"] >= 2 and not found["other"]


def test_a_cluster_scaled_to_zero_is_waited_for_and_tasks_keep_a_cpu(start, sample, model, tmp_path):
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "include_log_monitor": False}
    )
    try:
        places = ["--images", sample, "--model", model, "--out", tmp_path / "run", "--address", cluster.address]
        flags = ["--decode", "tasks", "--workers", 1, 8, "--shard-size", 8, "--steps", 2, "--corrections", 0]
        process = start("encode", *places, *flags)
        assert process.stdout.readline() == "256 images in 32 shards, 32 to encode\n"
        while not cluster.global_state.actor_table(None):
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)
        cluster.add_node(num_cpus=3)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 and "256 latents and 0 rejects" in out, err
        assert len(cluster.global_state.actor_table(None)) == 2, "the third CPU is for the tasks"
    finally:
        cluster.shutdown()
