"""A class-conditional model: an image is told its class, encoded and decoded under it, and decoded under another."""

import dataclasses
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from palindrome import open as open_run
from palindrome.model import ddim
from palindrome.model.condition import ClassOf
from palindrome.model.families import unet2d
from palindrome.model.inversion import invert_exactly
from palindrome.model.ladder import ladder
from palindrome.model.process import VP
from palindrome.model.restoration import Gray, restore
from palindrome.model.unet import UNet
from palindrome.pipeline.images.decode import Preprocess, decode
from palindrome.pipeline.images.metrics import to_model, to_pixels
from palindrome.pipeline.images.pixels import pixels_of
from palindrome.pipeline.runs.schemas import metadata_of
from palindrome.pipeline.runs.shards import read_latents
from palindrome.pipeline.storage.folder import Folder

FLAGS = ["--steps", 4, "--ladder", "linear", "--corrections", 2, "--inline"]
LEVELS = ladder("linear", 4)
IMAGES = 12


@pytest.fixture(scope="module")
def conditional(tiny):
    """A model of ten classes, whose outputs depend on the class."""
    network = UNet(dataclasses.replace(tiny.config, num_class_embeds=10))
    generator = torch.Generator().manual_seed(1)
    classes = {
        "class_embedding.weight": 3 * torch.randn(10, 4 * tiny.config.block_out_channels[0], generator=generator)
    }
    return unet2d.UNet2D(network.config, {**tiny.weights, **classes}, VP())


