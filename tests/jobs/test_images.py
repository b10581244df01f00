"""How images become the model's input: by flags, recorded with the latents, and the same again wherever originals are
read."""

import errno
import io
import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from palindrome.jobs.train import TrainConfig
from palindrome.pipeline.images.decode import Preprocess, decode
from palindrome.pipeline.images.shuffle import shuffled_batches
from palindrome.pipeline.images.sources import open_collection
from palindrome.pipeline.runs.plan import read_plan, write_plan
from palindrome.pipeline.storage.folder import Folder

FLAGS = ["--fit", "pad", "--resample", "box", "--background", "200", "10", "60"]
HOW = Preprocess(16, background=(200, 10, 60), resample="box", fit="pad")


@pytest.fixture(scope="module")
def odd(pngs, corpus, tmp_path_factory):
    """A folder of pictures on which each of the flags shows: not square, some of them transparent."""
    folder = tmp_path_factory.mktemp("odd")
    for i in range(6):
        picture = Image.open(io.BytesIO(pngs[i])).resize((40, 25 + 9 * i))
        if i % 2:
            picture.putalpha(picture.convert("L"))
        (folder / f"{i}.png").write_bytes(corpus.encoded(picture, "PNG"))
    return folder


@pytest.fixture(scope="module")
def command(odd, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return ["encode", "--images", odd, "--model", model, "--out", out, "--ladder", "0,1,2", "--measure", *FLAGS]


@pytest.fixture(scope="module")
def run(palindrome, command):
    said = palindrome(*command)
    assert said.code == 0, said.err
    return command[6]


def test_the_settings_are_recorded(run):
    manifest = json.loads((run / "run.json").read_text())
    assert Preprocess(**manifest["preprocess"]) == HOW
    assert manifest["preprocess"]["fit"] == "pad"
    assert [manifest["config"][name] for name in ("fit", "resample", "background")] == ["pad", "box", [200, 10, 60]]
    assert {manifest["fields"][name] for name in ("fit", "resample", "background")} == {"must be the same to resume"}
    for path in (run / "latents").iterdir():
        about = json.loads(pq.read_schema(path).metadata[b"palindrome"])
        assert Preprocess(**about["preprocess"]) == HOW


def test_originals_are_read_again_as_they_were(palindrome, run, odd, tmp_path):
    said = palindrome("reconstruct", "--latents", run, "--out", tmp_path)
    assert said.code == 0, said.err
    [rows] = [pq.read_table(path).to_pylist() for path in (tmp_path / "reconstructions").iterdir()]
    [file] = (run / "latents").iterdir()
    stored = {row["image_id"]: row["mse"] for row in pq.read_table(file, columns=["image_id", "mse"]).to_pylist()}
    assert {row["image_id"]: row["status"] for row in rows} == dict.fromkeys(stored, "compared")
    for row in rows:
        assert row["mse"] == pytest.approx(stored[row["image_id"]], rel=1e-3, abs=1e-9)
        assert row["mse"] < 1e-4, "of another original it would be far larger"
    assert palindrome("verify", run, "--deep", 6).code == 0


def test_each_flag_shows_on_these_pictures(odd):
    """So the test above would see one that was lost on the way."""
    for name in ("0.png", "1.png"):
        data = (odd / name).read_bytes()
        wanted = decode(data, HOW)[0]
        for lost in ({"fit": "crop"}, {"resample": "lanczos"}, {"background": [255, 255, 255]}):
            other = decode(data, Preprocess(**{**HOW.record(), **lost}))[0]
            assert np.square(wanted / 255.0 - other / 255.0).mean() > 1e-4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fit", "crop"], "--fit was pad, now crop"),
        (["--resample", "area"], "--resample was box, now area"),
        (["--background", 1, 2, 3], "--background was [200, 10, 60], now [1, 2, 3]"),
    ],
)
def test_another_setting_may_not_go_on_in_the_folder(palindrome, command, run, flags, words):
    said = palindrome(*command, *flags)
    assert (said.code, said.err) == (2, f"palindrome encode: error: --out: {run} belongs to another command: {words}\n")


def test_a_run_of_an_earlier_version_goes_on(palindrome, odd, model, tmp_path):
    command = ["encode", "--images", odd, "--model", model, "--out", tmp_path, "--steps", 3, "--shard-size", 2]
    assert palindrome(*command).code == 0
    path = tmp_path / "run.json"
    manifest = json.loads(path.read_text())
    for name in ("fit", "resample", "background"):
        del manifest["config"][name], manifest["fields"][name]
    assert list(manifest["preprocess"]) == ["size", "channels", "max_pixels", "background", "resample"]
    path.write_text(json.dumps(manifest))
    before, lost = path.read_bytes(), sorted((tmp_path / "latents").iterdir())[1]
    lost.unlink()
    said = palindrome(*command, "--fit", "pad")
    assert (said.code, said.err.rpartition(": ")[2]) == (2, "--fit was crop, now pad\n")
    said = palindrome(*command)
    assert said.code == 0, said.err
    assert "3 shards, 1 to encode" in said.out
    assert lost.exists() and path.read_bytes() == before
    assert palindrome("verify", tmp_path, "--deep", 6).code == 0


