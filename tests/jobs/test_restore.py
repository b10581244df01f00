"""palindrome restore: the pictures against NumPy and Pillow on the same pixels, and every input accounted for."""

import io
import json
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from palindrome import restored, scores
from palindrome.pipeline.base.errors import RunError

SIZE = 16  # of the tiny model's images
STEPS = ["--steps", 3]


def opened(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def as_read(content):
    """As `encode` reads them by default."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def png(pixels):
    content = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(content, "PNG")
    return content.getvalue()


def hole(rows, size=SIZE):
    """A mask that leaves out some rows."""
    pixels = np.zeros((size, size), np.uint8)
    pixels[rows] = 255
    return png(pixels)


def mse(a, b):
    return ((a / 255.0 - b / 255.0) ** 2).mean()


def table(run):
    files = sorted(Path(run, "images").glob("*.parquet"))
    return pa.concat_tables([pq.read_table(f).replace_schema_metadata() for f in files])


def rows(run):
    return {(row["image_id"], row["variation"]): row for row in table(run).to_pylist()}


def rejected(palindrome, run):
    found = json.loads(palindrome("rejects", run, "--format", "json").out)
    return {row["image_id"]: (row["reason"], row["detail"]) for row in found}


@pytest.fixture(scope="module")
def folder(pngs, tmp_path_factory):
    """8 pictures of 32 pixels, and two files that are none."""
    folder = tmp_path_factory.mktemp("mixed")
    for i, content in enumerate(pngs[:8]):
        (folder / f"{i:02d}.png").write_bytes(content)
    (folder / "03-not.png").write_text("no image")
    (folder / "05-cut.png").write_bytes(pngs[0][:200])
    return folder


@pytest.fixture(scope="module")
def command(folder, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("restored") / "run"
    flags = [
        "--task",
        "inpaint",
        "--mask",
        "box:0.25",
        "--variations",
        2,
        "--ssim",
        "--shard-size",
        5,
        "--batch-size",
        3,
    ]
    return ["restore", "--images", folder, "--model", model, "--out", out, *STEPS, *flags]


@pytest.fixture(scope="module")
def run(palindrome, command):
    said = palindrome(*command)
    assert said.code == 0, said.err
    assert "8 images restored and 2 rejects" in said.out and "an observation: 0, of the picture in 8 bits 0" in said.out
    return Path(command[command.index("--out") + 1])


@pytest.fixture
def restore(palindrome, folder, model, tmp_path):
    """restore(flags...) -> what was said; a run in tmp_path / "run"."""

    def restore(*flags, images=folder):
        return palindrome("restore", "--images", images, "--model", model, "--out", tmp_path / "run", *STEPS, *flags)

    return restore


def test_known_pixels_are_those_of_the_image_to_the_bit(run, folder):
    found = rows(run)
    assert len(found) == 16
    missing = np.zeros((SIZE, SIZE), bool)
    missing[4:12, 4:12] = True
    for (name, _), row in found.items():
        original, result = as_read((folder / name).read_bytes()), opened(row["image"]["bytes"])
        assert np.array_equal(result[~missing], original[~missing])
        assert not np.array_equal(result[missing], original[missing])
        assert row["observation_error"] == row["picture_error"] == 0
        assert row["mse"] == pytest.approx(mse(original, result))
        assert row["psnr"] == pytest.approx(-10 * np.log10(row["mse"]))
        how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
        assert row["ssim"] == pytest.approx(structural_similarity(original, result, data_range=255, **how))
        alone = np.where(missing[:, :, None], 128, original)  # 0 in [-1, 1], rounded to even
        assert row["baseline_mse"] == pytest.approx(mse(original, alone))
        assert (row["width"], row["height"]) == (32, 32)
    assert len({row["mask_hash"] for row in found.values()}) == 1
    one, other = (opened(found["00.png", variation]["image"]["bytes"]).astype(int) for variation in (0, 1))
    assert np.abs(one - other).max() > 3


def test_all_inputs_are_accounted_for(run, palindrome):
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["shards"], summary["images"], summary["restored"], summary["rejects"]) == (2, 10, 8, 2)
    assert summary["rejects_by_reason"] == {"not_an_image": 1, "truncated": 1}
    means = duckdb.sql(f"select avg(mse), avg(psnr), avg(baseline_psnr) from '{run}/images/*.parquet'").fetchall()
    found = summary["results"]["mean"], summary["results"]["psnr"], summary["baseline"]["psnr"]
    assert found == pytest.approx(means[0])
    means = duckdb.sql(f"select avg(ssim), avg(baseline_ssim) from '{run}/images/*.parquet'").fetchall()
    assert (summary["results"]["ssim"], summary["baseline"]["ssim"]) == pytest.approx(means[0])
    assert (summary["results"]["count"], summary["baseline"]["count"]) == (16, 8)
    assert {name: reason for name, (reason, _) in rejected(palindrome, run).items()} == {
        "03-not.png": "not_an_image",
        "05-cut.png": "truncated",
    }
    state = palindrome("status", run).out
    assert "restore of " in state and "8 images, 2 rejects" in state and "complete" in state
    assert palindrome("verify", run).out == "2 shards, 8 images, 2 rejects: all well\n"


def test_the_report_shows_the_first_images(run):
    report = (run / "report.html").read_text()
    assert (
        "How near to the originals" in report
        and "SSIM" in report
        and "original, observation, and the results" in report
    )
    assert "00.png" in report and "03-not.png" not in report
    with Image.open(run / "images.png") as sheet:
        assert sheet.size == (4 * (SIZE + 2) - 2, 8 * (SIZE + 2) - 2)


def test_the_same_command_goes_on_and_a_shard_is_the_same_whatever_the_batch(palindrome, command, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    before, removed = rows(copy), sorted((copy / "images").iterdir())[0]
    kept = {path: path.stat().st_mtime_ns for path in (copy / "images").iterdir() if path != removed}
    removed.unlink()
    changed = [*command, "--batch-size", 2]
    changed[changed.index("--out") + 1] = copy
    said = palindrome(*changed)
    assert said.code == 0 and "10 images in 2 shards, 1 to restore" in said.out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    after = rows(copy)
    assert after.keys() == before.keys()
    for key, row in after.items():
        assert np.abs(opened(row["image"]["bytes"]).astype(int) - opened(before[key]["image"]["bytes"])).max() <= 1
    said = palindrome(*changed, "--mask", "box:0.5")
    assert said.code == 2 and "belongs to another command: --mask was box:0.25, now box:0.5" in said.err


def test_verify_sees_what_is_wrong(palindrome, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    file = sorted((copy / "images").iterdir())[0]
    whole = pq.read_table(file)

    def findings(changed):
        pq.write_table(changed, file)
        said = palindrome("verify", copy)
        assert said.code == 1
        return said.out + said.err

    footer = {b"palindrome.shard": pq.read_metadata(file).metadata[b"palindrome.shard"]}
    whole = whole.replace_schema_metadata({**whole.schema.metadata, **footer})
    at = whole.schema.get_field_index("mse")
    none = pa.nulls(len(whole), pa.float64())
    assert "has a mse that is not a number of 0 or more" in findings(whole.set_column(at, "mse", none))
    assert "it is neither restored nor a reject, in variation 1" in findings(whole.slice(0, len(whole) - 1))
    third = pa.array([2] * len(whole), pa.int32())
    at = whole.schema.get_field_index("variation")
    assert "has rows in variation 2, which the run does not make" in findings(whole.set_column(at, "variation", third))
    at = whole.schema.get_field_index("baseline_ssim")
    assert "has a baseline_ssim outside of -1 to 1" in findings(whole.set_column(at, "baseline_ssim", none))
    at = whole.schema.get_field_index("mask_hash")
    none = pa.nulls(len(whole), pa.string())
    assert "has a mask_hash that is not a sha256" in findings(whole.set_column(at, "mask_hash", none))


def test_the_rows_and_pictures_go_elsewhere(palindrome, run, folder, scripted, tmp_path):
    said = palindrome("export", run, "--out", tmp_path / "files", "--format", "png")
    assert said.code == 0, said.err
    assert len(list((tmp_path / "files/images/variation-1").glob("*.png"))) == 8
    tiny = ["--features", "tiny", "--input-size", 32, "--weights", scripted]
    said = palindrome("evaluate", "--real", run, "--generated", run, *tiny, "--out", tmp_path / "fid")
    assert said.code == 0, said.err
    assert sum(pq.read_metadata(f).num_rows for f in (tmp_path / "fid/features").glob("*.parquet")) == 2 * 16
    found = restored(run, "variation == 1", ["image_id", "image"]).to_pylist()
    assert len(found) == 8
    for row in found:
        assert np.array_equal(opened(row["image"]["bytes"]), opened(rows(run)[row["image_id"], 1]["image"]["bytes"]))
    assert restored(run).column_names == [name for name in table(run).column_names if name != "image"]
    with pytest.raises(RunError, match="is a run of restore, not of score"):
        scores(run)


@pytest.mark.parametrize("operator", ["average", "bicubic"])
def test_an_upscaled_image_has_the_small_one(restore, folder, tmp_path, operator):
    flags = [] if operator == "average" else ["--operator", operator]
    said = restore("--task", "upscale", "--factor", 4, "--limit", 4, *flags)
    assert said.code == 0, said.err
    for (name, _), row in rows(tmp_path / "run").items():
        original, result = (as_read((folder / name).read_bytes()), opened(row["image"]["bytes"]))
        smaller = [shrunk(pixels, operator) for pixels in (original, result)]
        assert row["picture_error"] == pytest.approx(np.abs(smaller[0] - smaller[1]).max() / 255, abs=1e-6)
        assert row["observation_error"] < 1e-5
        if operator == "average":
            alone = np.clip(smaller[0], 0, 255).repeat(4, 0).repeat(4, 1).round()
            assert row["baseline_mse"] == pytest.approx(mse(original, alone), rel=0.01)


def shrunk(pixels, operator):
    """uint8 [H, W, 3] -> float [H / 4, W / 4, 3]."""
    if operator == "average":
        return pixels.reshape(SIZE // 4, 4, SIZE // 4, 4, 3).mean((1, 3))
    bands = (Image.fromarray(pixels[:, :, i].astype(np.float32)) for i in range(3))
    return np.stack([np.asarray(b.resize((SIZE // 4,) * 2, Image.Resampling.BICUBIC)) for b in bands], -1)


def test_a_coloured_image_has_the_gray_one(restore, folder, tmp_path):
    assert restore("--task", "colorize", "--limit", 3).code == 0
    for (name, _), row in rows(tmp_path / "run").items():
        original, result = as_read((folder / name).read_bytes()), opened(row["image"]["bytes"])
        assert row["picture_error"] == pytest.approx(np.abs(original.mean(2) - result.mean(2)).max() / 255, abs=1e-6)
        alone = np.repeat(original.mean(2, keepdims=True), 3, 2).round()
        assert row["baseline_mse"] == pytest.approx(mse(original, alone), rel=0.01)
        assert row["mask_hash"] is None and row["ssim"] is None


def test_small_images_are_upscaled_as_they_are(restore, palindrome, pngs, tmp_path):
    images = tmp_path / "small"
    images.mkdir()
    small = [np.asarray(Image.open(io.BytesIO(p)).convert("RGB").resize((4, 4))) for p in pngs[:2]]
    for i, pixels in enumerate(small):
        Image.fromarray(pixels).save(images / f"{i}.png")
    (images / "large.png").write_bytes(pngs[0])
    Image.fromarray(small[0][:3]).save(images / "wide.png")
    said = restore("--task", "upscale", "--degraded", images=images)
    assert said.code == 0, said.err
    found = rows(tmp_path / "run")
    assert rejected(palindrome, tmp_path / "run") == {
        "large.png": ("wrong_size", "32x32 pixels, not 4x4"),
        "wide.png": ("wrong_size", "4x3 pixels, not 4x4"),
    }
    for i, pixels in enumerate(small):
        row = found[f"{i}.png", 0]
        smaller = shrunk(opened(row["image"]["bytes"]), "average")
        assert row["picture_error"] == pytest.approx(np.abs(smaller - pixels).max() / 255, abs=1e-6)
        assert row["mse"] is None and row["baseline_psnr"] is None and row["observation_error"] < 1e-5
    assert palindrome("verify", tmp_path / "run").code == 0
    assert "results" not in json.loads((tmp_path / "run/summary.json").read_text())
    assert "How near to the originals" not in (tmp_path / "run/report.html").read_text()


def test_a_picture_with_a_hole_is_filled_in_as_it_is(restore, palindrome, pngs, tmp_path):
    images = tmp_path / "holes"
    images.mkdir()
    pixels = np.array(Image.open(io.BytesIO(pngs[3])).convert("RGB").crop((8, 8, 24, 24)))
    pixels[5:9] = 255
    (images / "hole.png").write_bytes(png(pixels))
    (images / "large.png").write_bytes(pngs[0])
    (tmp_path / "mask.png").write_bytes(hole(slice(5, 9)))
    said = restore("--task", "inpaint", "--mask", f"file:{tmp_path}/mask.png", "--degraded", images=images)
    assert said.code == 0, said.err
    [row] = rows(tmp_path / "run").values()
    result, known = opened(row["image"]["bytes"]), np.r_[0:5, 9:16]
    assert np.array_equal(result[known], pixels[known]) and not np.array_equal(result[5:9], pixels[5:9])
    assert rejected(palindrome, tmp_path / "run") == {"large.png": ("wrong_size", "32x32 pixels, not 16x16")}
    mask = json.loads((tmp_path / "run/run.json").read_text())["restoration"]["mask"]
    assert mask == {"recipe": f"file:{tmp_path}/mask.png", "sha256": row["mask_hash"]}
    (tmp_path / "mask.png").write_bytes(hole(slice(4, 9)))
    said = restore("--task", "inpaint", "--mask", f"file:{tmp_path}/mask.png", "--degraded", images=images)
    assert said.code == 2 and "belongs to another command: restoration mask was" in said.err


def test_a_folder_of_masks_and_what_is_wrong_with_some(restore, palindrome, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for i, content in enumerate([hole(slice(3)), hole(slice(5), 20), hole(slice(0)), hole(slice(SIZE)), b"none"]):
        (masks / f"{i:02d}.png").write_bytes(content)
    said = restore("--task", "inpaint", "--mask", f"file:{masks}", "--limit", 8, "--seed", 1)
    assert said.code == 0, said.err
    assert [name for name, _ in rows(tmp_path / "run")] == ["00.png"]
    found = rejected(palindrome, tmp_path / "run")
    assert found["01.png"] == ("mask_size", "the mask has 20x20 pixels, and the image 16x16")
    assert {name: reason for name, (reason, _) in found.items()} == {
        "01.png": "mask_size",
        "02.png": "all_known",
        "03.png": "none_known",
        "03-not.png": "not_an_image",
        "04.png": "no_mask",
        "05-cut.png": "truncated",
        "05.png": "no_mask",
    }
    assert found["05.png"][1] == "05.png does not exist"
    assert palindrome("verify", tmp_path / "run").code == 0
    (masks / "05.png").write_bytes(hole(slice(2)))
    again = ["--task", "inpaint", "--mask", f"file:{masks}", "--limit", 8, "--seed", 1, "--retry-rejects"]
    assert restore(*again).code == 0
    assert [name for name, _ in rows(tmp_path / "run")] == ["00.png", "05.png"]


def test_a_run_in_which_nothing_can_be_restored_fails(restore, palindrome, tmp_path):
    (tmp_path / "masks").mkdir()
    said = restore("--task", "inpaint", "--mask", f"file:{tmp_path}/masks")
    assert said.code == 1 and "no image could be restored" in said.err
    assert "8 rejected as no_mask: the image has no mask" in said.out
    assert palindrome("verify", tmp_path / "run").code == 0


def test_a_column_of_masks(restore, palindrome, pngs, tmp_path):
    contents = [hole(slice(3)), None, hole(slice(6))]
    images = {"image": pngs[:3], "mask": [c and {"bytes": c, "path": None} for c in contents], "label": [1, 2, 3]}
    pq.write_table(pa.table(images), tmp_path / "images.parquet")
    source = tmp_path / "images.parquet"
    flags = ["--task", "inpaint", "--image-column", "image", "--keep", "label"]
    said = restore(*flags, "--mask", "column:mask", images=source)
    assert said.code == 0, said.err
    found = rows(tmp_path / "run")
    assert [(row["label"], row["image_id"]) for row in found.values()] == [
        (1, "images.parquet#0"),
        (3, "images.parquet#2"),
    ]
    assert "mask" not in table(tmp_path / "run").column_names
    assert len({row["mask_hash"] for row in found.values()}) == 2
    words = ("no_mask", "the column has none for this image")
    assert rejected(palindrome, tmp_path / "run") == {"images.parquet#1": words}
    assert palindrome("verify", tmp_path / "run").code == 0
    said = restore(*flags, "--mask", "column:nosuch", images=source)
    assert said.code == 2 and "--mask: column 'nosuch' is not in" in said.err
    said = restore(*flags, "--mask", "column:label", images=source)
    assert said.code == 2 and "--mask: column 'label' has int64, not pictures" in said.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--task", "inpaint"], "--mask: inpaint needs it"),
        (["--task", "upscale", "--mask", "box:0.5"], "--mask: goes with --task inpaint, not with upscale"),
        (["--task", "colorize", "--factor", 2], "--factor: goes with --task upscale, not with colorize"),
        (["--task", "colorize", "--operator", "average"], "--operator: goes with --task upscale"),
        (["--task", "upscale", "--factor", 5], "--factor: the model's 16 pixels are no multiple of 5"),
        (["--task", "upscale", "--degraded", "--resample", "box"], "--resample: with --degraded nothing is resized"),
        (["--task", "inpaint", "--mask", "box:2"], "--mask: box:2 is no fraction of the area"),
        (["--task", "inpaint", "--mask", "file:nosuch/mask.png"], "--mask: nosuch/mask.png does not exist"),
        (["--task", "inpaint", "--mask", "column:mask"], "--mask: column 'mask' is asked for"),
        (["--task", "upscale", "--degraded", "--ssim"], "--ssim: with --degraded there are no originals"),
        (["--task", "upscale", "--eta", 1.5], "--eta: 1.5 is out of range"),
    ],
)
def test_what_makes_no_sense_is_refused(restore, tmp_path, flags, words):
    said = restore(*flags)
    assert said.code == 2 and words in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_dry_run_writes_nothing(restore, tmp_path):
    said = restore("--task", "upscale", "--dry-run")
    assert said.code == 0, said.err
    assert "10 images in 1 shards, 1 to restore" in said.out and not list((tmp_path / "run").glob("images/*"))
