"""palindrome score: against the functions of model.scores on the same pixels, DuckDB, and DIRE's own map."""

import io
import json
import runpy
import shutil
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from palindrome.model import scores
from palindrome.model.ddim import invert
from palindrome.model.ladder import logsnr_ladder
from palindrome.pipeline.base.errors import RunError
from palindrome.pipeline.runs.schemas import metadata_of

ALL = ["nll", "diffpath", "invad", "secmi", "dire"]
FIXTURES = Path(__file__).parents[1] / "fixtures"
MADE = runpy.run_path(str(FIXTURES / "make_score_fixtures.py"))
BUNDLED = Path(__file__).parents[2] / "checkpoints/cifar10-32"
FORMATS = [("PNG", {}), ("JPEG", {"quality": 75}), ("JPEG", {"quality": 91}), ("WEBP", {}), ("GIF", {}), ("BMP", {})]


@pytest.fixture(scope="module")
def folder(pngs, tmp_path_factory):
    """6 pictures in several formats, and two files that are none."""
    folder = tmp_path_factory.mktemp("mixed")
    for i, png in enumerate(pngs[:6]):
        kind, how = FORMATS[i % len(FORMATS)]
        Image.open(io.BytesIO(png)).resize((40 + i, 40)).save(folder / f"{i:02d}.{kind.lower()}", kind, **how)
    (folder / "03-not.png").write_text("no image")
    (folder / "05-cut.png").write_bytes(pngs[0][:200])
    return folder


@pytest.fixture(scope="module")
def command(folder, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("scored") / "run"
    flags = ["--shard-size", 4, "--batch-size", 3, "--maps", "--latents"]
    return ["score", "--images", folder, "--model", model, "--out", out, "--method", *ALL, *flags]


@pytest.fixture(scope="module")
def run(command):
    return Path(command[command.index("--out") + 1])


@pytest.fixture(scope="module")
def said(palindrome, command):
    return palindrome(*command)


@pytest.fixture(scope="module")
def table(said, run):
    assert said.code == 0, said.err
    files = sorted((run / "scores").iterdir())
    return pa.concat_tables([pq.read_table(f).replace_schema_metadata() for f in files]).sort_by("image_id")


@pytest.fixture
def copy(said, run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def pixels(image, size=16, resample="openai"):
    """A picture as guided-diffusion reads it, or by a filter of Pillow's from the square: float [1, 3, size, size]."""
    if resample == "openai":
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - min(image.size)) // 2, (image.height - min(image.size)) // 2
    image = image.crop((left, top, left + min(image.size), top + min(image.size)))
    image = image if image.width == size else image.resize((size, size), getattr(Image.Resampling, resample.upper()))
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1


def opened(folder, ids):
    return [Image.open(folder / name).convert("RGB") for name in ids]


def close(found, expected, rtol=1e-3):
    found = np.asarray(found, float)
    np.testing.assert_allclose(found, np.asarray(expected, float), rtol=rtol, atol=1e-4 * np.abs(found).max())


def test_every_column_is_what_the_method_says_of_the_pixels(table, folder, tiny):
    x = torch.cat([pixels(image) for image in opened(folder, table["image_id"].to_pylist())])
    network, process = tiny.network(), tiny.process
    ladder = logsnr_ladder(process, 10)
    latent = invert(network, x, ladder, process)
    expected = {f"nll_{name}": value for name, value in scores.gaussian(latent).items()} | {"nll_latent": latent}
    for name, levels in {
        "diffpath": scores.spaced(10, 1000),
        "invad": scores.sectioned(3, 1000),
        "secmi": scores.secmi_levels(1000),
        "dire": scores.spaced(20, 1000),
    }.items():
        found = getattr(scores, name)(network, x, levels, process)
        expected |= {f"{name}_{column}": value for column, value in found.items()}
    [theirs] = (expected.pop(name) for name in ["dire_map"])
    assert expected.keys() <= set(table.column_names)
    for name, values in expected.items():
        if name.endswith("_latent"):
            close(table[name].combine_chunks().to_numpy_ndarray(), values, 1e-2)
        else:
            close(np.stack([np.array(value) for value in table[name].to_pylist()]), values, 1e-2)
    maps = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table["dire_map"].to_pylist()]
    rounded = (theirs * 255).clamp(0, 255).byte().permute(0, 2, 3, 1)
    assert np.abs(np.stack(maps).astype(int) - rounded.numpy().astype(int)).max() <= 1


