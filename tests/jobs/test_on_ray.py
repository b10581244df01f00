"""Each job on Ray writes what it writes inline, which the other tests of jobs look at closely."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

ONE, TWO = ["--workers", 1], ["--workers", 2]


@pytest.fixture(scope="module")
def encoded(palindrome, pictures, model, tmp_path_factory):
    """An encode run of 24 pictures in three shards, made inline."""
    out = tmp_path_factory.mktemp("encoded") / "run"
    assert palindrome(*encode(pictures, model), "--out", out).code == 0
    return out


def encode(pictures, model):
    return ["encode", "--images", pictures, "--model", model, "--steps", 4, "--shard-size", 8, "--measure"]


COMMANDS = {
    "encode": lambda pictures, model, encoded: encode(pictures, model),
    "reconstruct": lambda pictures, model, encoded: ["reconstruct", "--latents", encoded, "--steps", 2, 4],
    "regenerate": lambda pictures, model, encoded: [
        "regenerate",
        "--latents",
        encoded,
        "--eta",
        0.5,
        "--variations",
        2,
    ],
    "generate": lambda pictures, model, encoded: [
        *("generate", "--model", model, "--count", 20, "--steps", 3, "--shard-size", 8, "--latents", "float32")
    ],
    "interpolate": lambda pictures, model, encoded: [
        *("interpolate", "--latents", encoded, "--pairs", "random:4", "--frames", 3, "--shard-size", 6)
    ],
    "score": lambda pictures, model, encoded: [
        *("score", "--images", pictures, "--model", model, "--method", "invad", "dire", "--steps", 2),
        *("--shard-size", 8, "--latents"),
    ],
    "restore": lambda pictures, model, encoded: [
        *("restore", "--images", pictures, "--model", model, "--task", "inpaint", "--mask", "box:0.25"),
        *("--steps", 3, "--variations", 2, "--shard-size", 8),
    ],
    "edit": lambda pictures, model, encoded: [
        *("edit", "--latents", encoded, "--towards", "003.png", "--strength", 0.5, 1, "--mask", "box:0.25")
    ],
    "sweep": lambda pictures, model, encoded: [
        *("sweep", "--images", pictures, "--model", model, "--steps", 2, 3, "--corrections", 0, 1, "--shard-size", 8)
    ],
}


def files(run):
    return sorted(str(path.relative_to(run)) for path in Path(run).rglob("*.parquet"))


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def assert_alike(one, other):
    """Tables of the same rows; numbers and pictures may be rounded otherwise, since batches are cut otherwise."""
    assert one.schema.names == other.schema.names and len(one) == len(other)
    for name in one.schema.names:
        a, b = one[name].combine_chunks(), other[name].combine_chunks()
        if pa.types.is_floating(a.type):
            np.testing.assert_allclose(a.to_numpy(False), b.to_numpy(False), rtol=1e-3, atol=1e-5)
        elif isinstance(a.type, pa.FixedShapeTensorType):
            np.testing.assert_allclose(a.to_numpy_ndarray(), b.to_numpy_ndarray(), rtol=1e-3, atol=1e-4)
        elif name in ("image", "own"):
            for left, right in zip(a.to_pylist(), b.to_pylist(), strict=True):
                if left is right is None:
                    continue
                assert left["path"] == right["path"]
                assert np.abs(pixels(left["bytes"]) - pixels(right["bytes"])).max() <= 1
        else:
            assert a.to_pylist() == b.to_pylist()


@pytest.mark.parametrize("job", COMMANDS)
def test_a_job_writes_the_same_on_ray(job, palindrome, pictures, model, encoded, tmp_path):
    command = COMMANDS[job](pictures, model, encoded)
    for where, flags in (("inline", []), ("ray", TWO if job == "encode" else ONE)):
        said = palindrome(*command, *flags, "--out", tmp_path / where)
        assert said.code == 0, said.err
    assert files(tmp_path / "inline") == files(tmp_path / "ray")
    for name in files(tmp_path / "inline"):
        assert_alike(pq.read_table(tmp_path / "inline" / name), pq.read_table(tmp_path / "ray" / name))
    manifests = [json.loads((tmp_path / where / "run.json").read_text()) for where in ("inline", "ray")]
    for manifest in manifests:
        del manifest["config"]["workers"]
    assert manifests[0] == manifests[1]


def test_a_run_begun_inline_goes_on_on_ray(palindrome, pictures, model, tmp_path):
    command = [*encode(pictures, model), "--out", tmp_path]
    assert palindrome(*command).code == 0
    shards = sorted(tmp_path.glob("latents/*.parquet"))
    kept = {path: path.stat().st_mtime_ns for path in shards[1:]}
    shards[0].unlink()
    said = palindrome(*command, *ONE)
    assert said.code == 0 and "3 shards, 1 to encode" in said.out
    assert {path: path.stat().st_mtime_ns for path in shards[1:]} == kept
    assert shards[0].exists()
