"""The inline executor against the contract of Ray's: an outcome for every shard, retries, and no thread left behind."""

import threading
from dataclasses import dataclass, field

import pytest
import torch

from palindrome.model.ladder import ladder
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.runs.outcome import Failure, Receipt
from palindrome.pipeline.runtime import executor
from palindrome.pipeline.runtime.executor import Inline
from palindrome.pipeline.runtime.scheduler import MAX_RETRIES, Heartbeat, Resources

ONE = Resources(workers=1, gpus=0, threads=1, decode_in_tasks=False)
LEVELS = ladder("linear", 4, 1000)


@dataclass
class Work:
    """Does what a shard's name says; `seen` lists the shards in the order of the attempts."""

    seen: list = field(default_factory=list)
    threads: set = field(default_factory=set)

    def process(self, model, shard):
        self.seen.append(shard.name)
        self.threads.add(threading.current_thread())
        if shard.name == "bad" or (shard.name == "once" and self.seen.count("once") == 1):
            raise ValueError("no good\never")
        while shard.name == "endless":
            model.decode(torch.zeros(1, 3, 16, 16), LEVELS)
            model.advance(1)
        return Receipt(shard.name, shard.images, 0, 0.0, 0.0, 0)


def outcomes(work, model, *names):
    shards = (Shard(name, "files", 2, ()) for name in names)
    return [o for o in Inline().run(work, model, shards, ONE) if not isinstance(o, Heartbeat)]


def test_every_shard_has_one_outcome_in_order(tiny):
    work = Work()
    found = outcomes(work, tiny, "a", "bad", "once", "b")
    assert [o.shard.name if isinstance(o, Failure) else o.shard for o in found] == ["a", "bad", "once", "b"]
    assert [isinstance(o, Failure) for o in found] == [False, True, False, False]
    assert found[1].error == "ValueError: no good ever"
    assert work.seen == ["a", *["bad"] * (MAX_RETRIES + 1), *["once"] * 2, "b"]


def test_no_shard_is_no_outcome(tiny):
    assert outcomes(Work(), tiny) == []


def test_closing_it_cancels_the_shard_in_flight_and_ends_its_thread(tiny, monkeypatch):
    monkeypatch.setattr(executor, "HEARTBEAT_SECONDS", 0.01)
    work = Work()
    running = Inline().run(work, tiny, iter([Shard("endless", "files", 1, ()), Shard("a", "files", 1, ())]), ONE)
    while not (beat := next(running)).images:
        assert isinstance(beat, Heartbeat)
    running.close()
    assert work.seen == ["endless"]
    assert not any(thread.is_alive() for thread in work.threads)


@pytest.mark.parametrize("workers", [(), (1,)])
def test_it_is_one_worker_that_decodes_without_tasks(workers):
    resources = Inline().choose_resources(workers, "auto", None, {})
    assert (resources.workers, resources.decode_in_tasks) == (1, False)


def test_a_call_runs_in_this_thread():
    assert Inline().call(ONE, threading.get_ident) == threading.get_ident()
