"""palindrome sweep: against encode --measure, diffusers' U-Net, polars and DuckDB; adding settings; rejects."""

import json
import xml.etree.ElementTree as ET
from itertools import pairwise

import duckdb
import numpy as np
import polars as pl
import pytest
import torch
from diffusers import UNet2DModel

from palindrome.model.ddim import coefficients, noise_index, sample_noise
from palindrome.model.families import unet2d

SETTINGS = ["--steps", 4, 6, "--corrections", 0, 2, "--ladder", "quadratic", "5,300,799", "--dtype", "float32"]
FLAGS = ["--shard-size", 8, "--batch-size", 4, "--recover-noise", "--seed", 3]


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory):
    """Of 12 pictures and a file that is none."""
    folder = tmp_path_factory.mktemp("swept")
    for path in sorted(pictures.iterdir())[:12]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "005-not.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def command(folder, model):
    return ["sweep", "--images", folder, "--model", model, *FLAGS]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep") / "run"


@pytest.fixture(scope="module")
def said(palindrome, command, out):
    return palindrome(*command, "--out", out, *SETTINGS)


@pytest.fixture(scope="module")
def table(said, out):
    """table.csv as polars reads it."""
    assert said.code == 0, said.err
    return pl.read_csv(out / "table.csv")


def test_every_combination_is_a_row_over_all_images(table):
    found = table.select("ladder", "steps", "corrections", "nfe_up", "nfe_down", "images").rows()
    assert sorted(found) == [
        ("5,300,799", 3, 0, 3.0, 3, 12),
        ("5,300,799", 3, 2, 7.0, 3, 12),
        ("quadratic", 4, 0, 4.0, 4, 12),
        ("quadratic", 4, 2, 9.0, 4, 12),
        ("quadratic", 6, 0, 6.0, 6, 12),
        ("quadratic", 6, 2, 13.0, 6, 12),
    ]


def test_a_row_is_what_encode_measures(palindrome, table, folder, model, tmp_path):
    flags = ["--steps", 6, "--corrections", 2, "--ladder", "quadratic", "--measure"]
    palindrome("encode", "--images", folder, "--model", model, "--out", tmp_path, *flags)
    row = table.filter(pl.col("steps") == 6, pl.col("corrections") == 2).row(0, named=True)
    rows = f"from '{tmp_path}/latents/*.parquet'"
    mean, median, p99, same, exact = duckdb.sql(
        f"select avg(mse), median(mse), quantile_cont(mse, 0.99), avg(identical), avg((identical = 1)::int) {rows}"
    ).fetchall()[0]
    assert row["mse_mean"] == pytest.approx(mean, rel=1e-3)
    assert row["mse_median"] == pytest.approx(median, rel=1e-3)
    assert row["mse_p99"] == pytest.approx(p99, rel=1e-3)
    assert row["values_identical"] == pytest.approx(same, abs=1e-3)
    assert row["images_identical"] == exact
    moments = duckdb.sql(
        "select avg(m), avg(s), avg(k) from (select avg(v) m, stddev_pop(v) s, kurtosis_pop(v) + 3 k from"
        f" (select image_id, unnest(latent)::double v {rows}) group by image_id)"
    ).fetchall()[0]
    assert moments == pytest.approx([row[f"latent_{n}"] for n in ("mean", "std", "kurtosis")], abs=1e-5)


def test_missed_noise_is_that_of_a_loop_over_diffusers_network(table, out, folder, model):
    """The paper's inversion of what its sampler makes of the noise, by eq. 12 alone."""
    unet, schedule = UNet2DModel.from_pretrained(model, subfolder="unet"), unet2d.load(str(model)).process
    ids = duckdb.sql(f"select distinct image_id from '{out}/sweep/*.parquet'").fetchall()
    noise = torch.cat([sample_noise(3, noise_index(name), (3, 16, 16)) for (name,) in ids])
    x, steps = noise, list(pairwise([-1, 5, 300, 799]))
    with torch.no_grad():
        for low, high in reversed(steps):
            scale, gain = coefficients(schedule.marginal(high), schedule.marginal(low))
            x = scale * x + gain * unet(x, high).sample
        for low, high in steps:
            scale, gain = coefficients(schedule.marginal(low), schedule.marginal(high))
            x = scale * x + gain * unet(x, max(low, 5)).sample
    row = table.filter(pl.col("steps") == 3, pl.col("corrections") == 0).row(0, named=True)
    assert row["noise_mse"] == pytest.approx(float((x - noise).square().mean()), rel=1e-3)
    corrected = table.filter(pl.col("steps") == 3, pl.col("corrections") == 2).row(0, named=True)
    assert corrected["noise_mse"] != row["noise_mse"]


