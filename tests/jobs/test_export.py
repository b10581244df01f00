"""The images of a run as files that others read."""

import io
import json
import re
import shutil
import signal
import tarfile
import time
import uuid
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from palindrome.pipeline.images.pixels import png
from palindrome.pipeline.runs.schemas import ERROR_SCHEMA
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.export import name_of

STEPS = (3, 2)
NAMES = [
    "1.png",
    "2.png",
    "A.png",
    "a.png",
    "cats/1.jpg",
    "cats/1.png",
    "cats/con.png",
    "cats/a\\b.png",
    "cats/x\n.png",
]
NAMES += ["dogs/été.png", "dogs/" + "long" * 60 + ".png", "dogs/-rf~.png"]
HOSTILE = [
    "../../escaped",
    "/escaped",
    "a/../../../escaped",
    "..",
    ".",
    "",
    "a\0b",
    "\\\\host\\share",
    "a",
    "a/b",
    "a.png/b",
]
HOSTILE += [
    "A",
    "~root/x",
    "x" * 3000,
    "d/" * 1500,
    "metadata.parquet/x",
    "\x1b[2J\n",
    "C:\\x",
    "file:///escaped",
    "::memory",
]
WEBDATASET = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # as webdataset splits a member's name: key, extension


@pytest.fixture(scope="module")
def run(palindrome, pngs, model, tmp_path_factory):
    """A run of reconstruct: 12 images in 3 shards, under two numbers of steps."""
    folder = tmp_path_factory.mktemp("run")
    for name, content in zip(NAMES, pngs, strict=False):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(content)
    flags = ["--steps", 3, "--shard-size", 4, "--corrections", 0]
    said = palindrome("encode", "--images", folder / "images", "--model", model, "--out", folder / "encoded", *flags)
    assert said.code == 0, said.err
    said = palindrome("reconstruct", "--latents", folder / "encoded", "--out", folder / "back", "--steps", *STEPS)
    assert said.code == 0, said.err
    return folder / "back"


@pytest.fixture(scope="module")
def rows(run):
    """All its rows."""
    found = [row for file in sorted((run / "reconstructions").iterdir()) for row in pq.read_table(file).to_pylist()]
    assert {(row["image_id"], row["steps"]) for row in found} == {(name, steps) for name in NAMES for steps in STEPS}
    return found


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run, to be spoilt."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture
def made(tmp_path):
    """made(ids): a run of reconstruct that holds pictures of these ids, as if another program had made it."""

    def made(ids, shard="one"):
        run = tmp_path / "made"
        (run / "reconstructions").mkdir(parents=True, exist_ok=True)
        manifest = {"job": "reconstruct", "config": {}, "model_digest": "0", "ladders": [[-1, 5]]}
        (run / "run.json").write_text(json.dumps(manifest))
        pictures = [{"bytes": png(np.full((2, 2, 3), i % 256, np.uint8)), "path": None} for i in range(len(ids))]
        found = [{"image_id": i, "steps": 1, "image": picture} for i, picture in zip(ids, pictures, strict=True)]
        pq.write_table(pa.Table.from_pylist(found, ERROR_SCHEMA), run / f"reconstructions/{shard}.parquet")
        return run

    return made


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def spoil(run, change, at=5):
    """Changes the bytes of one image; returns the shard, the id and what undoes it."""
    path = sorted((run / "reconstructions").iterdir())[1]
    before, table = path.read_bytes(), pq.read_table(path)
    found = table.to_pylist()
    found[at]["image"] = change(found[at]["image"])
    pq.write_table(pa.Table.from_pylist(found, table.schema), path)
    return path.stem, found[at]["image_id"], lambda: path.write_bytes(before)


