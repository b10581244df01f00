"""palindrome direction: against DuckDB's rows and NumPy's means, and what is no direction."""

import json
import shutil

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from palindrome.model.ddim import sample
from palindrome.model.families import unet2d
from palindrome.model.process import VP
from palindrome.pipeline.runs.shards import tensor_array

GROUPS = ["--where", "label in [3, 5]", "--against", "label in [0, 8, 9]"]


@pytest.fixture(scope="module")
def encoded(palindrome, sample, model, tmp_path_factory):
    """24 images in three shards, with their labels."""
    out = tmp_path_factory.mktemp("encoded") / "run"
    flags = ["--limit", 24, "--shard-size", 8, "--steps", 4, "--keep", "label", "--dtype", "float16"]
    assert palindrome("encode", "--images", sample, "--model", model, "--out", out, *flags).code == 0
    return out


@pytest.fixture
def direction(palindrome, encoded, tmp_path):
    """direction(flags...) -> what was said; a file tmp_path / "d.safetensors"."""
    return lambda *flags: palindrome(
        "direction", "--latents", encoded, "--out", tmp_path / "d.safetensors", *GROUPS, *flags
    )


def stored(encoded, x_of=lambda x: x):
    """The latents of the groups, by bare pyarrow."""
    tables = [pq.read_table(path) for path in sorted((encoded / "latents").iterdir())]
    x = np.concatenate([t["latent"].combine_chunks().to_numpy_ndarray() for t in tables]).astype(np.float32)
    labels = np.array([label for t in tables for label in t["label"].to_pylist()])
    x = np.asarray(x_of(torch.tensor(x)), np.float64)
    return x[np.isin(labels, [3, 5])], x[np.isin(labels, [0, 8, 9])]


def pooled(first, second):
    """The deviation of a difference of means, as in Student's test of two groups, over all values."""
    n, m = len(first), len(second)
    within = (first.var(0, ddof=1) * (n - 1) + second.var(0, ddof=1) * (m - 1)).sum() / (n + m - 2)
    return np.sqrt(within * (1 / n + 1 / m))


def by_chance(said):
    return float(said.out.partition("as many images: ")[2].split()[0])


def test_it_is_the_difference_of_the_means(direction, encoded, tmp_path, tiny):
    said = direction()
    assert said.code == 0, said.err
    first, second = stored(encoded)
    assert len(first) != len(second)
    expected = first.mean(0) - second.mean(0)
    values = load_file(tmp_path / "d.safetensors")["direction"]
    assert values.dtype == torch.float32
    np.testing.assert_array_equal(values.numpy(), expected.astype(np.float32))
    assert f"{len(first)} latents for which label in [3, 5], {len(second)} for which label in [0, 8, 9]" in said.out
    assert f"of norm {np.linalg.norm(expected):.3g}" in said.out
    assert by_chance(said) == pytest.approx(pooled(first, second), rel=0.01)
    with safe_open(tmp_path / "d.safetensors", "np") as file:
        about = file.metadata()
    assert {json.loads(about[name]) for name in ("where", "against", "model_digest")} == {
        *("label in [3, 5]", "label in [0, 8, 9]", tiny.digest)
    }
    levels = json.loads((encoded / "run.json").read_text())["levels"]
    assert json.loads(about["levels"]) == levels and about["steps"] == "0"
    assert json.loads(about["counts"]) == [len(first), len(second)]


def test_along_the_path_it_is_that_of_the_states(direction, encoded, tmp_path, tiny):
    """Whatever batches they are decoded in: of the sampler's states, and the variance within the groups."""
    said = direction("--at", 0.5)
    assert said.code == 0, said.err
    levels = json.loads((encoded / "run.json").read_text())["levels"]
    first, second = stored(encoded, lambda x: sample(tiny.denoiser(), x, levels[2:], tiny.process))
    expected = first.mean(0) - second.mean(0)
    np.testing.assert_allclose(load_file(tmp_path / "d.safetensors")["direction"], expected, rtol=1e-3, atol=1e-3)
    assert f"direction at level {levels[2]}, of norm" in said.out
    assert by_chance(said) == pytest.approx(pooled(first, second), rel=0.01)