@pytest.fixture(scope="module")
def model(conditional, tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional") / "model"
    unet2d.save(conditional, str(folder))
    return folder


@pytest.fixture(scope="module")
def images(sample, tmp_path_factory):
    """Of the sample, one without a class, one of a class that the model does not know."""
    table = pq.read_table(sample).slice(0, IMAGES)
    labels = table["label"].to_pylist()
    labels[3], labels[7] = None, 10
    path = tmp_path_factory.mktemp("labelled") / "images.parquet"
    at = table.schema.get_field_index("label")
    pq.write_table(table.set_column(at, "label", pa.array(labels, pa.int64())), path)
    return path


@pytest.fixture(scope="module")
def run(palindrome, images, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("classes") / "run"
    flags = [*FLAGS, "--class-column", "label", "--measure"]
    said = palindrome("encode", "--images", images, "--model", model, "--out", out, *flags)
    assert said.code == 0, said.err
    return out


def assert_refused(said, words):
    assert said.code == 2
    assert len(said.err.splitlines()) == 1
    assert re.search(words, said.err), said.err


def rows(run):
    shards = sorted(path.stem for path in (run / "latents").glob("*.parquet"))
    for shard in shards:
        for stored, latents in read_latents(Folder(str(run)), shard, 100):
            yield from zip(stored, torch.from_numpy(latents), strict=True)


def of_class(conditional, number):
    condition = conditional.with_classes(ClassOf(value=number)).condition([{}])
    return conditional.denoiser(), condition


def _inverted(conditional, pixels, number):
    network, condition = of_class(conditional, number)
    x = to_model(pixels[None])
    return invert_exactly(network, x, LEVELS, VP(), condition=condition, corrections=2)[0][0]


def test_each_image_is_encoded_under_its_class(run, pngs, conditional):
    found = {int(row["image_id"].rpartition("#")[2]): (row, latent) for row, latent in rows(run)}
    assert sorted(found) == [i for i in range(IMAGES) if i not in (3, 7)]
    for i, (row, latent) in found.items():
        pixels, *_ = decode(pngs[i], Preprocess(16))
        right, wrong = (_inverted(conditional, pixels, (row["label"] + more) % 10) for more in (0, 1))
        torch.testing.assert_close(latent, right, rtol=1e-3, atol=1e-3)
        assert (latent - wrong).abs().max() > 0.1


def test_an_image_without_a_class_that_the_model_knows_is_a_reject(run):
    rejects = pq.read_table(run / "rejects").to_pylist()
    assert [row["reason"] for row in rejects] == ["no_class", "no_class"]
    assert {row["image_id"].rpartition("#")[2] for row in rejects} == {"3", "7"}
    assert any("10" in row["detail"] for row in rejects)


def test_a_sweep_rejects_them_too(images, model, palindrome, tmp_path):
    flags = ["--steps", 4, "--ladder", "linear", "--corrections", 1, "--inline", "--class-column", "label"]
    said = palindrome("sweep", "--images", images, "--model", model, "--out", tmp_path / "out", *flags)
    assert said.code == 0, said.err
    assert "2 rejected as no_class" in said.out
    assert len(pq.read_table(tmp_path / "out/sweep")) == IMAGES - 2


def test_the_run_says_what_it_was_told_and_verifies(run, palindrome):
    assert palindrome("verify", run, "--deep", 4).code == 0
    said = palindrome("status", run)
    assert said.code == 0


def test_it_is_reconstructed_under_its_classes(run, palindrome, tmp_path):
    said = palindrome("reconstruct", "--latents", run, "--out", tmp_path / "out", "--inline")
    assert said.code == 0, said.err
    found = pq.read_table(tmp_path / "out/reconstructions", columns=["image_id", "mse"]).to_pylist()
    stored = {row["image_id"]: row["mse"] for row, _ in rows(run)}
    assert len(found) == IMAGES - 2
    for row in found:
        assert row["mse"] == pytest.approx(stored[row["image_id"]], rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("number", [None, 3])
def test_it_is_decoded_under_its_classes_or_another(run, palindrome, tmp_path, conditional, number):
    flags = [] if number is None else ["--class", number]
    said = palindrome("regenerate", "--latents", run, "--out", tmp_path / "out", "--inline", *flags)
    assert said.code == 0, said.err
    images = {row["image_id"]: row for row in pq.read_table(tmp_path / "out/images").to_pylist()}
    for row, latent in rows(run):
        network, condition = of_class(conditional, row["label"] if number is None else number)
        expected = to_pixels(ddim.sample(network, latent[None], LEVELS, VP(), condition=condition))[0]
        found = pixels_of(images[row["image_id"]]["image"]["bytes"])
        assert np.abs(found.astype(int) - expected).max() <= 1
    assert palindrome("verify", tmp_path / "out").code == 0


def test_samples_are_of_the_class(model, palindrome, tmp_path, conditional):
    flags = ["--model", model, "--count", 3, "--seed", 5, "--steps", 4, "--ladder", "linear", "--inline"]
    said = palindrome("generate", *flags, "--class", 2, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    network, condition = of_class(conditional, 2)
    for row in pq.read_table(tmp_path / "out/images").to_pylist():
        x = ddim.sample_noise(5, row["index"], conditional.latent_shape)
        expected = to_pixels(ddim.sample(network, x, LEVELS, VP(), condition=condition))[0]
        assert np.abs(pixels_of(row["image"]["bytes"]).astype(int) - expected).max() <= 1
    said = palindrome("generate", *flags, "--class", 3, "--out", tmp_path / "out")
    assert said.code == 2 and "--class was 2, now 3" in said.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--class-column: the model is class-conditional, and is told no class"),
        (["--class", 10], "--class: .*10"),
        (["--class", 1, "--class-column", "label"], "--class-column: can't be combined with --class"),
        (["--class-column", "colour"], "--class-column: .*colour"),
    ],
)
def test_a_class_that_is_not_said_or_not_known_is_an_error(images, model, palindrome, tmp_path, flags, words):
    said = palindrome("encode", "--images", images, "--model", model, "--out", tmp_path / "out", *FLAGS, *flags)
    assert_refused(said, words)


def test_a_model_without_classes_is_told_none(images, palindrome, tmp_path, tiny):
    unet2d.save(tiny, str(tmp_path / "model"))
    flags = ["--images", images, "--model", tmp_path / "model", "--out", tmp_path / "out", *FLAGS]
    said = palindrome("encode", *flags, "--class", 1)
    assert said.code == 2 and "the model is not class-conditional" in said.err


def test_frames_between_images_need_one_class(run, palindrome, tmp_path):
    flags = ["--latents", run, "--out", tmp_path / "out", "--pairs", "random:1", "--frames", 3, "--inline"]
    said = palindrome("interpolate", *flags)
    assert said.code == 2 and "--class: the images have classes of their own" in said.err
    assert palindrome("interpolate", *flags, "--class", 4).code == 0


@pytest.fixture(scope="module")
def guided(palindrome, images, model, tmp_path_factory):
    """A run at W = 2, where class 9 stands for none."""
    out = tmp_path_factory.mktemp("guided") / "run"
    flags = [*FLAGS, "--class-column", "label", "--guidance", 2, "--null-class", 9]
    said = palindrome("encode", "--images", images, "--model", model, "--out", out, *flags)
    assert said.code == 0, said.err
    return out


def decoded_with(conditional, latent, weight, number):
    """By eq. 12 alone, with u + W (c - u)."""
    network = conditional.denoiser()
    with_it, without = (conditional.with_classes(ClassOf(value=n)).condition([{}]) for n in (number, 9))

    def combined(x, t):
        u, c = network(x, t, without), network(x, t, with_it)
        return u + weight * (c - u)

    return to_pixels(ddim.sample(combined, latent[None], LEVELS, VP()))[0]


@pytest.mark.parametrize(("weight", "flags"), [(2, []), (1, ["--guidance", 1]), (3, ["--guidance", 3])])
def test_latents_are_decoded_with_their_guidance_or_another(guided, palindrome, tmp_path, conditional, weight, flags):
    said = palindrome("regenerate", "--latents", guided, "--out", tmp_path / "out", "--inline", *flags)
    assert said.code == 0, said.err
    images = {row["image_id"]: row for row in pq.read_table(tmp_path / "out/images").to_pylist()}
    assert len(images) == IMAGES - 2
    for row, latent in rows(guided):
        expected = decoded_with(conditional, latent, weight, row["label"])
        assert np.abs(pixels_of(images[row["image_id"]]["image"]["bytes"]).astype(int) - expected).max() <= 1


def test_guidance_is_recorded_and_verifies(guided, palindrome, images, model):
    manifest = json.loads((guided / "run.json").read_text())
    assert manifest["guidance"] == {"weight": 2.0, "null_class": 9}
    schema = pq.read_schema(next((guided / "latents").glob("*.parquet")))
    assert metadata_of(schema)["guidance"] == manifest["guidance"]
    assert palindrome("verify", guided, "--deep", 4).code == 0
    flags = ["--images", images, "--model", model, "--out", guided, *FLAGS, "--class-column", "label"]
    said = palindrome("encode", *flags, "--guidance", 2.5, "--null-class", 9)
    assert said.code == 2 and "guidance was 2.0, now 2.5" in said.err
    said = palindrome("encode", *flags)
    assert said.code == 2 and "guidance was 2.0, now None" in said.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--guidance", 2], "--guidance: .* the class that stands for none"),
        (["--guidance", 2, "--null-class", 10], "--null-class: .*10"),
        (["--null-class", 9], "--null-class: goes with --guidance"),
        (["--guidance", -1], "--guidance"),
        (["--guidance", "nan"], "--guidance"),
    ],
)
def test_guidance_that_can_not_be_is_an_error(images, model, palindrome, tmp_path, flags, words):
    flags = [*FLAGS, "--class", 1, *flags]
    said = palindrome("encode", "--images", images, "--model", model, "--out", tmp_path / "out", *flags)
    assert_refused(said, words)