def test_png_is_the_run_s_own_bytes_under_the_ids_names(palindrome, run, rows, tmp_path):
    out = tmp_path / "out"
    said = palindrome("export", run, "--out", out, "--format", "png")
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines()[0] == "3 shards of images, 3 to export"
    assert "export: 3/3 shards, 24 images" in said.out
    expected = {f"steps-{row['steps']}/{name_of(row['image_id'])}.png": row["image"]["bytes"] for row in rows}
    found = files(out / "images")
    index = pq.read_table(out / "images/metadata.parquet").to_pylist()
    assert found.pop("metadata.parquet") and found == expected
    assert {"steps-3/cats/1.png.png", "steps-2/cats/1.jpg.png", "steps-2/A.png~8.png"} < found.keys()
    known = {row["file_name"]: row for row in index}
    assert known.keys() == found.keys() and len(index) == len(found)
    for row in rows:
        about = known[f"steps-{row['steps']}/{name_of(row['image_id'])}.png"]
        assert {name: about[name] for name in row if name != "image"} == {k: v for k, v in row.items() if k != "image"}


def test_one_number_of_steps(palindrome, run, rows, tmp_path):
    out = tmp_path / "out"
    said = palindrome("export", run, "--out", out, "--format", "png", "--steps", 2)
    assert (said.code, said.err) == (0, "")
    found = files(out / "images")
    del found["metadata.parquet"]
    assert found == {f"{name_of(r['image_id'])}.png": r["image"]["bytes"] for r in rows if r["steps"] == 2}
    said = palindrome("export", run, "--out", tmp_path / "other", "--format", "png", "--steps", 4)
    assert said.code == 2
    assert said.err == f"palindrome export: error: --steps: {run} holds images of 3 and 2 steps\n"
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("form", "end", "kind"), [("webp", ".webp", "WEBP"), ("jpeg", ".jpg", "JPEG")])
def test_other_picture_files(palindrome, run, rows, tmp_path, form, end, kind):
    sizes = []
    for flags in ([], ["--quality", 20]):
        out = tmp_path / f"out{len(flags)}"
        assert palindrome("export", run, "--out", out, "--format", form, "--steps", 3, *flags).code == 0
        sizes.append(0)
        for row in (row for row in rows if row["steps"] == 3):
            content = (out / "images" / (name_of(row["image_id"]) + end)).read_bytes()
            sizes[-1] += len(content)
            picture, truth = Image.open(io.BytesIO(content)), Image.open(io.BytesIO(row["image"]["bytes"]))
            assert picture.format == kind
            if form == "webp" and not flags:
                np.testing.assert_array_equal(np.asarray(picture), np.asarray(truth))
            assert picture.size == truth.size
    assert sizes[1] < sizes[0]


def test_webdataset(palindrome, run, rows, tmp_path):
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        said = palindrome("export", run, "--out", out, "--format", "webdataset")
        assert (said.code, said.err) == (0, "")
    assert files(outs[0] / "data") == files(outs[1] / "data"), "the same bytes in every export"
    index = {row["file_name"]: row for row in pq.read_table(outs[0] / "index.parquet").to_pylist()}
    by_id = {(row["image_id"], row["steps"]): row for row in rows}
    for path in (outs[0] / "data").iterdir():
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert {(m.mtime, m.uid, m.gid, m.uname, m.isfile()) for m in members} == {(0, 0, 0, "", True)}
            for image, about in zip(members[::2], members[1::2], strict=True):
                (key, kind), (same, other) = (WEBDATASET.fullmatch(m.name).groups() for m in (image, about))
                assert (key, kind, other) == (same, "png", "json")
                told = json.load(tar.extractfile(about), parse_constant=pytest.fail)
                row = by_id.pop((told["image_id"], told["steps"]))
                assert tar.extractfile(image).read() == row["image"]["bytes"]
                assert told == {k: v for k, v in row.items() if k != "image"}
                assert index[image.name]["image_id"] == told["image_id"] and index[image.name]["shard"] == path.stem
    assert not by_id
    assert len(index) == len(rows)


