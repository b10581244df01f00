"""Training through Ray Train, whose start takes most of a run's time: one from S3 to a folder, one whose driver is
killed, one that goes on with it on S3, and one that fails."""

import io
import json
import math
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from palindrome.jobs import train
from palindrome.model.families import unet2d
from palindrome.model.presets import PRESETS
from palindrome.pipeline.base.log import KEYS
from palindrome.pipeline.storage.folder import Folder

pytestmark = pytest.mark.usefixtures("ray_here")
FLAGS = ["--preset", "tiny", "--batch-size", 8, "--lr-warmup", 0, "--lr", 1e-3, "--sample-every", 1000, "--limit", 64]


@pytest.fixture(scope="module")
def bucket(moto, sample):
    """A bucket with the sample."""
    folder = Folder(moto.bucket(), moto.options)
    folder.put("images/sample.parquet", Path(sample).read_bytes())
    return folder


@pytest.fixture(scope="module")
def command(bucket, moto, tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    (place / "options.json").write_text(json.dumps(moto.options))
    flags = ["--prediction", "v_prediction", "--workers", 2, "--train-steps", 6, "--save-every", 3]
    flags += ["--storage-options", place / "options.json"]
    return ["train", "--images", f"{bucket.uri}/images", *FLAGS, *flags, "--out", place / "run"]


@pytest.fixture(scope="module")
def out(command):
    return command[command.index("--out") + 1]


@pytest.fixture(scope="module")
def dry(palindrome, command, out):
    """What is said of a training to come."""
    said = palindrome(*command, "--dry-run")
    assert not out.exists()
    return said


@pytest.fixture(scope="module")
def said(palindrome, command, dry, ray_here):
    """Six steps by two workers."""
    return palindrome(*command)


@pytest.fixture(scope="module")
def record(said, out):
    assert said.code == 0, said.err
    return json.loads((out / "training.json").read_text())


def saved(out):
    """What is said of the last saved state, as Ray Train keeps it."""
    while True:
        try:
            snapshot = json.loads((out / "train/checkpoint_manager_snapshot.json").read_text())
            return snapshot["latest_checkpoint_result"]["metrics"]
        except ValueError:  # it is being written
            time.sleep(0.01)


def is_checkpoint(folder, steps):
    """A whole one, of finite weights that have left their initial values, as training.json says."""
    trained = unet2d.load(str(folder))
    assert trained.config == PRESETS["tiny"]
    assert all(value.isfinite().all() for value in trained.weights.values())
    record = json.loads((folder / "training.json").read_text())
    assert record["steps"] == record["loss"][-1]["step"] == steps
    assert all(0 < saved["loss"] < 10 for saved in record["loss"])
    return trained


def test_training_ends_in_a_checkpoint(record, said, out):
    assert "training tiny on 64 images for 6 steps" in said.out
    assert f"checkpoint in {out}" in said.out
    trained = is_checkpoint(out, 6)
    assert trained.process.prediction_type == "v_prediction"
    assert trained.process.beta_schedule == "linear"
    assert {value.dtype for value in trained.weights.values()} == {torch.float32}


def test_the_record_has_a_loss_for_every_saved_state(record):
    assert [saved["step"] for saved in record["loss"]] == [3, 6]
    assert all(math.isfinite(saved["loss"]) for saved in record["loss"])
    assert (record["steps"], record["images"], record["device"]) == (6, 48, "cpu")


def test_diffusers_opens_the_checkpoint(record, out):
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.DDIMPipeline.from_pretrained(out)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = pipeline.unet.eval()(x, 500).sample
    torch.testing.assert_close(unet2d.load(str(out)).network()(x, 500), theirs, rtol=1e-4, atol=1e-4)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2).images[0].size == (16, 16)


def test_there_is_a_grid_of_samples(record, out):
    [file] = (out / "samples").iterdir()
    assert file.name == "step-0000006.png"
    grid = np.asarray(Image.open(io.BytesIO(file.read_bytes())))
    assert grid.shape == (4 * 18 - 2, 4 * 18 - 2, 3)
    assert (grid[16:18] == 255).all()  # white between them
    samples = {grid[y : y + 16, x : x + 16].tobytes() for y in range(0, 72, 18) for x in range(0, 72, 18)}
    assert len(samples) == 16


def test_the_manifest_says_what_was_run(record, out, bucket):
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["job"] == "train"
    assert manifest["config"]["images"] == f"{bucket.uri}/images"
    assert (manifest["config"]["preset"], manifest["config"]["batch_size"]) == ("tiny", 8)
    assert manifest["fields"]["lr"] == "must be the same to resume"


def test_another_training_may_not_go_on_in_the_folder(record, palindrome, command):
    said = palindrome(*command, "--lr", 0.5)
    assert said.code == 2
    assert "--lr was 0.001, now 0.5" in said.err


def test_a_second_run_finds_it_trained(record, palindrome, command, out, times):
    before = times(out)
    said = palindrome(*command)
    assert (said.code, said.err, said.out) == (0, "", f"{out} is trained already: 6 steps\n")
    assert times(out) == before


def written(text):
    """Bytes of the checkpoint and of a saved state, as a dry run says them."""
    sizes = re.search(
        r"a checkpoint of ([\d.]+) (\w+), and every [\d,]+ steps a state of ([\d.]+) (\w+),", text
    ).groups()
    unit = {"bytes": 1, "kB": 1e3, "MB": 1e6}
    return float(sizes[0]) * unit[sizes[1]], float(sizes[2]) * unit[sizes[3]]


def weights_in(folder):
    return (folder / "unet/diffusion_pytorch_model.safetensors").stat().st_size