def test_the_reject_counts_once(said, out):
    assert "1 rejected as not_an_image" in said.out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["images"] == 13
    assert summary["rejects_by_reason"] == {"not_an_image": 1}
    assert duckdb.sql(f"select distinct image_id from '{out}/rejects/*.parquet'").fetchall() == [("005-not.png",)]


def test_the_plot_has_a_line_for_each_and_the_paper_s(table, out):
    words = "".join(ET.parse(out / "error.svg").getroot().itertext())
    for label in ("quadratic, plain", "quadratic, 2 corrections", "5,300,799, plain", "DDIM paper, Table 2"):
        assert label in words
    page = (out / "report.html").read_text()
    assert page.count('<th scope="row">') == len(table)
    assert "1 not_an_image" in page
    assert "http" not in page.replace("http-equiv", "").split("<body>")[0]


def test_the_same_again_does_nothing_and_other_settings_are_added(palindrome, table, command, out, times):
    before = times(out)
    again = palindrome(*command, "--out", out, *SETTINGS)
    assert again.code == 0 and "6 settings: 0 to do" in again.out
    kept = {name: when for name, when in before.items() if name == "run.json" or name.startswith(("plan/", "sweep/"))}
    assert len(kept) > 12 and kept.items() <= times(out).items()
    more = palindrome(*command, "--out", out, "--steps", 4, 6, "--corrections", 1, "--ladder", "quadratic", "linear",
                      "--max-nfe", 10)  # fmt: skip
    assert more.code == 0 and "2 settings: 4 to do" in more.out
    assert kept.items() <= times(out).items()
    found = pl.read_csv(out / "table.csv")
    assert len(found) == 8
    assert found.filter(pl.col("corrections") == 1)["nfe"].to_list() == [9.0, 9.0]
    same = found.join(table, on=["ladder", "steps", "corrections"], suffix="_before")
    assert np.array_equal(same["mse_mean"], same["mse_mean_before"])


def test_shards_and_batches_change_no_figure(palindrome, table, command, tmp_path):
    said = palindrome(*command, "--out", tmp_path, *SETTINGS, "--shard-size", 100, "--batch-size", 64)
    assert said.code == 0, said.err
    columns = ["mse_mean", "latent_correlation", "noise_mse", "values_identical"]
    assert pl.read_csv(tmp_path / "table.csv").select(columns).to_numpy() == pytest.approx(
        table.select(columns).to_numpy(), rel=1e-2, abs=1e-6
    )


def test_float16_and_tolerances_are_settings(palindrome, command, tmp_path):
    flags = ["--steps", 6, "--corrections", 0, 4, "--tolerance", 0, 1, "--dtype", "float32", "float16"]
    said = palindrome(*command, "--out", tmp_path, *flags, "--limit", 2)
    assert said.code == 0, said.err
    found = pl.read_csv(tmp_path / "table.csv")
    spent = {(r["corrections"], r["tolerance"], r["dtype"]): r["nfe_up"] for r in found.rows(named=True)}
    assert spent.keys() == {(k, t, d) for k, t in ((0, 0), (4, 0), (4, 1)) for d in ("float32", "float16")}
    assert spent[4, 1, "float32"] < spent[4, 0, "float32"] == 25
    errors = {r["dtype"]: r["mse_mean"] for r in found.filter(pl.col("tolerance") == 1).rows(named=True)}
    assert errors["float16"] != errors["float32"]


def test_other_images_are_refused(palindrome, command, out, table, sample):
    command = [sample if argument == command[2] else argument for argument in command]
    said = palindrome(*command, "--out", out, *SETTINGS)
    assert said.code == 2
    assert "belongs to another command: --images" in said.err


def test_a_collection_of_rejects_alone_fails(palindrome, model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_text("no image")
    flags = ["--steps", 2, "--corrections", 0]
    said = palindrome("sweep", "--images", tmp_path / "in", "--model", model, "--out", tmp_path / "out", *flags)
    assert said.code == 1
    assert "no image could be encoded" in said.err
    assert "no error measured" in said.out
