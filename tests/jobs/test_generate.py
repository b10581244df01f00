"""Samples depend on the seed, their index and the model: not on workers, shards, batches or what was killed."""

import io
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from PIL import Image

from palindrome.model.ddim import sample, sample_noise
from palindrome.model.families import unet2d
from palindrome.model.ladder import ladder
from palindrome.pipeline.images.metrics import to_pixels

COUNT = 60


def read(run):
    """(ids, images uint8 [N, H, W, 3], x_T [N, C, H, W] or None), by index."""
    table = pa.concat_tables([pq.read_table(f) for f in sorted(Path(run, "images").glob("*.parquet"))])
    table = table.sort_by("index")
    images = [np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in table["image"].to_pylist()]
    noise = table["latent"].combine_chunks().to_numpy_ndarray() if "latent" in table.column_names else None
    return table["image_id"].to_pylist(), np.stack(images), noise


def command(model, out, *flags):
    return ["generate", "--model", model, "--count", COUNT, "--steps", 4, "--out", out, *flags]


@pytest.fixture(scope="module")
def gaussian(tiny, tmp_path_factory):
    """A network that is 0 everywhere: as v-prediction, the exact one for images that are noise of N(0, I) themselves,
    since E[x0 | x_t] is then sqrt(alpha_bar) x_t."""
    weights = {name: torch.zeros_like(value) for name, value in tiny.weights.items()}
    folder = tmp_path_factory.mktemp("checkpoints") / "gaussian"
    unet2d.save(
        replace(tiny, weights=weights, process=replace(tiny.process, prediction_type="v_prediction")), str(folder)
    )
    return folder


@pytest.mark.parametrize("steps", [3, 25])
@pytest.mark.parametrize("eta", [0, 0.5, 1])
def test_moments_are_those_of_a_known_distribution(eta, steps, palindrome, gaussian, tiny, tmp_path):
    """Eq. 12 and 16 with that network are linear in x and in the noise: x0 is Gaussian, of a deviation and a share of
    x_T that a recursion gives. Files hold it clipped to [-1, 1], which Bussgang's theorem follows."""
    flags = ["--model", gaussian, "--count", 200, "--steps", steps, "--eta", eta, "--latents", "float32"]
    assert palindrome("generate", *flags, "--out", tmp_path).code == 0
    _, images, noise = read(tmp_path)
    share, variance = 1.0, 1.0
    levels = ladder("linear", steps)
    for low, high in reversed(list(pairwise(levels))):
        a_from, a_to = tiny.process.alpha_bar(high), tiny.process.alpha_bar(low)
        sigma = eta * math.sqrt((1 - a_to) / (1 - a_from)) * math.sqrt(1 - a_from / a_to)  # eq. 16
        factor = math.sqrt(a_to * a_from) + math.sqrt((1 - a_to - sigma**2) * (1 - a_from))  # eq. 12, epsilon and x0
        share, variance = share * factor, variance * factor**2 + (0 if low < 0 else sigma**2)
    x0, x_T = (images / 127.5 - 1).ravel(), noise.transpose(0, 2, 3, 1).ravel()
    normal, deviation = NormalDist(), math.sqrt(variance)
    inside = 2 * normal.cdf(1 / deviation) - 1
    clipped = variance * (inside - 2 / deviation * normal.pdf(1 / deviation)) + 1 - inside
    error = 5 / math.sqrt(len(x0))  # five standard errors of the mean of numbers whose deviation is about 1
    assert abs(x0.mean()) < error
    assert abs(np.square(x0).mean() - clipped) < error
    assert abs((x0 * x_T).mean() - share * inside) < error
    if eta == 0:
        assert np.abs(x0 - np.clip(share * x_T, -1, 1)).max() < 1 / 127
    else:
        assert share < 0.9 and variance > share**2 + 0.05


@pytest.fixture(scope="module")
def one(palindrome, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("generate") / "one"
    said = palindrome(*command(model, out, "--latents", "float32", "--shard-size", 16))
    assert said.code == 0, said.err
    return read(out)


def test_samples_are_what_the_model_makes_of_their_noise(one, tiny):
    ids, images, noise = one
    assert ids == [f"{i:09d}" for i in range(COUNT)]
    expected = torch.cat([sample_noise(0, i, (3, 16, 16)) for i in range(COUNT)])
    assert np.array_equal(noise, expected.numpy())
    decoded = to_pixels(sample(tiny.network(), expected, ladder("linear", 4), tiny.process))
    assert np.abs(images.astype(int) - decoded).max() <= 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--shard-size", 7),
        ("--workers", 2, "--shard-size", 16, "--batch-size", 5),
        ("--shard-size", 100, "--batch-size", 1),
    ],
    ids=["small shards", "two workers", "one by one"],
)
def test_workers_shards_and_batches_change_nothing_but_rounding(one, flags, palindrome, model, tmp_path):
    assert palindrome(*command(model, tmp_path / "run", "--latents", "float32", *flags)).code == 0
    ids, images, noise = read(tmp_path / "run")
    assert ids == one[0]
    assert np.array_equal(noise, one[2])
    assert np.abs(images.astype(int) - one[1]).max() <= 1  # kernels differ between batch sizes: a value may round up


