"""Stored latents -> images: those of reconstruct, of the ids or rows asked for, on several ladders, and varied."""

import io
import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def encoded(palindrome, sample, model, tmp_path_factory):
    """48 images in 5 shards, with their labels."""
    out = tmp_path_factory.mktemp("encoded") / "run"
    flags = ["--limit", 48, "--shard-size", 12, "--steps", 6, "--keep", "label"]
    assert palindrome("encode", "--images", sample, "--model", model, "--out", out, *flags).code == 0
    return out


def read(run):
    """(id, steps, variation) -> uint8 [H, W, C]."""
    rows = pa.concat_tables([pq.read_table(f) for f in sorted(Path(run, "images").glob("*.parquet"))]).to_pylist()
    found = {(r["image_id"], r["steps"], r["variation"]): pixels(r["image"]["bytes"]) for r in rows}
    assert len(found) == len(rows)
    return found


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def test_the_images_are_those_of_reconstruct(palindrome, encoded, tmp_path):
    flags = ["--latents", encoded, "--steps", 3, 6]
    assert palindrome("reconstruct", *flags, "--out", tmp_path / "a").code == 0
    said = palindrome("regenerate", *flags, "--out", tmp_path / "b")
    assert said.code == 0 and "96 images of 48 latents" in said.out
    found = read(tmp_path / "b")
    rows = duckdb.sql(f"select image_id, steps, image.bytes from '{tmp_path}/a/reconstructions/*.parquet'").fetchall()
    assert {(name, steps, 0) for name, steps, _ in rows} == found.keys()
    for name, steps, content in rows:
        assert np.abs(found[name, steps, 0].astype(int) - pixels(content)).max() <= 1, name


def test_consistency_is_the_distance_to_the_most_steps(palindrome, encoded, tmp_path):
    assert palindrome("regenerate", "--latents", encoded, "--steps", 2, 6, 12, "--out", tmp_path).code == 0
    found = read(tmp_path)
    by_steps = {row["steps"]: row for row in json.loads((tmp_path / "summary.json").read_text())["by_steps"]}
    assert by_steps[12]["mean"] == 0 < by_steps[6]["mean"] < by_steps[2]["mean"]
    names = sorted({name for name, *_ in found})
    far = [(found[name, 2, 0] / 255 - found[name, 12, 0] / 255) ** 2 for name in names]
    assert by_steps[2]["images"] == 48 and by_steps[2]["mean"] == pytest.approx(np.mean(far), rel=0.02)  # 8 bits
    assert Image.open(tmp_path / "images.png").size == (3 * 18 - 2, 12 * 18 - 2)
    report = (tmp_path / "report.html").read_text()
    assert "How far each is from the longest" in report and names[0] in report


def test_ids_and_expressions(palindrome, encoded, tmp_path):
    rows = duckdb.sql(f"select image_id, label, nfe from '{encoded}/latents/*.parquet' order by 1").fetchall()
    (tmp_path / "ids.txt").write_text("\n".join([rows[40][0], rows[3][0], "none.png"]) + "\n")
    chosen = palindrome("regenerate", "--latents", encoded, "--ids", tmp_path / "ids.txt", "--out", tmp_path / "a")
    assert chosen.code == 0 and "2 of 3 ids have a latent" in chosen.err
    assert {name for name, *_ in read(tmp_path / "a")} == {rows[40][0], rows[3][0]}
    (tmp_path / "ids.txt").write_text("\n".join([rows[40][0], rows[4][0], "none.png"]) + "\n")
    said = palindrome("regenerate", "--latents", encoded, "--ids", tmp_path / "ids.txt", "--out", tmp_path / "a")
    assert said.code == 2 and "belongs to another command: ids_digest" in said.err
    where = "label in [3, 5] or (label == 8 and not nfe < 0)"
    assert palindrome("regenerate", "--latents", encoded, "--where", where, "--out", tmp_path / "b").code == 0
    assert {name for name, *_ in read(tmp_path / "b")} == {name for name, label, _ in rows if label in (3, 5, 8)}
    said = palindrome("regenerate", "--latents", encoded, "--where", "label > 99", "--out", tmp_path / "c")
    assert said.code == 1 and "no latent matches --ids and --where" in said.err
    said = palindrome("regenerate", "--latents", encoded, "--where", "nosuch == 1", "--out", tmp_path / "d")
    assert said.code == 2 and "--where: 'nosuch' is not a column" in said.err
    said = palindrome("regenerate", "--latents", encoded, "--ids", tmp_path / "none.txt", "--out", tmp_path / "d")
    assert said.code == 2 and "--ids: " in said.err and "none.txt" in said.err
    assert not (tmp_path / "d").exists()


def test_variations_have_noise_of_their_own_whatever_the_batch(palindrome, encoded, tmp_path):
    flags = ["--latents", encoded, "--where", "label == 3", "--eta", 1, "--variations", 3]
    assert palindrome("regenerate", *flags, "--out", tmp_path / "a").code == 0
    assert palindrome("regenerate", *flags, "--out", tmp_path / "b", "--batch-size", 1).code == 0
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert a.keys() == b.keys() and {variation for *_, variation in a} == {0, 1, 2}
    assert all(np.abs(a[key].astype(int) - b[key]).max() <= 1 for key in a)
    name = next(iter(a))[0]
    assert np.abs(a[name, 6, 0].astype(int) - a[name, 6, 1]).mean() > 1
    said = palindrome("export", tmp_path / "a", "--out", tmp_path / "files", "--format", "png")
    assert said.code == 0, said.err
    files = list((tmp_path / "files/images").rglob("*.png"))
    assert len(files) == len(a) and {path.parts[-2] for path in files} >= {"variation-0", "variation-2"}


def test_the_same_command_goes_on(palindrome, encoded, tmp_path, times):
    command = ["regenerate", "--latents", encoded, "--out", tmp_path]
    assert palindrome(*command).code == 0
    removed = sorted((tmp_path / "images").iterdir())[1]
    removed.unlink()
    before = times(tmp_path)
    said = palindrome(*command)
    assert said.code == 0 and "5 shards of latents, 1 to decode" in said.out
    changed = {name for name, when in times(tmp_path).items() if before.get(name) != when}
    assert changed == {f"images/{removed.name}", "images.png"}
    assert "5 of 5 shards" in palindrome("status", tmp_path).out
