"""What is said of run folders made by hand, and the pace of commits."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest

from palindrome.pipeline.base.errors import RunError
from palindrome.pipeline.base.text import duration, printable
from palindrome.pipeline.images.records import Image, Reject
from palindrome.pipeline.runs import status as state
from palindrome.pipeline.runs.entries import entries
from palindrome.pipeline.runs.kinds import (
    FEATURES,
    IMAGES,
    KINDS,
    LATENTS,
    RECONSTRUCTIONS,
    SCORES,
    SHARDED,
    SWEPT,
)
from palindrome.pipeline.runs.manifest import open_run
from palindrome.pipeline.runs.schemas import latent_schema
from palindrome.pipeline.runs.shards import latent_rows, latent_writer, rejects
from palindrome.pipeline.runs.status import StateReader, as_json, describe, pace
from palindrome.pipeline.storage.folder import Folder

NOW = 1_000_000.0
SCHEMA = latent_schema((3, 2, 2), "float32")


def commit(run, shard, images=4, refused=1, seconds=1.5, reason="empty"):
    rows = [Image(f"{shard}-{i}", "s", 3, 3, "0" * 64, {}, None) for i in range(images)]
    with latent_writer(run, shard, SCHEMA, {"model_digest": "x", "levels": [-1, 5]}) as out:
        latents = np.zeros((images, 3, 2, 2), np.float32)
        out.add(latent_rows(SCHEMA, rows, latents, {}), [Reject(f"{shard}-bad", "s", reason, "d")] * refused)
        out.commit({"seconds": seconds, "device_seconds": 1.0})


def name(i):
    return hashlib.sha256(str(i).encode()).hexdigest()[:24]


def folder(uri, shards, images, job="encode", **more):
    run = Folder(str(uri))
    run.put("plan/complete.json", json.dumps({"shards": shards, "images": images, "files": 1}).encode())
    run.put("run.json", json.dumps({"job": job, "config": {}, "collection": {"uri": "s3://b/x"}, **more}).encode())
    return run


def read(run, now=None, **options):
    return StateReader(*open_run(run.uri, *SHARDED), **options).read(now)


def committed_at(run, when):
    """Sets when the shards were committed, by name."""
    for shard, at in when.items():
        os.utime(run.path(f"latents/{shard}.parquet"), (at, at))


@pytest.fixture
def run(tmp_path):
    """5 of 8 shards, one every 10 s, the last one 5 s ago, each of 4 latents and 1 reject."""
    run = folder(tmp_path / "run", 8, 40)
    for i in range(5):
        commit(run, name(i), seconds=10 + i, reason="null" if i == 0 else "empty")
    committed_at(run, {name(i): NOW - 5 - 10 * (4 - i) for i in range(5)})
    return run


def test_the_folders_are_those_that_the_jobs_write():
    images = dict.fromkeys(("generate", "restore", "regenerate", "edit", "interpolate"), IMAGES)
    others = {"encode": LATENTS, "reconstruct": RECONSTRUCTIONS, "sweep": SWEPT, "score": SCORES, "evaluate": FEATURES}
    assert {**others, **images} == {name: KINDS[name].folder for name in SHARDED}


def test_a_run_under_way(run):
    found = read(run, NOW)
    assert (found.shards, found.shards_total, found.images_total, found.complete) == (5, 8, 40, False)
    assert (found.latents, found.rejects, found.rejects_by_reason) == (20, 5, {"empty": 4, "null": 1})
    assert found.exact and not found.standing_still
    assert found.images_per_second == pytest.approx(4 * 5 / 45)
    assert found.eta_seconds == pytest.approx(3 * 45 / 4)
    assert found.idle_seconds == pytest.approx(5)
    assert found.slowest[0] == {"shard": name(4), "seconds": 14.0}
    files = [p for below in ("latents", "rejects") for p in Path(run.path(below)).iterdir()]
    assert found.bytes == sum(p.stat().st_size for p in files)
    text = describe(found)
    assert text[:2] == ["encode of s3://b/x", f"5 of 8 shards (62.5%) done, {state.size(found.bytes)} written"]
    assert text[2:4] == ["20 latents, 5 rejects (4 empty, 1 null)", "0.4 images/s, ETA 0:00:34"]


def test_one_that_stands_still_promises_nothing(run):
    found = read(run, NOW + 3600)
    assert found.standing_still
    assert (found.images_per_second, found.eta_seconds) == (None, None)
    assert "stalled: the last shard was committed 1:00:05 ago" in describe(found)


def test_a_clock_that_is_behind_the_store_s(run):
    assert read(run, NOW - 1000).idle_seconds == 0


def test_a_plan_that_is_not_there_yet(run):
    run.remove("plan/complete.json")
    for file in (*Path(run.path("latents")).iterdir(), *Path(run.path("rejects")).iterdir()):
        file.unlink()
    found = read(run, NOW)
    assert (found.shards, found.shards_total, found.latents, found.complete) == (0, None, 0, False)
    assert "no estimate yet" in describe(found)


def test_temporary_files_and_folders_are_no_shards(run):
    run.fs.touch(run.path("latents/.tmp-abc"))
    Path(run.path("latents/x.parquet")).mkdir()
    assert read(run, NOW).shards == 5


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-9], lambda b: b"no Parquet", lambda b: b"PAR1" * 9])
def test_a_damaged_footer_is_named(run, damage):
    path = Path(run.path(f"latents/{name(2)}.parquet"))
    path.write_bytes(damage(path.read_bytes()))
    found = read(run, NOW)
    assert (found.shards, found.latents, found.exact, found.unreadable) == (5, 20, False, [name(2)])
    assert f"1 shards can't be read: {name(2)}" in describe(found)


def test_a_rejects_file_that_is_gone_is_verify_s_matter(run):
    run.remove(f"rejects/{name(2)}.parquet")
    assert read(run, NOW).rejects == 4


def test_rejects_of_a_shard_that_is_not_committed_do_not_count(run):
    run.remove(f"latents/{name(2)}.parquet")
    assert read(run, NOW).rejects == 4
    found = [row["image_id"] for row in rejects(*open_run(run.uri, "encode"))]
    assert sorted(found) == sorted(f"{name(i)}-bad" for i in (0, 1, 3, 4))


def test_a_summary_of_all_shards_spares_their_footers(run):
    run.put("summary.json", json.dumps({"shards": 5, "latents": 7, "rejects": 9, "rejects_by_reason": {}}).encode())
    assert (read(run, NOW, max_footers=2).latents, read(run, NOW, max_footers=2).exact) == (7, True)
    os.utime(run.path("summary.json"), (NOW - 6, NOW - 6))  # before the last shard
    assert (read(run, NOW, max_footers=2).latents, read(run, NOW, max_footers=2).exact) == (20, False)


def test_shards_that_failed_and_are_not_done_since(run):
    failed = [{"shard": s, "images": 5, "error": "OSError: \x1b[31mdisk\nfull"} for s in (name(1), name(6))]
    run.put("summary.json", json.dumps({"failed_shards": failed}).encode())
    found = read(run, NOW)
    assert [s["shard"] for s in found.failed_shards] == [name(6)]
    assert describe(found)[-1] == f"failed: shard {name(6)}: OSError: \\x1b[31mdisk\\nfull"


def test_one_who_watches_reads_a_footer_once(run, monkeypatch):
    reader = StateReader(*open_run(run.uri, "encode"))
    first = reader.read(NOW)
    asked = []
    found = state.shard_metadata
    monkeypatch.setattr(state, "shard_metadata", lambda *args: asked.append(args[1]) or found(*args))
    assert reader.read(NOW) == first and not asked
    commit(run, name(5))
    assert reader.read(NOW).latents == 24 and asked == [name(5)]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """20,000 of 25,000 shards: copies of one file, one in four with a rejects file."""
    run = folder(tmp_path_factory.mktemp("large"), 25_000, 125_000)
    commit(run, "with")
    commit(run, "without", images=5, refused=0)
    for i in range(20_000):
        kind = "without" if i % 4 else "with"
        shutil.copyfile(run.path(f"latents/{kind}.parquet"), run.path(f"latents/{name(i)}.parquet"))
        if kind == "with":
            shutil.copyfile(run.path("rejects/with.parquet"), run.path(f"rejects/{name(i)}.parquet"))
    for file in ("latents/with", "latents/without", "rejects/with"):
        run.remove(f"{file}.parquet")
    return run


def test_of_many_shards_a_sample_is_read(large, monkeypatch):
    asked = []
    found = state.shard_metadata
    monkeypatch.setattr(state, "shard_metadata", lambda *args: asked.append(args[1]) or found(*args))
    seen = read(large)
    assert len(asked) <= state.MAX_FOOTERS + state.NEWEST
    assert (seen.shards, seen.shards_total, seen.exact) == (20_000, 25_000, False)
    assert seen.rejects == pytest.approx(5_000, rel=0.1)
    assert seen.latents + seen.rejects == pytest.approx(100_000, abs=2)
    assert "about" in describe(seen)[2]


def test_every_reject_of_many_shards_is_listed(large):
    assert sum(1 for _ in rejects(*open_run(large.uri, "encode"))) == 5_000


def test_a_store_without_a_disk():
    """fsspec's memory:// says when an object was created, as S3 does."""
    run = folder(f"memory://{uuid.uuid4().hex}/run", 2, 10)
    for i in range(2):
        commit(run, name(i))
    assert {(e.shard, e.is_file) for e in entries(run, "latents")} == {(name(0), True), (name(1), True)}
    assert all(e.size and e.modified for e in entries(run, "latents"))
    found = read(run)
    assert (found.complete, found.latents, found.rejects, found.exact) == (True, 8, 2, True)
    assert "complete" in describe(found)


