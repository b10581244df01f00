"""--log and $PALINDROME_LOG: the lines of real runs, on pipes and on a terminal."""

import json
import os
import pty
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from palindrome.pipeline.base.log import KEYS

ROOT = Path(__file__).parents[2]


def records(text):
    """The objects, one a line."""
    found = [json.loads(line) for line in text.splitlines()]
    assert all(record.keys() >= KEYS for record in found)
    assert all(datetime.fromisoformat(record["time"]).tzinfo == UTC for record in found)
    return found


@pytest.fixture(scope="module")
def images(pngs, tmp_path_factory):
    """A folder of 20 pictures and a file that is none."""
    folder = tmp_path_factory.mktemp("images")
    for i, png in enumerate(pngs[:20]):
        (folder / f"{i:02d}.png").write_bytes(png)
    (folder / "none.png").write_text("no picture")
    return folder


def encode(images, model, out, *flags):
    places = ["--images", images, "--model", model, "--out", out]
    return ["encode", *places, "--shard-size", 4, "--steps", 3, "--measure", *flags]


def test_a_run_s_lines_are_objects_with_numbers(start, ray_here, images, model, tmp_path):
    process = start(*encode(images, model, tmp_path / "run", "--address", ray_here), PALINDROME_LOG="auto")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    lines = records(out)
    assert {record["level"] for record in lines} == {"info"}
    [first, *_] = lines
    assert (first["event"], first["message"]) == ("message", "21 images in 6 shards, 6 to encode")
    *_, progress = (record for record in lines if record["event"] == "progress")
    assert progress["images_per_second"] > 0 and progress["eta_seconds"] is None
    told = {"job": "encode", "shards_done": 6, "shards": 6, "images": 20, "rejects": 1, "failed_shards": 0}
    assert told.items() <= progress.items()
    end, summary = lines[-1], json.loads((tmp_path / "run/summary.json").read_text())
    assert (end["event"], end["job"], end["exit_code"], end["failed_shards"]) == ("end", "encode", 0, 0)
    assert 0 < end["seconds"] < 300
    assert (end["summary"]["latents"], end["summary"]["rejects_by_reason"]) == (20, summary["rejects_by_reason"])
    assert end["summary"]["round_trip"]["mean"] == summary["round_trip"]["mean"]
    assert "worst" not in end["summary"]["round_trip"], "no lists of images"


def test_a_failed_shard_is_named_and_no_setting_has_changed(palindrome, images, model, tmp_path):
    run = encode(images, model, tmp_path / "run")
    assert palindrome(*run).code == 0
    assert palindrome(*run, "--log", "json").code == 0, "the same run"
    files = (tmp_path / "run/latents").iterdir()
    file = min(file for file in files if pq.read_metadata(file).num_rows == 4)  # one is of the reject alone
    table = pq.read_table(file)
    about = json.loads(table.schema.metadata[b"palindrome"]) | {"levels": [-1, 5, 800]}
    pq.write_table(table.replace_schema_metadata({"palindrome": json.dumps(about)}), file)
    said = palindrome("reconstruct", "--latents", tmp_path / "run", "--out", tmp_path / "back", "--log", "json")
    failed, left = records(said.err)
    assert (said.code, failed["event"], failed["level"], failed["shard"]) == (1, "shard_failed", "error", file.stem)
    assert "on the ladder [-1, 5, 800]" in failed["error"]
    assert (left["level"], left["message"]) == ("warning", "1 shards failed; repeat the command to retry them")
    end = records(said.out)[-1]
    assert (end["level"], end["exit_code"], end["failed_shards"]) == ("error", 1, 1)
    assert [row["count"] for row in end["summary"]["by_steps"]] == [16]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", 0], "palindrome encode: error: --steps: 0 is out of range"),  # found while the command is parsed
        (["--nosuch"], "palindrome: error: unrecognized arguments: --nosuch"),
        (["--images", "nosuch"], "palindrome encode: error: --images: "),
    ],
)
def test_what_is_wrong_is_an_object_too(palindrome, images, model, tmp_path, flags, words):
    said = palindrome(*encode(images, model, tmp_path / "run", "--log=json"), *flags)
    [error], [end] = records(said.err), records(said.out)
    assert (said.code, error["level"], error["event"], end["exit_code"]) == (2, "error", "error", 2)
    assert error["message"].startswith(words)


def test_people_get_text(start, palindrome, images, model, tmp_path, monkeypatch):
    run = encode(images, model, tmp_path / "run")
    monkeypatch.delenv("PALINDROME_LOG", raising=False)
    assert palindrome(*run).out.startswith("21 images in 6 shards")
    monkeypatch.setenv("PALINDROME_LOG", "json")
    assert palindrome(*run, "--log", "text").out.startswith("21 images in 6 shards")
    assert palindrome("status", tmp_path / "run").out.startswith("encode of "), "an answer is no log"
    assert palindrome("encode", "--help").out.startswith("usage: ")
    monkeypatch.setenv("PALINDROME_LOG", "xml")
    said = palindrome(*run)
    assert said.code == 2 and said.err == (
        "palindrome encode: error: $PALINDROME_LOG: must be one of auto, text, json; got 'xml'\n"
    )
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "palindrome", *map(str, run), "--dry-run"]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PALINDROME_LOG": "auto"}, stdout=theirs)
    os.close(theirs)
    shown = b""
    while part := _read(ours):
        shown += part
    assert process.wait() == 0 and shown.startswith(b"21 images in 6 shards")


def _read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed
        return b""