def test_a_dry_run_says_what_it_writes(dry, record, palindrome, command, out, times):
    assert dry.code == 0 and dry.out.endswith("dry run: nothing was done\n"), dry.err
    assert "training tiny on 64 images for 6 steps\n32 of the first 32 images can be decoded\n" in dry.out
    assert "6 steps of 8 images, 48 images forward and backward, 0.8 epochs" in dry.out
    weights, state = written(dry.out)
    *_, saved = (out / "train").rglob("state.pt")
    assert weights == pytest.approx(weights_in(out), rel=0.2)  # tiny: names weigh something beside the values
    assert state == pytest.approx(saved.stat().st_size, rel=0.35)
    [parameters] = re.findall(r"([\d,]+) parameters", dry.out)
    values = sum(value.numel() for value in unet2d.load(str(out)).weights.values())
    assert int(parameters.replace(",", "")) == values

    before = times(out)
    said = palindrome(*command, "--dry-run")
    assert said.code == 0 and "is trained already: 6 steps" in said.out
    said = palindrome(*command, "--train-steps", 10, "--dry-run")
    assert said.code == 0 and "6 of 10 steps are saved; 4 steps of 8 images, 32 images" in said.out
    said = palindrome(*command, "--train-steps", 10, "--lr", 0.5, "--dry-run")
    assert said.code == 2 and f"--out: {out} belongs to another command: --lr was 0.001" in said.err
    assert times(out) == before


def test_a_finished_training_given_more_steps_goes_on_and_so_does_one_whose_driver_was_killed(
    record, palindrome, start, ray_here, workers, moto, bucket, command, out, tmp_path
):
    """The latter on S3, where its folder was copied to."""
    more = [*command, "--workers", 1, "--save-dtype", "float16", "--save-every", 2]
    first = unet2d.load(str(out))
    process = start(*more, "--train-steps", 100_000, "--address", ray_here)
    while saved(out)["step"] == 6:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    while workers("RayTrainWorker", "TrainController"):  # Ray ends them in its own time
        time.sleep(0.05)
    assert unet2d.load(str(out)).digest == first.digest, "a checkpoint is written at the end"
    reached = saved(out)
    for path in out.rglob("*"):
        if path.is_file():
            bucket.put(f"run/{path.relative_to(out)}", path.read_bytes())
    last = reached["step"] + 10
    more = [*more, "--out", f"{bucket.uri}/run", "--save-every", 1000, "--train-steps"]
    dry = palindrome(*more, last, "--dry-run")
    assert f"{reached['step']:,} of {last:,} steps are saved; 10 steps of 8 images, 80 images" in dry.out, dry.err
    said = palindrome(*more, last, "--log", "json")
    assert said.code == 0, said.err

    there = bucket.fs.find(bucket.path("run"))
    for path in there:
        local = tmp_path / "run" / path.removeprefix(bucket.path("run") + "/")
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(bucket.fs.cat_file(path))
    second = is_checkpoint(tmp_path / "run", last)
    assert written(dry.out)[0] == pytest.approx(weights_in(tmp_path / "run"), rel=0.2)
    assert unet2d.load(f"{bucket.uri}/run", moto.options).digest == second.digest
    history = json.loads((tmp_path / "run/training.json").read_text())["loss"]
    assert history[:2] == record["loss"]
    assert history[-2] == reached, "its seconds, too: nothing was done again"
    assert {value.dtype for value in second.weights.values()} == {torch.float16}
    assert any(not torch.equal(first.weights[name].half(), value) for name, value in second.weights.items())
    states = [torch.load(path, weights_only=True)["step"] for path in (tmp_path / "run/train").rglob("state.pt")]
    assert max(states) == saved(tmp_path / "run")["step"] == last, "from which the next one goes on"

    lines = [json.loads(line) for line in said.out.splitlines()]
    assert all(line.keys() >= KEYS for line in lines)
    end = lines[-1]
    assert (end["exit_code"], end["summary"]["steps"], end["summary"]["images"]) == (0, last, 8 * last)
    assert 0 < end["summary"]["loss"] < 10


def test_a_model_of_classes_is_trained_sampled_and_guided(palindrome, sample, tmp_path):
    flags = ["--class-column", "label", "--num-classes", 10, "--train-steps", 2]
    said = palindrome("train", "--images", sample, *FLAGS, *flags, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    trained = unet2d.load(str(tmp_path / "run"))
    assert (trained.config.num_class_embeds, trained.null_class) == (11, 10)
    assert next((tmp_path / "run/samples").iterdir()).name == "step-0000002.png"
    flags = ["--model", tmp_path / "run", "--count", 2, "--steps", 2, "--class", 3, "--guidance", 2]
    said = palindrome("generate", *flags, "--out", tmp_path / "samples")
    assert said.code == 0, said.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--class-column", "label"], "--num-classes: is needed with --class-column"),
        (["--num-classes", 10], "--num-classes: goes with --class-column"),
        (["--class-column", "colour", "--num-classes", 10], "--class-column: .*'colour'"),
    ],
)
def test_classes_that_can_not_be_trained_are_named(palindrome, sample, tmp_path, flags, words):
    said = palindrome("train", "--images", sample, *FLAGS, *flags, "--out", tmp_path / "run")
    assert said.code == 2 and re.search(words, said.err), said.err
    assert not (tmp_path / "run").exists()


def test_images_of_which_none_decodes_are_said_in_one_line(palindrome, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MAX_FAILURES", 0)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.png").write_text("no picture")
    said = palindrome("train", "--images", tmp_path / "bad", *FLAGS, "--out", tmp_path / "run", "--train-steps", 1)
    assert said.code == 1
    assert said.err == f"palindrome train: RuntimeError: no image of {tmp_path}/bad could be decoded\n"