def test_a_store_that_says_no_times(run, monkeypatch):
    fs = fsspec.filesystem("memory")
    copy = f"memory://{uuid.uuid4().hex}/run"
    fs.put(run.path(), copy, recursive=True)
    ls = fs.ls
    bare = ("name", "size", "type")
    monkeypatch.setattr(type(fs), "ls", lambda self, *a, **k: [{n: i[n] for n in bare} for i in ls(*a, **k)])
    found = read(Folder(copy))
    assert (found.shards, found.latents, found.images_per_second, found.idle_seconds) == (5, 20, None, None)
    assert "no estimate yet" in describe(found)


def test_a_sweep_has_no_total_until_it_is_through(tmp_path):
    run = folder(tmp_path, 2, 10, job="sweep")
    for i in range(2):
        for setting in ("a" * 12, "b" * 12)[: 2 - i]:
            commit(run, "shard")
            os.makedirs(tmp_path / "sweep", exist_ok=True)
            (tmp_path / "latents/shard.parquet").rename(tmp_path / f"sweep/{name(i)}-{setting}.parquet")
            (tmp_path / "rejects/shard.parquet").rename(tmp_path / f"rejects/{name(i)}-{setting}.parquet")
    found = read(run)
    assert (found.shards, found.shards_total, found.settings, found.complete) == (3, None, 2, False)
    assert found.rejects == 2, "of each shard once"
    assert len(list(rejects(*open_run(run.uri, "sweep")))) == 2
    run.put("summary.json", json.dumps({"images": 10, "settings": [], "failed_shards": []}).encode())
    assert read(run).complete


