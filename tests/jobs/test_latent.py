"""Latent diffusion in every command: images with captions are encoded under them and decoded under others."""

import io
import json
import re
import tarfile
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from palindrome import open as open_run
from palindrome.model import families
from palindrome.model.condition import TextOf
from palindrome.model.ddim import sample as ddim_sample
from palindrome.model.inversion import invert_exactly
from palindrome.pipeline.images.decode import Preprocess, decode
from palindrome.pipeline.images.metrics import to_model
from palindrome.pipeline.images.pixels import pixels_of
from palindrome.pipeline.runs.schemas import metadata_of

COUNT, STEPS = 8, 4
FLAGS = ["--steps", STEPS, "--corrections", 2, "--ladder", "diffusers"]
CAPTIONS = [
    "a photo of a cat",
    None,
    " ".join(f"word{i}" for i in range(500)),
    "一只猫坐在窗边，阳光照进来",
    "a ship\0on the sea",
    "",
    "A Frog, close up.",
    "a photo of a cat",
]


@pytest.fixture(scope="module")
def model(pipelines):
    return pipelines("stable_diffusion")[0]


@pytest.fixture(scope="module")
def images(sample, tmp_path_factory):
    """Of the sample, with captions: one has none."""
    table = pq.read_table(sample).slice(0, COUNT)
    path = tmp_path_factory.mktemp("captioned") / "images.parquet"
    pq.write_table(table.append_column("caption", pa.array(CAPTIONS)), path)
    return path


