"""The precision a run computes in: as asked for or found by a trial, written down, and kept to by what follows."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import palindrome as interface
from palindrome.model.execution import Execution
from palindrome.pipeline.images.decode import Preprocess, decode
from palindrome.pipeline.runs.ladders import resolve
from palindrome.pipeline.runtime.device import Model

BUNDLED = Path(__file__).parents[2] / "checkpoints/cifar10-32"
PLAIN = ("--steps", 4, "--corrections", 0)


@pytest.fixture(autouse=True)
def threads():
    """Model sets torch's threads for the process it is in."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def x(pictures):
    pixels = np.stack([decode(p.read_bytes(), Preprocess(16))[0] for p in sorted(pictures.iterdir())])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def manifest(run):
    return json.loads((run / "run.json").read_text())


def metadata(run):
    return [json.loads(pq.read_schema(f).metadata[b"palindrome"]) for f in run.glob("latents/*.parquet")]


@pytest.fixture(scope="module")
def low(palindrome, pictures, model, tmp_path_factory):
    """24 pictures encoded in bfloat16."""
    run = tmp_path_factory.mktemp("low") / "run"
    flags = ["--images", pictures, "--model", model, "--out", run, *PLAIN, "--measure", "--precision", "bfloat16"]
    said = palindrome("encode", *flags)
    assert said.code == 0, said.err
    return run


def test_latents_are_those_of_the_precision_asked_for(low, tiny, x, read_run):
    assert manifest(low)["precision"] == "bfloat16"
    assert [about["precision"] for about in metadata(low)] == ["bfloat16"]
    stored = read_run(low)
    assert stored.latents.dtype == np.float32
    levels = resolve("logsnr", 4, tiny.process)
    found = {p: Model(tiny, execution=Execution(p)).encode(x, levels)[0].numpy() for p in ("bfloat16", "float32")}
    off = {p: np.sqrt(((stored.latents - latents) ** 2).mean()) for p, latents in found.items()}
    assert off["bfloat16"] < off["float32"] / 3


