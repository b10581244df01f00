"""What a summary reads of many shards, and what it says of errors that are no numbers."""

import threading

import numpy as np
import pyarrow as pa
import pytest

from palindrome.pipeline.runs import summary
from palindrome.pipeline.storage.folder import Folder


@pytest.fixture(scope="module")
def run(palindrome, model, pictures, tmp_path_factory):
    """24 shards of an image each, measured."""
    out = tmp_path_factory.mktemp("summary") / "run"
    said = palindrome(
        "encode", "--images", pictures, "--model", model, "--out", out, "--shard-size", 1, "--steps", 2, "--measure"
    )
    assert said.code == 0, said.err
    return Folder(str(out))


def test_shards_are_read_side_by_side(run, monkeypatch):
    """An object store takes tens of milliseconds each: one after the other, 250,000 footers took hours."""
    alone = summary.latents_summary(run, True)
    together, read = threading.Barrier(8), summary.shard_metadata

    def waiting(*arguments):
        together.wait(timeout=60)  # raises where fewer are read at once
        return read(*arguments)

    monkeypatch.setattr(summary, "shard_metadata", waiting)
    assert summary.latents_summary(run, True) == alone
    assert alone["shards"] == alone["latents"] == alone["round_trip"]["count"] == 24


def test_errors_that_are_no_numbers_are_counted_left_out_and_the_worst():
    mse = [0.5, float("nan"), 0.1, float("inf"), 0.0]
    found = summary.error_statistics(pa.table({"image_id": list("abcde"), "mse": mse}))
    assert (found["count"], found["not_finite"]) == (5, 2)
    assert found["mean"] == pytest.approx(np.mean([0.5, 0.1, 0.0])) and found["max"] == 0.5
    assert found["worst"] == ["b", "d", "a", "c", "e"]
    none = summary.error_statistics(pa.table({"image_id": ["a"], "mse": [float("nan")]}))
    assert none["mean"] is None and none["not_finite"] == 1
