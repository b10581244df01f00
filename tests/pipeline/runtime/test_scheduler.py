"""The streaming run on a real Ray: shards that fail, processes that die, and which shard is charged for it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import torch

from palindrome.model.execution import FLOAT32
from palindrome.pipeline.base.errors import RunError, SettingError
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.runs.outcome import Failure, Receipt
from palindrome.pipeline.runtime import scheduler as run_module
from palindrome.pipeline.runtime.scheduler import MAX_RETRIES, SHARDS_PER_ACTOR, Heartbeat, Resources, run_shards

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers can't import a test module
pytestmark = pytest.mark.usefixtures("ray_here")
ROOT = Path(__file__).parents[3]
ONE = Resources(workers=1, gpus=0, threads=1, decode_in_tasks=False)
TWO = Resources(workers=2, gpus=0, threads=1, decode_in_tasks=False)


class BadShard(Exception):
    """Takes two arguments and passes one to its base: such an exception can be pickled but not unpickled."""

    def __init__(self, name, why):
        super().__init__(f"{name}: {why}")


@dataclass(frozen=True)
class Work:
    """Records every attempt in a folder. The name of a shard says what happens to it:

    `good`; `raise` each time; `raise-once`; `odd` raises what can't be unpickled; `kill` its process each time;
    `kill-once`; `wait` until a file `go` is there; `slow` for a moment; `hang` each time; `hang-once`; `stop-once` its
    process as a whole; `busy` evaluates a network for longer than others may hang.
    """

    folder: Path

    def process(self, model, shard):
        kind = shard.name.rpartition(".")[0]
        before = len(list(self.folder.glob(f"{shard.name}@*")))
        (self.folder / f"{shard.name}@{os.getpid()}-{time.monotonic_ns()}").touch()
        if kind == "raise" or (kind == "raise-once" and not before):
            raise ValueError(f"no luck with {shard.name}\nof attempt {before}")
        if kind == "odd":
            raise BadShard(shard.name, "odd")
        if kind == "kill" or (kind == "kill-once" and not before):
            time.sleep(0.3)  # until a neighbour is in flight too
            os.kill(os.getpid(), signal.SIGKILL)
        while kind == "wait" and not (self.folder / "go").exists():
            time.sleep(0.05)
        if kind == "slow":
            time.sleep(0.2)
        if kind == "hang" or (kind == "hang-once" and not before):
            time.sleep(60)
        if kind == "stop-once" and not before:
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(60)  # the signal may reach this thread late, which would then return
        if kind == "busy":
            for _ in range(12):
                time.sleep(0.5)
                model.encode(torch.zeros(1, 3, 16, 16), (-1, 0))
        return Receipt(shard.name, 1, 0, 0.0, 0.0, 0)

    def attempts(self):
        return Counter(path.name.partition("@")[0] for path in self.folder.glob("*@*"))

    def processes(self):
        return {int(path.name.partition("@")[2].partition("-")[0]) for path in self.folder.glob("*@*")}


def shards_of(*kinds):
    return [Shard(f"{kind}.{i}", "files", 1, ()) for i, kind in enumerate(kinds)]


def account(outcomes):
    """(names of the shards done, error by name of the failed ones); no shard has two outcomes."""
    outcomes = [outcome for outcome in outcomes if not isinstance(outcome, Heartbeat)]
    done = [o.shard for o in outcomes if isinstance(o, Receipt)]
    failed = {o.shard.name: o.error for o in outcomes if isinstance(o, Failure)}
    assert len(outcomes) == len({*done, *failed}), "a shard has two outcomes"
    return set(done), failed


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path)


def run(work, kinds, resources, checkpoint):
    return account(run_shards(work, checkpoint, iter(shards_of(*kinds)), resources))


def test_every_shard_has_one_outcome(work, tiny):
    done, failed = run(work, ["good"] * 40, TWO, tiny)
    assert done == {shard.name for shard in shards_of(*["good"] * 40)}
    assert failed == {}
    assert set(work.attempts().values()) == {1}


def test_no_shards_no_outcomes(work, tiny):
    assert run(work, [], ONE, tiny) == (set(), {})


def test_a_shard_that_raises_fails_after_its_retries(work, tiny):
    done, failed = run(work, ["good", "raise", "good", "raise-once", "good"], ONE, tiny)
    assert done == {"good.0", "good.2", "raise-once.3", "good.4"}
    assert failed.keys() == {"raise.1"}
    assert failed["raise.1"] == f"ValueError: no luck with raise.1 of attempt {MAX_RETRIES}"
    assert work.attempts() == {"good.0": 1, "raise.1": MAX_RETRIES + 1, "good.2": 1, "raise-once.3": 2, "good.4": 1}
    assert len(work.processes()) == 1  # an exception costs no process


def test_an_exception_that_can_not_be_unpickled_is_a_failure_too(work, tiny):
    done, failed = run(work, ["good", "odd", "good"], ONE, tiny)
    assert done == {"good.0", "good.2"}
    assert "odd.1: odd" in failed["odd.1"]


def test_a_shard_that_kills_its_process_is_quarantined(work, tiny, monkeypatch):
    monkeypatch.setattr(run_module, "MAX_RETRIES", 1)
    kinds = ["slow", "kill", "slow", "slow", "slow", "slow", "slow"]
    done, failed = run(work, kinds, ONE, tiny)
    assert failed.keys() == {"kill.1"}
    assert failed["kill.1"].startswith("The actor is dead because its worker process has died.")
    assert len(done) == len(kinds) - 1
    assert work.attempts()["kill.1"] in (2, 3)  # once with a neighbour: no attempt


class Preempted(ray.exceptions.RayError):
    preempted = True


@ray.remote(num_cpus=0)
class Idle:
    pass


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_shards_of_a_preempted_actor_are_retried_beside_others_and_not_charged(work, tiny, names):
    """Were they quarantined, every actor would have to finish what it has before it takes one of them."""
    run = run_module._Run(work, tiny, iter(()), ONE, FLOAT32, 60)
    shards = [Shard(name, "files", 1, ()) for name in names]
    actor = run_module._Actor(Idle.remote(), None, dict(enumerate(shards)))
    run.actors.append(actor)
    assert list(run._handle_death(actor, Preempted("its node is gone"))) == []
    assert list(run.retries) == shards and not run.quarantine and not run.attempts and not run.actors


def test_two_shards_that_kill_their_process_fail_no_other_shard(work, tiny, monkeypatch):
    monkeypatch.setattr(run_module, "MAX_RETRIES", 1)
    done, failed = run(work, ["kill", "kill", "slow", "slow", "slow", "slow"], TWO, tiny)
    assert failed.keys() == {"kill.0", "kill.1"}
    assert len(done) == 4


def test_a_shard_that_kills_its_process_once_is_done(work, tiny):
    done, failed = run(work, ["slow", "kill-once", "slow", "slow"], ONE, tiny)
    assert failed == {}
    assert len(done) == 4
    assert len(work.processes()) == 2


def test_an_actor_killed_from_outside_is_replaced(work, tiny):
    def kill_when_busy():
        while not work.processes():
            time.sleep(0.05)
        os.kill(next(iter(work.processes())), signal.SIGKILL)
        while len(work.processes()) < 2:
            time.sleep(0.05)
        (work.folder / "go").touch()

    killer = threading.Thread(target=kill_when_busy, daemon=True)
    killer.start()
    done, failed = run(work, ["wait"] * 5, ONE, tiny)
    killer.join()
    assert failed == {}
    assert len(done) == 5
    assert len(work.processes()) == 2


@dataclass(frozen=True)
class Dying:
    """A checkpoint whose network can't be built: by an exception, or because the process is gone."""

    fatal: bool

    def denoiser(self, device, execution):
        if self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the weights are not those of the network")