def test_exact_inversion_leaves_nothing_of_any_image_and_says_so(palindrome, sample, tmp_path):
    flags = ["--method", "dire", "dire-exact", "--limit", 1, "--steps", 10, "--maps", "--latents"]
    said = palindrome("score", "--images", sample, "--model", BUNDLED, "--out", tmp_path / "run", *flags)
    assert said.code == 0 and "exact inversion brings every image back, real or generated" in said.err
    rows = pq.read_table(tmp_path / "run/scores").to_pylist()
    assert max(row["dire_exact_l1"] for row in rows) < 2e-3 < 2e-2 < min(row["dire_l1"] for row in rows)
    assert {"dire_map", "dire_exact_map", "dire_latent", "dire_exact_latent"} < rows[0].keys()


def test_files_say_what_they_are(table):
    containers = [FORMATS[i % len(FORMATS)] for i in range(6)]
    assert table["container"].to_pylist() == [kind for kind, _ in containers]
    assert table["jpeg_quality"].to_pylist() == [how.get("quality") for _, how in containers]
    assert table["width"].to_pylist() == [40 + i for i in range(6)] and set(table["height"].to_pylist()) == {40}


def test_all_inputs_are_accounted_for(table, said, run, palindrome):
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["shards"], summary["images"], summary["scored"], summary["rejects"]) == (2, 8, 6, 2)
    assert summary["rejects_by_reason"] == {"not_an_image": 1, "truncated": 1}
    assert "6 images scored and 2 rejects" in said.out
    listed = {row["image_id"]: row["reason"] for row in json.loads(palindrome("rejects", run, "--format", "json").out)}
    assert listed == {
        "03-not.png": "not_an_image",
        "05-cut.png": "truncated",
    }
    state = palindrome("status", run).out
    assert "score of " in state and "6 images, 2 rejects" in state and "complete" in state
    verified = palindrome("verify", run)
    assert verified.out == "2 shards, 6 images, 2 rejects: all well\n" and verified.code == 0


def test_the_summary_s_figures_are_those_of_the_rows(table, run):
    found = json.loads((run / "summary.json").read_text())["scores"]
    columns = [f.name for f in table.schema if f.type == pa.float64()]
    assert list(found) == columns and len(columns) == 13
    for name in columns:
        values = table[name].to_numpy()
        order = [table["image_id"].to_pylist()[i] for i in np.argsort(values, kind="stable")]
        figures = {key: found[name][key] for key in ("mean", "std", "min", "median", "p99", "max")}
        quantiles = np.quantile(values, [0, 0.5, 0.99, 1])
        expected = dict(zip(figures, [values.mean(), values.std(), *quantiles], strict=True))
        assert figures == pytest.approx(expected, rel=1e-6, abs=1e-9 * np.abs(values).max())
        assert found[name]["count"] == 6 and found[name]["lowest"][:3] == order[:3]
        assert found[name]["highest"][:3] == order[::-1][:3]


def test_the_manifest_says_what_each_column_means_and_how_it_was_made(table, run, tiny):
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["scores"]["secmi_t_error"] == {"method": "secmi", "positive": "lower", "of": "member"}
    assert manifest["scores"]["dire_l1"] == {"method": "dire", "positive": "lower", "of": "generated"}
    assert {about["method"] for about in manifest["scores"].values()} == set(ALL) == set(manifest["methods"])
    methods = manifest["methods"]
    assert methods["diffpath"]["levels"] == list(range(0, 1000, 100)) and methods["diffpath"]["clipped"]
    assert methods["secmi"]["levels"] == list(range(0, 101, 10)) and not methods["secmi"]["clipped"]
    evaluations = {"nll": 10, "diffpath": 10, "invad": 3, "secmi": 11, "dire": 40}
    assert {name: about["evaluations"] for name, about in methods.items()} == evaluations
    assert manifest["preprocess"]["resample"] == "openai" and "recompress" not in manifest["preprocess"]
    for file in (run / "scores").iterdir():
        metadata = metadata_of(pq.read_schema(file))
        assert (metadata["methods"], metadata["model_digest"]) == (methods, tiny.digest)


def test_duckdb_and_polars_read_them(table, run):
    query = f"select count(*), sum(secmi_t_error), min(len(diffpath_eps_sum_steps)) from '{run}/scores/*.parquet'"
    [[count, total, steps]] = duckdb.sql(query).fetchall()
    assert (count, steps) == (6, 10) and total == pytest.approx(sum(table["secmi_t_error"].to_pylist()))
    read = pl.read_parquet(f"{run}/scores/*.parquet", columns=["image_id", "dire_l1"])
    assert read.sort("image_id")["dire_l1"].to_list() == table["dire_l1"].to_pylist()