def test_a_killed_worker_changes_nothing(one, start, ray_here, kill_workers, model, tmp_path):
    out = tmp_path / "run"
    flags = ("--latents", "float32", "--shard-size", 4, "--batch-size", 2, "--steps", 20, "--address", ray_here)
    process = start(*command(model, out, *flags))
    kill_workers(process, out, "images/*.parquet")
    out_text, err = process.communicate()
    assert process.returncode == 0, out_text + err
    ids, _, noise = read(out)
    assert ids == one[0] and np.array_equal(noise, one[2])


@pytest.mark.parametrize("flags", [("--eta", 1, "--clip"), ("--sigma-hat",)], ids=str)
def test_stochastic_samples_do_not_depend_on_batches_either(one, flags, palindrome, model, tmp_path):
    for name, batch in (("a", 64), ("b", 7)):
        assert palindrome(*command(model, tmp_path / name, "--batch-size", batch, *flags)).code == 0
    (_, a, _), (_, b, _) = read(tmp_path / "a"), read(tmp_path / "b")
    assert np.abs(a.astype(int) - b).max() <= 1
    assert np.abs(a.astype(int) - one[1]).max() > 1


def test_the_same_command_goes_on_and_another_is_refused(palindrome, model, tmp_path, times):
    assert palindrome(*command(model, tmp_path, "--shard-size", 20)).code == 0
    removed = sorted((tmp_path / "images").iterdir())[0]
    content, before = removed.read_bytes(), times(tmp_path)
    removed.unlink()
    said = palindrome(*command(model, tmp_path, "--shard-size", 20))
    assert said.code == 0 and "60 samples in 3 shards, 1 to generate" in said.out
    again = pq.read_table(pa.BufferReader(removed.read_bytes()))
    assert again.equals(pq.read_table(pa.BufferReader(content)))
    changed = {name for name, when in times(tmp_path).items() if before.get(name) != when}
    assert changed == {f"images/{removed.name}", "samples.png"}
    said = palindrome(*command(model, tmp_path, "--shard-size", 20, "--seed", 1))
    assert said.code == 2 and "--seed was 0, now 1" in said.err
    assert json.loads((tmp_path / "summary.json").read_text())["images"] == COUNT
    assert "60 images" in palindrome("status", tmp_path).out


def test_a_run_is_read_by_duckdb_and_says_how_it_was_made(palindrome, model, tmp_path):
    assert palindrome(*command(model, tmp_path, "--eta", 0.3, "--seed", 5)).code == 0
    rows = duckdb.sql(f"select image_id, index, image.path from '{tmp_path}/images/*.parquet' order by 1").fetchall()
    assert rows[:2] == [("000000000", 0, "000000000.png"), ("000000001", 1, "000000001.png")]
    [file] = (tmp_path / "images").iterdir()
    facts = json.loads(pq.read_schema(file).metadata[b"palindrome"])
    assert (facts["eta"], facts["seed"], facts["levels"]) == (0.3, 5, list(ladder("linear", 4)))
    assert Image.open(tmp_path / "samples.png").size == (8 * 18 - 2, 8 * 18 - 2)
    pictures = tmp_path / "pictures"
    assert palindrome("export", tmp_path, "--out", pictures, "--format", "png").code == 0
    stored = pq.read_table(file, columns=["image_id", "image"]).to_pylist()
    assert {p.name: p.read_bytes() for p in (pictures / "images").glob("*.png")} == {
        f"{row['image_id']}.png": row["image"]["bytes"] for row in stored
    }


def test_images_are_exported_once_they_are_there(one, palindrome, model, tmp_path):
    said = palindrome(*command(model, tmp_path, "--format", "png"))
    assert said.code == 0 and f"the images are in {tmp_path}/png/images" in said.out
    said = palindrome(*command(model, tmp_path, "--format", "webp"))  # another format is the same run
    assert said.code == 0 and "0 to generate" in said.out
    for form in ("png", "webp"):
        for name, expected in zip(one[0], one[1], strict=True):
            found = np.asarray(Image.open(tmp_path / form / "images" / f"{name}.{form}")).astype(int)
            assert np.abs(found - expected).max() <= 1
    assert "60 images" in palindrome("status", tmp_path).out
    assert palindrome("export", tmp_path, "--out", tmp_path / "png", "--format", "png").code == 0  # the very command


def test_samples_are_those_of_diffusers(one, tiny, model):
    """The pipeline that diffusers' users have, from the same noise."""
    pipeline = DDIMPipeline.from_pretrained(str(model))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.scheduler.set_timesteps(4)
    x = torch.from_numpy(one[2].copy())
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
    assert np.abs(one[1].astype(int) - to_pixels(x)).max() <= 1