@pytest.mark.parametrize("fatal", [False, True], ids=["raises", "is killed"])
def test_actors_that_never_start_end_the_run(work, fatal, monkeypatch):
    monkeypatch.setattr(run_module, "START_BACKOFF", 0.1)
    why = "The actor is dead because its worker process has died" if fatal else "the weights are not those"
    with pytest.raises(RunError, match=f"3 actors in a row died before they were ready: .*{why}"):
        run(work, ["good"] * 3, ONE, Dying(fatal))
    assert work.attempts() == {}


def test_more_workers_than_cpus_still_completes(work, tiny):
    cpus = int(ray.cluster_resources()["CPU"])
    many = Resources(workers=2 * cpus, gpus=0, threads=1, decode_in_tasks=False)
    done, failed = run(work, ["slow"] * 30, many, tiny)
    assert (len(done), failed) == (30, {})
    assert len(work.processes()) <= cpus


def test_fewer_actors_than_the_minimum_end_the_run(work, tiny, monkeypatch):
    monkeypatch.setattr(run_module, "CAPACITY_TIMEOUT", 3)
    many = Resources(workers=10, gpus=0, threads=1, decode_in_tasks=False, min_workers=10)
    with pytest.raises(RunError, match=r"[0-3] workers are up and 10 are needed"):
        run(work, ["slow"] * 500, many, tiny)


def test_no_more_actors_than_shards(work, tiny):
    done, _ = run(work, ["slow"], Resources(workers=3, gpus=0, threads=1, decode_in_tasks=False), tiny)
    assert done == {"slow.0"}
    assert len(work.processes()) == 1


def test_shards_are_read_as_actors_have_free_slots(work, tiny):
    read = []

    def shards():
        for shard in shards_of(*["good"] * 200):
            read.append(shard)
            yield shard

    outcomes = (o for o in run_shards(work, tiny, shards(), ONE) if not isinstance(o, Heartbeat))
    for count, _ in enumerate(outcomes, start=1):
        assert len(read) <= count + ONE.workers * (SHARDS_PER_ACTOR + 1)
    assert len(read) == count == 200


