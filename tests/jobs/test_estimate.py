"""--dry-run and --calibrate: what is said, that it is so, and that nothing is left behind."""

import json
import re
from pathlib import Path

import pytest

from palindrome.jobs.command import JOBS
from palindrome.model.families import unet2d
from palindrome.pipeline.runtime import speed


@pytest.fixture(scope="module")
def encoded(palindrome, sample, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "run"
    flags = ["--limit", 24, "--shard-size", 8, "--steps", 4, "--corrections", 2]
    assert palindrome("encode", "--images", sample, "--model", model, "--out", out, *flags).code == 0
    return out


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


def said_cost(text):
    [found] = re.findall(
        r"([\d,]+) images in ([\d,]+) shards; at most ([\d.,]+) network evaluations an image, ([\d,]+) in all;"
        r" at most ([\d.]+) (\w+) to write",
        text,
    )
    images, shards, nfe, evaluations = (float(value.replace(",", "")) for value in found[:4])
    return images, shards, nfe, evaluations, float(found[4]) * {"bytes": 1, "kB": 1e3, "MB": 1e6}[found[5]]


@pytest.mark.parametrize(
    ("flags", "cost"),
    [
        ("encode --images SAMPLE --model MODEL --limit 100 --shard-size 16 --steps 5", (100, 7, 16, 1600, 307200)),
        (
            "encode --images SAMPLE --model MODEL --limit 9 --steps 5 --corrections 0 --measure --dtype float16",
            (9, 1, 10, 90, 13800),
        ),
        ("reconstruct --latents ENCODED --steps 2 4", (24, 3, 6, 144, 36900)),
        ("regenerate --latents ENCODED --steps 2 4 --eta 1 --variations 3", (24, 3, 18, 432, 111000)),
        ("generate --model MODEL --count 50 --steps 7 --latents float32", (50, 1, 7, 350, 192000)),
        ("interpolate --latents ENCODED --pairs random:5 --frames 4 --shard-size 8", (20, 3, 4, 80, 15400)),
        ("sweep --images SAMPLE --model MODEL --limit 10 --steps 3 5 --corrections 0 1", (40, 4, 8.5, 340, 0)),
    ],
)
def test_a_dry_run_counts_and_leaves_nothing(palindrome, sample, model, encoded, tmp_path, flags, cost):
    places = {"SAMPLE": sample, "MODEL": model, "ENCODED": encoded}
    words = [str(places.get(word, word)) for word in flags.split()]
    before = everything(encoded)
    said = palindrome(*words, "--out", tmp_path / "out", "--dry-run")
    assert said.code == 0 and said.out.endswith("dry run: nothing was done\n"), said.err
    assert said_cost(said.out) == pytest.approx(cost, rel=0.01)
    assert not list(tmp_path.iterdir()) and everything(encoded) == before


def test_of_a_run_that_is_there_it_counts_what_is_left(palindrome, pngs, model, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(20):
        (tmp_path / "images" / f"{i:02d}.png").write_bytes(pngs[i])
    command = ["encode", "--images", tmp_path / "images", "--model", model, "--out", tmp_path / "run"]
    command += ["--shard-size", 4, "--steps", 3, "--corrections", 0]
    assert palindrome(*command).code == 0
    before = everything(tmp_path / "run")
    said = palindrome(*command, "--dry-run")
    assert said.code == 0 and "nothing is left to do" in said.out
    (tmp_path / "images/new.png").write_bytes(pngs[30])
    said = palindrome(*command, "--dry-run")
    assert said.code == 0 and said_cost(said.out)[1:4] == (1, 3, 9)  # shards, of about so many images as the others
    said = palindrome(*command, "--steps", 4, "--dry-run")
    assert said.code == 2 and f"--out: {tmp_path}/run belongs to another command: --steps was 3, now 4" in said.err
    assert everything(tmp_path / "run") == before


def test_what_is_wrong_is_said_as_without_it(palindrome, sample, model, tmp_path):
    for words, flags in {
        "--images: ": ["--images", tmp_path / "nosuch", "--model", model],
        "--model: ": ["--images", sample, "--model", tmp_path / "nosuch"],
        "--steps: ": ["--images", sample, "--model", model, "--steps", 10**6],
    }.items():
        said = palindrome("encode", *flags, "--out", tmp_path / "out", "--dry-run")
        assert said.code == 2 and words in said.err and not (tmp_path / "out").exists()


@pytest.fixture
def briefly(monkeypatch):
    """A calibration that measures for a moment only: inline, it is this process that does."""
    monkeypatch.setattr(speed, "CALIBRATION_SECONDS", 0.2)


def test_a_calibration_says_how_far_off_it_was(briefly, palindrome, sample, model, tmp_path):
    command = ["encode", "--images", sample, "--model", model, "--out", tmp_path / "run", "--limit", 64, "--steps", 20]
    dry = palindrome(*command, "--dry-run", "--calibrate")
    measured = re.search(
        r"measured: ([\d,]+) network evaluations a second on a device, in float32; estimated: (\S+) dev",
        dry.out,
    )
    assert dry.code == 0 and measured and not (tmp_path / "run").exists()
    rate, hours = float(measured[1].replace(",", "")), float(measured[2])
    assert hours * 3600 == pytest.approx(64 * 61 / rate, rel=0.02)
    said = palindrome(*command, "--calibrate")
    assert said.code == 0 and re.search(r"estimated 0:00:\d\d, took 0:0\d:\d\d: [+-]\d+%", said.out)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["latents"] == 64
    assert "calibrate" not in json.loads((tmp_path / "run/run.json").read_text())["config"]


def test_a_recorded_calibration_estimates_without_a_device(briefly, palindrome, sample, model, tmp_path):
    record = tmp_path / "speeds.json"
    command = ["encode", "--images", sample, "--model", model, "--out", tmp_path / "run", "--steps", 20, "--dry-run"]
    said = palindrome(*command, "--limit", 64, "--calibrate", "--calibration", record)
    assert said.code == 0, said.err
    [[digest, found]] = json.loads(record.read_text()).items()
    assert digest == unet2d.load(str(model)).digest and found["precision"] == "float32"
    rate = found["evaluations_per_second"]
    for workers in (1, 4):
        flags = ["--shard-size", 32, "--calibration", record, "--workers", workers]
        again = palindrome(*command, *flags)
        assert again.code == 0 and again.out.endswith("dry run: nothing was done\n"), again.err
        hours = number(r"estimated: (\S+) device hours", again.out)
        assert hours * 3600 == pytest.approx(256 * 61 / rate, rel=0.02)
        assert f"measured at {found['measured']}: " in again.out and f"with {workers} worker" in again.out
    assert list(tmp_path.iterdir()) == [record]
    ran = palindrome(*command[:-1], "--limit", 64, "--calibration", record)
    assert ran.code == 0 and re.search(r"estimated 0:00:\d\d, took 0:0\d:\d\d: [+-]\d+%", ran.out)


def test_a_record_that_tells_nothing_is_named(palindrome, sample, model, tmp_path):
    command = ["encode", "--images", sample, "--model", model, "--out", tmp_path / "run", "--dry-run", "--calibration"]
    other = tmp_path / "other.json"
    for content, words in (("{}", "no measurement of this model"), ("[1]", "is not a calibration file")):
        other.write_text(content)
        said = palindrome(*command, other)
        assert said.code == 2 and "--calibration: " in said.err and words in said.err
    said = palindrome(*command, tmp_path / "none.json")
    assert said.code == 2 and "--calibration: " in said.err and "does not exist" in said.err


def number(pattern, text):
    [found] = re.findall(pattern, text)
    return float(found.replace(",", ""))


def bytes_of(amount):
    value, unit = amount.split()
    return float(value.replace(",", "")) * {"bytes": 1, "kB": 1e3, "MB": 1e6}[unit]


def test_a_dry_run_of_a_training_looks_at_images(palindrome, pngs, tmp_path):
    (tmp_path / "images").mkdir()
    command = ["train", "--images", tmp_path / "images", "--preset", "tiny", "--out", tmp_path / "run", "--dry-run"]
    (tmp_path / "images/0.png").write_text("no picture")
    said = palindrome(*command)
    assert said.code == 2
    assert "--images: none of the first 1 can be decoded: " in said.err and "0.png is " in said.err
    (tmp_path / "images/1.png").write_bytes(pngs[0])
    said = palindrome(*command)
    assert said.code == 0 and "1 of the first 2 images can be decoded; " in said.out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_a_calibration_counts_its_evaluations(palindrome, sample, model, tmp_path):
    out = tmp_path / "ladders/three.json"
    command = ["calibrate", "--images", sample, "--model", model, "--steps", 3, "--limit", 5, "--corrections", 1]
    dry = palindrome(*command, "--out", out, "--dry-run")
    assert dry.code == 0 and dry.out.endswith("dry run: nothing was done\n"), dry.err
    assert not list(tmp_path.iterdir())
    levels, each = number(r"fitted on ([\d,]+) levels", dry.out), number(r"([\d,]+) network evaluations an", dry.out)
    assert palindrome(*command, "--out", out).code == 0
    found = json.loads(out.read_text())
    assert each == levels + len(found["round_trip"]) * sum(found["nfe"])
    assert number(r"([\d,]+) in all", dry.out) == found["images"] * each == 5 * each
    before = everything(tmp_path)
    assert palindrome(*command, "--out", out, "--dry-run").code == 0
    (tmp_path / "folder.json").mkdir()
    for place, words in {
        tmp_path / "folder.json": f"--out: {tmp_path}/folder.json is a folder",
        out / "x.json": f"--out: {out} can't be written to",
        tmp_path / "none": "does not end in .json",
    }.items():
        said = palindrome(*command, "--out", place, "--dry-run")
        assert said.code == 2 and words in said.err
    assert everything(tmp_path).items() >= before.items()


def test_dry_runs_of_what_writes_files(palindrome, encoded, tmp_path):
    names = ["--pairs", "random:3", "--frames", 4, "--shard-size", 8]
    assert palindrome("interpolate", "--latents", encoded, "--out", tmp_path / "between", *names).code == 0
    for job, form, counted in (("export", "png", 12), ("animate", "gif", 3)):
        out = tmp_path / form
        command = [job, tmp_path / "between", "--format", form, "--out", out]
        said = palindrome(*command, "--dry-run")
        assert said.code == 0 and said.out.endswith("dry run: nothing was done\n") and not out.exists()
        whole = (r"about ([\d,]+) images", r"3 paths, ([\d,]+) to write")[job == "animate"]
        assert number(whole, said.out) == counted
        assert palindrome(*command).code == 0
        files = {path: path.stat().st_size for path in out.rglob(f"*.{form}")}
        assert len(files) == counted
        if job == "export":
            stored = re.search(r"; about ([\d.]+ \w+) to write", said.out)[1]
            # Tiny pictures: the heads of Parquet's pages weigh something beside them.
            assert bytes_of(stored) == pytest.approx(sum(files.values()), rel=0.5)
        before = everything(out)
        said = palindrome(*command, "--dry-run")
        assert said.code == 0 and number(whole, said.out) == 0 and everything(out) == before


def test_every_job_that_writes_has_it(palindrome):
    without = {job for job in JOBS if "--dry-run" not in palindrome(job, "--help").out}
    assert without == {"status", "verify", "rejects", "submit", "jobs", "logs", "stop"}
