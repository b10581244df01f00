import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from palindrome.model.ddim import sample
from palindrome.model.families import unet2d
from palindrome.model.ladder import ladder
from palindrome.model.process import VP

STEPS = (5, 3)  # 5 is the encode run's own
COUNT = 24


@pytest.fixture(scope="module")
def here(palindrome, pngs, model, tmp_path_factory):
    """A folder with 24 pictures, `images`, and an encode run over them, `encoded`, in three shards."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "images").mkdir()
    for i, png in enumerate(pngs[:COUNT]):
        (folder / "images" / f"{i:02d} <&>.png").write_bytes(png)
    flags = ["--steps", 5, "--shard-size", 8, "--measure", "--ladder", "quadratic", "--corrections", 0]
    said = palindrome("encode", "--images", folder / "images", "--model", model, "--out", folder / "encoded", *flags)
    assert said.code == 0, said.err
    return folder


@pytest.fixture(scope="module")
def command(here):
    return ["reconstruct", "--latents", here / "encoded", "--out", here / "again", "--steps", *STEPS]


@pytest.fixture(scope="module")
def said(palindrome, command):
    return palindrome(*command)


@pytest.fixture
def copy(here, tmp_path):
    """A copy of the images and of a run over them, to be spoilt."""
    for name in ("images", "encoded"):
        shutil.copytree(here / name, tmp_path / name)
    manifest = tmp_path / "encoded/run.json"
    manifest.write_text(manifest.read_text().replace(str(here), str(tmp_path)))
    for path in (tmp_path / "encoded/plan").glob("*.parquet"):
        table = pq.read_table(path)
        rows = json.loads(json.dumps(table.to_pylist()).replace(str(here), str(tmp_path)))
        pq.write_table(table.from_pylist(rows, table.schema), path)
    return tmp_path


def rows_of(run):
    return [row for file in sorted((run / "reconstructions").iterdir()) for row in pq.read_table(file).to_pylist()]


def measured(run):
    files = (run / "latents").iterdir()
    rows = [row for file in files for row in pq.read_table(file, columns=["image_id", "mse"]).to_pylist()]
    return {row["image_id"]: row["mse"] for row in rows}


def statuses(run):
    return {row["image_id"]: row["status"] for row in rows_of(run)}


def test_every_image_has_a_row_for_each_number_of_steps(said, here):
    assert said.code == 0, said.err
    rows = rows_of(here / "again")
    assert len(rows) == COUNT * len(STEPS)
    assert {(row["image_id"], row["steps"]) for row in rows} == {
        (i, s) for i in measured(here / "encoded") for s in STEPS
    }
    assert {row["status"] for row in rows} == {"compared"}


def test_the_run_s_own_ladder_gives_the_error_that_encode_measured(said, here):
    expected = measured(here / "encoded")
    found = {row["image_id"]: row["mse"] for row in rows_of(here / "again") if row["steps"] == 5}
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(set(found.values())) > COUNT / 2


def test_without_steps_it_is_the_run_s_own_ladder(palindrome, said, here, tmp_path):
    assert palindrome("reconstruct", "--latents", here / "encoded", "--out", tmp_path / "own").code == 0
    own = {row["image_id"]: row for row in rows_of(tmp_path / "own")}
    assert own == {row["image_id"]: row for row in rows_of(here / "again") if row["steps"] == 5}


def test_pictures_and_errors_are_those_of_the_decoded_latents(said, here, tiny):
    latents = pq.read_table(here / "encoded/latents")
    x = torch.tensor(latents["latent"].combine_chunks().to_numpy_ndarray()).float()
    by_key = {(row["image_id"], row["steps"]): row for row in rows_of(here / "again")}
    for steps in STEPS:
        levels = ladder("quadratic", steps, top=ladder("quadratic", 5)[-1])
        decoded = sample(tiny.network(), x, levels, tiny.process).numpy()
        shown = np.rint((decoded.clip(-1, 1) + 1) * 127.5).transpose(0, 2, 3, 1).astype(np.uint8)
        for image_id, expected, pixels in zip(latents["image_id"].to_pylist(), decoded, shown, strict=True):
            row = by_key[image_id, steps]
            original = Image.open(here / "images" / image_id).resize((16, 16), Image.Resampling.LANCZOS)
            truth = np.asarray(original, np.float64) / 255
            mse = np.mean(((expected.transpose(1, 2, 0) + 1) / 2 - truth) ** 2)
            assert row["mse"] == pytest.approx(mse, rel=1e-3)
            assert row["psnr"] == pytest.approx(-10 * np.log10(mse), abs=1e-2)
            found = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
            assert np.mean(found != pixels) < 0.02  # a rounding here and there, where kernels differ by batch
            assert np.abs(found.astype(int) - pixels).max() <= 1
            assert row["identical"] == np.mean(found == np.asarray(original))


def test_the_picture_s_name_is_a_file_name(said, here):
    names = {row["image"]["path"] for row in rows_of(here / "again")}
    assert "00_.png.png" in names
    assert all(set(name) <= set("0123456789_.png") for name in names)


def test_the_summary_has_a_row_for_each_number_of_steps(said, here):
    summary = json.loads((here / "again/summary.json").read_text())
    assert (summary["shards"], summary["images"], summary["uncompared"]) == (3, COUNT, 0)
    assert [row["steps"] for row in summary["by_steps"]] == list(STEPS)
    for row in summary["by_steps"]:
        rows = [r for r in rows_of(here / "again") if r["steps"] == row["steps"]]
        mse = np.array([r["mse"] for r in rows])
        assert (row["count"], row["uncompared"]) == (COUNT, {})
        assert row["mean"] == pytest.approx(mse.mean())
        assert row["median"] == pytest.approx(np.median(mse))
        assert row["identical"] == pytest.approx(np.mean([r["identical"] for r in rows]))
        assert row["worst"][:3] == [rows[i]["image_id"] for i in np.argsort(-mse)[:3]]
        assert f"{row['steps']} steps: round-trip error {row['mean']:.3g}" in said.out


class Report(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.texts, self.pictures, self.table, self.titles = [], 0, 0, set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.pictures += tag == "img" and found["src"].startswith("data:image/png;base64,")
        self.table += tag == "tr"
        self.titles.add(found.get("title"))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_report_shows_the_worst(said, here):
    report = Report((here / "again/report.html").read_text())
    worst = json.loads((here / "again/summary.json").read_text())["by_steps"][0]["worst"]
    assert set(worst[:12]) <= report.titles
    assert report.pictures == 3 * 36  # original, reconstruction and difference, of 12 under each of three headings
    assert report.table == 1 + len(STEPS)
    headings = {text.strip() for text in report.texts}
    assert {"A sample of the collection", "Best", "Worst"} <= headings


def test_a_second_run_changes_nothing(said, palindrome, command, here, times):
    before = times(here / "again")
    texts = [(here / "again" / name).read_text() for name in ("summary.json", "report.html")]
    again = palindrome(*command)
    assert (again.code, again.err) == (0, "")
    assert "0 to reconstruct" in again.out
    assert times(here / "again") == before
    assert [(here / "again" / name).read_text() for name in ("summary.json", "report.html")] == texts


def test_originals_that_are_gone_or_changed_are_counted_and_said(palindrome, copy, pngs):
    files = sorted((copy / "images").iterdir())
    for file in files[:3]:
        file.unlink()
    files[5].write_bytes(pngs[200])
    files[6].write_bytes(b"no picture any more")
    said = palindrome("reconstruct", "--latents", copy / "encoded", "--out", copy / "again")
    assert said.code == 0, said.err
    found = statuses(copy / "again")
    uncompared = {files[i].name: "missing" for i in range(3)}
    uncompared |= {files[5].name: "changed", files[6].name: "not_an_image"}
    assert found == {file.name: uncompared.get(file.name, "compared") for file in files}
    summary = json.loads((copy / "again/summary.json").read_text())
    assert summary["uncompared"] == 5
    [row] = summary["by_steps"]
    assert row["count"] == COUNT - 5
    assert row["uncompared"] == {"changed": 1, "missing": 3, "not_an_image": 1}
    assert "5 steps: 3 images not compared: missing" in said.out
    gone = [row for row in rows_of(copy / "again") if row["status"] != "compared"]
    assert all(Image.open(io.BytesIO(row["image"]["bytes"])).size == (16, 16) for row in gone)
    assert {(row["mse"], row["psnr"], row["identical"]) for row in gone} == {(None, None, None)}


def test_without_one_original_there_are_pictures_and_no_errors(palindrome, copy):
    shutil.rmtree(copy / "images")
    said = palindrome("reconstruct", "--latents", copy / "encoded", "--out", copy / "again")
    assert said.code == 0, said.err
    assert set(statuses(copy / "again").values()) == {"missing"}
    assert len(rows_of(copy / "again")) == COUNT
    [row] = json.loads((copy / "again/summary.json").read_text())["by_steps"]
    assert (row["count"], row["mean"], row["uncompared"]) == (0, None, {"missing": COUNT})
    assert "No image could be compared" in (copy / "again/report.html").read_text()


def test_an_encode_run_that_is_not_complete_is_gone_on_with(palindrome, copy, here):
    files = sorted((copy / "encoded/latents").iterdir())
    content = files[0].read_bytes()
    files[0].unlink()
    command = ["reconstruct", "--latents", copy / "encoded", "--out", copy / "again"]
    said = palindrome(*command)
    assert said.code == 0
    assert said.err == "the encode run is not complete: 2 of 3 shards\n"
    assert len(rows_of(copy / "again")) == COUNT - 8
    files[0].write_bytes(content)
    said = palindrome(*command)
    assert (said.code, said.err) == (0, "")
    assert "3 shards of latents, 1 to reconstruct" in said.out
    assert statuses(copy / "again").keys() == measured(here / "encoded").keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_digest": "f" * 64}, "by model ffff"),
        ({"levels": [-1, 5, 800]}, "on the ladder [-1, 5, 800], not [-1, "),
        ({"preprocess": {"size": 16}}, "from images preprocessed as {'size': 16}, not {"),
    ],
    ids=["model", "ladder", "preprocessing"],
)
def test_latents_that_were_made_otherwise_are_a_failed_shard(palindrome, copy, change, words):
    file = min((copy / "encoded/latents").iterdir())
    table = pq.read_table(file)
    metadata = {**json.loads(table.schema.metadata[b"palindrome"]), **change}
    pq.write_table(table.replace_schema_metadata({"palindrome": json.dumps(metadata)}), file)
    said = palindrome("reconstruct", "--latents", copy / "encoded", "--out", copy / "again")
    assert said.code == 1
    assert f"the latents of shard {file.stem} were made {words}" in said.err
    assert len(rows_of(copy / "again")) == COUNT - 8


def refused(palindrome, here, out, *flags):
    said = palindrome("reconstruct", "--latents", here / "encoded", "--out", out, *flags)
    assert said.code == 2
    assert said.err.startswith("palindrome reconstruct: error: --") and said.err.count("\n") == 1
    assert not Path(out).exists()
    return said.err


def test_another_model_is_refused(palindrome, here, tiny, tmp_path):
    other = tiny.with_process(VP(prediction_type="v_prediction"))
    unet2d.save(other, str(tmp_path / "other"))
    words = refused(palindrome, here, tmp_path / "out", "--model", tmp_path / "other")
    assert f"--model: the latents were made by another model: digest {tiny.digest[:12]}" in words
    assert other.digest[:12] in words


def test_a_model_that_moved_away_is_said(palindrome, copy):
    manifest = copy / "encoded/run.json"
    content = json.loads(manifest.read_text())
    content["config"]["model"] = str(copy / "nowhere")
    manifest.write_text(json.dumps(content))
    assert f"--model: {copy}/nowhere" in refused(palindrome, copy, copy / "again")


def test_a_number_of_steps_named_twice_is_refused(palindrome, here, tmp_path):
    assert "--steps: a number is given twice" in refused(palindrome, here, tmp_path / "out", "--steps", 4, 4)


def test_more_steps_than_levels_are_refused(palindrome, here, tmp_path):
    assert "--steps: 900 steps do not fit" in refused(palindrome, here, tmp_path / "out", "--steps", 4, 900)


def test_a_run_of_reconstruct_holds_no_latents(palindrome, said, here, tmp_path):
    found = palindrome("reconstruct", "--latents", here / "again", "--out", tmp_path / "out")
    assert found.code == 2
    assert f"--latents: {here}/again is a run of reconstruct, not of encode" in found.err


def test_a_run_without_latents_is_refused(palindrome, copy):
    shutil.rmtree(copy / "encoded/latents")
    assert "holds no latents yet" in refused(palindrome, copy, copy / "again")


def test_other_steps_may_not_go_on_in_the_folder(palindrome, said, here, command, times):
    before = times(here / "again")
    found = palindrome(*command[:-1])
    assert found.code == 2
    assert "belongs to another command: --steps was [5, 3], now [5]" in found.err
    assert times(here / "again") == before


def test_the_manifest_says_what_was_run(said, here, tiny):
    manifest = json.loads((here / "again/run.json").read_text())
    assert manifest["job"] == "reconstruct"
    assert manifest["model_digest"] == tiny.digest
    assert manifest["ladders"] == [list(ladder("quadratic", 5)), list(ladder("quadratic", 3, top=800))]
    assert manifest["config"]["latents"] == str(here / "encoded")
