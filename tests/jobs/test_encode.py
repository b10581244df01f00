import http.server
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from palindrome.model.ddim import invert
from palindrome.model.inversion import invert_exactly
from palindrome.model.ladder import ladder, logsnr_ladder
from palindrome.pipeline.images.decode import Preprocess, decode
from palindrome.pipeline.runtime import scheduler

GOOD, BAD, SHARD = 1000, 40, 100

PLAIN = ["--corrections", "0", "--ladder", "quadratic"]


@pytest.fixture(scope="module")
def mixed(corpus, tmp_path_factory):
    """A folder of 1,000 good images and 40 that are none: (folder, names of the good, reasons of the bad)."""
    folder = tmp_path_factory.mktemp("mixed")
    good = corpus.good_images(folder, GOOD)
    return folder, good, corpus.bad_images(folder)


@pytest.fixture(scope="module")
def command(mixed, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mixed"
    flags = {"--images": mixed[0], "--model": model, "--out": out, "--steps": 4, "--shard-size": SHARD, "--measure": ""}
    flags |= {"--precision": "float32"}  # or a trial would choose by what this machine is good at
    return [
        "encode",
        *PLAIN,
        "--dtype",
        "float16",
        *(str(word) for pair in flags.items() for word in pair if word != ""),
    ]


@pytest.fixture(scope="module")
def run(command):
    return Path(command[command.index("--out") + 1])


@pytest.fixture(scope="module")
def said(palindrome, command):
    """The first run of the command."""
    return palindrome(*command)


@pytest.fixture(scope="module")
def summary(said, run):
    return json.loads((run / "summary.json").read_text())


@pytest.fixture(scope="module")
def stored(said, run, read_run):
    return read_run(run)


def metadata(path):
    return json.loads(pq.read_schema(path).metadata[b"palindrome"])


def test_a_run_over_good_and_bad_images_ends_well(said):
    assert said.code == 0, said.err
    assert f"{GOOD} latents and {BAD} rejects" in said.out
    assert f"encode: {math.ceil((GOOD + BAD) / SHARD)}/{math.ceil((GOOD + BAD) / SHARD)} shards" in said.out


def test_every_good_image_has_one_latent_named_by_its_path(stored, mixed):
    assert stored.ids == sorted(mixed[1])
    assert stored.latents.shape == (GOOD, 3, 16, 16)
    assert stored.latents.dtype == np.float16
    assert np.isfinite(stored.latents).all()


def test_every_bad_image_is_a_reject_with_its_reason(said, run, mixed):
    files = sorted((run / "rejects").iterdir())
    rejects = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert {row["image_id"]: row["reason"] for row in rejects} == mixed[2]
    assert len(rejects) == BAD
    assert all(row["detail"] and " at 0x" not in row["detail"] for row in rejects)


def test_the_summary_counts_what_is_there(summary, mixed):
    counts = {name: summary[name] for name in ("shards", "images", "latents", "rejects")}
    assert counts == {"shards": math.ceil((GOOD + BAD) / SHARD), "images": GOOD + BAD, "latents": GOOD, "rejects": BAD}
    assert summary["rejects_by_reason"] == dict(sorted(Counter(mixed[2].values()).items()))
    assert summary["failed_shards"] == []


def test_the_summary_s_error_is_that_of_the_rows(summary, stored):
    mse = np.array([row["mse"] for row in stored.rows])
    found = summary["round_trip"]
    assert found["count"] == GOOD
    assert found["mean"] == pytest.approx(mse.mean())
    assert found["p99"] == pytest.approx(np.quantile(mse, 0.99))
    assert found["worst"][0] == stored.ids[int(mse.argmax())]


def test_the_account_closes_in_every_shard(said, run):
    footers = [pq.read_metadata(file).metadata[b"palindrome.shard"] for file in (run / "latents").iterdir()]
    counts = [json.loads(footer)["counts"] for footer in footers]
    assert all(c["images"] == c["latents"] + c["rejects"] <= SHARD for c in counts)
    assert sum(c["images"] for c in counts) == GOOD + BAD


def test_duckdb_counts_them(said, run):
    query = f"SELECT count(*), count(DISTINCT image_id), min(len(latent)) FROM '{run}/latents/*.parquet'"
    assert duckdb.sql(query).fetchall() == [(GOOD, GOOD, 3 * 16 * 16)]
    assert duckdb.sql(f"SELECT count(*) FROM '{run}/rejects/*.parquet'").fetchall() == [(BAD,)]


def test_the_manifest_says_what_was_run(said, run, mixed, model, tiny):
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["job"] == "encode"
    assert manifest["model_digest"] == tiny.digest
    config = manifest["config"]
    assert (config["images"], config["model"]) == (str(mixed[0]), str(model))
    assert (config["steps"], config["shard_size"], config["measure"]) == (4, SHARD, True)
    assert config.keys() == manifest["fields"].keys()
    assert manifest["fields"]["steps"] == "must be the same to resume"
    assert manifest["fields"]["workers"] == "may change"
    assert {"torch", "ray", "pyarrow"} <= manifest["versions"].keys()


def test_every_file_says_how_to_decode_it(said, run, tiny):
    for file in (run / "latents").iterdir():
        found = metadata(file)
        assert found["levels"] == list(ladder("quadratic", 4))
        assert found["model_digest"] == tiny.digest
        assert found["inversion"] == {"method": "ddim", "corrections": 0, "tolerance": None, "nfe": 4}
        assert (found["num_train_timesteps"], found["beta_schedule"]) == (1000, "linear")
        assert (found["beta_start"], found["beta_end"], found["prediction_type"]) == (1e-4, 0.02, "epsilon")
        assert (found["preprocess"]["size"], found["preprocess"]["resample"]) == (16, "lanczos")


def test_rows_keep_the_size_and_hash_of_the_file(stored, mixed):
    folder, good, _ = mixed
    by_id = {row["image_id"]: row for row in stored.rows}
    for name in good[::97]:
        row = by_id[name]
        assert (row["width"], row["height"]) == Image.open(folder / name).size
        [[digest]] = duckdb.sql(f"SELECT sha256(content) FROM read_blob('{folder / name}')").fetchall()
        assert row["content_hash"] == digest
        assert row["source"].endswith(str(folder / name))


def test_latents_are_the_inversion_of_the_pixels(stored, mixed, tiny):
    folder, good, _ = mixed
    names = sorted(good[:64])  # the sample's own: 32x32 RGB
    opened = [Image.open(folder / name).resize((16, 16), Image.Resampling.LANCZOS) for name in names]
    x = torch.tensor(np.stack([np.asarray(image) for image in opened])).permute(0, 3, 1, 2) / 127.5 - 1
    expected = invert(tiny.network(), x, ladder("quadratic", 4), tiny.process).numpy()
    found = stored.latents[[stored.ids.index(name) for name in names]]
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


def test_another_program_decodes_them_to_the_stored_error(stored, run, mixed, model):
    """diffusers' network and schedule, and the paper's eq. 12 written out, from the file's own words."""
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.UNet2DModel.from_pretrained(model, subfolder="unet").eval()
    alphas = diffusers.DDIMScheduler.from_pretrained(model, subfolder="scheduler").alphas_cumprod.double()
    folder, good, _ = mixed
    rows = [stored.ids.index(name) for name in good[:16]]
    x = torch.from_numpy(stored.latents[rows]).float()
    levels = metadata(next((run / "latents").iterdir()))["levels"]
    for high, low in zip(levels[:0:-1], levels[-2::-1], strict=True):
        a, a_low = float(alphas[high]), float(alphas[low]) if low >= 0 else 1.0
        with torch.no_grad():
            noise = network(x, high).sample
        x0 = (x - math.sqrt(1 - a) * noise) / math.sqrt(a)
        x = math.sqrt(a_low) * x0 + math.sqrt(1 - a_low) * noise
    originals = [Image.open(folder / name).resize((16, 16), Image.Resampling.LANCZOS) for name in good[:16]]
    pixels = torch.tensor(np.stack([np.asarray(image) for image in originals])).permute(0, 3, 1, 2) / 255
    mse = ((x + 1) / 2 - pixels).square().flatten(1).mean(1)
    assert mse.tolist() == pytest.approx([stored.rows[i]["mse"] for i in rows], rel=1e-2)
    psnr = [-10 * math.log10(stored.rows[i]["mse"]) for i in rows]
    assert [stored.rows[i]["psnr"] for i in rows] == pytest.approx(psnr)


def test_a_second_run_changes_nothing(said, palindrome, command, run, times):
    before, summary = times(run), (run / "summary.json").read_text()
    again = palindrome(*command)
    assert (again.code, again.err) == (0, "")
    assert "0 to encode" in again.out
    assert times(run) == before
    assert (run / "summary.json").read_text() == summary


def test_a_finished_run_needs_no_ray(said, start, command, run, times):
    before = times(run)
    process = start(*command, "--address", "127.0.0.1:1")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert f"{GOOD} latents" in out
    assert times(run) == before


def test_a_latent_file_that_was_removed_is_made_again(said, stored, palindrome, command, run, times, read_run):
    before = times(run)
    removed = sorted((run / "latents").iterdir())[3]
    removed.unlink()
    assert palindrome(*command).code == 0
    after = times(run)
    assert after.keys() == before.keys()
    changed = {name for name in before if after[name] != before[name]}
    assert f"latents/{removed.name}" in changed
    assert changed <= {f"latents/{removed.name}", f"rejects/{removed.name}"}
    again = read_run(run)
    assert again.rows == stored.rows
    assert again.latents.tobytes() == stored.latents.tobytes()


def test_the_place_of_decoding_changes_not_one_bit(palindrome, command, tmp_path, read_run):
    runs = []
    for place in ("tasks", "actor"):
        elsewhere = [*command, "--limit", 150, "--shard-size", 50, "--workers", 1, "--decode", place]
        elsewhere[elsewhere.index("--out") + 1] = tmp_path / place
        assert palindrome(*elsewhere).code == 0
        runs.append(read_run(tmp_path / place))
    assert len(runs[0].rows) > 125
    assert runs[0].rows == runs[1].rows
    assert runs[0].latents.tobytes() == runs[1].latents.tobytes()


@pytest.fixture(scope="module")
def plain(palindrome, pictures, model, tmp_path_factory, read_run):
    """24 pictures from a folder, in float32."""
    out = tmp_path_factory.mktemp("plain") / "run"
    said = palindrome("encode", "--images", pictures, "--model", model, "--out", out, "--steps", 5, *PLAIN)
    assert said.code == 0, said.err
    return read_run(out)


def test_float32_is_what_is_stored_unless_said_otherwise(plain):
    assert plain.latents.dtype == np.float32
    assert {(row["mse"], row["psnr"]) for row in plain.rows} == {(None, None)}


def test_corrections_are_those_of_the_model_and_their_residuals_are_stored(
    palindrome, pictures, model, tiny, tmp_path, read_run
):
    flags = ["--steps", 6, "--corrections", 2, "--batch-size", 24]
    said = palindrome("encode", "--images", pictures, "--model", model, "--out", tmp_path, *flags)
    assert said.code == 0, said.err
    stored = read_run(tmp_path)
    x0 = torch.from_numpy(np.stack([decode(p.read_bytes(), Preprocess(16))[0] for p in sorted(pictures.iterdir())]))
    x0 = x0.permute(0, 3, 1, 2).float() / 127.5 - 1
    levels = logsnr_ladder(tiny.process, 6)
    latents, residuals, _ = invert_exactly(tiny.network(), x0, levels, tiny.process, corrections=2)
    assert np.allclose(stored.latents, latents, rtol=1e-3, atol=1e-3)
    assert np.allclose([row["residual"] for row in stored.rows], residuals, rtol=1e-2)
    found = metadata(next((tmp_path / "latents").iterdir()))
    assert found["inversion"] == {"method": "fixed point", "corrections": 2, "tolerance": None, "nfe": 13}
    assert {row["nfe"] for row in stored.rows} == {13}
    assert found["levels"] == list(levels)


def test_batches_glob_and_float16_give_the_same_latents(palindrome, pictures, model, plain, tmp_path, read_run):
    flags = ["--model", model, "--out", tmp_path / "run", "--steps", 5, "--batch-size", 7, "--shard-size", 10, *PLAIN]
    said = palindrome("encode", "--images", f"{pictures}/*.png", *flags, "--dtype", "float16")
    assert said.code == 0, said.err
    found = read_run(tmp_path / "run")
    assert found.ids == plain.ids
    assert len(list((tmp_path / "run/latents").iterdir())) == 3
    np.testing.assert_allclose(found.latents, plain.latents, rtol=1e-2, atol=1e-2)


def test_parquet_with_limit_and_kept_columns(palindrome, sample, model, plain, tmp_path, read_run):
    flags = ["--model", model, "--out", tmp_path / "run", "--steps", 5, "--limit", 24, "--keep", "label"]
    said = palindrome("encode", "--images", sample, *flags, "--image-column", "img", *PLAIN)
    assert said.code == 0, said.err
    found = read_run(tmp_path / "run")
    order = sorted(range(24), key=lambda i: f"{sample.name}#{i}")
    assert found.ids == [f"{sample.name}#{i}" for i in order]
    labels = pq.read_table(sample)["label"].to_pylist()
    assert [row["label"] for row in found.rows] == [labels[i] for i in order]
    np.testing.assert_allclose(found.latents, plain.latents[order], rtol=1e-4, atol=1e-4)


def test_a_collection_of_rejects_alone_fails(palindrome, corpus, model, tmp_path):
    (tmp_path / "bad").mkdir()
    reasons = corpus.bad_images(tmp_path / "bad")
    said = palindrome("encode", "--images", tmp_path / "bad", "--model", model, "--out", tmp_path / "run", "--measure")
    assert said.code == 1
    assert "no image could be encoded" in said.err
    found = json.loads((tmp_path / "run/summary.json").read_text())
    assert (found["latents"], found["rejects"]) == (0, len(reasons))
    [file] = (tmp_path / "run/latents").iterdir()
    assert pq.read_table(file).num_rows == 0


def test_a_shard_that_can_not_be_committed_fails_and_the_rest_is_done(palindrome, pictures, model, tmp_path, read_run):
    command = ["encode", "--images", pictures, "--model", model, "--out", tmp_path / "run", "--steps", 2]
    command += ["--shard-size", 8]
    assert palindrome(*command).code == 0
    files = sorted((tmp_path / "run/latents").iterdir())
    for file in files:
        file.unlink()
    (files[1] / "in the way").mkdir(parents=True)
    said = palindrome(*command)
    assert said.code == 1
    assert f"shard {files[1].stem} failed: IsADirectoryError" in said.err
    assert "1 shards failed; repeat the command to retry them" in said.err
    [failed] = json.loads((tmp_path / "run/summary.json").read_text())["failed_shards"]
    assert (failed["shard"], failed["images"]) == (files[1].stem, 8)
    assert files[0].is_file() and files[2].is_file()
    shutil.rmtree(files[1])
    assert palindrome(*command).code == 0
    assert len(read_run(tmp_path / "run").ids) == 24


def test_what_breaks_in_the_run_is_not_blamed_on_the_address(palindrome, pictures, model, tmp_path):
    command = ["encode", "--images", pictures, "--model", model, "--out", tmp_path / "run", "--steps", 2]
    assert palindrome(*command).code == 0
    for file in (tmp_path / "run/latents").iterdir():
        file.unlink()
    [plan] = (tmp_path / "run/plan").glob("*.parquet")
    plan.unlink()
    said = palindrome(*command, "--address", "local")
    assert said.code == 1
    assert f"plan/{plan.name} is missing" in said.err


def test_a_run_survives_interrupt_and_kill_of_its_driver(
    palindrome, start, ray_here, sample, model, tmp_path, times, read_run
):
    run, latents = tmp_path / "run", tmp_path / "run/latents"
    command = ["encode", "--images", sample, "--model", model, "--out", run, "--steps", 40, "--shard-size", 4]
    command += ["--limit", 80, *PLAIN]

    def stop(number, after, *flags):
        """Sends the signal to a driver that has committed so many shards."""
        process = start(*command, *flags)
        while len(list(latents.glob("*.parquet"))) < after:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.kill(process.pid, number)
        out, err = process.communicate()
        return process.returncode, out, err

    code, out, err = stop(signal.SIGINT, 1, "--decode", "actor")  # on a Ray of its own
    assert code == 130
    assert "80 images in 20 shards, 20 to encode" in out
    assert err.strip() == f"interrupted; the same command resumes {run}"
    first = times(latents)
    assert 0 < len(first) < 20
    assert not (run / "summary.json").exists()
    code, _, err = stop(signal.SIGTERM, len(first) + 1, "--decode", "tasks", "--address", ray_here)
    assert code == 143
    assert err.strip() == f"interrupted; the same command resumes {run}"
    code, out, _ = stop(signal.SIGKILL, len(times(latents)) + 1, "--decode", "actor", "--address", ray_here)
    assert code == -signal.SIGKILL
    second = {name: when for name, when in times(latents).items() if name.endswith(".parquet")}
    assert len(first) < len(second) < 20
    said = palindrome(*command)
    assert said.code == 0, said.err
    assert sorted(read_run(run).ids) == sorted(f"{sample.name}#{i}" for i in range(80))
    assert len(list(latents.glob("*.parquet"))) == 20
    after = times(latents)
    assert all(after[name] == when for name, when in {**first, **second}.items() if name.endswith(".parquet"))


def test_other_libraries_latents_are_equal_too(said, run, stored):
    polars = pytest.importorskip("polars")
    frame = polars.read_parquet(run / "latents/*.parquet").sort("image_id")
    assert frame["image_id"].to_list() == stored.ids
    assert frame["latent"].to_numpy().reshape(stored.latents.shape).tobytes() == stored.latents.tobytes()


def test_a_parquet_of_null_and_broken_rows(palindrome, pngs, model, tmp_path):
    table = pa.table({"image": pa.array([pngs[0], None, b"", b"no picture", pngs[1]]), "n": [1, 2, 3, 4, 5]})
    pq.write_table(table, tmp_path / "rows.parquet")
    flags = ["--model", model, "--out", tmp_path / "run", "--steps", 1, "--keep", "n"]
    assert palindrome("encode", "--images", tmp_path / "rows.parquet", *flags).code == 0
    [latents], [rejects] = ([*(tmp_path / "run" / name).iterdir()] for name in ("latents", "rejects"))
    assert pq.read_table(latents)["n"].to_pylist() == [1, 5]
    found = {row["image_id"]: row["reason"] for row in pq.read_table(rejects).to_pylist()}
    assert found == {"rows.parquet#1": "null", "rows.parquet#2": "empty", "rows.parquet#3": "not_an_image"}


BUNDLED = Path(__file__).parents[2] / "checkpoints/cifar10-32"


def test_exact_spends_more_on_what_does_not_come_back_to_the_bit(palindrome, sample, tmp_path, read_run):
    """On the bundled checkpoint, with too few corrections for any image to come back at the first try."""
    command = ["encode", "--images", sample, "--model", BUNDLED, "--limit", 2, "--steps", 8, "--corrections", 1]
    for name, flags in {"once": ["--measure"], "exact": ["--tolerance", "exact"]}.items():
        said = palindrome(*command, "--out", tmp_path / name, *flags)
        assert said.code == 0, said.err
    once, exact = (read_run(tmp_path / name).rows for name in ("once", "exact"))
    assert all(row["identical"] < 1 and row["nfe"] == 9 for row in once)
    assert all(row["identical"] == 1 and row["nfe"] > 9 for row in exact)
    assert "2 of 2 images identical to the bit" in said.out
    summary = json.loads((tmp_path / "once/summary.json").read_text())["round_trip"]
    assert (summary["not_identical"], sorted(summary["not_identical_ids"])) == (2, [row["image_id"] for row in once])


def test_exact_names_the_images_that_do_not_come_back(palindrome, pictures, model, tmp_path):
    """A network of random weights at float16: nothing does."""
    flags = ["--steps", 2, "--corrections", 1, "--tolerance", "exact", "--dtype", "float16", "--limit", 2]
    said = palindrome("encode", "--images", pictures, "--model", model, "--out", tmp_path, *flags)
    assert said.code == 0
    assert "0 of 2 images identical" in said.out
    assert "not identical: 000.png, 001.png" in said.err


def test_a_tolerance_and_a_listed_ladder(palindrome, pictures, model, tmp_path, read_run):
    flags = ["--ladder", "0,50,300,700", "--corrections", 30, "--tolerance", "1e-3", "--limit", 4]
    said = palindrome("encode", "--images", pictures, "--model", model, "--out", tmp_path, *flags)
    assert said.code == 0, said.err
    assert all(5 <= row["nfe"] < 121 for row in read_run(tmp_path).rows)
    found = metadata(next((tmp_path / "latents").iterdir()))
    assert found["levels"] == [-1, 0, 50, 300, 700]
    assert found["inversion"]["tolerance"] == 1e-3
    assert json.loads((tmp_path / "run.json").read_text())["config"]["steps"] == 4


@pytest.fixture
def growing(pngs, tmp_path):
    folder = tmp_path / "growing"
    folder.mkdir()
    for i in range(0, 20, 2):
        (folder / f"{i:03d}.png").write_bytes(pngs[i])
    return folder


def test_images_that_are_added_are_encoded_and_nothing_else(
    palindrome, growing, pngs, model, tmp_path, times, read_run
):
    run = tmp_path / "run"
    command = ["encode", "--images", growing, "--model", model, "--out", run, "--steps", 2, "--shard-size", 4, *PLAIN]
    assert palindrome(*command).code == 0
    before = times(run / "latents")
    (growing / "005.png").write_bytes(pngs[5])
    (growing / "broken.png").write_bytes(b"no image")
    said = palindrome(*command)
    assert said.code == 0, said.err
    assert "2 images are new" in said.out and "4 shards, 1 to encode" in said.out
    assert before.items() <= times(run / "latents").items()
    assert sorted(read_run(run).ids) == sorted([f"{i:03d}.png" for i in range(0, 20, 2)] + ["005.png"])
    assert json.loads((run / "summary.json").read_text())["rejects_by_reason"] == {"not_an_image": 1}


def test_images_that_changed_or_are_gone_are_named(palindrome, growing, pngs, model, tmp_path, times):
    run = tmp_path / "run"
    command = ["encode", "--images", growing, "--model", model, "--out", run, "--steps", 2, "--shard-size", 4, *PLAIN]
    assert palindrome(*command).code == 0
    before = times(run)
    (growing / "004.png").write_bytes(pngs[40])
    (growing / "006.png").unlink()
    said = palindrome(*command)
    assert said.code == 0
    assert "1 changed since and 1 are gone (004.png, 006.png)" in said.err
    assert times(run) == before
    assert palindrome(*command, "--no-relist").err == ""


def test_a_file_that_vanishes_between_plan_and_read_is_a_reject(palindrome, growing, model, tmp_path, read_run):
    run = tmp_path / "run"
    command = ["encode", "--images", growing, "--model", model, "--out", run, "--steps", 2, "--shard-size", 4, *PLAIN]
    assert palindrome(*command).code == 0
    for path in (run / "latents").iterdir():
        path.unlink()
    (growing / "006.png").unlink()
    said = palindrome(*command, "--no-relist")
    assert said.code == 0
    assert json.loads((run / "summary.json").read_text())["rejects_by_reason"] == {"missing": 1}
    assert len(read_run(run).ids) == 9


def test_rejects_are_tried_again_when_asked(palindrome, growing, pngs, model, tmp_path, times, read_run):
    run = tmp_path / "run"
    for i, content in {3: b"no image", 7: b""}.items():
        (growing / f"{i:03d}.png").write_bytes(content)
    command = ["encode", "--images", growing, "--model", model, "--out", run, "--steps", 2, "--shard-size", 4, *PLAIN]
    assert palindrome(*command).code == 0
    before = times(run / "latents")
    (growing / "003.png").write_bytes(pngs[3])
    assert "0 to encode" in palindrome(*command).out
    said = palindrome(*command, "--retry-rejects")
    assert said.code == 0 and "2 to encode" in said.out
    assert "003.png" in read_run(run).ids and len(read_run(run).ids) == 11
    assert json.loads((run / "summary.json").read_text())["rejects_by_reason"] == {"empty": 1}
    assert sum(times(run / "latents")[name] == when for name, when in before.items()) == 1
    assert len(list((run / "rejects").iterdir())) == 1


def test_more_rejects_than_may_be_end_the_run(palindrome, growing, model, tmp_path):
    for i in range(10):
        (growing / f"{i:03d}-bad.png").write_bytes(b"no image")
    command = ["encode", "--images", growing, "--model", model, "--out", tmp_path / "run", "--steps", 2, *PLAIN]
    command += ["--shard-size", 2]
    said = palindrome(*command, "--max-reject-fraction", 0.2)
    assert said.code == 1
    assert re.search(r"aborted: --max-reject-fraction: \d+ of 20 images are rejected, above 0.2", said.err)
    done = len(list((tmp_path / "run/latents").iterdir()))
    assert 0 < done < 10
    said = palindrome(*command, "--max-reject-fraction", 0.2)  # those of before count: it ends after one shard more
    assert said.code == 1 and len(list((tmp_path / "run/latents").iterdir())) == done + 1
    said = palindrome(*command, "--max-reject-fraction", 0.5)
    assert said.code == 0, said.err


@pytest.mark.parametrize(("most", "code"), [(1, 1), (2, 0)])
def test_so_many_shards_may_fail(palindrome, growing, model, tmp_path, most, code):
    run = tmp_path / "run"
    command = ["encode", "--images", growing, "--model", model, "--out", run, "--steps", 2, "--shard-size", 4, *PLAIN]
    assert palindrome(*command).code == 0
    done = sorted((run / "latents").iterdir())
    for path in done:
        path.unlink()
    for path in done[:2]:
        path.mkdir()  # where a folder stands no file can be put
        (path / "keep").touch()
    said = palindrome(*command, "--max-failed-shards", most)
    assert said.code == code, said.err
    assert ("aborted: --max-failed-shards: 2 shards failed, and 1 may" in said.err) == (code == 1)


def test_a_reader_that_hangs_fails_its_shard_alone(palindrome, pngs, model, tmp_path, read_run, monkeypatch):
    """Images over HTTP, one of which the server begins to send and never ends, until it is let go."""
    monkeypatch.setattr(scheduler, "MAX_RETRIES", 0)  # each takes as long as --stall says; test_scheduler.py has some
    let_go = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self._head()

        def do_GET(self):
            content = self._head()
            self.wfile.write(content[:100])
            if "005" in self.path:
                let_go.wait(120)
            self.wfile.write(content[100:])

        def _head(self):
            name = self.path.rpartition("/")[2]
            links = "".join(f'<a href="/in/{i:03d}.png">{i}</a>' for i in range(8)).encode()
            content = pngs[int(name[:3])] if name else links
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "image/png" if name else "text/html")
            self.end_headers()
            return content

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_port}/in/*.png"
    command = ["encode", "--images", uri, "--model", model, "--out", tmp_path, "--steps", 2, "--shard-size", 4, *PLAIN]
    try:
        said = palindrome(*command, "--stall", 6)  # a reading process takes seconds to start
        assert said.code == 1
        assert "failed: no progress for 6 s" in said.err
        assert sorted(read_run(tmp_path).ids) == [f"{i:03d}.png" for i in range(4)]
        let_go.set()
        assert palindrome(*command).code == 0
        assert sorted(read_run(tmp_path).ids) == [f"{i:03d}.png" for i in range(8)]
    finally:
        let_go.set()
        server.shutdown()