def test_one_that_says_nothing_is_named(palindrome, encoded, tmp_path):
    """Between noise and noise: latents drawn in place of those of the images."""
    copy, random = shutil.copytree(encoded, tmp_path / "run"), np.random.default_rng(0)
    for path in (copy / "latents").iterdir():
        found = pq.read_table(path)
        noise = random.standard_normal((len(found), 3, 16, 16)).astype(np.float16)
        field = found.schema.field("latent")
        found = found.set_column(found.schema.get_field_index("latent"), field, tensor_array(field.type, noise))
        pq.write_table(found, path)
    command = ["direction", "--latents", copy, *GROUPS, "--out", tmp_path / "d.safetensors"]
    said = palindrome(*command)
    assert said.code == 0 and "no longer than between random groups: it says nothing" in said.err
    n, m = map(len, stored(encoded))
    assert by_chance(said) == pytest.approx(np.sqrt(768 * (1 / n + 1 / m)), rel=0.02)


def test_a_run_in_progress_says_over_how_much_it_is(palindrome, encoded, tmp_path):
    copy = shutil.copytree(encoded, tmp_path / "run")
    sorted((copy / "latents").iterdir())[0].unlink()
    said = palindrome("direction", "--latents", copy, *GROUPS, "--out", tmp_path / "d.safetensors")
    assert said.code == 0 and "the encode run is not complete: 2 of 3 shards" in said.err
    [(count,)] = duckdb.sql(f"select count(*) from '{copy}/latents/*.parquet' where label in (3, 5)").fetchall()
    assert f"{count} latents for which label in" in said.out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--against", "label >= 5"], "--against: in both groups are cifar10-test-256.parquet#"),
        (["--where", "label == 77"], "--where: no latent matches label == 77"),
        (["--against", "label == 77"], "--against: no latent matches label == 77"),
        (["--where", "nosuch == 1"], "--where: 'nosuch' is not a column"),
        (["--against", "label"], "--against: 'label' is not true or false"),
        (["--at", 1.5], "--at: 1.5 is out of range"),
        (["--at", 0.5, "--model", "nosuch"], "nosuch is no checkpoint folder"),
        (["--latents", "nosuch"], "--latents: "),
    ],
)
def test_what_makes_no_sense_is_refused(direction, tmp_path, flags, words):
    said = direction(*flags)
    assert said.code == 2 and words in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "d.safetensors").exists()


def test_a_dry_run_writes_nothing(direction, tmp_path):
    said = direction("--at", 0.5, "--dry-run")
    assert said.code == 0 and "network evaluations; one file" in said.out
    assert not (tmp_path / "d.safetensors").exists()


def test_edit_takes_none_of_another_model_shape_or_program(palindrome, direction, encoded, tiny, tmp_path):
    assert direction().code == 0
    file, other = tmp_path / "d.safetensors", tmp_path / "other"
    with safe_open(file, "pt") as opened:
        about, values = opened.metadata(), opened.get_tensor("direction")

    def refused(latents=encoded):
        said = palindrome("edit", "--latents", latents, "--direction", file, "--out", tmp_path / "run")
        assert said.code == 2 and said.err.startswith("palindrome edit: error: --direction: "), said.err
        return said.err

    unet2d.save(tiny.with_process(VP(prediction_type="v_prediction")), str(other / "model"))
    flags = ["--images", encoded, "--out", other / "run", "--steps", 2, "--limit", 1]
    sample = json.loads((encoded / "run.json").read_text())["config"]["images"]
    flags[1] = sample
    assert palindrome("encode", "--model", other / "model", *flags).code == 0
    assert f"latents of another model: digest {tiny.digest[:12]}" in refused(other / "run")
    save_file({"direction": values[:, 1:].contiguous()}, file, about)
    assert "it has the shape [3, 15, 16], and the latents have [3, 16, 16]" in refused()
    save_file({"direction": values * torch.nan}, file, about)
    assert "has values that are not finite" in refused()
    save_file({"direction": values}, file, {**about, "palindrome_direction": "2"})
    assert "its version is not 1" in refused()
    save_file({"direction": values}, file, {**about, "steps": "9"})
    assert "9 steps are not on its ladder" in refused()
    save_file({"direction": values}, file)
    assert "is no file of palindrome direction" in refused()
    file.write_bytes(b"no safetensors")
    assert "is no file of palindrome direction" in refused()
    assert not (tmp_path / "run").exists()