def test_infinity_is_null_in_json(palindrome, made, tmp_path):
    """Which is the PSNR of what comes back the same."""
    run = made(["a"])
    path = run / "reconstructions/one.parquet"
    row = {**pq.read_table(path).to_pylist()[0], "psnr": float("inf"), "mse": 0.0}
    pq.write_table(pa.Table.from_pylist([row], ERROR_SCHEMA), path)
    palindrome("export", run, "--out", tmp_path / "out", "--format", "webdataset")
    with tarfile.open(tmp_path / "out/data/one.tar") as tar:
        told = json.load(tar.extractfile("a.json"), parse_constant=pytest.fail)
    assert (told["psnr"], told["mse"]) == (None, 0.0)


def test_parquet(palindrome, run, rows, tmp_path):
    out = tmp_path / "out"
    said = palindrome("export", run, "--out", out, "--format", "parquet")
    assert (said.code, said.err) == (0, "")
    found = []
    for path in sorted((out / "data").iterdir()):
        table = pq.read_table(path)
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        assert features["image"] == {"_type": "Image"}
        assert features["psnr"] == {"dtype": "float64", "_type": "Value"}
        assert features.keys() == set(table.column_names) == set(ERROR_SCHEMA.names)
        found += table.to_pylist()
    assert len({row["image"]["path"] for row in found}) == len(found) == len(rows)
    for row in found:
        assert row["image"].pop("path") == f"steps-{row['steps']}/{name_of(row['image_id'])}.png"
    for row in rows:
        assert {**row, "image": {"bytes": row["image"]["bytes"]}} in found
    count = duckdb.sql(f"select count(image.bytes) from '{out}/data/*.parquet' where steps = 2").fetchall()
    assert count == [(len(NAMES),)]


@pytest.mark.parametrize("form", ["png", "webdataset", "parquet"])
def test_the_same_command_does_what_is_missing(palindrome, run, times, tmp_path, form):
    out = tmp_path / "out"
    command = ["export", run, "--out", out, "--format", form]
    assert palindrome(*command).code == 0
    before, content = times(out), files(out)
    said = palindrome(*command)
    assert said.code == 0
    assert said.out.splitlines()[0] == "3 shards of images, 0 to export"
    assert times(out) == before
    done = sorted((out / ("index" if form == "png" else "data")).iterdir())[1]
    done.unlink()
    half = out / ("images/steps-3/cats/.tmp-0" if form == "png" else "data/.tmp-0")
    half.write_bytes(b"what a writer that was killed has left")
    said = palindrome(*command)
    assert said.out.splitlines()[0] == "3 shards of images, 1 to export"
    assert files(out) == content
    changed = {name for name, when in times(out).items() if when != before[name]}
    assert changed < before.keys() and all(done.stem in name or not name.startswith("data/") for name in changed)


def test_shards_that_come_later_are_exported_then(palindrome, copy, tmp_path):
    out = tmp_path / "out"
    shard = sorted((copy / "reconstructions").iterdir())[0]
    shard.rename(tmp_path / "later")
    said = palindrome("export", copy, "--out", out, "--format", "png")
    assert said.code == 0
    assert said.err == f"{copy} is not complete; repeat the command to export further shards\n"
    assert pq.read_table(out / "images/metadata.parquet").num_rows == 16
    (tmp_path / "later").rename(shard)
    said = palindrome("export", copy, "--out", out, "--format", "png")
    assert (said.code, said.err) == (0, "")
    assert "3 shards of images, 1 to export" in said.out
    assert pq.read_table(out / "images/metadata.parquet").num_rows == len(files(out / "images")) - 1 == 24


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--format", "webp"], "--format was png, now webp"),
        (["--format", "png", "--steps", 3], "--steps was None, now 3"),
    ],
)
def test_another_export_may_not_go_on_in_the_folder(palindrome, run, tmp_path, flags, words):
    out = tmp_path / "out"
    assert palindrome("export", run, "--out", out, "--format", "png").code == 0
    before = files(out)
    said = palindrome("export", run, "--out", out, *flags)
    assert said.code == 2
    assert said.err == f"palindrome export: error: --out: {out} belongs to another command: {words}\n"
    assert files(out) == before