def test_what_works_from_the_latents_keeps_to_it(low, palindrome, tmp_path, tiny, read_run):
    latents = read_run(low).latents
    for job in ("reconstruct", "regenerate"):
        said = palindrome(job, "--latents", low, "--out", tmp_path / job)
        assert said.code == 0, said.err
    [file] = (tmp_path / "reconstruct/reconstructions").glob("*.parquet")
    again = {row["image_id"]: row["mse"] for row in pq.read_table(file).to_pylist()}
    for row in read_run(low).rows:
        assert again[row["image_id"]] == pytest.approx(row["mse"], rel=1e-2)
    assert palindrome("verify", low, "--deep", 24).code == 0
    levels = resolve("logsnr", 4, tiny.process)
    exact = Model(tiny).decode(torch.from_numpy(latents), levels)
    ours = Model(tiny, execution=Execution("bfloat16")).decode(torch.from_numpy(latents), levels)
    pictures = np.stack([np.asarray(p) for p in interface.open(low).decode(latents)]).astype(float)
    off = [np.abs(pictures - ((y + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()).mean() for y in (ours, exact)]
    assert off[0] < off[1]


def test_a_run_goes_on_in_its_precision_only(low, palindrome, pictures, model):
    flags = ["--images", pictures, "--model", model, "--out", low, *PLAIN, "--measure"]
    for precision in ("float32", "auto"):
        said = palindrome("encode", *flags, "--precision", precision)
        assert said.code == 2 and f"--precision was bfloat16, now {precision}" in said.err


def test_a_few_images_are_encoded_in_float32(palindrome, pictures, model, tmp_path):
    said = palindrome("encode", "--images", pictures, "--model", model, "--out", tmp_path / "run", *PLAIN)
    assert said.code == 0 and "network evaluations a second" not in said.out
    assert manifest(tmp_path / "run")["precision"] == "float32"


@pytest.fixture
def trials(monkeypatch):
    """A trial pays for few images, too, and takes a moment."""
    monkeypatch.setattr("palindrome.jobs.encode.MIN_IMAGES_FOR_TRIAL", 1)
    monkeypatch.setattr("palindrome.pipeline.runtime.speed.TRIAL_SECONDS", 0.1)


def test_a_trial_finds_one_and_the_run_keeps_it(trials, palindrome, sample, tmp_path, read_run):
    run = tmp_path / "run"
    flags = ["encode", "--images", sample, "--limit", 8, "--shard-size", 4, "--model", BUNDLED, "--out", run, *PLAIN]
    flags += ["--batch-size", 4]  # of the trial too
    said = palindrome(*flags)
    assert said.code == 0, said.err
    found = manifest(run)
    assert f"precision: {found['precision']} (float32: " in said.out
    assert set(found["tried"]) == {"float32", "bfloat16"}
    assert {about["precision"] for about in metadata(run)} == {found["precision"]}
    first = read_run(run)
    sorted(run.glob("latents/*.parquet"))[0].unlink()
    again = palindrome(*flags)
    assert again.code == 0 and "network evaluations a second" not in again.out
    assert manifest(run) == found
    assert np.allclose(read_run(run).latents, first.latents, rtol=1e-3, atol=1e-3)


def test_where_every_image_is_to_come_back_to_the_bit_nothing_is_tried(trials, palindrome, sample, tmp_path):
    flags = ["--images", sample, "--limit", 1, "--model", BUNDLED, "--out", tmp_path / "run", "--tolerance", "exact"]
    said = palindrome("encode", *flags, "--steps", 4)
    assert "network evaluations a second" not in said.out
    assert manifest(tmp_path / "run")["precision"] == "float32"


def test_a_run_of_an_earlier_version_goes_on_in_float32(trials, palindrome, sample, model, tmp_path):
    run = tmp_path / "run"
    flags = ["encode", "--images", sample, "--limit", 16, "--shard-size", 8, "--model", model, "--out", run, *PLAIN]
    assert palindrome(*flags, "--precision", "float32").code == 0
    before = manifest(run)
    for name in ("precision", "tried"):
        before.pop(name, None)
    del before["config"]["precision"], before["config"]["compile"]
    (run / "run.json").write_text(json.dumps(before))
    sorted(run.glob("latents/*.parquet"))[0].unlink()
    assert palindrome(*flags).code == 0
    assert manifest(run)["precision"] == "float32"


def test_a_trial_of_rejects_alone_is_none(trials, palindrome, model, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(20):
        (images / f"a{i:02d}.png").write_bytes(b"no picture")
    said = palindrome("encode", "--images", images, "--model", model, "--out", tmp_path / "run", *PLAIN)
    assert said.code == 1 and "no image could be encoded" in said.err
    assert manifest(tmp_path / "run")["precision"] == "float32"
    assert "tried" not in manifest(tmp_path / "run")


def test_a_trial_takes_the_first_images_that_can_be_decoded(trials, palindrome, pictures, model, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(20):
        (images / f"a{i:02d}.png").write_bytes(b"no picture")
    for path in pictures.iterdir():
        (images / f"b{path.name}").write_bytes(path.read_bytes())
    said = palindrome("encode", "--images", images, "--model", model, "--out", tmp_path / "run", *PLAIN)
    assert said.code == 0, said.err
    found = manifest(tmp_path / "run")
    assert found["precision"] in found["tried"]  # which one is faster depends on the machine


def test_generate_computes_in_what_is_asked_for(palindrome, model, tmp_path):
    for precision in ("float32", "bfloat16"):
        flags = ["--model", model, "--count", 4, "--steps", 4, "--out", tmp_path / precision]
        assert palindrome("generate", *flags, "--precision", precision).code == 0
    pictures = [(tmp_path / p / "samples.png").read_bytes() for p in ("float32", "bfloat16")]
    assert pictures[0] != pictures[1]
