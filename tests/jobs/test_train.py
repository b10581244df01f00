import io
import json
import math
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from palindrome.jobs import train
from palindrome.model.families import unet2d
from palindrome.model.presets import PRESETS

FLAGS = ["--preset", "tiny", "--batch-size", 8, "--lr-warmup", 0, "--lr", 1e-3, "--sample-every", 1000, "--limit", 64]


@pytest.fixture(scope="module")
def command(sample, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--prediction", "v_prediction", "--workers", 2, "--train-steps", 6, "--save-every", 3]
    return ["train", "--images", sample, *FLAGS, *flags, "--out", out]


@pytest.fixture(scope="module")
def out(command):
    return command[command.index("--out") + 1]


@pytest.fixture(scope="module")
def said(palindrome, command):
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
    assert trained.prediction_type == "v_prediction"
    assert trained.schedule.beta_schedule == "linear"
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


def test_the_manifest_says_what_was_run(record, out, sample):
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["job"] == "train"
    assert manifest["config"]["images"] == str(sample)
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


def test_a_finished_training_given_more_steps_goes_on_and_so_does_one_whose_driver_was_killed(
    record, palindrome, start, command, out
):
    more = [*command, "--workers", 1, "--save-dtype", "float16", "--save-every", 50, "--train-steps"]
    first = unet2d.load(str(out))
    process = start(*more, 100_000)
    while saved(out)["step"] == 6:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert unet2d.load(str(out)).digest == first.digest, "a checkpoint is written at the end"
    reached = saved(out)
    said = palindrome(*more, reached["step"] + 10)
    assert said.code == 0, said.err
    second = is_checkpoint(out, reached["step"] + 10)
    history = json.loads((out / "training.json").read_text())["loss"]
    assert history[:2] == record["loss"]
    assert history[-2] == reached, "its seconds, too: nothing was done again"
    assert {value.dtype for value in second.weights.values()} == {torch.float16}
    assert any(not torch.equal(first.weights[name].half(), value) for name, value in second.weights.items())


def test_images_of_which_none_decodes_are_said_in_one_line(palindrome, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "FAILURES", 0)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.png").write_text("no picture")
    said = palindrome("train", "--images", tmp_path / "bad", *FLAGS, "--out", tmp_path / "run", "--train-steps", 1)
    assert said.code == 1
    assert said.err == f"palindrome train: RuntimeError: no image of {tmp_path}/bad could be decoded\n"
