"""palindrome watermark, generate --watermark and score --method tree-ring: keys that are put in are found again."""

import io
import json
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from palindrome.model.watermarks import GaussianShading
from palindrome.pipeline.runs.watermarks import new_keys, read_keys

BUNDLED = Path(__file__).parents[2] / "checkpoints/cifar10-32"


@pytest.fixture(scope="module")
def keys(palindrome, tmp_path_factory):
    """Files of keys: two rings and three of Gaussian Shading."""
    folder = tmp_path_factory.mktemp("keys")
    files = {"tree-ring": folder / "rings.json", "gaussian-shading": folder / "signs.json"}
    said = palindrome(
        "watermark", "--model", BUNDLED, "--method", "tree-ring", "--count", 2, "--out", files["tree-ring"]
    )
    assert said.code == 0 and "2 keys of tree-ring for latents of 3 x 32 x 32 in" in said.out
    names = ["--names", "ann", "ben", "eve"]
    said = palindrome(
        "watermark", "--model", BUNDLED, "--method", "gaussian-shading", *names, "--out", files["gaussian-shading"]
    )
    assert said.code == 0
    return files


@pytest.fixture(scope="module")
def generated(palindrome, keys, tmp_path_factory):
    """Four images under each kind of keys, and four without: the folders of the runs."""
    folders = {}
    for name, file in {**keys, "none": None}.items():
        folders[name] = tmp_path_factory.mktemp("generated") / name
        flags = ["--count", 4, "--steps", 10, "--ladder", "logsnr", "--shard-size", 2, "--latents", "float32"]
        marked = ["--watermark", file] if file else []
        said = palindrome("generate", "--model", BUNDLED, "--out", folders[name], *flags, *marked)
        assert said.code == 0, said.err
    return folders


def score(palindrome, images, out, keys, *flags):
    both = ["--method", "tree-ring", "gaussian-shading", "--steps", 10]
    return palindrome(
        "score", "--images", images, "--model", BUNDLED, "--out", out, "--keys", *keys.values(), *both, *flags
    )


def test_each_image_is_found_by_its_key_also_as_a_jpeg_and_one_without_is_not(palindrome, generated, keys, tmp_path):
    for method, others in {"tree-ring": "gaussian_shading", "gaussian-shading": "tree_ring"}.items():
        out = tmp_path / method
        said = score(
            palindrome, generated[method] / "images", out, keys, "--keep", "watermark", "--recompress", "jpeg:90"
        )
        assert said.code == 0, said.err
        prefix = method.replace("-", "_")
        assert f"{prefix}_p: at most 0.01 for 4 images (watermarked)" in said.out
        [row] = duckdb.sql(
            f"select count(*), max({prefix}_p), min({others}_p), count_if({prefix}_key = watermark)"
            f" from '{out}/scores/*.parquet'"
        ).fetchall()
        assert row[0] == row[3] == 4 and row[1] < 1e-6 and row[2] > 0.01, row
        assert palindrome("verify", out).code == 0
        written = json.loads((out / "run.json").read_text())
        assert written["scores"][f"{prefix}_p"]["positive"] == "lower"
        assert written["methods"][method]["keys"]["keys"] == len(read_keys(str(keys[method])).names)
        secrets = [secret.hex() for secret in read_keys(str(keys[method])).secrets.values()]
        files = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
        assert not any(secret.encode() in content for secret in secrets for content in files)
    none = score(palindrome, generated["none"] / "images", tmp_path / "none", keys)
    assert "tree_ring_p: at most 0.01 for 0 images" in none.out and "shading_p: at most 0.01 for 0 images" in none.out


def test_generate_marks_the_noise_that_it_has_without_keys(generated, keys, palindrome):
    plain, marked = (
        pq.read_table(generated[name] / "images").sort_by("image_id") for name in ("none", "gaussian-shading")
    )
    assert "watermark" not in plain.column_names
    assert marked["watermark"].to_pylist() == ["ann", "ben", "eve", "ann"]
    x, y = (torch.tensor(table["latent"].combine_chunks().to_numpy_ndarray()) for table in (plain, marked))
    assert torch.equal(x.abs(), y.abs()) and torch.equal(read_keys(str(keys["gaussian-shading"])).mark(x, range(4)), y)
    images = [Image.open(io.BytesIO(row["bytes"])) for row in marked["image"].to_pylist()]
    assert {image.size for image in images} == {(32, 32)}
    verified = palindrome("verify", generated["gaussian-shading"])
    assert verified.out == "2 shards, 4 images, 0 rejects: all well\n"


