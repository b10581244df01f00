"""Runs that an earlier version made (tests/fixtures/make_earlier_runs.py) resume, verify, reconstruct, export and
decode with this one, to what that version made of the same inputs."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from palindrome import open as open_run
from palindrome.model.families import unet2d

EARLIER = sorted((Path(__file__).parents[1] / "fixtures/earlier").iterdir())
VERIFIED = (
    *("encoded", "kept", "reconstructed", "regenerated", "generated", "pairs", "grid", "swept"),
    *("png", "webdataset", "parquet"),
)
WHOLE = ("encoded", "kept", "pairs")  # resumed as they are
LOST = {  # resumed after one file of this folder was removed
    "reconstructed": "reconstructions",
    "regenerated": "images",
    "generated": "images",
    "grid": "images",
    "swept": "sweep",
    "png": "index",
    "webdataset": "data",
    "parquet": "data",
    "films": "paths",
}


def relocated(fixture, to):
    """A copy that says of its runs that they were made there. A plan holds the inputs' modification times."""
    made = json.loads((fixture / "commands.json").read_text())
    shutil.copytree(fixture, to)
    for path in to.rglob("*.json"):
        path.write_text(path.read_text().replace(made["root"], str(to)))
    for path in to.glob("*/plan/*.parquet"):
        table = pq.read_table(path)
        rows = json.loads(json.dumps(table.to_pylist()).replace(made["root"], str(to)))
        pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    for path in [to / "table.parquet", *(to / "pictures").iterdir()]:
        os.utime(path, (made["modified"], made["modified"]))
    return to


@pytest.fixture(scope="module", params=EARLIER, ids=lambda path: path.name)
def fixture(request):
    return request.param


@pytest.fixture(scope="module")
def earlier(fixture, tmp_path_factory):
    """The runs, to be read."""
    return relocated(fixture, tmp_path_factory.mktemp("earlier") / fixture.name)


@pytest.fixture
def copy(fixture, tmp_path):
    """The runs, to be written to."""
    return relocated(fixture, tmp_path / fixture.name)


def command(runs, name):
    """The one that made the run."""
    return json.loads((runs / "commands.json").read_text())["commands"][name]


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


def assert_alike(made, before):
    """Two tables of the same rows: 8-bit values differ by one at most, and other numbers by rounding. The column
    `source`, which holds the images' folder, is not compared."""
    made, before = pq.read_table(made), pq.read_table(before)
    assert made.schema.remove_metadata() == before.schema.remove_metadata()
    assert len(made) == len(before)
    for field in made.schema:
        new, old = (table[field.name].combine_chunks() for table in (made, before))
        if field.name == "image":
            for a, b in zip(new.field("bytes").to_pylist(), old.field("bytes").to_pylist(), strict=True):
                assert np.abs(pixels(a) - pixels(b)).max() <= 1
        elif field.name == "latent":
            np.testing.assert_allclose(new.to_numpy_ndarray(), old.to_numpy_ndarray(), rtol=1e-3, atol=1e-5)
        elif pa.types.is_floating(field.type):
            assert pa.compute.is_null(new) == pa.compute.is_null(old)
            new, old = (column.to_numpy(zero_copy_only=False) for column in (new, old))
            np.testing.assert_allclose(new, old, rtol=1e-2, atol=2e-2 if field.name == "identical" else 1e-5)
        elif field.name != "source":
            assert new == old


def assert_same(made, before):
    """As above, or a tar of the same files and PNGs, or a picture."""
    if made.suffix == ".parquet":
        assert_alike(made, before)
    elif made.suffix == ".tar":
        with tarfile.open(made) as new, tarfile.open(before) as old:
            assert new.getnames() == old.getnames()
            for name in new.getnames():
                if name.endswith(".png"):
                    assert new.extractfile(name).read() == old.extractfile(name).read()
    else:
        np.testing.assert_array_equal(pixels(made.read_bytes()), pixels(before.read_bytes()))


def kept(times, run):
    """When each file was written, but for those at the top, which a run may write anew at its end."""
    return {name: time for name, time in times(run).items() if "/" in name or name == "run.json"}


@pytest.mark.parametrize("name", WHOLE)
def test_nothing_is_done_again(palindrome, copy, times, name):
    before = kept(times, copy / name)
    said = palindrome(*command(copy, name))
    assert (said.code, said.err) == (0, "")
    assert kept(times, copy / name) == before


@pytest.mark.parametrize("name", LOST)
def test_what_is_missing_is_done(palindrome, fixture, copy, times, name):
    lost = min((copy / name / LOST[name]).iterdir())
    place = str(lost.relative_to(copy / name))
    before = kept(times, copy / name)
    lost.unlink()
    said = palindrome(*command(copy, name))
    assert said.code == 0, said.err
    after = kept(times, copy / name)
    assert after.keys() == before.keys()
    pictures = set()
    if name == "png":
        pictures = {f"images/{file}" for file in pq.read_table(lost, columns=["file_name"])["file_name"].to_pylist()}
        for file in pictures:
            assert (copy / name / file).read_bytes() == (fixture / name / file).read_bytes()
        pictures.add("images/metadata.parquet")
    written = {path for path in after if after[path] != before[path]}
    assert place in written
    assert {path for path in written if lost.stem not in path} == pictures
    assert_same(lost, fixture / name / place)


LEFT = 1e-3  # of a latent: corrections are weighted otherwise since then, and either way stop short of the exact one


