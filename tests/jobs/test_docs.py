"""What the documents tell a user to run does what they say."""

import re
from pathlib import Path

import duckdb
import numpy as np
import torch

from palindrome.pipeline.images.decode import Preprocess, decode

ROOT = Path(__file__).parents[2]


def block(document, language, place=0):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)[place]


def test_diffusers_and_pyarrow_alone_decode_the_latents(palindrome, model, pictures, pngs, tmp_path):
    said = palindrome("encode", "--images", pictures, "--model", model, "--out", tmp_path, "--steps", 6, "--measure")
    assert said.code == 0, said.err
    names = {"path": str(next((tmp_path / "latents").glob("*.parquet"))), "model": str(model)}
    exec(block("docs/latents.md", "python", 1), names)
    images, rows = names["images"], names["rows"].to_pylist()
    assert images.shape == (24, 3, 16, 16)
    # The document's images are clipped to [0, 1], so only pixels that need no clipping can be held to the stored error.
    unclipped = (names["x"] + 1) / 2
    originals = [decode(pngs[int(row["image_id"][:3])], Preprocess(16))[0] for row in rows]
    squared = (unclipped - torch.from_numpy(np.stack(originals)).permute(0, 3, 1, 2) / 255).square()
    assert np.allclose(squared.mean((1, 2, 3)), [row["mse"] for row in rows], rtol=1e-3)
    assert torch.equal(images, unclipped.clamp(0, 1))


def test_batches_come_as_tensors(palindrome, model, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    palindrome("encode", "--images", pictures, "--model", model, "--out", "runs/photos", "--steps", 2)
    names = {}
    exec(block("docs/latents.md", "python", 0), names)
    assert names["x"].shape == (24, 3, 16, 16) and len(names["ids"]) == 24


def test_the_query_of_the_latents_page_lists_the_worst_first(palindrome, model, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    palindrome("encode", "--images", pictures, "--model", model, "--out", "runs/photos", "--steps", 2, "--measure")
    rows = duckdb.sql(block("docs/latents.md", "sql")).fetchall()
    errors = [row[3] for row in rows]
    assert len(rows) == 10
    assert errors == sorted(errors, reverse=True)
    assert len(rows[0][4]) == 3 * 16 * 16