def test_closing_a_run_kills_its_actors(work, tiny):
    outcomes = run_shards(work, tiny, iter(shards_of(*["good"] * 50)), ONE)
    while not isinstance(next(outcomes), Receipt):
        pass
    [pid] = work.processes()
    outcomes.close()
    while _is_alive(pid):  # Ray ends the process asynchronously
        time.sleep(0.05)


def test_shards_overlap_in_an_actor_so_that_one_is_read_while_the_other_computes(work, tiny):
    outcomes = run_shards(work, tiny, iter(shards_of(*["wait"] * SHARDS_PER_ACTOR)), ONE)

    def let_go():
        while len(work.attempts()) < SHARDS_PER_ACTOR:
            time.sleep(0.05)
        (work.folder / "go").touch()

    threading.Thread(target=let_go, daemon=True).start()
    done, _ = account(outcomes)
    assert len(done) == SHARDS_PER_ACTOR


@pytest.mark.parametrize(
    ("workers", "decode", "expected"),
    [
        ((), "auto", Resources(1, 0, 3, True)),
        ((), "actor", Resources(1, 0, 3, False)),
        ((2,), "tasks", Resources(2, 0, 1, True)),
        ((3,), "auto", Resources(3, 0, 1, False)),
        ((2, 7), "auto", Resources(7, 0, 1, False, min_workers=2)),
    ],
)
def test_resources_on_three_cpus(workers, decode, expected):
    assert run_module.choose_resources(workers, decode) == expected


def test_decoding_tasks_need_a_cpu_beside_the_actors():
    with pytest.raises(SettingError, match="3 actors take all 3 CPUs") as e:
        run_module.choose_resources([3], "tasks")
    assert e.value.field == "decode"
    assert run_module.choose_resources((1, 8), "tasks") == Resources(8, 0, 1, True, min_workers=1)


# On a Ray of its own that kills a process once 3 GiB more memory are in use than at its start.
SHORT_OF_MEMORY = """
import json, os, sys
from palindrome.infra import cluster
import ray._private.utils as machine
threshold = (machine.get_used_memory() + 3 * 2**30) / machine.get_system_memory()
os.environ |= {"RAY_memory_usage_threshold": str(threshold), "RAY_memory_monitor_refresh_ms": "50"}
import ray, torch
from dataclasses import dataclass
from palindrome.model.families.unet2d import UNet2D
from palindrome.model.process import VP
from palindrome.model.unet import UNetConfig
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runtime import scheduler

@dataclass(frozen=True)
class Checkpoint(UNet2D):
    def denoiser(self, device, execution):
        return torch.nn.Identity()

@dataclass(frozen=True)
class Work:
    def process(self, model, shard):
        import time
        taken = []
        while shard.name == "greedy" and len(taken) < 96:
            taken.append(torch.ones(2**24))  # 64 MiB
            time.sleep(0.02)
        return Receipt(shard.name, 1, 0, 0.0, 0.0, 0)

scheduler.MAX_RETRIES = 0
with cluster.connect("local"):
    shards = iter([Shard("greedy", "files", 1, ()), Shard("modest", "files", 1, ())])
    checkpoint, resources = Checkpoint(UNetConfig(), {}, VP()), scheduler.Resources(1, 0, 1, False)
    for outcome in scheduler.run_shards(Work(), checkpoint, shards, resources):
        if not isinstance(outcome, scheduler.Heartbeat):
            print(json.dumps([getattr(outcome, "error", "done"), str(outcome)]))
"""


def test_a_shard_whose_actor_ray_kills_for_its_memory_fails():
    code = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY], cwd=ROOT, capture_output=True, text=True)
    assert code.returncode == 0, code.stderr
    outcomes = [json.loads(line) for line in code.stdout.splitlines() if line.startswith('["')]
    found = {"greedy" if "greedy" in text else "modest": words for words, text in outcomes}
    assert found.keys() == {"greedy", "modest"}
    assert "low on memory" in found["greedy"]
    assert found["modest"] == "done"


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_stalled_shard_is_retried_and_its_neighbours_are_not_charged(work, tiny, monkeypatch):
    monkeypatch.setattr(run_module, "MAX_RETRIES", 1)
    kinds = ["slow", "hang-once", "busy", "hang", "slow"]
    done, failed = account(run_shards(work, tiny, iter(shards_of(*kinds)), TWO, stall_timeout=3))
    assert done == {"slow.0", "hang-once.1", "busy.2", "slow.4"}
    assert failed == {"hang.3": "no progress for 3 s"}
    attempts = work.attempts()
    assert (attempts["hang-once.1"], attempts["hang.3"]) == (2, 2)


def test_a_process_that_does_not_answer_is_killed(work, tiny):
    done, failed = account(
        run_shards(work, tiny, iter(shards_of("good", "stop-once", "good", "good")), ONE, stall_timeout=3)
    )
    assert failed == {}
    assert len(done) == 4
    assert work.attempts()["stop-once.1"] == 2
