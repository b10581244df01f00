"""Distances between sets of images as a command computes them: against torch-fidelity on the same network and images,
and the same however they are cut into batches and shards."""

import csv
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
from sklearn.metrics import average_precision_score, roc_auc_score

REAL, GENERATED = 120, 100
TINY = ("--features", "tiny", "--input-size", 32)


@pytest.fixture(scope="module")
def sets(pngs, tmp_path_factory):
    """Two folders of pictures of 32 pixels, `real` and `generated`, which are blurred."""
    folder = tmp_path_factory.mktemp("sets")
    for name, those in (("real", pngs[:REAL]), ("generated", pngs[REAL : REAL + GENERATED])):
        (folder / name).mkdir()
        for i, png in enumerate(those):
            image = Image.open(io.BytesIO(png)).convert("RGB")
            if name == "generated":
                image = image.resize((20, 20)).resize((32, 32))
            image.save(folder / name / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def command(sets, scripted):
    """command(OUT, flags...) -> an evaluation of the two."""
    network = [*TINY, "--weights", f"file://{scripted}"]
    places = ["--real", sets / "real", "--generated", sets / "generated"]
    return lambda out, *flags: ["evaluate", *places, *network, "--out", out, *flags]


@pytest.fixture(scope="module")
def whole(palindrome, command, tmp_path_factory):
    """One with all metrics, in five shards."""
    out = tmp_path_factory.mktemp("evaluated") / "whole"
    said = palindrome(*command(out, "--metrics", "fid", "is", "kid", "prc", "--shard-size", 50, "--subset-size", 60))
    assert said.code == 0, said.err
    return out, said


def values(out):
    return {row["metric"]: row["value"] for row in json.loads((out / "summary.json").read_text())["metrics"]}


def test_it_is_what_torch_fidelity_computes(whole, sets, scripted, torch_fidelity):
    """By its own program, with the same network as an extractor of features."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as bilinear

    class Extractor(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.network = torch.jit.load(scripted)

        @staticmethod
        def get_provided_features_list():
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, x):
            x = bilinear(x.float(), size=(32, 32), align_corners=False) / 127.5 - 1
            found = dict(zip(("features", "logits"), self.network(x), strict=True))
            return tuple(found[name] for name in self.features_list)

    torch_fidelity.register_feature_extractor("tiny", Extractor)

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, folder):
            self.files = sorted(folder.iterdir())

        def __len__(self):
            return len(self.files)

        def __getitem__(self, i):
            return torch.from_numpy(np.array(Image.open(self.files[i]))).permute(2, 0, 1)

    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(sets / "generated"),
        input2=Pictures(sets / "real"),
        feature_extractor="tiny",
        **dict.fromkeys(("fid", "kid", "isc", "prc"), True),
        kid_subset_size=60,
        isc_splits=1,
        cuda=False,
        cache=False,
        verbose=False,
        num_workers=0,
    )
    found = values(whole[0])
    assert found["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert found["is_whole"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert found["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)  # float32 there
    assert (found["precision"], found["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


@pytest.mark.parametrize("flags", [["--shard-size", 7, "--batch-size", 3], ["--batch-size", 200]])
def test_the_numbers_do_not_depend_on_batches_and_shards(palindrome, command, whole, tmp_path, flags):
    every = ["--metrics", "fid", "is", "kid", "prc", "--subset-size", 60]
    assert palindrome(*command(tmp_path / "out", *every, *flags)).code == 0
    found, expected = values(tmp_path / "out"), values(whole[0])
    assert found.pop("fid") == pytest.approx(expected.pop("fid"), rel=1e-11)
    assert found == pytest.approx(expected, rel=1e-12)


def test_nor_on_workers(palindrome, command, whole, tmp_path):
    flags = ["--shard-size", 50, "--workers", 2, "--decode", "actor"]
    assert palindrome(*command(tmp_path / "out", *flags)).code == 0
    expected = values(whole[0])
    assert values(tmp_path / "out") == {name: expected[name] for name in ("fid", "is", "is_whole")}


def test_a_set_is_at_no_distance_from_itself(palindrome, sets, scripted, tmp_path):
    same = ["--real", sets / "real", "--generated", sets / "real", "--weights", scripted, *TINY]
    said = palindrome("evaluate", *same, "--metrics", "fid", "prc", "--out", tmp_path / "out")
    assert said.code == 0, said.err
    assert values(tmp_path / "out") == {"fid": 0, "precision": 1, "recall": 1}


def test_it_goes_on_where_it_was_broken_off(palindrome, command, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    lost = sorted((out / "features").iterdir())[1]
    lost.unlink()
    kept = {path: path.stat().st_mtime_ns for path in (out / "features").iterdir()}
    flags = ["--metrics", "fid", "is", "kid", "prc", "--shard-size", 50, "--subset-size", 60]
    said = palindrome(*command(out, *flags))
    assert said.code == 0 and "220 images in 5 shards, 1 to evaluate" in said.out
    assert values(out) == values(whole[0]) and lost.exists()
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_a_plan_that_lacks_a_set_is_completed(palindrome, command, whole, tmp_path, monkeypatch):
    from palindrome.jobs import evaluate

    real = evaluate.add_pieces
    calls = []

    def once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(evaluate, "add_pieces", once)
    assert palindrome(*command(tmp_path / "out")).code != 0
    monkeypatch.undo()
    assert palindrome(*command(tmp_path / "out")).code == 0
    assert values(tmp_path / "out")["fid"] == pytest.approx(values(whole[0])["fid"], rel=1e-11)


def test_other_metrics_can_be_asked_of_what_is_stored(palindrome, command, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "out")
    said = palindrome(*command(tmp_path / "out", "--metrics", "prc", "--neighbours", 5, "--shard-size", 50))
    assert said.code == 0 and "0 to evaluate" in said.out
    assert set(values(tmp_path / "out")) == {"precision", "recall"}
    said = palindrome(*command(tmp_path / "out", "--shard-size", 50))
    assert said.code == 2 and "stored was True, now False" in said.err


def test_rows_and_features_are_plain_parquet(whole, sets, scripted):
    rows = duckdb.sql(f"select * from '{whole[0]}/features/*.parquet' order by image_id").fetchall()
    assert [row[0] for row in rows] == [
        *(f"generated/{i:03d}.png" for i in range(GENERATED)),
        *(f"real/{i:03d}.png" for i in range(REAL)),
    ]
    image = np.asarray(Image.open(sets / "generated/000.png"), np.float32)
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    features, logits = torch.jit.load(scripted)(x)
    np.testing.assert_allclose(rows[0][-1], features[0].numpy(), rtol=1e-4, atol=1e-6)
    p = logits.double().softmax(1)
    assert rows[0][-2] == pytest.approx(float(-(p * p.log()).sum()), rel=1e-5)


def test_without_their_metrics_no_features_are_stored(palindrome, command, tmp_path):
    assert palindrome(*command(tmp_path / "out")).code == 0
    names = {name for file in (tmp_path / "out/features").iterdir() for name in pq.read_schema(file).names}
    assert "features" not in names and "entropy" in names


def test_results_are_a_page_a_table_and_json(whole):
    out, said = whole
    with open(out / "table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert {row["metric"]: float(row["value"]) for row in table} == values(out)
    assert {(row["real"], row["generated"], row["resize"]) for row in table} == {("120", "100", "legacy_tensorflow")}
    page = (out / "report.html").read_text()
    assert "Furthest from all real images" in page and page.count("data:image/png;base64,") == 2 * 2 * 12
    for name, value in values(out).items():
        assert f"{value:.6g}" in page and f"{name}: {value:.6g}" in said.out
    assert "resized legacy_tensorflow" in said.out


def test_the_run_verifies_and_damage_is_found(palindrome, whole, tmp_path):
    said = palindrome("verify", whole[0])
    assert (said.code, said.out) == (0, "5 shards, 220 images, 0 rejects: all well\n")
    shutil.copytree(whole[0], tmp_path / "out")
    first, second, *_ = sorted((tmp_path / "out/moments").iterdir())
    shutil.copy(next(p for p in (whole[0] / "moments").iterdir() if p.stat().st_size and p.name != second.name), second)
    first.write_bytes(first.read_bytes()[:-100])
    said = palindrome("verify", tmp_path / "out")
    assert said.code == 1 and "its moments can't be read" in said.out


def test_reference_statistics_are_read_and_written(palindrome, command, whole, sets, scripted, tmp_path):
    """As pytorch-fid's `compute_statistics_of_path` and EDM's `fid.py` read them."""
    with np.load(whole[0] / "real.npz", allow_pickle=False) as found:
        mu, sigma = found["mu"], found["sigma"]
    assert (mu.shape, sigma.shape, int(np.load(whole[0] / "real.npz")["n"])) == ((24,), (24, 24), REAL)
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    for i, reference in enumerate((tmp_path / "edm.npz", whole[0] / "real.npz")):
        out = tmp_path / str(i)
        places = ["--real", reference, "--generated", sets / "generated", "--weights", scripted, *TINY]
        said = palindrome("evaluate", *places, "--out", out)
        assert said.code == 0, said.err
        assert values(out)["fid"] == pytest.approx(values(whole[0])["fid"], rel=1e-11)
        assert palindrome("verify", out).code == 0
    assert (
        "of an unknown number of real and 100 generated images"
        in palindrome("evaluate", "--real", tmp_path / "edm.npz", *places[2:], "--out", tmp_path / "0").out
    )


@pytest.mark.parametrize(
    ("arrays", "flags", "words"),
    [
        ({"mu": np.zeros(24)}, [], "--real: {} holds no statistics: ValueError: it has mu, and not mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, [], "--real: {} is of 3 features, and the network makes 24"),
        ({"mu": np.zeros(24), "sigma": np.eye(23)}, [], "--real: {} holds no statistics: mu is (24,)"),
        ({"mu": np.full(24, np.nan), "sigma": np.eye(24)}, [], "or not finite"),
        ({"mu": np.array([{}]), "sigma": np.eye(24)}, [], "holds no statistics: ValueError: Object arrays"),
        ({"mu": np.zeros(24), "sigma": np.eye(24)}, ["--metrics", "kid"], "--metrics: kid needs real images"),
    ],
)
def test_other_statistics_are_refused(palindrome, sets, scripted, tmp_path, arrays, flags, words):
    reference = tmp_path / "reference.npz"
    np.savez(reference, **arrays)
    places = ["--real", reference, "--generated", sets / "generated", "--weights", scripted, *TINY]
    said = palindrome("evaluate", *places, "--out", tmp_path / "out", *flags)
    assert said.code == 2 and words.format(reference) in said.err, said.err


def test_statistics_of_another_resizing_are_refused(palindrome, whole, sets, scripted, tmp_path):
    places = ["--real", whole[0] / "real.npz", "--generated", sets / "generated", "--weights", scripted, *TINY]
    said = palindrome("evaluate", *places, "--resize", "clean", "--out", tmp_path / "out")
    assert said.code == 2 and "was made with resize legacy_tensorflow, and this is clean" in said.err


def test_what_is_no_image_is_a_reject(palindrome, sets, scripted, tmp_path):
    shutil.copytree(sets / "generated", tmp_path / "spoilt")
    (tmp_path / "spoilt/003.png").write_bytes(b"no image")
    (tmp_path / "spoilt/050.png").write_bytes(b"")
    places = ["--real", sets / "real", "--generated", tmp_path / "spoilt", "--weights", scripted, *TINY]
    said = palindrome("evaluate", *places, "--out", tmp_path / "out")
    assert said.code == 0 and "1 rejected as not_an_image" in said.out
    assert "of 120 real and 98 generated images" in said.out
    said = palindrome("rejects", tmp_path / "out")
    assert "generated/003.png" in said.out and "generated/050.png" in said.out
    assert palindrome("verify", tmp_path / "out").out.endswith("218 images, 2 rejects: all well\n")


class Divided(torch.nn.Module):
    def forward(self, x: torch.Tensor):
        return 1 / (x.mean([2, 3]) + 1)


def test_features_that_are_not_finite_are_rejects(palindrome, sets, tmp_path):
    torch.jit.save(torch.jit.script(Divided()), tmp_path / "divided.pt")
    shutil.copytree(sets / "generated", tmp_path / "black")
    Image.new("RGB", (32, 32)).save(tmp_path / "black/black.png")
    places = ["--real", sets / "real", "--generated", tmp_path / "black", "--weights", tmp_path / "divided.pt"]
    said = palindrome("evaluate", *places, *TINY, "--out", tmp_path / "out")
    assert said.code == 0 and "1 rejected as not_finite" in said.out, said.err
    assert "of 120 real and 100 generated images" in said.out and set(values(tmp_path / "out")) == {"fid"}
    assert palindrome("verify", tmp_path / "out").code == 0


def test_one_image_is_too_few(palindrome, sets, scripted, tmp_path):
    places = ["--real", sets / "real", "--generated", sets / "generated", "--weights", scripted, *TINY]
    said = palindrome("evaluate", *places, "--limit", 1, "--out", tmp_path / "out")
    assert said.code == 1 and "too few images could be used of --generated" in said.err


def test_runs_are_taken_for_their_pictures(palindrome, model, pictures, scripted, tmp_path):
    """An encode run for what it encoded, at its size; the others for what they made."""
    encoded, made = tmp_path / "encoded", tmp_path / "made"
    said = palindrome("encode", "--images", pictures, "--model", model, "--out", encoded, "--steps", 2, "--limit", 20)
    assert said.code == 0, said.err
    assert palindrome("reconstruct", "--latents", encoded, "--out", made, "--steps", 1, 2).code == 0
    network = ["--weights", scripted, *TINY]

    def fid(real, generated, *flags):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        said = palindrome("evaluate", "--real", real, "--generated", generated, *network, "--out", out, *flags)
        assert said.code == 0 and "of 20 real and 20 generated images" in said.out, said.err
        assert palindrome("verify", out).code == 0
        return values(out)["fid"]

    found = {steps: fid(encoded, made, "--steps", steps, "--shard-size", 6) for steps in (1, 2)}
    assert found[1] != found[2]
    for form in ("png", "webdataset", "parquet"):
        exported = tmp_path / form
        assert palindrome("export", made, "--format", form, "--steps", 2, "--out", exported).code == 0
        assert fid(encoded, exported) == pytest.approx(found[2], rel=1e-9)
    (tmp_path / "resized").mkdir()
    for path in sorted(pictures.iterdir())[:20]:
        Image.open(path).resize((16, 16), Image.Resampling.LANCZOS).save(tmp_path / "resized" / path.name)
    assert fid(tmp_path / "resized", made, "--steps", 2) == pytest.approx(found[2], rel=1e-9)
    assert fid(pictures, made, "--steps", 2, "--size", 16, "--limit", 20) == pytest.approx(found[2], rel=1e-9)
    rows = pq.read_table(next(iter((tmp_path / "out3/features").glob("*.parquet"))))
    assert set(rows["picture"].to_pylist()) <= {None, *(path.name for path in pictures.iterdir())}
    places = ["--real", pictures, "--generated", made, *network, "--out", tmp_path / "none"]
    said = palindrome("evaluate", *places)
    assert said.code == 2 and "--steps: " in said.err and "holds images of 1 and 2 steps: say which" in said.err
    said = palindrome("evaluate", *places, "--steps", 3)
    assert said.code == 2 and "--steps: " in said.err and "not 3" in said.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--generated", "x", "--weights", "w"], "--real: is needed, as are --weights and --generated"),
        (["--real", "x", "--weights", "w"], "--generated: is needed, as are --weights and --real"),
        (["--real", "x", "--generated", "y"], "--weights: the file with the network of features is needed"),
        (["--real", "x", "--generated", "y.npz", "--weights", "w"], "--generated: images are needed"),
        (["--real", "x", "--generated", "y", "--weights", "none"], "--weights: "),
        (["--real", "x", "--generated", "y", "--weights", "w", "--input-size", 9], "--input-size: that of inception"),
        (["--real", "x", "--generated", "y", "--weights", "w", "--precision", "bfloat16"], "--precision: features are"),
        (["--real", "x", "--generated", "y", "--weights", "w", "--compile"], "--compile: features are"),
        (["--real", "x", "--generated", "y", "--weights", "w", "--calibrate"], "--calibrate: only diffusion models"),
        (
            ["--real", "x", "--generated", "y", "--weights", "w", "--features", "a", "--input-range", 1, 0],
            "--input-range: must be two rising numbers",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(palindrome, tmp_path, flags, words):
    said = palindrome("evaluate", *flags, "--out", tmp_path / "out")
    assert said.code == 2 and words in said.err and said.err.count("\n") == 1, said.err


def test_a_set_without_images_is_named(palindrome, sets, scripted, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, other in (("real", "generated"), ("generated", "real")):
        places = [f"--{name}", tmp_path / "empty", f"--{other}", sets / other, "--weights", scripted, *TINY]
        said = palindrome("evaluate", *places, "--out", tmp_path / "out")
        assert said.code == 2 and f"--{name}: {tmp_path}/empty holds no files" in said.err


def test_a_run_without_pictures_is_refused(palindrome, sets, scripted, whole, tmp_path):
    places = ["--real", whole[0], "--generated", sets / "generated", "--weights", scripted, *TINY]
    said = palindrome("evaluate", *places, "--out", tmp_path / "out")
    assert said.code == 2 and f"--real: {whole[0]} is a run of evaluate, which has no pictures" in said.err


def test_a_dry_run_writes_nothing(palindrome, command, tmp_path):
    said = palindrome(*command(tmp_path / "out", "--dry-run"))
    assert said.code == 0 and "220 images in 2 shards" in said.out and not Path(tmp_path / "out").exists()


@pytest.fixture(scope="module")
def measured(palindrome, model, pictures, sample, tmp_path_factory):
    """Two encode runs with their errors, `few` of 24 pictures and `many` of 60, as JPEGs of 48 pixels."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "jpegs").mkdir()
    for i, row in enumerate(pq.read_table(sample).slice(100, 60)["img"].to_pylist()):
        Image.open(io.BytesIO(row["bytes"])).convert("RGB").resize((48, 48)).save(
            folder / f"jpegs/{i:03d}.jpg", quality=20
        )
    for name, images in (("few", pictures), ("many", folder / "jpegs")):
        flags = ["--model", model, "--steps", 2, "--measure", "--shard-size", 20]
        said = palindrome("encode", "--images", images, *flags, "--out", folder / name)
        assert said.code == 0, said.err
    return folder


def judge(palindrome, measured, out, *flags):
    places = ["--positive", measured / "many", "--negative", measured / "few", "--out", out]
    return palindrome("evaluate", *places, "--resamples", 50, *flags)


def test_runs_are_told_apart_by_any_column(palindrome, measured, tmp_path):
    said = judge(palindrome, measured, tmp_path / "out", "--column", "mse", "residual", "--lower", "mse")
    assert said.code == 0, said.err
    found = {row["column"]: row for row in json.loads((tmp_path / "out/summary.json").read_text())["columns"]}
    files = [measured / name / "latents/*.parquet" for name in ("many", "few")]
    for name, sign in (("mse", -1), ("residual", 1)):
        drawn = [[row[0] for row in duckdb.sql(f"select {name}::double from '{path}'").fetchall()] for path in files]
        label = np.repeat([1, 0], [len(values) for values in drawn])
        scores = sign * np.concatenate(drawn)
        assert found[name]["measures"]["auroc"] == pytest.approx(roc_auc_score(label, scores))
        assert found[name]["measures"]["ap"] == pytest.approx(average_precision_score(label, scores))
        low, high = found[name]["intervals"]["auroc"]
        assert low <= found[name]["measures"]["auroc"] <= high
        assert f"{name}: AUROC {found[name]['measures']['auroc']:.4f} ({low:.4f} to {high:.4f})" in said.out
    with open(tmp_path / "out/table.csv", newline="") as file:
        table = {row["column"]: row for row in csv.DictReader(file)}
    assert table["mse"]["positive"] == "lower" and float(table["mse"]["asr"]) == found["mse"]["measures"]["asr"]
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<svg") == 2 and page.count("data:image/png;base64,") == 4 * 8
    assert "The positive images that look least positive" in page
    assert "warning: pixels alone tells the runs apart, at an AUROC of 1.0000" in said.err


def test_judging_again_gives_the_same(palindrome, measured, tmp_path):
    contents, out = [], tmp_path / "out"
    for seed in (0, 0, 1):
        assert judge(palindrome, measured, out, "--column", "mse", "--seed", seed).code == 0
        contents.append([(out / name).read_bytes() for name in ("summary.json", "table.csv", "report.html")])
    assert contents[0] == contents[1] != contents[2]
    other = ["--positive", measured / "few", "--negative", measured / "few", "--column", "mse", "--resamples", 5]
    said = palindrome("evaluate", *other, "--out", out)
    assert said.code == 2 and "belongs to another command: --positive was" in said.err


def test_a_third_run_makes_a_mixture(palindrome, measured, tmp_path):
    fit = ["--fit", measured / "few", "--column", "mse", "residual", "--components", 1, 2, "--folds", 3]
    said = judge(palindrome, measured, tmp_path / "out", *fit)
    assert said.code == 0, said.err
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert [row["column"] for row in summary["columns"]] == ["mse", "residual", "mixture"]
    assert summary["mixture"]["rows"] == 24 and summary["mixture"]["columns"] == ["mse", "residual"]
    said = judge(palindrome, measured, tmp_path / "more", *fit[:5], "--components", 20, "--folds", 3)
    assert said.code == 2 and "--components: 20 are more than the 16 rows of" in said.err


def test_scores_know_which_way_is_positive(palindrome, measured, tmp_path):
    """As a run of score says of its columns in run.json."""
    for name in ("few", "many"):
        shutil.copytree(measured / name, tmp_path / name)
        manifest = json.loads((tmp_path / name / "run.json").read_text())
        manifest["scores"] = {"mse": {"method": "m", "positive": "lower", "of": "member"}}
        (tmp_path / name / "run.json").write_text(json.dumps(manifest))
    said = judge(palindrome, tmp_path, tmp_path / "out")
    assert said.code == 0, said.err
    [found] = json.loads((tmp_path / "out/summary.json").read_text())["columns"]
    assert (found["column"], found["sign"], found["of"]) == ("mse", -1, "member")


def test_a_column_without_values_is_named(palindrome, measured, tmp_path):
    shutil.copytree(measured / "few", tmp_path / "few")
    shutil.copytree(measured / "many", tmp_path / "many")
    for i, path in enumerate(sorted((tmp_path / "few/latents").iterdir())):
        table = pq.read_table(path)
        nulls = pa.nulls(len(table), pa.float64())
        table = table.set_column(table.schema.get_field_index("psnr"), "psnr", nulls)
        if not i:
            mse = [float("nan"), *table["mse"].to_pylist()[1:]]
            table = table.set_column(table.schema.get_field_index("mse"), "mse", pa.array(mse))
        pq.write_table(table, path)
    said = judge(palindrome, tmp_path, tmp_path / "out", "--column", "mse", "psnr")
    assert said.code == 1 and "psnr has no finite value in the negative run" in said.err
    assert "mse: 1 images have no finite value, and are left out" in said.err and "mse: AUROC" in said.out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--column: {0}/many and {0}/few have no scores in common; the columns of numbers are residual, nfe, mse"),
        (["--column", "label"], "--column: {0}/many has no column 'label' of numbers; it has residual, nfe, mse"),
        (["--column", "mse", "--lower", "nfe"], "--lower: nfe is not among those of --column"),
        (["--column", "mse", "--real", "x"], "--real: can't be combined with --positive and --negative"),
        (["--column", "mse", "--fit", "none"], "--fit: "),
    ],
)
def test_scores_that_can_t_be_judged_are_refused(palindrome, measured, tmp_path, flags, words):
    said = judge(palindrome, measured, tmp_path / "out", *flags)
    assert said.code == 2 and words.format(measured) in said.err, said.err
    assert not (tmp_path / "out").exists()


def test_both_runs_are_needed(palindrome, measured, tmp_path):
    said = palindrome("evaluate", "--positive", measured / "few", "--out", tmp_path / "out")
    assert said.code == 2 and "--negative: is needed to judge scores" in said.err


def test_a_dry_run_judges_nothing(palindrome, measured, tmp_path):
    said = judge(palindrome, measured, tmp_path / "out", "--column", "mse", "--dry-run")
    assert said.code == 0 and "60 positive and 24 negative images" in said.out and not (tmp_path / "out").exists()