def test_a_model_without_classes_is_not_guided(images, palindrome, tmp_path, tiny):
    unet2d.save(tiny, str(tmp_path / "model"))
    flags = ["--images", images, "--model", tmp_path / "model", "--out", tmp_path / "out", *FLAGS]
    said = palindrome("encode", *flags, "--guidance", 2)
    assert said.code == 2 and "--guidance: the model is not class-conditional" in said.err


def test_samples_are_guided(model, palindrome, tmp_path, conditional):
    flags = ["--model", model, "--count", 2, "--seed", 5, "--steps", 4, "--ladder", "linear", "--inline"]
    said = palindrome("generate", *flags, "--class", 2, "--guidance", 3, "--null-class", 9, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    for row in pq.read_table(tmp_path / "out/images").to_pylist():
        [x] = ddim.sample_noise(5, row["index"], conditional.latent_shape)
        expected = decoded_with(conditional, x, 3, 2)
        assert np.abs(pixels_of(row["image"]["bytes"]).astype(int) - expected).max() <= 1


def test_a_notebook_decodes_under_a_class_and_with_guidance(guided, palindrome, tmp_path):
    flags = ["--class", 3, "--guidance", 3, "--out", tmp_path / "out", "--inline"]
    assert palindrome("regenerate", "--latents", guided, *flags).code == 0
    images = {row["image_id"]: row["image"]["bytes"] for row in pq.read_table(tmp_path / "out/images").to_pylist()}
    run = open_run(guided)
    for image_id, picture in zip(run.ids, run.decode(run.ids, class_=3, guidance=3), strict=True):
        assert np.abs(np.asarray(picture).astype(int) - pixels_of(images[image_id])).max() <= 1
    with pytest.raises(ValueError, match="class_ says"):
        run.decode(run.ids[:1], guidance=3)


def test_an_image_is_restored_as_one_of_its_class_with_the_noise_of_its_id(
    palindrome, images, conditional, model, tmp_path
):
    flags = ["--task", "colorize", "--class-column", "label", "--steps", 4, "--seed", 5, "--inline"]
    said = palindrome("restore", "--images", images, "--model", model, "--out", tmp_path / "run", *flags)
    assert said.code == 0 and "10 images restored and 2 rejects" in said.out, said.err
    told = conditional.with_classes(ClassOf("label"))
    for row in pq.read_table(tmp_path / "run/images").to_pylist()[:3]:
        name = row["image_id"]
        content = pq.read_table(images)["img"][int(name.rpartition("#")[2])].as_py()["bytes"]
        y = to_model(decode(content, Preprocess(16))[0][None]).mean(1, keepdim=True)
        noise = ddim.noise_stream(5, [ddim.noise_index(f"0/{name}")], (3, 16, 16))
        how = {"noise": noise, "condition": told.condition([row])}
        found = restore(told.denoiser(), y, Gray(), LEVELS, told.process, **how)
        assert np.abs(to_pixels(found)[0].astype(int) - pixels_of(row["image"]["bytes"])).max() <= 1


def test_a_part_of_the_steps_is_edited_as_another_class(palindrome, run, tmp_path):
    """As `regenerate` does it; and in a mask, outside of which each image keeps the class that it was encoded with."""
    flags = ["--latents", run, "--class", 5, "--keep-until", 0.5, "--inline"]
    assert palindrome("regenerate", *flags, "--out", tmp_path / "whole").code == 0
    found = {}
    for name, more in {"edit": [], "masked": ["--mask", "box:0.25"]}.items():
        said = palindrome("edit", *flags, *more, "--out", tmp_path / name)
        assert said.code == 0, said.err
        assert palindrome("verify", tmp_path / name).code == 0
        found[name] = {row["image_id"]: row for row in pq.read_table(tmp_path / name / "images").to_pylist()}
    for row in pq.read_table(tmp_path / "whole/images").to_pylist():
        whole, own = pixels_of(row["image"]["bytes"]), pixels_of(found["edit"][row["image_id"]]["own"]["bytes"])
        edited, masked = (pixels_of(found[name][row["image_id"]]["image"]["bytes"]) for name in found)
        assert np.abs(edited.astype(int) - whole).max() <= 1 < np.abs(edited.astype(int) - own).max()
        stays = np.ones((16, 16), bool)
        stays[4:12, 4:12] = False
        assert np.array_equal(masked[stays], own[stays]) and not np.array_equal(masked, own)
    manifest = json.loads((tmp_path / "edit/run.json").read_text())
    assert manifest["classes"] == {"column": "label", "class": None}
    assert manifest["edit"]["told"] == {"classes": {"column": None, "class": 5}}