@pytest.fixture(scope="module")
def run(palindrome, images, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("latent") / "run"
    flags = [*FLAGS, "--prompt-column", "caption", "--measure"]
    said = palindrome("encode", "--images", images, "--model", model, "--out", out, *flags)
    assert said.code == 0, said.err
    assert "in the latent space" in said.out
    assert said.err.splitlines()[-1] == "1 prompts are longer than the model can be told, and were cut"
    return out


@pytest.fixture
def decode_image(pngs):
    """Of a stored row the image's pixels, as the model is given them."""
    return lambda row: decode(pngs[int(row["image_id"].rpartition("#")[2])], Preprocess(32))[0]


def numbered(rows):
    return {int(row["image_id"].rpartition("#")[2]): row for row in rows}


def inverted(model, pixels, prompt):
    """The latent of an image, by the model's parts alone."""
    loaded = families.load(model).with_texts(TextOf(text=prompt))
    state = loaded.autoencoder().to_state(to_model(pixels[None]))
    how = {"levels": loaded.own_ladder(STEPS), "process": loaded.process, "condition": loaded.condition([{}])}
    return invert_exactly(loaded.denoiser(), state, corrections=2, **how)[0][0]


def test_each_image_is_encoded_under_its_caption(run, read_run, pngs, model):
    """The one of 500 words is cut as CLIP cuts it, in Chinese and with a NUL it is a text like others."""
    found = read_run(run)
    rows = numbered(found.rows)
    assert sorted(rows) == [i for i in range(COUNT) if CAPTIONS[i] is not None]
    for row, latent in zip(found.rows, found.latents, strict=True):
        i = int(row["image_id"].rpartition("#")[2])
        assert row["caption"] == CAPTIONS[i]
        pixels, *_ = decode(pngs[i], Preprocess(32))
        expected = inverted(model, pixels, CAPTIONS[i])
        np.testing.assert_allclose(latent, expected, rtol=1e-3, atol=1e-3)
        assert np.abs(latent - inverted(model, pixels, "another text").numpy()).max() > 0.01


def test_an_image_without_a_caption_is_a_reject_or_has_that_of_all(run, images, model, palindrome, tmp_path):
    [reject] = pq.read_table(run / "rejects").to_pylist()
    assert (reject["reason"], reject["image_id"].rpartition("#")[2]) == ("no_prompt", "1")
    flags = [*FLAGS, "--prompt-column", "caption", "--prompt", "a picture"]
    said = palindrome("encode", "--images", images, "--model", model, "--out", tmp_path / "out", *flags)
    assert said.code == 0, said.err
    assert "8 latents and 0 rejects" in said.out


def test_captions_stand_beside_the_images_of_a_tar(model, pngs, palindrome, tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for i, png in enumerate(pngs[:COUNT]):
            members = {"png": png} | ({} if CAPTIONS[i] is None else {"txt": CAPTIONS[i].encode()})
            for ending, content in members.items():
                entry = tarfile.TarInfo(f"{i:03d}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    flags = [*FLAGS, "--prompt-column", "txt"]
    said = palindrome(
        "encode", "--images", tmp_path / "images.tar", "--model", model, "--out", tmp_path / "out", *flags
    )
    assert said.code == 0, said.err
    assert "7 latents and 1 rejects" in said.out
    stored = duckdb.sql(f"SELECT txt FROM '{tmp_path}/out/latents/*.parquet' ORDER BY image_id").fetchall()
    assert [text for (text,) in stored] == [caption for caption in CAPTIONS if caption is not None]


def test_captions_stand_in_text_files_beside_pictures(model, pngs, palindrome, tmp_path):
    for i, png in enumerate(pngs[:COUNT]):
        (tmp_path / "in" / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "deep" / f"{i}.v2.png").write_bytes(png)
        if CAPTIONS[i] is not None:
            (tmp_path / "in" / "deep" / f"{i}.v2.txt").write_text(CAPTIONS[i])
    flags = [*FLAGS, "--prompt-column", "txt", "--measure"]
    command = ["encode", "--images", tmp_path / "in", "--model", model, "--out", tmp_path / "out", *flags]
    said = palindrome(*command)
    assert said.code == 0, said.err
    assert "7 latents and 1 rejects" in said.out
    stored = pl.read_parquet(tmp_path / "out/latents/*.parquet", columns=["image_id", "txt"]).sort("image_id")
    assert stored["txt"].to_list() == [caption for caption in CAPTIONS if caption is not None]
    assert palindrome("verify", tmp_path / "out", "--deep", 3).code == 0
    assert palindrome("reconstruct", "--latents", tmp_path / "out", "--out", tmp_path / "again").code == 0


def test_errors_are_apart(run, read_run, model, pngs):
    """Of the state, of the autoencoder itself, and of what is decoded against it, each by the model's parts."""
    loaded, found = families.load(model), read_run(run)
    vae, ladder = loaded.autoencoder(), loaded.own_ladder(STEPS)
    for row, latent in zip(found.rows, found.latents, strict=True):
        told = loaded.with_texts(TextOf(text=row["caption"]))
        pixels, *_ = decode(pngs[int(row["image_id"].rpartition("#")[2])], Preprocess(32))
        x = to_model(pixels[None])
        z = vae.to_state(x)
        latents, condition = torch.tensor(latent)[None], told.condition([{}])
        state = ddim_sample(loaded.denoiser(), latents, ladder, loaded.process, condition=condition)
        floor, decoded = vae.to_images(z), vae.to_images(state)
        expected = {
            "latent_mse": (state - z).square().mean(),
            "vae_mse": (floor - x).square().mean() / 4,
            "mse_from_vae": (decoded - floor).square().mean() / 4,
            "mse": (decoded - x).square().mean() / 4,
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(float(value), rel=1e-3), name


def test_the_run_says_how_it_was_made_and_verifies(run, palindrome):
    said = palindrome("verify", run, "--deep", 4)
    assert said.code == 0, said.out + said.err
    assert palindrome("status", run).code == 0
    content = json.loads((run / "run.json").read_text())
    assert content["latent_shape"] == [4, 16, 16]
    assert content["autoencoder"] == {"class": "AutoencoderKL", "scaling_factor": 3.2, "shift_factor": 0.0}
    assert content["prompts"] == {"column": "caption", "prompt": None}
    assert (content["set_alpha_to_one"], content["beta_schedule"]) == (False, "scaled_linear")
    [shard] = (run / "latents").iterdir()
    stored = metadata_of(pq.read_schema(shard))
    assert stored["prompts"] == content["prompts"] and stored["levels"] == content["levels"]


def test_it_resumes_and_another_text_is_refused(images, model, palindrome, tmp_path):
    command = ["encode", "--images", images, "--model", model, "--out", tmp_path, *FLAGS, "--shard-size", 3]
    flags = ["--prompt", "a cat", "--guidance", 2, "--negative-prompt", "blurry"]
    assert palindrome(*command, *flags).code == 0
    first = sorted((tmp_path / "latents").iterdir())[0]
    content = first.read_bytes()
    first.unlink()
    said = palindrome(*command, *flags)
    assert said.code == 0 and "1 to encode" in said.out
    assert pq.read_table(first).drop(["residual"]) == pq.read_table(pa.BufferReader(content)).drop(["residual"])
    for other in (["--prompt", "a dog"], ["--prompt", "a cat", "--guidance", 2], ["--prompt", "a cat", *flags[2:4]]):
        said = palindrome(*command, *other)
        assert said.code == 2 and "belongs to another command" in said.err


def test_states_are_refined_and_stored(run, images, model, palindrome, tmp_path, read_run, decode_image):
    flags = [*FLAGS, "--prompt-column", "caption", "--measure", "--decode-inversion", 10, "--vae-latent"]
    command = ["encode", "--images", images, "--model", model, "--out", tmp_path / "run", *flags]
    assert palindrome(*command).code == 0
    assert palindrome("verify", tmp_path / "run", "--deep", 3).code == 0
    plain, refined = read_run(run), read_run(tmp_path / "run")
    for before, after in zip(plain.rows, refined.rows, strict=True):
        assert after["vae_mse"] < before["vae_mse"]
    loaded = families.load(model).with_autoencoder(refinements=10)
    x = [decode_image(row) for row in refined.rows]
    states = loaded.autoencoder().to_state(to_model(np.stack(x)))
    stored = np.array([row["vae_latent"] for row in refined.rows]).reshape(states.shape)
    np.testing.assert_allclose(stored, states, atol=1e-3)
    assert palindrome("reconstruct", "--latents", tmp_path / "run", "--out", tmp_path / "again").code == 0
    found = pq.read_table(tmp_path / "again/reconstructions").to_pylist()
    by_id = {row["image_id"]: row for row in refined.rows}
    assert all(row["vae_mse"] == pytest.approx(by_id[row["image_id"]]["vae_mse"], rel=1e-3) for row in found)
    assert "vae_latent" not in open_run(tmp_path / "run").table().column_names


def test_it_is_reconstructed_with_the_errors_apart(run, palindrome, tmp_path, read_run):
    said = palindrome("reconstruct", "--latents", run, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    stored = {row["image_id"]: row for row in read_run(run).rows}
    found = pq.read_table(tmp_path / "out/reconstructions").to_pylist()
    assert len(found) == len(stored)
    for row in found:
        for name in ("mse", "latent_mse", "vae_mse", "mse_from_vae"):
            assert row[name] == pytest.approx(stored[row["image_id"]][name], rel=1e-3), name
        assert pixels_of(row["vae_image"]["bytes"]).shape == (32, 32, 3)
    assert palindrome("verify", tmp_path / "out").code == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "autoencoder&#39;s round trip, reconstruction" in page and "latent<br>MSE" in page
    [by_steps] = json.loads((tmp_path / "out/summary.json").read_text())["by_steps"]
    assert by_steps["latent_mse"] == pytest.approx(np.mean([row["latent_mse"] for row in found]))


def test_with_other_numbers_of_steps_it_begins_where_its_latents_are(run, palindrome, tmp_path):
    """The scheduler's own ladder ends at timestep 751 with 4 steps, and at 901 with 10."""
    said = palindrome("reconstruct", "--latents", run, "--out", tmp_path, "--steps", 4, 10)
    assert said.code == 0, said.err
    four, ten = json.loads((tmp_path / "run.json").read_text())["ladders"]
    assert four == [-1, 1, 251, 501, 751] and ten[-1] == 751
    assert palindrome("verify", tmp_path).code == 0


def test_it_is_decoded_under_another_text(run, palindrome, model, tmp_path, read_run):
    flags = ["--prompt", "a painting of a dog", "--guidance", 3]
    said = palindrome("regenerate", "--latents", run, "--out", tmp_path / "out", *flags)
    assert said.code == 0, said.err
    assert palindrome("verify", tmp_path / "out").code == 0
    found = {row["image_id"]: row for row in pq.read_table(tmp_path / "out/images").to_pylist()}
    stored = read_run(run)
    loaded = families.load(model).with_texts(TextOf(text=flags[1])).with_guidance(3)
    latents, condition = torch.tensor(stored.latents), loaded.condition([{}] * len(stored.rows))
    state = ddim_sample(loaded.denoiser(), latents, loaded.own_ladder(STEPS), loaded.process, condition=condition)
    expected = ((loaded.autoencoder().to_images(state).clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
    for row, pixels in zip(stored.rows, expected.numpy(), strict=True):
        assert np.abs(pixels_of(found[row["image_id"]]["image"]["bytes"]) - pixels).max() <= 1


def test_frames_between_captioned_images_need_a_text_of_their_own(run, palindrome, tmp_path, read_run):
    ids = read_run(run).ids
    command = ["interpolate", "--latents", run, "--out", tmp_path / "out", "--path", ",".join(ids[:2]), "--frames", 3]
    said = palindrome(*command)
    assert said.code == 2 and "--prompt" in said.err
    assert palindrome(*command, "--prompt", "a cat").code == 0
    assert palindrome("verify", tmp_path / "out").code == 0


def test_a_sweep_measures_it(images, model, palindrome, tmp_path):
    flags = ["--steps", 3, "--ladder", "diffusers", "--corrections", 0, 2, "--prompt-column", "caption"]
    said = palindrome("sweep", "--images", images, "--model", model, "--out", tmp_path / "out", *flags)
    assert said.code == 0, said.err
    assert "1 rejected as no_prompt" in said.out
    assert len(pq.read_table(tmp_path / "out/sweep")) == 2 * (COUNT - 1)


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "ldm", "dit", "stable_diffusion_3", "flux"])
def test_every_pipeline_goes_through_the_commands(pipelines, name, images, palindrome, tmp_path):
    folder, _ = pipelines(name)
    size = ["--size", 32]
    told = {"ldm": [], "dit": ["--class-column", "label"]}.get(name, ["--prompt", "a photo"])
    command = ["encode", "--images", images, "--model", folder, "--out", tmp_path / "run", *FLAGS, *size, *told]
    said = palindrome(*command, "--measure")
    assert said.code == 0, said.err
    assert f"{COUNT} latents and 0 rejects" in said.out
    assert palindrome("verify", tmp_path / "run", "--deep", 2).code == 0
    assert palindrome("reconstruct", "--latents", tmp_path / "run", "--out", tmp_path / "again").code == 0
    one = {"ldm": [], "dit": ["--class", 3]}.get(name, ["--prompt", "a photo"])
    flags = ["--count", 2, "--steps", 3, "--ladder", "diffusers", *size, *one]
    said = palindrome("generate", "--model", folder, "--out", tmp_path / "samples", *flags)
    assert said.code == 0, said.err


def test_in_a_notebook(run, read_run, pngs):
    opened, stored = open_run(run), read_run(run)
    pictures = opened.decode(stored.ids[:2], prompt="a photo of a cat")
    assert [picture.size for picture in pictures] == [(32, 32)] * 2
    i = [row["caption"] for row in stored.rows].index(CAPTIONS[0])
    number = int(stored.ids[i].rpartition("#")[2])
    latent = opened.encode(pngs[number], prompt=CAPTIONS[0])
    np.testing.assert_allclose(latent, stored.latents[i], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="prompt says what the images are"):
        opened.decode(stored.ids[:2])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--class", 3], "--class: the model is not class-conditional"),
        (["--prompt-column", "text"], "--prompt-column: column 'text' is not in"),
        (["--negative-prompt", "blurry"], "--negative-prompt: goes with --guidance"),
        (["--guidance", 2, "--null-class", 3], "--null-class: the model is told texts, not classes"),
        (["--vae-latent", "--class-column", "label"], "--class-column: the model is not class-conditional"),
        (["--size", 33], "--size: the model's images have a multiple of 2 pixels, not 33"),
    ],
)
def test_flags_that_do_not_fit_are_refused(images, model, palindrome, tmp_path, flags, words):
    said = palindrome("encode", "--images", images, "--model", model, "--out", tmp_path / "out", *FLAGS, *flags)
    assert said.code == 2 and len(said.err.splitlines()) == 1
    assert words in said.err


@pytest.mark.parametrize(
    "flags",
    [
        *(["--prompt", "a cat"], ["--prompt-column", "label"], ["--size", 32], ["--ladder", "diffusers"]),
        *(["--vae-tile"], ["--decode-inversion", 5], ["--vae-latent"]),
    ],
)
def test_a_pixel_model_is_told_none_of_it(palindrome, sample, tmp_path, tiny, flags):
    from palindrome.model.families import unet2d

    unet2d.save(tiny, str(tmp_path / "tiny"))
    command = ["encode", "--images", sample, "--model", tmp_path / "tiny", "--out", tmp_path / "out", "--limit", 2]
    said = palindrome(*command, *flags)
    assert said.code == 2 and re.search(flags[0], said.err)


def test_steps_under_the_images_own_text_keep_their_structure(run, palindrome, model, tmp_path, read_run):
    """The first half from the latent on under each image's caption, the others under one text with guidance."""
    flags = ["--prompt", "a painting of a dog", "--guidance", 3, "--keep-until", 0.5]
    said = palindrome("regenerate", "--latents", run, "--out", tmp_path / "out", *flags)
    assert said.code == 0, said.err
    assert palindrome("verify", tmp_path / "out").code == 0
    found = {row["image_id"]: row for row in pq.read_table(tmp_path / "out/images").to_pylist()}
    stored = read_run(run)
    loaded = families.load(model)
    ladder, network, along = loaded.own_ladder(STEPS), loaded.denoiser(), {"process": loaded.process}
    own = loaded.with_texts(TextOf("caption")).condition(stored.rows)
    other = loaded.with_texts(TextOf(text=flags[1])).with_guidance(3).condition(stored.rows)
    half = ddim_sample(network, torch.tensor(stored.latents), ladder[STEPS // 2 :], condition=own, **along)
    state = ddim_sample(network, half, ladder[: STEPS // 2 + 1], condition=other, **along)
    expected = ((loaded.autoencoder().to_images(state).clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    for row, pixels in zip(stored.rows, expected, strict=True):
        assert np.abs(pixels_of(found[row["image_id"]]["image"]["bytes"]) - pixels).max() <= 1
    edited = open_run(run).edit(stored.ids[:3], prompt=flags[1], guidance=3, keep_until=0.5)
    for picture, pixels in zip(edited, expected, strict=False):
        assert np.abs(np.asarray(picture, np.float32) - pixels).max() <= 1


def test_all_of_the_steps_are_a_reconstruction(run, palindrome, tmp_path):
    command = ["regenerate", "--latents", run, "--out", tmp_path / "kept"]
    assert palindrome(*command, "--prompt", "a dog", "--keep-until", 1).code == 0
    assert palindrome("regenerate", "--latents", run, "--out", tmp_path / "plain").code == 0
    kept, plain = (pq.read_table(tmp_path / name / "images")["image"].to_pylist() for name in ("kept", "plain"))
    assert kept == plain
    said = palindrome("regenerate", "--latents", run, "--out", tmp_path / "nothing", "--keep-until", 0.5)
    assert said.code == 2 and "--keep-until: there is no other class, text or guidance" in said.err


def test_an_actor_killed_costs_no_row_and_no_bit(
    palindrome, start, ray_here, kill_workers, images, model, tmp_path, read_run
):
    """On Ray; and a resume after it."""
    flags = [*FLAGS, "--prompt-column", "caption", "--shard-size", 2, "--batch-size", 1]
    command = ["encode", "--images", images, "--model", model, *flags, "--out"]
    assert palindrome(*command, tmp_path / "whole").code == 0
    process = start(*command, tmp_path / "killed", "--address", ray_here)
    kill_workers(process, tmp_path, "killed/latents/*.parquet")
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    for path in list(Path(tmp_path, "killed/latents").iterdir())[:2]:
        path.unlink()
    assert palindrome(*command, tmp_path / "killed").code == 0
    whole, killed = read_run(tmp_path / "whole"), read_run(tmp_path / "killed")
    assert whole.ids == killed.ids
    assert np.array_equal(whole.latents, killed.latents)


def test_an_edit_in_a_mask_keeps_the_originals_pixels(run, palindrome, images, decode_image, tmp_path):
    """Put in at the end, as the autoencoder changes all of them: without its original an image can't be edited so."""
    flags = ["--latents", run, "--prompt", "a painting of a dog", "--keep-until", 0.5, "--mask", "box:0.25"]
    said = palindrome("edit", *flags, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    assert palindrome("verify", tmp_path / "run").code == 0
    missing = np.zeros((32, 32), bool)
    missing[8:24, 8:24] = True
    rows = pq.read_table(tmp_path / "run/images").to_pylist()
    assert len(rows) == COUNT - 1
    for row in rows:
        original, own, edited = (decode_image(row), *(pixels_of(row[name]["bytes"]) for name in ("own", "image")))
        assert np.array_equal(edited[~missing], original[~missing]) and row["changed_outside"] == 0
        assert not np.array_equal(own[~missing], original[~missing])
        assert not np.array_equal(edited[missing], own[missing])
    pictures = open_run(run).edit([row["image_id"] for row in rows], prompt=flags[3], keep_until=0.5, mask="box:0.25")
    for row, picture in zip(rows, pictures, strict=True):
        assert np.array_equal(np.asarray(picture), pixels_of(row["image"]["bytes"]))
    kept = images.read_bytes()
    images.unlink()
    try:
        said = palindrome("edit", *flags, "--out", tmp_path / "gone")
        assert said.code == 1 and "7 rejected as missing" in said.out and "no image could be edited" in said.err
    finally:
        images.write_bytes(kept)


def test_masked_images_are_filled_in_and_nothing_else_is_restored(palindrome, images, model, decode_image, tmp_path):
    """The states are held to where all of their pixels are known; what they decode to is blended in pixels."""
    command = ["restore", "--images", images, "--model", model, "--prompt", "a cat", "--limit", 2, "--steps", 3]
    said = palindrome(*command, "--task", "inpaint", "--mask", "box:0.25", "--out", tmp_path / "run")
    assert said.code == 0, said.err
    rows = pq.read_table(tmp_path / "run/images").to_pylist()
    missing = np.zeros((32, 32), bool)
    missing[8:24, 8:24] = True
    assert len(rows) == 2
    for row in rows:
        original, result = decode_image(row), pixels_of(row["image"]["bytes"])
        assert np.array_equal(result[~missing], original[~missing])
        assert not np.array_equal(result[missing], original[missing])
        assert row["observation_error"] == row["picture_error"] == 0
    assert palindrome("verify", tmp_path / "run").code == 0
    said = palindrome(*command, "--task", "upscale", "--out", tmp_path / "other")
    assert said.code == 2 and "--task: upscale needs a model of pixels" in said.err