def test_an_interrupted_run_is_completed_to_the_same_latents(palindrome, copy, times, read_run):
    run = copy / "interrupted"
    done = {f"latents/{path.name}" for path in (run / "latents").glob("*.parquet")}
    before = kept(times, run)
    said = palindrome(*command(copy, "interrupted"))
    assert said.code == 0, said.err
    assert "12 images in 4 shards, " + f"{4 - len(done)} to encode" in said.out
    after = kept(times, run)
    assert {name: after[name] for name in done} == {name: before[name] for name in done}
    assert not list(run.rglob(".tmp-*")), "what the interrupted process left goes"
    made, whole = read_run(run), read_run(copy / "encoded")
    assert made.ids == whole.ids
    np.testing.assert_allclose(made.latents, whole.latents, rtol=0, atol=LEFT)
    assert palindrome("verify", run).code == 0


@pytest.mark.parametrize("name", VERIFIED)
def test_a_run_is_verified(palindrome, earlier, name):
    said = palindrome("verify", earlier / name)
    assert (said.code, said.err) == (0, ""), said.out
    assert said.out.endswith(": all well\n")


@pytest.mark.parametrize("name", ["encoded", "kept"])
def test_latents_are_verified_by_decoding(palindrome, earlier, name):
    said = palindrome("verify", earlier / name, "--deep", 3)
    assert said.code == 0, said.out
    assert said.out.startswith("3 latents decoded")


@pytest.mark.parametrize("name", ["encoded", "kept", "reconstructed", "regenerated", "generated", "pairs", "swept"])
def test_the_status_is_complete(palindrome, earlier, name):
    said = palindrome("status", earlier / name, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["complete"]


def test_rejects_are_listed(palindrome, earlier):
    said = palindrome("rejects", earlier / "kept", "--format", "json")
    [row] = json.loads(said.out)
    assert (row["image_id"], row["reason"]) == ("table.parquet#3", "truncated")


def test_latents_are_reconstructed(palindrome, earlier, tmp_path):
    said = palindrome("reconstruct", "--latents", earlier / "kept", "--out", tmp_path / "out")
    assert said.code == 0, said.err
    stored = pq.read_table(earlier / "kept/latents", columns=["image_id", "mse"]).to_pylist()
    made = pq.read_table(tmp_path / "out/reconstructions", columns=["image_id", "mse"]).to_pylist()
    expected = {row["image_id"]: row["mse"] for row in stored}
    assert {row["image_id"]: row["mse"] for row in made} == pytest.approx(expected, rel=1e-2, abs=1e-8)


def test_images_are_exported(palindrome, fixture, earlier, tmp_path):
    said = palindrome("export", earlier / "reconstructed", "--out", tmp_path / "out", "--format", "png")
    assert said.code == 0, said.err
    files = [path.relative_to(fixture / "png") for path in (fixture / "png/images").rglob("*.png")]
    assert len(files) == 24
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (fixture / "png" / file).read_bytes()


def test_a_notebook_decodes_to_the_recorded_pixels(earlier):
    run = open_run(earlier / "encoded")
    recorded = pq.read_table(earlier / "reconstructed/reconstructions").to_pylist()
    assert {row["steps"] for row in recorded} == {5, 20}
    for steps in (5, 20):
        by_id = {row["image_id"]: row["image"]["bytes"] for row in recorded if row["steps"] == steps}
        for image_id, decoded in zip(run.ids, run.decode(run.ids, steps), strict=True):
            assert np.abs(np.asarray(decoded).astype(int) - pixels(by_id[image_id])).max() <= 1


def test_a_notebook_encodes_to_the_stored_latent(earlier):
    run = open_run(earlier / "encoded")
    np.testing.assert_allclose(run.encode(earlier / "pictures/04.png"), run.latents("04.png")[0], rtol=0, atol=LEFT)
    labels = open_run(earlier / "kept").table(columns=["image_id", "label"])
    assert labels["label"].null_count == 0


def test_the_checkpoint_is_the_one_that_runs_name(earlier):
    model = unet2d.load(str(earlier / "model"))
    named = [*earlier.glob("*/run.json"), earlier / "ladder.json"]
    said = {path: json.loads(path.read_text()) for path in named}
    digests = {path: content["model_digest"] for path, content in said.items() if "model_digest" in content}
    assert len(digests) >= 9
    assert set(digests.values()) == {model.digest}


def test_a_training_goes_on(palindrome, copy, times):
    run, arguments = copy / "trained", command(copy, "trained")
    before = times(run)
    record = json.loads((run / "training.json").read_text())
    earlier_weights = unet2d.load(str(run)).weights
    said = palindrome(*arguments)
    assert (said.code, said.out) == (0, f"{run} is trained already: {record['steps']} steps\n")
    assert times(run) == before
    arguments[arguments.index("--train-steps") + 1] = str(record["steps"] + 1)
    said = palindrome(*arguments)
    assert said.code == 0, said.err
    went_on = json.loads((run / "training.json").read_text())
    assert went_on["steps"] == record["steps"] + 1
    assert went_on["loss"][:-1] == record["loss"], "the steps before are not done again"
    weights = unet2d.load(str(run)).weights
    assert {name: value.dtype for name, value in weights.items()} == {n: v.dtype for n, v in earlier_weights.items()}
    assert any((weights[name] != value).any() for name, value in earlier_weights.items())
