"""palindrome edit: what is to stay stays to the bit; what changes, against NumPy, the sampler and the files."""

import io
import json
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from palindrome.model.ddim import sample
from palindrome.model.families import unet2d
from palindrome.model.interpolate import slerp

SIZE, COUNT = 16, 12
LEVELS = (-1, 0, 10, 40, 100, 200, 400)
STRENGTHS = (0.5, 1.0)
BOX = np.zeros((SIZE, SIZE), bool)
BOX[4:12, 4:12] = True  # of box:0.25


def opened(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def as_read(content):
    """As `encode` reads them by default."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def mask(rows, size=SIZE):
    """A picture that is white in some rows."""
    pixels, content = np.zeros((size, size), np.uint8), io.BytesIO()
    pixels[rows] = 255
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def to_pixels(x):
    return ((x.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()


def table(run):
    files = sorted(Path(run, "images").glob("*.parquet"))
    return pa.concat_tables([pq.read_table(f).replace_schema_metadata() for f in files])


def rows(run):
    """(number of the image, strength) -> row."""
    return {(number(row), row["strength"]): row for row in table(run).to_pylist()}


def number(row):
    return int(row["image_id"].rpartition("#")[2].partition(".")[0])


def rejected(palindrome, run):
    found = json.loads(palindrome("rejects", run, "--format", "json").out)
    return {number(row): (row["reason"], row["detail"]) for row in found}


@pytest.fixture(scope="module")
def gentle(tiny):
    """A network whose output is small, so that its inversion is exact in few steps."""
    weights = {name: value * (0.01 if name.startswith("conv_out") else 1) for name, value in tiny.weights.items()}
    return unet2d.UNet2D(tiny.config, weights, tiny.process)


@pytest.fixture(scope="module")
def images(sample, tmp_path_factory):
    """12 images with labels, and masks, of which one is missing and one too large."""
    found = pq.read_table(sample).slice(0, COUNT)
    masks = [mask(slice(i + 1)) for i in range(COUNT)]
    masks[2], masks[3] = None, mask(slice(3), 20)
    path = tmp_path_factory.mktemp("images") / "images.parquet"
    column = pa.array([None if m is None else {"bytes": m, "path": None} for m in masks])
    pq.write_table(found.append_column("mask", column), path)
    return path


@pytest.fixture(scope="module")
def encode(palindrome, images, gentle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded")
    unet2d.save(gentle, str(folder / "model"))

    def encode(name, *flags, images=images):
        how = ["--ladder", ",".join(map(str, LEVELS[1:])), "--shard-size", 6, "--keep", "label", "--measure"]
        where = ["--images", images, "--image-column", "img", "--model", folder / "model", "--out", folder / name]
        said = palindrome("encode", *where, *how, *flags)
        assert said.code == 0, said.err
        return folder / name

    return encode


@pytest.fixture(scope="module")
def encoded(encode):
    """Two shards, exact."""
    return encode("exact")


@pytest.fixture(scope="module")
def command(encoded, tmp_path_factory):
    out = tmp_path_factory.mktemp("edited") / "run"
    flags = ["--towards", "images.parquet#7", "--strength", *STRENGTHS, "--mask", "box:0.25", "--batch-size", 4]
    return ["edit", "--latents", encoded, "--out", out, *flags]


@pytest.fixture(scope="module")
def run(palindrome, command):
    said = palindrome(*command)
    assert said.code == 0, said.err
    assert "24 pictures of 12 images and 0 rejects" in said.out
    values = 24 * 3 * int((~BOX).sum())
    assert f"\n0 of {values:,} values outside the masks changed\n" in said.out
    return Path(command[command.index("--out") + 1])


@pytest.fixture
def edit(palindrome, encoded, tmp_path):
    """edit(flags...) -> what was said; a run in tmp_path / "run"."""
    return lambda *flags, latents=encoded: palindrome("edit", "--latents", latents, "--out", tmp_path / "run", *flags)


@pytest.fixture(scope="module")
def latents(encoded, read_run):
    """x_T of image i, [12, 3, 16, 16], and their rows."""
    found = read_run(encoded)
    order = np.argsort([number(row) for row in found.rows])
    return torch.tensor(found.latents[order]), [found.rows[i] for i in order]


@pytest.fixture(scope="module")
def decoded(gentle):
    """decoded(x) -> pictures, float [N, H, W, C], by the sampler alone."""
    network = gentle.denoiser()
    return lambda x, levels=LEVELS: to_pixels(sample(network, x, levels, gentle.process))


def far(picture, pixels):
    return np.abs(opened(picture["bytes"]) - pixels).max()


def test_what_is_to_stay_stays_to_the_bit(run, pngs, latents, decoded):
    found = rows(run)
    assert found.keys() == {(i, strength) for i in range(COUNT) for strength in STRENGTHS}
    x, stored = latents
    own = decoded(x)
    for (i, strength), row in found.items():
        original, edited = as_read(pngs[i]), opened(row["image"]["bytes"])
        assert np.array_equal(edited[~BOX], original[~BOX])
        assert (row["changed_outside"], row["values_outside"]) == (0, 3 * (SIZE * SIZE - 64))
        inside = ((edited / 255 - original / 255) ** 2)[BOX].mean()
        assert row["change"] == pytest.approx(inside) and (i == 7 or inside > 1e-3)
        assert row["own_mse"] == pytest.approx(stored[i]["mse"], rel=0.1, abs=1e-12) and row["status"] == "compared"
        assert (row["own"] is not None) == (strength == 0.5) and (row["own"] is None or far(row["own"], own[i]) <= 1)
        assert (row["width"], row["height"], row["content_hash"]) == (32, 32, stored[i]["content_hash"])
    assert len({row["mask_hash"] for row in found.values()}) == 1


def test_the_summary_is_that_of_the_rows(run, palindrome):
    summary = json.loads((run / "summary.json").read_text())
    assert [summary[name] for name in ("shards", "latents", "images", "rejects")] == [2, COUNT, 2 * COUNT, 0]
    none = dict.fromkeys(("changed", "changed_rows", "most"), 0)
    assert summary["outside"] == {"values": 24 * 3 * int((~BOX).sum()), "rows": 24, "worst": [], **none}
    means = duckdb.sql(f"select strength, avg(change) from '{run}/images/*.parquet' group by all order by 1").fetchall()
    assert [(row["strength"], pytest.approx(row["mean"])) for row in summary["by_strength"]] == means
    assert summary["own"]["count"] == COUNT and summary["own"]["uncompared"] == {}
    state = palindrome("status", run).out
    assert "edit of " in state and "12 latents, 0 rejects" in state and "complete" in state
    assert palindrome("verify", run).out == "2 shards, 12 latents, 0 rejects: all well\n"
    report = (run / "report.html").read_text()
    assert "<strong>0 of " in report and "strength 0.5" in report and "images.parquet#11" in report
    assert Image.open(run / "images.png").size == (5 * (SIZE + 2) - 2, COUNT * (SIZE + 2) - 2)


def test_without_exactness_what_changes_is_counted(palindrome, encode, edit, pngs, tmp_path):
    said = edit("--towards", "images.parquet#7", "--mask", "box:0.25", latents=encode("plain", "--corrections", 0))
    assert said.code == 0, said.err
    changed = {}
    for (i, _), row in rows(tmp_path / "run").items():
        changed[i] = int((opened(row["image"]["bytes"]) != as_read(pngs[i]))[~BOX].sum())
        assert row["changed_outside"] == changed[i]
    assert min(changed.values()) > 20
    summary = json.loads((tmp_path / "run/summary.json").read_text())["outside"]
    assert (summary["changed"], summary["most"]) == (sum(changed.values()), max(changed.values()))
    assert changed[number({"image_id": summary["worst"][0]})] == summary["most"]
    of = f"{summary['changed']:,} of {COUNT * 3 * 192:,} values outside the masks changed; at most {summary['most']} of"
    assert of in said.out
    assert palindrome("verify", tmp_path / "run").code == 0
    assert f"<strong>{summary['changed']:,} of" in (tmp_path / "run/report.html").read_text()


def test_towards_another_image_is_on_the_sphere(edit, latents, decoded, tmp_path):
    x, _ = latents
    assert edit("--towards", "images.parquet#3", "--strength", 0, 0.25, 1).code == 0
    found = rows(tmp_path / "run")
    between = decoded(slerp(x, x[3].expand_as(x), torch.full((COUNT,), 0.25, dtype=torch.float64)))
    for i in range(COUNT):
        assert found[i, 0.0]["image"]["bytes"] == found[i, 0.0]["own"]["bytes"]
        assert far(found[i, 0.25]["image"], between[i]) <= 1
        assert far(found[i, 1.0]["image"], opened(found[3, 0.0]["image"]["bytes"]).astype(float)) <= 1
        assert found[i, 1.0]["mask_hash"] is found[i, 1.0]["values_outside"] is None
    assert "outside" not in json.loads((tmp_path / "run/summary.json").read_text())


@pytest.mark.parametrize("steps", [0, 4])
def test_a_direction_is_added_at_its_level(palindrome, edit, encoded, latents, gentle, decoded, tmp_path, steps):
    """That of two images over two others; against the means by NumPy of what the sampler makes."""
    x, stored = latents
    labels = [row["label"] for row in stored]
    first, second = labels.index(8), labels.index(6)
    flags = ["--where", f"image_id == 'images.parquet#{first}'", "--against", "label == 6"]
    file = tmp_path / "direction.safetensors"
    said = palindrome("direction", "--latents", encoded, *flags, "--at", steps / 6, "--out", file)
    assert said.code == 0, said.err
    assert labels[second] == 6
    high, low = LEVELS[6 - steps :], LEVELS[: 7 - steps]
    network = gentle.denoiser()
    part = sample(network, x, high, gentle.process).double()
    direction = part[first] - part[[label == 6 for label in labels]].mean(0)
    assert edit("--direction", file, "--strength", -1, 0.5, "--where", "label != 8").code == 0
    found = rows(tmp_path / "run")
    assert {i for i, _ in found} == {i for i, label in enumerate(labels) if label != 8}
    for (i, strength), row in found.items():
        expected = decoded((part[i] + strength * direction).float()[None], low)[0]
        assert far(row["image"], expected) <= 1
    described = json.loads((tmp_path / "run/run.json").read_text())["edit"]["direction"]
    assert described["level"] == LEVELS[6 - steps] and described["counts"] == [1, labels.count(6)]
    assert f"less label == 6, at level {LEVELS[6 - steps]}" in (tmp_path / "run/report.html").read_text()
    said = edit("--direction", file, "--towards", "images.parquet#7")
    assert said.code == 2 and "--direction: can't be combined with --towards" in said.err
    if steps:  # the ladder of another number of steps does not visit that level
        said = edit("--direction", file, "--steps", 3, "--where", "label == 8")
        words = f"--direction: it is of x at level {LEVELS[2]}, which the ladder here does not visit"
        assert said.code == 2 and words in said.err


def test_the_same_command_goes_on_and_another_is_refused(palindrome, command, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    before, removed = rows(copy), sorted((copy / "images").iterdir())[0]
    kept = {path: path.stat().st_mtime_ns for path in (copy / "images").iterdir() if path != removed}
    removed.unlink()
    changed = [*command, "--batch-size", 5]
    changed[changed.index("--out") + 1] = copy
    said = palindrome(*changed)
    assert said.code == 0 and "2 shards of latents, 1 to edit" in said.out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    after = rows(copy)
    assert after.keys() == before.keys()
    for key, row in after.items():
        assert far(row["image"], opened(before[key]["image"]["bytes"]).astype(int)) <= 1
        assert row["changed_outside"] == 0
    for flags, words in {
        ("--strength", 0.25): "--strength was [0.5, 1.0], now [0.25]",
        ("--mask", "box:0.5"): "--mask was box:0.25, now box:0.5",
        ("--towards", "images.parquet#8"): "--towards was images.parquet#7, now images.parquet#8",
    }.items():
        said = palindrome(*changed, *flags)
        assert said.code == 2 and f"belongs to another command: {words}" in said.err


def test_each_image_has_a_mask_of_its_own_beside_it(palindrome, edit, pngs, tmp_path):
    said = edit("--towards", "images.parquet#7", "--mask", "column:mask")
    assert said.code == 0, said.err
    found = rows(tmp_path / "run")
    assert {i for i, _ in found} == {*range(COUNT)} - {2, 3}
    for (i, _), row in found.items():
        assert np.array_equal(opened(row["image"]["bytes"])[i + 1 :], as_read(pngs[i])[i + 1 :])
        assert row["values_outside"] == 3 * SIZE * (SIZE - i - 1)
    assert rejected(palindrome, tmp_path / "run") == {
        2: ("no_mask", "the column has none for this image"),
        3: ("mask_size", "the mask has 20x20 pixels, and the image 16x16"),
    }
    assert "1 rejected as no_mask: the image has no mask" in said.out
    assert palindrome("verify", tmp_path / "run").out == "2 shards, 10 latents, 2 rejects: all well\n"
    for column, words in {"nosuch": "column 'nosuch' is not in", "label": "column 'label' has int64, not pic"}.items():
        said = edit("--towards", "images.parquet#7", "--mask", f"column:{column}")
        assert said.code == 2 and f"--mask: {words}" in said.err


def test_a_folder_of_masks_and_what_is_wrong_with_some(palindrome, edit, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for i, content in enumerate([mask(slice(3)), mask(slice(0)), mask(slice(SIZE)), b"none"]):
        (masks / f"images.parquet#{i}.png").write_bytes(content)
    flags = ["--towards", "images.parquet#7", "--mask", f"file:{masks}", "--where", "label in [3, 8, 6, 0]"]
    assert edit(*flags).code == 0
    found = rejected(palindrome, tmp_path / "run")
    assert [i for i, _ in rows(tmp_path / "run")] == [0]
    assert {i: reason for i, (reason, _) in found.items() if i < 4} == {1: "all_known", 2: "none_known", 3: "no_mask"}
    assert found[4] == ("no_mask", "images.parquet#4.png does not exist")
    assert palindrome("verify", tmp_path / "run").code == 0
    (masks / "images.parquet#4.png").write_bytes(mask(slice(2)))
    assert edit(*flags).code == 0 and [i for i, _ in rows(tmp_path / "run")] == [0]
    assert edit(*flags, "--retry-rejects").code == 0 and {i for i, _ in rows(tmp_path / "run")} == {0, 4}
    said = edit("--towards", "images.parquet#7", "--mask", f"file:{masks}/images.parquet#1.png")
    assert said.code == 2 and "--mask: " in said.err and "all known" in said.err


def test_originals_that_are_gone_or_changed_are_said(palindrome, encode, edit, images, pngs, tmp_path):
    """Only those with masks beside them can't be edited; those of others have nothing to be compared with."""
    copy = shutil.copy(images, tmp_path / "images.parquet")
    run = encode("spoilt", images=copy)
    found = pq.read_table(copy)
    pictures = found["img"].to_pylist()
    pictures[1], pictures[4] = {**pictures[1], "bytes": pngs[200]}, {**pictures[4], "bytes": b"none"}
    at = found.schema.get_field_index("img")
    pq.write_table(found.set_column(at, "img", pa.array(pictures, found.schema.field("img").type)), copy)
    flags = ["--towards", "images.parquet#7", "--mask"]
    said = edit(*flags, "box:0.25", latents=run)
    assert said.code == 0, said.err
    statuses = {i: row["status"] for (i, _), row in rows(tmp_path / "run").items()}
    assert statuses == dict.fromkeys(range(COUNT), "compared") | {1: "changed", 4: "not_an_image"}
    row = rows(tmp_path / "run")[1, 1.0]
    assert row["values_outside"] == 576 and row["change"] is row["own_mse"] is row["changed_outside"] is None
    assert np.array_equal(opened(row["image"]["bytes"])[~BOX], as_read(pngs[1])[~BOX])
    assert "1 images not compared: changed" in said.out and "1 images not compared: not_an_image" in said.out
    assert f"0 of {10 * 576:,} values outside" in said.out
    assert palindrome("verify", tmp_path / "run").code == 0
    said = palindrome("edit", "--latents", run, *flags, "column:mask", "--out", tmp_path / "columns")
    assert said.code == 0, said.err
    reasons = {i: reason for i, (reason, _) in rejected(palindrome, tmp_path / "columns").items()}
    assert reasons == {1: "changed", 2: "no_mask", 3: "mask_size", 4: "not_an_image"}
    assert palindrome("verify", tmp_path / "columns").code == 0


def test_where_no_arc_leads_is_a_reject(palindrome, edit, encoded, tmp_path):
    """Towards the opposite of another image's latent: made so by hand."""
    copy = shutil.copytree(encoded, tmp_path / "encoded")
    for path in (copy / "latents").iterdir():
        file = pq.ParquetFile(path)
        found, footer = file.read(), file.metadata.metadata[b"palindrome.shard"]
        x = found["latent"].combine_chunks().to_numpy_ndarray().copy()
        names = found["image_id"].to_pylist()
        if "images.parquet#7" in names:
            x[names.index("images.parquet#7")] = -x[names.index("images.parquet#9")]
        at = found.schema.get_field_index("latent")
        found = found.set_column(at, found.schema.field("latent"), pa.FixedShapeTensorArray.from_numpy_ndarray(x))
        with pq.ParquetWriter(path, found.schema) as writer:
            writer.write_table(found)
            writer.add_key_value_metadata({"palindrome.shard": footer})
    assert edit("--towards", "images.parquet#7", "--strength", 0.5, latents=copy).code == 0
    assert {i: reason for i, (reason, _) in rejected(palindrome, tmp_path / "run").items()} == {9: "no_arc"}
    assert len(rows(tmp_path / "run")) == COUNT - 1


def test_ids_and_expressions(edit, tmp_path):
    (tmp_path / "ids.txt").write_text("images.parquet#2\nimages.parquet#9\nnone\n")
    said = edit("--towards", "images.parquet#7", "--ids", tmp_path / "ids.txt")
    assert said.code == 0 and "2 of 3 ids have a latent that matches" in said.err
    assert {i for i, _ in rows(tmp_path / "run")} == {2, 9}
    shutil.rmtree(tmp_path / "run")
    said = edit("--towards", "images.parquet#7", "--where", "label > 99")
    assert said.code == 1 and "no latent matches --ids and --where" in said.err


def test_the_pictures_go_elsewhere(palindrome, run, scripted, tmp_path):
    said = palindrome("export", run, "--out", tmp_path / "files", "--format", "png")
    assert said.code == 0, said.err
    assert {path.parent.name for path in (tmp_path / "files/images").rglob("*.png")} == {"strength-0.5", "strength-1.0"}
    tiny = ["--features", "tiny", "--input-size", 32, "--weights", scripted]
    said = palindrome("evaluate", "--real", run, "--generated", run, *tiny, "--out", tmp_path / "fid")
    assert said.code == 0, said.err
    assert sum(pq.read_metadata(f).num_rows for f in (tmp_path / "fid/features").glob("*.parquet")) == 2 * 24


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--towards: nothing is to change: give it, --direction, or another class, text or guidance"),
        (["--strength", 1], "--towards: nothing is to change"),
        (["--towards", "none"], "--towards: there is no latent of 'none'"),
        (["--towards", "images.parquet#7", "--strength", 2], "--strength: 2 is no part of the way --towards another"),
        (["--towards", "images.parquet#7", "--strength", -0.5], "--strength: -0.5 is no part"),
        (["--towards", "images.parquet#7", "--strength", "nan"], "--strength: nan is not finite"),
        (["--towards", "images.parquet#7", "--strength", 1, 0.5, 1], "--strength: a strength is given twice"),
        (["--towards", "images.parquet#7", "--keep-until", 0.5], "--keep-until: there is no other class, text or"),
        (["--towards", "images.parquet#7", "--mask", "box:2"], "--mask: box:2 is no fraction"),
        (["--towards", "images.parquet#7", "--mask", "file:nosuch.png"], "--mask: nosuch.png does not exist"),
        (["--towards", "images.parquet#7", "--steps", 900], "--steps: 900 steps do not fit"),
        (["--direction", "nosuch.safetensors"], "--direction: "),
        (["--class", 3], "--class: the model is not class-conditional"),
    ],
)
def test_what_makes_no_sense_is_refused(edit, tmp_path, flags, words):
    said = edit(*flags)
    assert said.code == 2 and words in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_dry_run_writes_nothing(edit, tmp_path):
    said = edit("--towards", "images.parquet#7", "--strength", 0.5, 1, "--dry-run")
    assert said.code == 0, said.err
    assert "12 images in 2 shards; at most 18 network evaluations an image" in said.out
    assert not list((tmp_path / "run").glob("images/*"))