def test_a_notebook_reads_the_table(table, run, tmp_path):
    import palindrome

    found = palindrome.scores(run).sort_by("image_id")
    stored = [name for name in table.column_names if not name.endswith(("_latent", "_map"))]
    assert found.column_names == stored and found.equals(table.select(stored).cast(found.schema))
    most = np.median(table["dire_l1"].to_numpy())
    few = palindrome.scores(str(run), f"dire_l1 > {most} and container != 'GIF'", ["image_id", "dire_map"])
    rows = table.select(["image_id", "dire_l1", "container"]).to_pylist()
    assert {*few["image_id"].to_pylist()} == {
        row["image_id"] for row in rows if row["dire_l1"] > most and row["container"] != "GIF"
    }
    with pytest.raises(ValueError, match="'fid' is not a column"):
        palindrome.scores(run, columns=["fid"])
    with pytest.raises(RunError, match="does not exist"):
        palindrome.scores(tmp_path / "none")


def test_the_report_shows_the_extremes(table, run):
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 13 * 12 and page.count("<svg") == 13
    lowest = table["image_id"].to_pylist()[int(np.argmin(table["dire_l1"].to_numpy()))]
    section = page.split("dire_l1 <small>")[1]
    assert section.index(f'title="{lowest}"') < section.index("The highest")


def test_a_second_run_changes_nothing_and_a_lost_shard_comes_back(folder, palindrome, model, tmp_path, times):
    run, flags = tmp_path / "run", ["--method", "invad", "--shard-size", 4, "--latents"]
    command = ["score", "--images", folder, "--model", model, "--out", run, *flags]
    assert palindrome(*command).code == 0
    before = times(run)
    said = palindrome(*command)
    assert said.code == 0 and "8 images in 2 shards, 0 to score" in said.out and times(run) == before
    lost = min((run / "scores").iterdir())
    content = pq.read_table(lost)
    lost.unlink()
    assert "1 to score" in palindrome(*command).out
    assert pq.read_table(lost).equals(content)
    for changed, words in (
        (["--recompress", "jpeg:50"], "None, now jpeg:50"),
        (["--steps", 4], "--steps was None, now 4"),
    ):
        other = palindrome(*command, *changed)
        assert other.code == 2 and words in other.err


def test_new_images_are_added_and_repaired_ones_retried(folder, palindrome, model, pngs, tmp_path):
    images = shutil.copytree(folder, tmp_path / "images")
    command = ["score", "--images", images, "--model", model, "--out", tmp_path / "run", "--method", "invad"]
    assert palindrome(*command).code == 0
    (images / "99.png").write_bytes(pngs[40])
    assert "1 images are new" in palindrome(*command).out
    (images / "03-not.png").write_bytes(pngs[41])
    said = palindrome(*command, "--retry-rejects")
    assert "8 images scored and 1 rejects" in said.out and "1 changed since" in said.err


@pytest.fixture(scope="module")
def plain(folder, palindrome, model, tmp_path_factory):
    """plain(flags...) -> the rows by image of a run of invad on good files alone."""
    good = tmp_path_factory.mktemp("good")
    for file in folder.iterdir():
        if "-" not in file.name:
            shutil.copy(file, good)

    def plain(*flags, images=good):
        out = tmp_path_factory.mktemp("plain") / "run"
        said = palindrome("score", "--images", images, "--model", model, "--out", out, "--method", "invad", *flags)
        assert said.code == 0, said.err
        assert palindrome("verify", out).code == 0
        rows = [row for file in (out / "scores").iterdir() for row in pq.read_table(file).to_pylist()]
        return {row["image_id"]: row["invad_nll"] for row in rows}

    plain.good = good
    return plain


def test_recompressing_is_making_jpegs_first(plain, tmp_path):
    for file in plain.good.iterdir():
        Image.open(file).convert("RGB").save(tmp_path / f"{file.stem}.jpg", quality=60)
    before, recompressed, jpegs = plain(), plain("--recompress", "jpeg:60"), plain(images=tmp_path)
    by_stem = {name.partition(".")[0]: value for name, value in jpegs.items()}
    assert {name.partition(".")[0]: value for name, value in recompressed.items()} == pytest.approx(by_stem, rel=1e-5)
    assert all(abs(before[name] - recompressed[name]) > 1e-3 for name in before)


