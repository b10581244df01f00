"""Runs in a notebook: the same rows, pictures and latents as the commands read and write, and no Ray."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import ExifTags, Image

from palindrome import Run
from palindrome import open as open_run
from palindrome.model.families import unet2d
from palindrome.model.process import VP
from palindrome.pipeline.images.metrics import to_model
from palindrome.pipeline.storage.folder import Folder

ROOT = Path(__file__).parents[1]
NEAR = 1e-4  # between latents of the same image in batches of other sizes
WITHOUT_RAY = """
import json, sys
import palindrome, ray
run = palindrome.open(sys.argv[1])
[picture] = run.decode(run.ids[0])
latent = run.encode(picture)
print(json.dumps([len(run), list(latent.shape), ray.is_initialized()]))
"""


@pytest.fixture(autouse=True)
def one_thread():
    """For the model: several in one process wait for one another on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoded(palindrome, sample, model, tmp_path_factory):
    """48 images in 5 shards, with their labels."""
    out = tmp_path_factory.mktemp("encoded") / "run"
    flags = ["--limit", 48, "--shard-size", 12, "--steps", 6, "--keep", "label"]
    assert palindrome("encode", "--images", sample, "--model", model, "--out", out, *flags).code == 0
    return out


@pytest.fixture(scope="module")
def run(encoded):
    return open_run(encoded)


@pytest.fixture(scope="module")
def rows(encoded):
    """Its rows by id, read with bare pyarrow."""
    table = pa.concat_tables(pq.read_table(f).replace_schema_metadata() for f in (encoded / "latents").iterdir())
    latents = table["latent"].combine_chunks().to_numpy_ndarray()
    others = table.drop_columns(["latent"]).to_pylist()
    return {row["image_id"]: {**row, "latent": x} for row, x in zip(others, latents, strict=True)}


def regenerated(run):
    """(id, steps) -> uint8 [H, W, C]."""
    found = pa.concat_tables(pq.read_table(f) for f in (run / "images").iterdir()).to_pylist()
    return {(r["image_id"], r["steps"]): np.asarray(Image.open(io.BytesIO(r["image"]["bytes"]))) for r in found}


def assert_same(picture, pixels):
    """But for the last bit, where batches of other sizes round otherwise."""
    assert isinstance(picture, Image.Image) and picture.size == pixels.shape[1::-1]
    assert np.abs(np.asarray(picture).astype(int) - pixels).max() <= 1


def test_a_run_is_a_table_in_the_collections_order(run, rows, sample):
    assert len(run) == 48
    assert run.ids == [f"{sample.name}#{i}" for i in range(48)]
    table = run.table()
    assert table["image_id"].to_pylist() == run.ids and "latent" not in table.schema.names
    assert table.to_pylist() == [{k: v for k, v in rows[i].items() if k != "latent"} for i in run.ids]
    assert polars.from_arrow(table)["label"].to_list() == [rows[i]["label"] for i in run.ids]


def test_other_engines_read_the_dataset(run, rows):
    everything = run.dataset
    found = duckdb.sql("select image_id, label from everything where label = 3 order by 1").fetchall()
    assert found == sorted((i, 3) for i in run.ids if rows[i]["label"] == 3)
    assert everything.schema.field("latent").type.shape == [3, 16, 16]


def test_expressions_and_columns(run, rows):
    table = run.table("label in [3, 5] and not nfe < 0", columns=["label", "image_id"])
    assert table.schema.names == ["label", "image_id"]
    assert table["image_id"].to_pylist() == [i for i in run.ids if rows[i]["label"] in (3, 5)]
    assert run.table("label > 99").num_rows == 0
    found = run.table("label == 3", ["latent"])["latent"].combine_chunks().to_numpy_ndarray()
    assert np.array_equal(found, [rows[i]["latent"] for i in run.ids if rows[i]["label"] == 3])
    with pytest.raises(ValueError, match="'nosuch' is not a column; the columns are image_id, "):
        run.table(columns=["label", "nosuch"])
    with pytest.raises(ValueError, match="'nosuch' is not a column"):
        run.table("nosuch == 1")


def test_latents_come_in_the_order_asked_for(run, rows):
    wanted = [run.ids[i] for i in (40, 3, 17, 3)]
    found = run.latents(wanted)
    assert found.dtype == np.float32 and np.array_equal(found, [rows[i]["latent"] for i in wanted])
    column = run.table("label == 3")["image_id"]
    assert np.array_equal(run.latents(column), run.latents(column.to_pylist()))
    assert np.array_equal(run.latents(run.ids[5]), run.latents(np.array(run.ids[5:6])))
    assert run.latents([]).shape == (0, 3, 16, 16)
    with pytest.raises(KeyError, match=re.escape("no latent of 'none.png'")):
        run.latents([run.ids[0], "none.png"])