@pytest.mark.parametrize("job", ["encode", "score", "sweep", "calibrate", "train"])
def test_the_jobs_that_read_images_take_the_same_flags(palindrome, job):
    text = " ".join(palindrome(job, "--help").out.split())
    for words in (
        "--fit {crop,pad}",
        "--resample {lanczos,bicubic,bilinear,box,area,openai}",
        "(default: 255 255 255)",
        "--max-pixels",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--background", 1, 2], "--background: must be red, green and blue; got 1 2"),
        (["--background", 1, 2, 3, 4], "--background: must be red, green and blue; got 1 2 3 4"),
        (["--background", 1, 2, 256], "--background: 256 is out of range; it takes 0 to 255"),
        (["--background", "white"], "--background: invalid int value: 'white'"),
        (["--resample", "nearest"], "--resample: invalid choice: 'nearest'"),
        (["--fit", "stretch"], "--fit: invalid choice: 'stretch'"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_flag(palindrome, command, tmp_path, flags, words):
    said = palindrome(*command, "--out", tmp_path / "run", *flags)
    assert said.code == 2
    assert words in said.err
    assert not (tmp_path / "run").exists()


def test_sweep_and_calibrate_read_images_so_too(palindrome, odd, model, tmp_path):
    flags = ["--images", odd, "--model", model, *FLAGS]
    said = palindrome("sweep", *flags, "--steps", 2, "--corrections", 1, "--out", tmp_path / "sweep")
    assert said.code == 0, said.err
    said = palindrome("calibrate", *flags, "--steps", 2, "--corrections", 1, "--out", tmp_path / "ladder.json")
    assert said.code == 0, said.err
    for file in ("sweep/run.json", "ladder.json"):
        assert Preprocess(**json.loads((tmp_path / file).read_text())["preprocess"]) == HOW


def test_train_reads_images_so_too(pngs, tmp_path):
    """What it draws of pictures that are transparent throughout is the background."""
    (tmp_path / "in").mkdir()
    for i in range(4):
        picture = Image.open(io.BytesIO(pngs[i])).convert("RGBA")
        picture.putalpha(0)
        picture.save(tmp_path / f"in/{i}.png")
    images, run = open_collection(str(tmp_path / "in")), Folder(str(tmp_path / "out"))
    write_plan(run, images, 512)
    config = TrainConfig(images=images.uri, preset="tiny", out=run.uri, batch_size=4, background=(200, 10, 60))
    batch, _ = next(
        shuffled_batches(images, list(read_plan(run)), config.preprocess((3, 16, 16)), config.batch_size, seed=0)
    )
    assert batch.shape == (4, 16, 16, 3)
    assert (batch == (200, 10, 60)).all()


@pytest.fixture(scope="module")
def halves(pngs, corpus, tmp_path_factory):
    """A JPEG, and half of it with an end marker."""
    folder = tmp_path_factory.mktemp("halves")
    data = corpus.encoded(Image.open(io.BytesIO(pngs[1])).convert("RGB").resize((64, 64)), "JPEG", quality=95)
    (folder / "whole.jpg").write_bytes(data)
    (folder / "half.jpg").write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    return folder


def test_a_picture_that_lacks_a_part_is_a_reject_unless_it_is_to_be_kept(palindrome, halves, model, tmp_path):
    for flags, latents in (((), ["whole.jpg"]), (("--truncated", "keep"), ["half.jpg", "whole.jpg"])):
        out = tmp_path / str(len(latents))
        command = ["encode", "--images", halves, "--model", model, "--out", out, "--ladder", "0,1,2", *flags]
        said = palindrome(*command)
        assert said.code == 0, said.err
        assert pq.read_table(out / "latents")["image_id"].to_pylist() == latents
        recorded = json.loads((out / "run.json").read_text())["preprocess"]
        assert recorded.get("truncated") == ("keep" if flags else None)  # as in runs of earlier versions
        assert Preprocess(**recorded).truncated == ("keep" if flags else "reject")
        assert palindrome(*command).code == 0
    (path,) = (tmp_path / "1" / "rejects").iterdir()
    (reject,) = pq.read_table(path).to_pylist()
    assert (reject["image_id"], reject["reason"]) == ("half.jpg", "truncated")
    assert "premature end of data" in reject["detail"]
    said = palindrome(*command[:6], tmp_path / "1", *command[7:])
    assert said.code == 2 and "--truncated" in said.err


def test_an_outage_while_inputs_are_looked_at_is_no_wrong_command(palindrome, odd, model, tmp_path, monkeypatch):
    command = ["encode", "--model", model, "--out", tmp_path / "run", "--ladder", "0,1,2"]
    assert palindrome(*command, "--images", tmp_path / "none").code == 2
    listed = os.scandir
    for number, code in ((errno.ESTALE, 1), (errno.EIO, 1), (errno.EMFILE, 1), (errno.EACCES, 2)):

        def fails(folder, number=number):
            if str(folder).startswith(str(odd)):
                raise OSError(number, os.strerror(number), str(folder))
            return listed(folder)

        with monkeypatch.context() as patched:
            patched.setattr(os, "scandir", fails)
            said = palindrome(*command, "--images", odd)
        assert said.code == code, said.err
        if code == 1:
            stat = os.stat

            def unstated(path, *more, number=number, stat=stat, **named):
                if str(path).startswith(str(odd)):
                    raise OSError(number, os.strerror(number), str(path))
                return stat(path, *more, **named)

            with monkeypatch.context() as patched:
                patched.setattr(os, "stat", unstated)
                assert [palindrome(*command, "--images", images).code for images in (odd, f"{odd}/*.png")] == [1, 1]
        assert os.strerror(number) in said.err and "--images" in said.err and len(said.err.splitlines()) == 1


def test_an_outage_amid_a_run_is_no_reject(palindrome, odd, model, tmp_path, monkeypatch):
    command = ["encode", "--images", odd, "--model", model, "--out", tmp_path / "run", "--ladder", "0,1,2"]

    def fails(self, path, *_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)

    with monkeypatch.context() as patched:
        patched.setattr(LocalFileSystem, "cat_file", fails)
        assert palindrome(*command).code == 1
    assert not list((tmp_path / "run").glob("rejects/*"))
    assert palindrome(*command).code == 0
    assert pq.read_table(tmp_path / "run" / "latents").num_rows == 6
