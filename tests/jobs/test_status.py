"""status of real runs, whole and cut short."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from palindrome.jobs import status

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(palindrome, model, pictures, tmp_path_factory):
    """24 pictures in 6 shards."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    flags = ["--steps", 2, "--corrections", 0, "--shard-size", 4]
    assert palindrome("encode", "--images", pictures, "--model", model, "--out", run, *flags).code == 0
    return run


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def test_a_whole_run(palindrome, run, pictures):
    said = palindrome("status", run)
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0] == f"encode of {pictures}"
    assert lines[1].startswith("6 of 6 shards (100.0%) done, ")
    assert lines[2:4] == ["24 latents, 0 rejects", "complete"]


def test_a_run_that_is_cut_short(palindrome, run):
    for path in sorted((run / "latents").iterdir())[:2]:
        path.unlink()
    found = json.loads(palindrome("status", run, "--json").out)
    assert (found["shards"], found["shards_total"], found["latents"], found["complete"]) == (4, 6, 16, False)
    assert found["rejects_by_reason"] == {} and found["exact"]
    assert "complete" not in palindrome("status", run).out


def test_images_that_are_rejected(palindrome, model, corpus, tmp_path):
    corpus.good_images(tmp_path / "in", 6)
    for i in range(3):
        (tmp_path / f"in/empty-{i}.png").touch()
    command = ["encode", "--images", tmp_path / "in", "--model", model, "--out", tmp_path / "run", "--steps", 2]
    assert palindrome(*command, "--corrections", 0).code == 0
    assert "6 latents, 3 rejects (3 empty)" in palindrome("status", tmp_path / "run").out


def test_watching_ends_when_the_run_is_complete(palindrome, run, monkeypatch):
    monkeypatch.setattr(status, "EVERY", 0.1)
    held = sorted((run / "latents").iterdir())[0]
    aside = held.rename(run / "aside")
    looks, read = [], status.StateReader.read

    def look(reader):
        looks.append(reader)
        if len(looks) == 3:
            aside.rename(held)
        return read(reader)

    monkeypatch.setattr(status.StateReader, "read", look)
    said = palindrome("status", run, "--watch", "--json")
    assert said.code == 0
    assert [json.loads(line)["complete"] for line in said.out.splitlines()] == [False, False, True]


def test_on_a_terminal_it_is_redrawn_in_place_until_ctrl_c(run):
    sorted((run / "latents").iterdir())[0].unlink()
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "palindrome", "status", run, "--watch"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    out = b""
    until = time.monotonic() + 60
    while b"\x1b[5F" not in out and time.monotonic() < until:
        out += os.read(ours, 4096)
    process.send_signal(2)
    assert process.wait(30) == 130
    os.close(ours)
    assert out.count(b"5 of 6 shards") >= 1 and b"\x1b[5F" in out and b"Traceback" not in out


def test_a_reconstruction_and_a_sweep(palindrome, run, model, pictures, tmp_path):
    out = tmp_path / "reconstruction"
    assert palindrome("reconstruct", "--latents", run, "--out", out).code == 0
    found = json.loads(palindrome("status", out, "--json").out)
    assert (found["job"], found["collection"]) == ("reconstruct", str(run))
    assert (found["shards"], found["shards_total"], found["complete"]) == (6, 6, True)
    next((out / "reconstructions").iterdir()).unlink()
    assert not json.loads(palindrome("status", out, "--json").out)["complete"]

    out = tmp_path / "sweep"
    flags = ["--steps", 1, 2, "--corrections", 0, "--shard-size", 12]
    assert palindrome("sweep", "--images", pictures, "--model", model, "--out", out, *flags).code == 0
    found = json.loads(palindrome("status", out, "--json").out)
    assert (found["shards"], found["settings"], found["complete"]) == (4, 2, True)
    assert "with 2 settings" in palindrome("status", out).out


def test_what_is_no_run(palindrome, model, tmp_path):
    for place, words in {
        tmp_path / "none": "does not exist",
        model: r"is not a run folder \(it has no run.json\)",
    }.items():
        said = palindrome("status", place)
        assert (said.code, said.out) == (1, "")
        assert re.fullmatch(f"palindrome status: {place} {words}\n", said.err)