def test_pictures_are_those_of_regenerate(palindrome, encoded, run, tmp_path):
    assert palindrome("regenerate", "--latents", encoded, "--steps", 3, 6, "--out", tmp_path).code == 0
    found = regenerated(tmp_path)
    for given, steps in ((None, 6), (6, 6), (3, 3)):
        wanted = run.ids[::-1] if given is None else [run.ids[i] for i in (40, 3, 40)]
        pictures = run.decode(wanted, given)
        assert len(pictures) == len(wanted)
        for image_id, picture in zip(wanted, pictures, strict=True):
            assert_same(picture, found[image_id, steps])
    [by_id], [by_latent] = run.decode(run.ids[7]), run.decode(run.latents(run.ids[7])[0].astype(np.float64))
    assert np.array_equal(by_id, by_latent)
    [by_tensor, _] = run.decode(torch.from_numpy(run.latents(run.ids[7:9])))
    assert_same(by_tensor, np.asarray(by_id))
    assert run.decode([]) == []


def test_what_can_not_be_decoded(run):
    with pytest.raises(KeyError, match=re.escape("no latent of 'none.png'")):
        run.decode("none.png")
    with pytest.raises(ValueError, match=re.escape("[3, 16, 16]; got [2, 3, 8, 8]")):
        run.decode(np.zeros((2, 3, 8, 8)))
    with pytest.raises(ValueError, match="0 steps do not fit"):
        run.decode(run.ids[0], steps=0)


def test_an_image_has_the_latent_that_encode_stored(run, rows, pngs, pictures):
    for i in (0, 20):
        stored = rows[run.ids[i]]["latent"]
        path = pictures / f"{i:03d}.png"
        for given in (Image.open(io.BytesIO(pngs[i])), pngs[i], path, str(path)):
            latent = run.encode(given)
            assert latent.dtype == np.float32 and np.abs(latent - stored).max() < NEAR
        loaded = Image.open(io.BytesIO(pngs[i]))
        loaded.load()
        assert np.array_equal(run.encode(loaded), latent)


@pytest.mark.parametrize(
    ("flags", "near"),
    [
        (["--corrections", 0, "--ladder", "quadratic", "--steps", 5, "--fit", "pad", "--resample", "area"], NEAR),
        (["--tolerance", "1e-3", "--dtype", "float16", "--steps", 4, "--background", 9, 99, 200], 4e-3),
        (["--tolerance", "exact", "--steps", 3, "--corrections", 1, "--ladder", "0,3,11"], NEAR),
    ],
    ids=["plain", "float16", "exact"],
)
def test_as_the_run_did_it(palindrome, corpus, model, tmp_path, flags, near):
    """Of turned, transparent, gray and 16-bit files in many formats, none of them square."""
    folder = tmp_path / "photos"
    folder.mkdir()
    picture = Image.open(io.BytesIO(corpus.sample_pngs()[1])).resize((48, 36))
    turned = picture.getexif()
    turned[ExifTags.Base.Orientation] = 6
    picture.save(folder / "turned.jpg", exif=turned)
    clear = picture.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "clear.webp", lossless=True)
    picture.convert("P").save(folder / "palette.gif")
    picture.convert("CMYK").save(folder / "print.tif")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    command = ["encode", "--images", folder, "--model", model, "--out", tmp_path / "run", *flags]
    assert palindrome(*command).code == 0
    run = open_run(tmp_path / "run")
    assert len(run) == 5
    for image_id in run.ids:
        for given in (folder / image_id, Image.open(folder / image_id)):
            assert np.abs(run.encode(given) - run.latents(image_id)[0]).max() < near, image_id