def test_a_reconstruction_whose_latents_are_out_of_reach(tmp_path):
    run = folder(tmp_path, 2, 10, job="reconstruct", config={"latents": "nosuch://x"})
    found = read(run)
    assert (found.collection, found.shards_total, found.complete) == ("nosuch://x", None, False)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not a run folder (it has no run.json)"),
        ("{", "is not JSON"),
        ("[]", "is not a run's"),
        ('{"job": "train", "config": {}}', "is a run of train, not of encode or sweep"),
    ],
)
def test_what_is_no_run_is_said(tmp_path, content, words):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError) as e:
        open_run(str(tmp_path), "encode", "sweep")
    assert words in str(e.value) and str(tmp_path) in str(e.value)


def every(seconds, count, last=NOW):
    return [last - seconds * i for i in reversed(range(count))]


@pytest.mark.parametrize(
    ("times", "longest", "rate", "still"),
    [
        ([], 0, None, False),
        ([NOW - 5], 10, None, False),  # of one, nothing can be said
        (every(10, 100), 20, 0.1, False),
        ([*every(10, 50, NOW - 86400), *every(10, 10)], 20, 0.1, False),  # a night's pause lies before
        (every(1, 600, NOW - 300), 5, None, True),
        (every(10, 20, NOW - 55), 10, 4 / 95, False),  # slower than it was
        ([NOW - 1 + i / 64 for i in range(64)], 600, None, False),  # 64 workers' first shards, all at once
        ([*[NOW - 1205] * 64, *[NOW - 605] * 64, *[NOW - 5] * 64], 600, 191 / 1205, False),
        (every(600, 3, NOW - 1000), 600, 2 / 2200, False),  # a shard takes so long
    ],
)
def test_the_pace(times, longest, rate, still):
    found = pace(times, NOW, longest)
    assert found == (rate if rate is None else pytest.approx(rate, rel=0.05), still)


def test_what_would_move_the_cursor_is_escaped():
    assert printable("a\x1b[2J\r\nb\x00\x7f\x9b\u202e\ud800") == "a\\x1b[2J\\r\\nb\\x00\\x7f\\x9b\\u202e\\ud800"
    assert printable("Hündchen 子犬 – 🐶") == "Hündchen 子犬 – 🐶"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (3725.4, "1:02:05"), (90061, "1 d 1:01:01")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_json_is_an_object_in_one_line(run):
    line = as_json(read(run, NOW))
    assert "\n" not in line
    assert json.loads(line)["slowest"][0]["shard"] == name(4)


def test_neither_torch_nor_ray_is_loaded():
    code = "import sys, jobs.status, jobs.rejects, jobs.verify; print({'torch', 'ray'} & sys.modules.keys())"
    root = Path(__file__).parents[3]
    said = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert said.stdout == "set()\n"