def test_nor_one_of_another_run_nor_in_the_run_itself(palindrome, run, made, copy, tmp_path):
    out = tmp_path / "out"
    assert palindrome("export", copy, "--out", out, "--format", "png").code == 0
    manifest = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**manifest, "model_digest": "another"}))
    said = palindrome("export", copy, "--out", out, "--format", "png")
    assert said.code == 2 and "source model_digest was " in said.err
    said = palindrome("export", run, "--out", out, "--format", "png")
    assert said.code == 2 and f"--run was {copy}, now {run}" in said.err
    before = files(run)
    said = palindrome("export", run, "--out", run, "--format", "png")
    assert said.code == 2 and "belongs to another command: reconstruct, not export" in said.err
    assert files(run) == before


def test_what_holds_no_images(palindrome, run, made, tmp_path):
    out = tmp_path / "out"
    said = palindrome("export", run.parent / "encoded", "--out", out, "--format", "png")
    assert (said.code, said.out) == (1, "")
    assert "is a run of encode, not of reconstruct" in said.err
    empty = made([])
    (empty / "reconstructions/one.parquet").unlink()
    said = palindrome("export", empty, "--out", out, "--format", "png")
    assert said.code == 2
    assert said.err == f"palindrome export: error: RUN: {empty} holds no images yet\n"
    assert not out.exists()


@pytest.mark.parametrize("form", ["png", "webp", "webdataset", "parquet"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: None, "there is no image"),
        (lambda image: {"bytes": None, "path": "x"}, "there is no image"),
        (lambda image: {**image, "bytes": b"GIF89a"}, "it is no PNG"),
        (lambda image: {**image, "bytes": image["bytes"][:-20]}, "the PNG is damaged or breaks off"),
    ],
    ids=["null", "no bytes", "no PNG", "cut"],
)
def test_an_image_that_is_broken_is_named_and_nothing_else_is_lost(palindrome, copy, tmp_path, form, change, words):
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert palindrome("export", copy, "--out", whole, "--format", form).code == 0
    shard, image_id, mend = spoil(copy, change)
    command = ["export", copy, "--out", out, "--format", form]
    said = palindrome(*command)
    assert said.code == 1
    shown = image_id.replace("\n", "\\n")
    assert said.err.startswith(f"shard {shard} failed: {shown}: ") and words in said.err
    assert said.err.endswith("\n1 shards failed; repeat the command to retry them\n") and said.err.count("\n") == 2
    expected, found = files(whole), files(out)
    if form in ("png", "webp"):
        lost = {name for name in expected if name.startswith("images/") and name not in found}
        assert len(lost) == 1 and Path(lost.pop()).name.startswith(Path(name_of(image_id)).name)
        assert f"index/{shard}.parquet" not in found
    else:
        assert {name for name in expected if name.startswith("data/")} - found.keys() == {
            f"data/{shard}.{'tar' if form == 'webdataset' else 'parquet'}"
        }
    mend()
    assert palindrome(*command).code == 0
    assert {k: v for k, v in files(out).items() if k != "run.json"} == {
        k: v for k, v in expected.items() if k != "run.json"
    }


def test_a_file_that_can_t_be_read_is_named(palindrome, copy, tmp_path):
    path = sorted((copy / "reconstructions").iterdir())[1]
    path.write_bytes(path.read_bytes()[:-9])
    said = palindrome("export", copy, "--out", tmp_path / "out", "--format", "png")
    assert said.code == 1
    assert f"shard {path.stem} failed: {path} can't be read: ArrowInvalid" in said.err
    assert len(files(tmp_path / "out/images")) == 16 + 1