def test_edits_are_those_of_the_command(palindrome, encoded, run, tmp_path):
    """To the bit, in batches of the same images: those of a shard."""
    ids, other, box = run.ids[:12], run.ids[40], ["--mask", "box:0.25"]
    (tmp_path / "ids.txt").write_text("\n".join(ids))
    file = tmp_path / "d.safetensors"
    groups = ["--where", "label == 3", "--against", "label == 8", "--at", 0.5]
    assert palindrome("direction", "--latents", encoded, *groups, "--out", file).code == 0
    white = Image.new("L", (16, 16))
    white.paste(255, (4, 4, 12, 12))
    for name, flags, how in (
        ("towards", ["--towards", other, "--strength", 0.4], {"towards": other, "strength": 0.4}),
        ("masked", ["--towards", other, *box], {"towards": run.latents(other)[0], "mask": "box:0.25"}),
        (
            "direction",
            ["--direction", file, "--strength", -2, *box],
            {"direction": file, "strength": -2, "mask": white},
        ),
    ):
        command = ["edit", "--latents", encoded, "--ids", tmp_path / "ids.txt", *flags, "--out", tmp_path / name]
        assert palindrome(*command).code == 0
        found = pa.concat_tables(pq.read_table(f) for f in (tmp_path / name / "images").iterdir()).to_pylist()
        stored = {row["image_id"]: np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in found}
        for image_id, picture in zip(ids, run.edit(ids, **how), strict=True):
            assert np.array_equal(np.asarray(picture), stored[image_id]), (name, image_id)
    for how, words in (
        ({"towards": other, "strength": 2}, "2 is no part of the way"),
        ({"strength": 0.5}, "goes with --towards or --direction"),
        ({"direction": file, "steps": 3}, "which the ladder here does not visit"),
        ({"towards": other, "mask": Image.new("L", (9, 9))}, "mask size"),
        ({"towards": -run.latents(ids[0])[0], "strength": 0.5}, f"{ids[0]}: no_arc"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            run.edit(ids, **how)


def test_restored_pictures_are_those_of_the_command(palindrome, run, sample, pngs, model, tmp_path):
    ids = run.ids[:8]
    command = ["restore", "--images", sample, "--model", model, "--limit", 8, "--steps", 4, "--eta", 0.5]
    masked = {"task": "inpaint", "mask": "box:0.25"}
    for name, flags, how in (
        ("inpaint", ["--mask", "box:0.25"], masked),
        ("upscale", ["--factor", 2, "--operator", "bicubic"], {"task": "upscale", "factor": 2, "operator": "bicubic"}),
    ):
        assert palindrome(*command, "--task", name, *flags, "--out", tmp_path / name).code == 0
        found = pa.concat_tables(pq.read_table(f) for f in (tmp_path / name / "images").iterdir()).to_pylist()
        stored = {row["image_id"]: np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in found}
        for image_id, picture in zip(ids, run.restore(ids, eta=0.5, steps=4, **how), strict=True):
            assert np.array_equal(np.asarray(picture), stored[image_id])
    given = [Image.open(io.BytesIO(png)) for png in pngs[:2]]
    stays = np.ones((16, 16), bool)
    stays[4:12, 4:12] = False
    for picture, png in zip(run.restore(given, steps=2, **masked), pngs, strict=False):
        original = np.asarray(Image.open(io.BytesIO(png)).convert("RGB").resize((16, 16), Image.Resampling.LANCZOS))
        assert np.array_equal(np.asarray(picture)[stays], original[stays])
    [small] = run.restore(given[0].resize((4, 4)), "upscale", degraded=True, steps=2)
    assert small.size == (16, 16)
    for images, how, words in (
        (ids, {"task": "inpaint"}, "inpaint needs it"),
        (ids, {"task": "upscale", "factor": 5}, "no multiple of 5"),
        (given, {"task": "upscale", "degraded": True}, "wrong_size: 32x32 pixels, not 4x4"),
    ):
        with pytest.raises(ValueError, match=words):
            run.restore(images, **how)


def test_what_can_not_be_encoded(palindrome, run, pngs, pictures, model, tmp_path):
    broken = Image.open(io.BytesIO(pngs[0][:-400]))
    for given, reason in (
        (b"", "empty: "),
        (b"a note", "not_an_image: "),
        (pngs[0][:-400], "truncated: "),
        (broken, "truncated: "),
        (Image.new("F", (20, 20)), "corrupt: mode F has no stated range"),
    ):
        with pytest.raises(ValueError, match=f"^{reason}"):
            run.encode(given)
    with pytest.raises(FileNotFoundError):
        run.encode(tmp_path / "none.png")
    flags = ["--limit", 1, "--steps", 2, "--corrections", 0, "--max-pixels", 1024]
    assert palindrome("encode", "--images", pictures, "--model", model, "--out", tmp_path / "run", *flags).code == 0
    small = open_run(tmp_path / "run")
    for given in (Image.new("RGB", (64, 17)), as_png(Image.new("RGB", (64, 17)))):
        with pytest.raises(ValueError, match=r"^too_large: 64x17 is more than 1024 pixels"):
            small.encode(given)


def as_png(image):
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def test_interpolation_goes_from_one_image_to_the_other(run):
    a, b = run.ids[2], run.ids[30]
    frames = run.interpolate(a, run.latents(b)[0], 5, steps=3)
    assert len(frames) == 5
    for frame, image_id in ((frames[0], a), (frames[-1], b)):
        assert_same(frame, np.asarray(run.decode(image_id, 3)[0]))
    distances = [np.square(to_model(np.stack([f])) - to_model(np.stack([frames[0]]))).mean() for f in frames]
    assert distances == sorted(distances) and distances[1] > 0
    with pytest.raises(ValueError, match="frames must be at least 2"):
        run.interpolate(a, b, frames=1)
    with pytest.raises(ValueError, match="between two single images"):
        run.interpolate(run.latents([a, b]), b)
    with pytest.raises(ValueError, match="opposite"):
        run.interpolate(a, -run.latents(a)[0])


def test_the_model_is_loaded_late_and_has_to_be_the_runs(encoded, run, model, tiny, tmp_path):
    moved = shutil.copytree(encoded, tmp_path / "run")
    manifest = json.loads((moved / "run.json").read_text())
    manifest["config"]["model"] = str(tmp_path / "gone")
    (moved / "run.json").write_text(json.dumps(manifest))
    without = open_run(str(moved))
    assert len(without) == 48 and without.latents(without.ids[:2]).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="gone"):
        without.decode(without.ids[0])
    with_model = open_run(moved, model=model)
    assert_same(with_model.decode(run.ids[1])[0], np.asarray(run.decode(run.ids[1])[0]))
    other = tiny.with_process(VP(prediction_type="v_prediction"))
    unet2d.save(other, str(tmp_path / "other"))
    for use in (lambda r: r.decode(r.ids[0]), lambda r: r.encode(Image.new("RGB", (9, 9)))):
        with pytest.raises(ValueError, match="made by another model"):
            use(open_run(moved, model=str(tmp_path / "other")))


def test_what_is_no_run(palindrome, encoded, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_run(tmp_path / "none")
    assert palindrome("regenerate", "--latents", encoded, "--steps", 1, "--out", tmp_path / "images").code == 0
    with pytest.raises(ValueError, match="is a run of regenerate, not of encode"):
        open_run(tmp_path / "images")


def test_a_run_on_a_store_with_its_options(rclone, encoded, run, model, pngs, monkeypatch):
    """On one that checks credentials, which only the options hold."""
    bucket = Folder(rclone.bucket(), rclone.options)
    for path in encoded.rglob("*"):
        if path.is_file():
            bucket.put(f"run/{path.relative_to(encoded)}", path.read_bytes())
    bucket.put("a.png", pngs[20])
    unet2d.save(unet2d.load(str(model)), f"{bucket.uri}/model", rclone.options)
    there = open_run(f"{bucket.uri}/run", model=f"{bucket.uri}/model", storage_options=rclone.options)
    assert there.table("label == 3").to_pylist() == run.table("label == 3").to_pylist()
    assert np.array_equal(there.latents(run.ids[::7]), run.latents(run.ids[::7]))
    assert np.abs(there.encode(f"{bucket.uri}/a.png") - run.latents(run.ids[20])[0]).max() < NEAR
    assert_same(there.decode(run.ids[1])[0], np.asarray(run.decode(run.ids[1])[0]))
    assert isinstance(there, Run) and bucket.uri in repr(there) and rclone.secret not in repr(there)
    with pytest.raises(FileNotFoundError):
        there.encode(f"{bucket.uri}/none.png")
    wrong = {"s3": {**rclone.options["s3"], "secret": "wrong"}}
    with pytest.raises(OSError, match="secret access key is wrong"):
        open_run(f"{bucket.uri}/run", storage_options=wrong)
    for no_options in ({"endpoint_url": "http://minio"}, {"nosuch": {}}):
        with pytest.raises(ValueError, match="storage_options must map protocols") as info:
            open_run(f"{bucket.uri}/run", storage_options=no_options)
        assert "minio" not in str(info.value)


def test_no_ray_is_started(encoded):
    command = [sys.executable, "-c", WITHOUT_RAY, str(encoded)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [48, [3, 16, 16], False] and not done.stderr


def test_the_page_does_what_it_says(palindrome, pngs, tmp_path, monkeypatch, capsys):
    """With the bundled checkpoint, which brings pictures back."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i in range(9):
        Path(f"photos/{i}.png").write_bytes(pngs[i])
    model = ROOT / "checkpoints/cifar10-32"
    said = palindrome("encode", "--images", "photos/", "--model", model, "--out", "runs/photos", "--measure")
    assert said.code == 0, said.err
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/notebook.md").read_text(), re.DOTALL):
        exec(block, names)
    said = capsys.readouterr().out
    assert "9 latents: ['0.png', '1.png', '2.png'] ..." in said
    assert "0 images are not identical to the bit: []" in said
    across = {"decoded": 8, "steps": 4, "mixed": 8, "mirrored": 2, "between": 9}
    assert {path.stem: Image.open(path).size for path in tmp_path.glob("*.png")} == {
        name: (32 * count, 32) for name, count in across.items()
    }
    originals = [Image.open(f"photos/{i}.png") for i in range(8)]
    assert_same(Image.open("decoded.png"), np.hstack(originals))
    mirrored = originals[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert_same(Image.open("mirrored.png"), np.hstack([originals[0], mirrored]))
    between = Image.open("between.png")
    assert_same(between.crop((0, 0, 32, 32)), np.asarray(originals[0]))
    assert_same(between.crop((256, 0, 288, 32)), np.asarray(mirrored))
    assert Image.open("between.gif").n_frames == 9