def test_through_a_smaller_size_by_the_same_filter(plain, tiny):
    found = plain("--through", "8", "--resample", "bilinear")
    x = []
    for image in opened(plain.good, found):
        small = ((pixels(image, 8, "bilinear")[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        x.append(pixels(Image.fromarray(small), 16, "bilinear"))
    expected = scores.invad(tiny.network(), torch.cat(x), scores.sectioned(3, 1000), tiny.process)["nll"]
    close(list(found.values()), expected)


def test_steps_are_those_of_each_method(palindrome, folder, model, tmp_path):
    flags = ["--method", "dire", "nll", "--steps", 4]
    said = palindrome("score", "--images", folder, "--model", model, "--out", tmp_path, *flags, "--limit", 3)
    assert said.code == 0, said.err
    methods = json.loads((tmp_path / "run.json").read_text())["methods"]
    assert list(methods) == ["nll", "dire"], "in the order of the documents, whatever the command's"
    assert methods["dire"]["levels"] == [0, 250, 500, 750] and len(methods["nll"]["levels"]) == 5


def test_dire_s_maps_are_their_script_s(palindrome, tmp_path):
    """Files in, PNGs out: their resizing, their clipping, their ends, their rounding."""
    case = json.loads((FIXTURES / "scores/case.json").read_text())
    draw = runpy.run_path(str(FIXTURES / "make_openai_fixtures.py"))["weights_for"]
    torch.save(draw(case["shapes"], case["seed"]), tmp_path / "model.pt")
    (tmp_path / "model.json").write_text(json.dumps(case["flags"]))
    (tmp_path / "images").mkdir()
    for number, picture in enumerate(MADE["pictures"]()):
        Image.fromarray(picture).save(tmp_path / "images" / f"{number}.png")
    flags = ["--model", tmp_path / "model.pt", "--allow-pickle", "--method", "dire", "--maps"]
    said = palindrome("score", "--images", tmp_path / "images", "--out", tmp_path / "run", *flags)
    assert said.code == 0, said.err
    rows = pq.read_table(tmp_path / "run/scores").sort_by("image_id").to_pylist()
    ours = np.stack([np.asarray(Image.open(io.BytesIO(row["dire_map"]["bytes"]))) for row in rows])
    theirs = safetensors.torch.load_file(FIXTURES / "scores/tensors.safetensors")["dire: map"].numpy()
    assert np.abs(ours.astype(int) - theirs).max() <= 1 and theirs.std() > 10


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "fid"], "--method: invalid choice: 'fid'"),
        (["--method", "secmi", "secmi"], "--method: a method is given twice"),
        (["--method", "secmi", "nll", "--maps"], "--maps: nll, secmi makes no map; dire and dire-exact do"),
        (["--method", "secmi", "--latents"], "--latents: secmi has no latent"),
        (["--method", "secmi", "--steps", "5"], "--steps: secmi: it has steps of its own"),
        (["--method", "dire", "--steps", "600"], "--steps: dire: no spacing of 1000 timesteps has 600 of them"),
        (["--method", "nll", "--recompress", "png:9"], "--recompress: recompress 'png:9' is not jpeg:QUALITY"),
        (["--method", "nll", "--through", "0"], "--through: 0 is out of range"),
        (["--method", "nll", "--keep", "nll_norm"], "--keep: "),
        ([], "the following arguments are required: --method"),
    ],
)
def test_what_makes_no_sense_is_refused(palindrome, sample, model, tmp_path, flags, words):
    said = palindrome("score", "--images", sample, "--model", model, "--out", tmp_path / "run", *flags)
    assert said.code == 2 and words in said.err and said.err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_dry_run_says_what_it_takes(palindrome, folder, model, tmp_path):
    flags = ["--method", "dire", "secmi", "--maps", "--dry-run"]
    said = palindrome("score", "--images", folder, "--model", model, "--out", tmp_path / "run", *flags)
    assert said.code == 0 and "at most 51 network evaluations an image, 408 in all" in said.out
    assert not (tmp_path / "run").exists()


SHARD = b"palindrome.shard"


def spoil(run, change):
    """Rewrites a shard with another table."""
    path = min((run / "scores").iterdir())
    with pq.ParquetFile(path) as file:
        table, footer = change(file.read()), file.metadata.metadata[SHARD]
    with pq.ParquetWriter(path, table.schema) as out:
        out.write_table(table)
        out.add_key_value_metadata({SHARD: footer})


def replaced(name, first):
    def change(table):
        field = table.schema.field(name)
        values = [first, *table[name].to_pylist()[1:]]
        return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replaced("secmi_t_error", float("nan")), "has a secmi_t_error that is not finite"),
        (replaced("diffpath_eps_sum", 1e9), "has diffpath_eps_sum_steps that do not sum to its diffpath_eps_sum"),
        (replaced("jpeg_quality", 101), "has a jpeg_quality outside of 1 to 100"),
        (replaced("content_hash", "none"), "has a content_hash that is not a sha256"),
        (replaced("dire_map", {"bytes": b"\x89PNG", "path": "x.png"}), "has an image that is not a whole PNG"),
    ],
    ids=["nan", "sum", "quality", "hash", "map"],
)
def test_verify_names_what_is_damaged(copy, palindrome, change, words):
    spoil(copy, change)
    said = palindrome("verify", copy)
    assert said.code == 1 and words in said.out