@pytest.mark.parametrize("form", ["png", "webdataset", "parquet"])
def test_no_id_escapes(palindrome, made, tmp_path, form):
    run, out = made(HOSTILE), tmp_path / "deep/er/out"
    before = set(tmp_path.rglob("*"))
    said = palindrome("export", run, "--out", out, "--format", form)
    assert said.code == 0, said.err
    assert all(out in path.parents or path in (out, *out.parents) for path in set(tmp_path.rglob("*")) - before)
    if form == "png":
        index = pq.read_table(out / "images/metadata.parquet").to_pylist()
        assert len(files(out / "images")) == len(HOSTILE) + 1
        assert {row["image_id"]: (out / "images" / row["file_name"]).read_bytes() for row in index} == {
            row["image_id"]: row["image"]["bytes"] for row in pq.read_table(run / "reconstructions").to_pylist()
        }
    elif form == "webdataset":
        with tarfile.open(out / "data/one.tar") as tar:
            tar.extractall(tmp_path / "extracted", filter="data")
        assert len(files(tmp_path / "extracted")) == 2 * len(HOSTILE)


def test_a_folder_that_may_not_be_written_to_ends_the_run(palindrome, run, tmp_path):
    out = tmp_path / "out"
    command = ["export", run, "--out", out, "--format", "png"]
    assert palindrome(*command).code == 0
    shutil.rmtree(out / "images/steps-3")
    (out / "images/steps-3").write_text("a file where a folder must be")
    for done in (out / "index").iterdir():
        done.unlink()
    said = palindrome(*command)
    assert said.code == 1
    assert re.fullmatch(f"palindrome export: {out} can't be written: (File exists|Not a directory)\n", said.err)


@pytest.mark.parametrize("form", ["png", "webdataset"])
def test_the_same_command_goes_on_where_it_was_killed(palindrome, start, made, tmp_path, form):
    for shard in range(6):
        run = made([f"{shard}/{i}.png" for i in range(1000)], shard=f"shard{shard}")
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = ["export", run, "--format", form, "--out"]
    for number, code, done in ((signal.SIGTERM, 143, 1), (signal.SIGKILL, -signal.SIGKILL, 3)):
        process = start(*command, out)
        while len(list((out / "index").glob("*"))) < done:  # of some shards the files are whole, of others under way
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(30) == code
        assert not (out / "index.parquet").exists() and not (out / "images/metadata.parquet").exists()
    assert palindrome(*command, out).code == palindrome(*command, whole).code == 0
    found, expected = files(out), files(whole)
    assert found.keys() == expected.keys()
    assert {name for name, content in expected.items() if found[name] != content} <= {"run.json"}


@pytest.mark.parametrize("form", ["png", "webdataset", "parquet"])
def test_from_and_to_a_bucket(palindrome, moto, run, tmp_path, form):
    options = tmp_path / "options.json"
    options.write_text(json.dumps(moto.options))
    bucket = moto.bucket()
    source, out = Folder(f"{bucket}/back", moto.options), Folder(f"{bucket}/{uuid.uuid4().hex}", moto.options)
    for name, content in files(run).items():
        source.put(name, content)
    here, there = tmp_path / "here", tmp_path / "there"
    assert palindrome("export", run, "--out", here, "--format", form).code == 0
    command = ["export", source.uri, "--out", out.uri, "--format", form, "--storage-options", options]
    said = palindrome(*command)
    assert (said.code, said.err) == (0, "")
    out.fs.get(out.path() + "/", f"{there}/", recursive=True)
    expected, found = files(here), files(there)
    assert moto.secret.encode() not in found["run.json"]
    del expected["run.json"], found["run.json"]
    assert found == expected
    said = palindrome(*command)
    assert (said.code, said.out.splitlines()[0]) == (0, "3 shards of images, 0 to export")