def test_a_run_is_resumed_with_its_own_keys_alone(palindrome, generated, keys, tmp_path):
    out = generated["tree-ring"]
    shard = next((out / "images").iterdir())
    before = pq.read_table(shard)
    shard.unlink()
    flags = ["--count", 4, "--steps", 10, "--ladder", "logsnr", "--shard-size", 2, "--latents", "float32"]
    command = ["generate", "--model", BUNDLED, "--out", out, *flags]
    other = tmp_path / "other.json"
    palindrome("watermark", "--model", BUNDLED, "--method", "tree-ring", "--count", 2, "--out", other)
    for wrong in ([], ["--watermark", other]):
        said = palindrome(*command, *wrong)
        assert said.code == 2 and "watermark" in said.err
    content = keys["tree-ring"].read_bytes()
    keys["tree-ring"].write_bytes(other.read_bytes())
    said = palindrome(*command, "--watermark", keys["tree-ring"])
    keys["tree-ring"].write_bytes(content)
    assert said.code == 2 and "watermark" in said.err
    assert palindrome(*command, "--watermark", keys["tree-ring"]).code == 0
    assert pq.read_table(shard).equals(before)


def test_a_run_of_scores_from_before_there_were_keys_is_resumed(palindrome, generated, tmp_path):
    command = ["score", "--images", generated["none"] / "images", "--model", BUNDLED, "--method", "secmi", "--limit", 1]
    command += ["--out", tmp_path / "run"]
    assert palindrome(*command).code == 0
    written = json.loads((tmp_path / "run/run.json").read_text())
    assert written["config"].pop("keys") == []
    (tmp_path / "run/run.json").write_text(json.dumps(written))
    assert palindrome(*command).code == 0


def test_secrets_differ_from_command_to_command_unless_they_have_a_seed(palindrome, tmp_path):
    def secrets(name, *flags):
        command = ["watermark", "--model", BUNDLED, "--method", "gaussian-shading", "--count", 3]
        assert palindrome(*command, "--out", tmp_path / name, *flags).code == 0
        return list(json.loads((tmp_path / name).read_text())["keys"].values())

    drawn = [secrets("a"), secrets("b")]
    assert len({secret for each in drawn for secret in each}) == 6
    assert secrets("c", "--seed", 7) == secrets("d", "--seed", 7) != secrets("e", "--seed", 8)
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o600
    made = new_keys(GaussianShading((3, 32, 32)), ["key-0", "key-1", "key-2"], 7)
    assert read_keys(str(tmp_path / "c")) == made


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "tree-ring", "--radius", 16], "--radius: a radius of 16 does not fit in latents of 3 x 32 x 32"),
        (["--method", "tree-ring", "--channels", 0, 3], "--channels: latents of 3 x 32 x 32 have the channels 0 to 2"),
        (["--method", "tree-ring", "--copies", 4], "--copies: tree-ring has none"),
        (["--method", "gaussian-shading", "--pattern", "rand"], "--pattern: gaussian-shading has none"),
        (["--method", "gaussian-shading", "--copies", 5], "--copies: latents of 3 x 32 x 32 can't be divided"),
        (["--method", "tree-ring", "--names", "a", "a"], "--names: a name is given twice"),
        (["--method", "tree-ring", "--names", "a", "--count", 2], "--names: can't be combined with --count"),
    ],
)
def test_what_can_not_be_a_watermark_is_refused(palindrome, tmp_path, flags, message):
    said = palindrome("watermark", "--model", BUNDLED, "--out", tmp_path / "keys.json", *flags)
    assert said.code == 2 and message in said.err and not (tmp_path / "keys.json").exists()


def test_keys_are_never_overwritten_and_a_dry_run_writes_none(palindrome, keys, tmp_path):
    command = ["watermark", "--model", BUNDLED, "--method", "tree-ring", "--out"]
    content = keys["tree-ring"].read_bytes()
    said = palindrome(*command, keys["tree-ring"])
    assert said.code == 2 and "exists, and its keys would be lost" in said.err
    assert keys["tree-ring"].read_bytes() == content
    said = palindrome(*command, tmp_path / "keys.json", "--dry-run")
    assert said.code == 0 and "dry run: nothing was done" in said.out and not (tmp_path / "keys.json").exists()


def test_keys_that_do_not_fit_are_named(palindrome, keys, model, sample, tmp_path):
    def refused(*flags, model=BUNDLED):
        said = palindrome("score", "--images", sample, "--model", model, "--out", tmp_path / "run", *flags)
        assert said.code == 2
        return said.err

    rings = keys["tree-ring"]
    assert "--method: tree-ring: it looks for the keys of --keys, and is given none" in refused("--method", "tree-ring")
    assert "has keys of tree-ring, not computed" in refused("--method", "nll", "--keys", rings)
    assert "has keys of tree-ring, again" in refused("--method", "tree-ring", "--keys", rings, rings)
    message = "--keys: its keys are for latents of 3 x 32 x 32, and those of the model are 3 x 16 x 16"
    assert message in refused("--method", "tree-ring", "--keys", rings, model=model)
    content = json.loads(rings.read_text())
    for change in [
        {"keys": {}},
        {"keys": {"a": "no hex"}},
        {"method": "none"},
        {"palindrome_watermark": 2},
        {"radius": 99},
    ]:
        (tmp_path / "bad.json").write_text(json.dumps({**content, **change}))
        said = refused("--method", "tree-ring", "--keys", tmp_path / "bad.json")
        assert "bad.json is no file of keys by palindrome watermark" in said
    assert "--keys" in refused("--method", "tree-ring", "--keys", tmp_path / "missing.json")
