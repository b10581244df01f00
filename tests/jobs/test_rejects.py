"""The table of what a run could not use."""

import csv
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from palindrome.pipeline.images.records import REASONS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reasons(corpus, tmp_path_factory):
    """A folder of good and bad images, one with a hostile name; what the bad ones are: name -> reason."""
    folder = tmp_path_factory.mktemp("mixed")
    corpus.good_images(folder, 4)
    reasons = corpus.bad_images(folder)
    (folder / "a\x1b[2J,\n\"b'.png").touch()
    return folder, {**reasons, "a\x1b[2J,\n\"b'.png": "empty"}


@pytest.fixture(scope="module")
def run(palindrome, model, reasons, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--steps", 1, "--corrections", 0, "--shard-size", 16]
    assert palindrome("encode", "--images", reasons[0], "--model", model, "--out", run, *flags).code == 0
    return run


def test_the_table(palindrome, run, reasons):
    said = palindrome("rejects", run)
    assert said.code == 0
    head, *lines = said.out.splitlines()
    assert head.split() == ["image_id", "source", "reason", "detail"]
    assert len(lines) == len(reasons[1])
    assert "\x1b" not in said.out and r"a\x1b[2J,\n" in said.out
    counts = ", ".join(f"{n} {reason}" for reason, n in sorted(Counter(reasons[1].values()).items()))
    assert said.err == f"{len(reasons[1])} rejects: {counts}\n"


def test_json_is_exact(palindrome, run, reasons):
    out = palindrome("rejects", run, "--format", "json").out
    assert {row["image_id"]: row["reason"] for row in json.loads(out)} == reasons[1]
    assert out.isascii() and "\x1b" not in out


def test_csv(palindrome, run, reasons):
    said = palindrome("rejects", run, "--format", "csv", "--reason", "empty")
    rows = list(csv.DictReader(io.StringIO(said.out)))
    empty = sorted(name for name, reason in reasons[1].items() if reason == "empty")
    assert sorted(row["image_id"] for row in rows) == [
        name.replace("\x1b", "\\x1b").replace("\n", "\\n") for name in empty
    ]
    assert {row["reason"] for row in rows} == {"empty"}
    assert said.err == f"{len(empty)} rejects: {len(empty)} empty\n"


@pytest.mark.parametrize(("form", "out"), [("table", ""), ("csv", "image_id,source,reason,detail\n"), ("json", "[]\n")])
def test_none(palindrome, run, form, out):
    said = palindrome("rejects", run, "--reason", "too_large", "--format", form)
    if form == "table":
        assert said.code == 0 and "too_large" in said.out
    said = palindrome("rejects", run, "--reason", "null", "--format", form)
    assert (said.code, said.out, said.err) == (0, out, "0 rejects\n")


def test_an_unknown_reason_is_said_with_the_known_ones(palindrome, run):
    said = palindrome("rejects", run, "--reason", "ennui")
    assert said.code == 2
    assert said.err.endswith(f"--reason: must be one of {', '.join(REASONS)}; got 'ennui'\n")


def test_a_damaged_file_is_named(palindrome, run, tmp_path):
    path = next((run / "rejects").iterdir())
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-7])
        said = palindrome("rejects", run)
    finally:
        path.write_bytes(content)
    assert said.code == 1
    assert f"rejects/{path.name} can't be read: ArrowInvalid" in said.err


def test_a_reader_that_goes_away(run):
    """As `| head` does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "palindrome", "rejects", run], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""
