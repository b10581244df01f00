"""What a summary reads of many shards, and what it says of errors that are no numbers."""

import json
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palindrome.pipeline.images.metrics import statistics
from palindrome.pipeline.runs import summary
from palindrome.pipeline.runs.errors import Errors
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.sweep import read_sweep


@pytest.fixture(scope="module")
def out(palindrome, model, pictures, tmp_path_factory):
    """24 shards of an image each, measured."""
    out = tmp_path_factory.mktemp("summary") / "run"
    said = palindrome(
        "encode", "--images", pictures, "--model", model, "--out", out, "--shard-size", 1, "--steps", 2, "--measure"
    )
    assert said.code == 0, said.err
    return out


@pytest.fixture
def run(out):
    return Folder(str(out))


def test_shards_are_read_side_by_side(run, monkeypatch):
    """An object store takes tens of milliseconds each: one after the other, 250,000 footers took hours."""
    alone = summary.latents_summary(run, True)
    for name in run.files("tallies"):
        run.remove(f"tallies/{name}")
    together, read = threading.Barrier(8), Folder.parquet_file

    def waiting(folder, name, *arguments):
        if name.startswith("latents/"):
            together.wait(timeout=60)  # raises where fewer are read at once
        return read(folder, name, *arguments)

    monkeypatch.setattr(Folder, "parquet_file", waiting)
    assert summary.latents_summary(run, True) == alone
    assert alone["shards"] == alone["latents"] == alone["round_trip"]["count"] == 24


def test_the_round_trip_is_that_of_all_rows(out, run):
    table = pa.concat_tables([pq.read_table(path) for path in sorted((out / "latents").glob("*.parquet"))])
    mse, found = table["mse"].to_numpy(), summary.latents_summary(run, True)["round_trip"]
    expected = statistics(mse)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    others = table.filter(pa.compute.less(table["identical"], 1))["image_id"].to_pylist()
    assert (found["not_identical"], found["not_identical_ids"]) == (len(others), others)
    assert found["worst"] == table["image_id"].take(np.argsort(-mse, kind="stable")[:20]).to_pylist()


def test_errors_that_are_no_numbers_are_counted_left_out_and_the_worst():
    def found(names, mse):
        errors = Errors()
        errors.add("s", np.arange(len(mse)), pa.array(names), np.array(mse))
        return summary.error_statistics(errors)

    some = found(list("abcde"), [0.5, float("nan"), 0.1, float("inf"), 0.0])
    assert (some["count"], some["not_finite"]) == (5, 2)
    assert some["mean"] == pytest.approx(np.mean([0.5, 0.1, 0.0])) and some["max"] == 0.5
    assert some["worst"] == ["b", "d", "a", "c", "e"]
    none = found(["a"], [float("nan")])
    assert none["mean"] is None and none["not_finite"] == 1


COMMANDS = {  # flags, and what reads its summary
    "reconstruct": (
        ["--steps", 1, 2],
        lambda run, latents: (
            summary.reconstructions_summary(summary.read_errors(run, latents), (1, 2)),
            summary.mean_nfe(latents, run),
        ),
    ),
    "regenerate": (["--steps", 1, 2], summary.regenerated_summary),
    "generate": (["--count", 9, "--shard-size", 1, "--steps", 1], lambda run, latents: summary.generated_summary(run)),
    "sweep": (["--shard-size", 1, "--steps", 1, "--corrections", 0, 1], lambda run, latents: read_sweep(run)),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_keeps_tallies_which_are_no_strays(
    command, palindrome, out, run, model, pictures, tmp_path, monkeypatch
):
    flags, summarise = COMMANDS[command]
    inputs = {"generate": ["--model", model], "sweep": ["--model", model, "--images", pictures]}
    flags = [*flags, *inputs.get(command, ["--latents", out])]
    to, made = Folder(str(tmp_path / "run")), str(tmp_path / "run")
    assert palindrome(command, *flags, "--out", made).code == 0
    content, kept = to.read("summary.json"), to.files("tallies")
    assert len(kept) == (2 if command in ("reconstruct", "sweep") else 1)

    read, names = Folder.parquet_file, []

    def noting(folder, name, *arguments):
        names.append(name)
        return read(folder, name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "parquet_file", noting)
        first = summarise(to, run)
    shards = [name for name in names if not name.startswith("plan/")]
    assert len(shards) == (2 if command == "sweep" else 0)  # one tells of a setting what it is

    assert palindrome(command, *flags, "--out", made).code == 0
    assert to.read("summary.json") == content and to.files("tallies") == kept
    for name in kept:
        to.remove(f"tallies/{name}")
    assert json.dumps(summarise(to, run)) == json.dumps(first)
    said = palindrome("verify", made)
    assert (said.code, said.err) == (0, "") and "all well" in said.out
    assert palindrome("status", made).code == 0
