"""One command writes into a run at a time: leases that are held, given back, stale, and lost."""

import json
import subprocess
import sys
import threading
import time

import fsspec
import pytest

from palindrome.pipeline.base import interrupt
from palindrome.pipeline.base.errors import ManifestError, RunError
from palindrome.pipeline.runs import lease
from palindrome.pipeline.storage.folder import Folder

ELSEWHERE = {"id": "x", "job": "encode", "host": "another", "boot": "b", "namespace": "n", "pid": 7, "started": "1"}


@pytest.fixture(params=["disk", "moto", "memory"])
def run(request, tmp_path):
    if request.param == "disk":
        yield Folder(str(tmp_path / "run"))
    elif request.param == "moto":
        store = request.getfixturevalue("moto")
        yield Folder(f"{store.bucket()}/run", store.options)
    else:
        yield Folder("memory://lease/run")
        fsspec.filesystem("memory").rm("/lease", recursive=True)


@pytest.fixture(autouse=True)
def released():
    yield
    lease.release_all()
    interrupt.set_pending(None)


def owner(run):
    return json.loads(run.read(lease.NAME))


def put(run, **changes):
    run.put(lease.NAME, json.dumps({**ELSEWHERE, **changes}).encode())


def test_an_object_is_put_where_there_is_none(run):
    assert run.put_new("a", b"first") and not run.put_new("a", b"second")
    assert run.read("a") == b"first"


def test_a_lease_is_held_and_given_back(run):
    lease.acquire(run, "encode")
    assert owner(run)["job"] == "encode"
    with pytest.raises(ManifestError, match=r"is being written by encode .*--take-over"):
        lease.acquire(run, "encode")
    lease.release_all()
    assert not run.exists(lease.NAME)
    lease.acquire(run, "sweep")
    assert owner(run)["job"] == "sweep"


def test_that_of_a_process_of_this_machine_that_has_ended_is_taken_at_once(run):
    code = "import json; from palindrome.pipeline.runs import lease; print(json.dumps(lease._this_process()))"
    ended = json.loads(subprocess.check_output([sys.executable, "-c", code]))
    put(run, **ended)
    lease.acquire(run, "encode")
    assert owner(run)["pid"] != ended["pid"]


def test_a_process_id_that_was_given_again_is_another_process(run):
    put(run, **{**lease._this_process(), "started": "0"})
    lease.acquire(run, "encode")
    assert owner(run)["id"] != "x"


def test_another_machine_s_is_taken_once_it_is_stale(run, monkeypatch, capsys):
    monkeypatch.setattr(lease, "STALE", 0.3)
    put(run)
    lease.acquire(run, "encode")
    assert owner(run)["id"] != "x"
    assert "process 7 on another" in capsys.readouterr().err


def test_another_machine_s_that_is_renewed_is_respected(run):
    put(run)
    respected = threading.Event()

    def renew():
        n = 0
        while not respected.wait(0.2):
            put(run, renewed=(n := n + 1))

    renewals = threading.Thread(target=renew)
    renewals.start()
    try:
        with pytest.raises(ManifestError, match="process 7 on another"):
            lease.acquire(run, "encode")
        assert owner(run)["id"] == "x"
    finally:
        respected.set()
        renewals.join()


def test_take_over_asks_nobody(run):
    put(run, **lease._this_process())
    lease.acquire(run, "encode", take_over=True)
    assert owner(run)["id"] != "x"


def test_who_has_lost_it_ends(run, monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL", 0.02)
    lease.acquire(run, "encode")
    before = owner(run)["renewed"]
    until(lambda: owner(run)["renewed"] != before)  # it is renewed
    interrupt.check()
    put(run)

    def lost():
        try:
            interrupt.check()
        except RunError as e:
            return "another command has taken" in str(e)
        put(run)  # a renewal was under way
        return False

    until(lost)
    lease.release_all()
    assert owner(run)["id"] == "x", "the other's stays"


def until(condition):
    while not condition():
        time.sleep(0.01)


def test_a_lease_that_can_t_be_read_is_one(run, monkeypatch):
    monkeypatch.setattr(lease, "STALE", 0.2)
    run.put(lease.NAME, b"{")
    lease.acquire(run, "encode")
    assert owner(run)["job"] == "encode"
