"""Between stored latents: the ends are reconstruct's images, and what lies between is eq. 67 of the DDIM paper."""

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

from palindrome.model.ddim import sample as ddim
from palindrome.model.families import unet2d

FRAMES = 5


@pytest.fixture(scope="module")
def encoded(palindrome, sample, model, tmp_path_factory):
    """24 images in 3 shards."""
    out = tmp_path_factory.mktemp("encoded") / "run"
    flags = ["--limit", 24, "--shard-size", 8, "--steps", 4, "--keep", "label"]
    assert palindrome("encode", "--images", sample, "--model", model, "--out", out, *flags).code == 0
    return out


@pytest.fixture(scope="module")
def reconstructed(palindrome, encoded, tmp_path_factory):
    """id -> uint8 [H, W, C]."""
    out = tmp_path_factory.mktemp("reconstructed")
    assert palindrome("reconstruct", "--latents", encoded, "--out", out).code == 0
    rows = duckdb.sql(f"select image_id, image.bytes from '{out}/reconstructions/*.parquet'").fetchall()
    return {name: pixels(content) for name, content in rows}


@pytest.fixture(scope="module")
def latents(encoded, read_run):
    """id -> float32 [C, H, W]."""
    found = read_run(encoded)
    return dict(zip(found.ids, found.latents.astype(np.float32), strict=True))


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def read(run):
    """(path, frame) -> the row, with its pixels."""
    rows = pa.concat_tables([pq.read_table(f) for f in sorted(Path(run, "images").glob("*.parquet"))]).to_pylist()
    found = {(row["path"], row["frame"]): {**row, "pixels": pixels(row["image"]["bytes"])} for row in rows}
    assert len(found) == len(rows) and all(row["image_id"] == f"{p}/{i:06d}" for (p, i), row in found.items())
    return found


def quoted(*ids):
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(ids)
    return line.getvalue()


def alike(a, b):
    """To the rounding of a network that has other images beside it in its batch."""
    return np.abs(a - b).max() <= 1


def eq_67(a, b, t):
    theta = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    return np.sin((1 - t) * theta) / np.sin(theta) * a + np.sin(t * theta) / np.sin(theta) * b


def test_pairs_of_a_file(palindrome, encoded, reconstructed, latents, model, tmp_path):
    names = sorted(latents)
    pairs = [(names[0], names[20]), (names[5], names[5]), (names[3], "none.png"), (names[9], names[2])]
    (tmp_path / "pairs.csv").write_text("\n".join(quoted(*pair) for pair in pairs))
    flags = ["--latents", encoded, "--pairs", tmp_path / "pairs.csv", "--frames", FRAMES]
    said = palindrome("interpolate", *flags, "--out", tmp_path / "out")
    assert said.code == 0 and "15 frames in" in said.out, said.err
    assert "1 paths rejected as no_latent: the encode run has no latent of that image" in said.err
    found = read(tmp_path / "out")
    assert sorted(found) == [(f"{path:06d}", frame) for path in (0, 1, 3) for frame in range(FRAMES)]

    loaded = unet2d.load(str(model))
    levels = json.loads((encoded / "run.json").read_text())["levels"]
    for (path, frame), row in found.items():
        a, b = pairs[int(path)]
        assert (row["ids"], row["t"], row["down"]) == ([a, b], frame / (FRAMES - 1), None)
        if frame in (0, FRAMES - 1):
            assert alike(row["pixels"], reconstructed[(a, b)[frame > 0]])
            x = latents[(a, b)[frame > 0]]
        else:
            x = latents[a] if a == b else eq_67(latents[a].astype(np.float64), latents[b], row["t"])
        assert row["rms_slerp"] == pytest.approx(np.sqrt(np.square(x).mean()), rel=1e-6)
        straight = (1 - row["t"]) * latents[a] + row["t"] * latents[b]
        assert row["rms_linear"] == pytest.approx(np.sqrt(np.square(straight).mean()), rel=1e-6)
        image = ddim(loaded.network("cpu"), torch.from_numpy(x).float()[None], levels, loaded.process)[0]
        expected = ((image.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
        assert alike(row["pixels"], expected)

    rejects = palindrome("rejects", tmp_path / "out", "--format", "json")
    assert [(row["reason"], row["detail"]) for row in json.loads(rejects.out)] == [("no_latent", "none.png")]
    assert "complete" in palindrome("status", tmp_path / "out").out
    again = palindrome("interpolate", *flags, "--out", tmp_path / "out")
    assert again.code == 0 and "0 to make" in again.out
    (tmp_path / "pairs.csv").write_text(quoted(*pairs[0]))
    said = palindrome("interpolate", *flags, "--out", tmp_path / "out")
    assert said.code == 2 and "belongs to another command: pairs_digest" in said.err


def test_noise_stays_on_the_shell_and_linear_leaves_it(palindrome, encoded, tmp_path):
    flags = ["--latents", encoded, "--pairs", "random:12", "--frames", 3]
    assert palindrome("interpolate", *flags, "--out", tmp_path / "a").code == 0
    assert palindrome("interpolate", *flags, "--method", "linear", "--out", tmp_path / "b").code == 0
    slerp, linear = read(tmp_path / "a"), read(tmp_path / "b")
    assert slerp.keys() == linear.keys() and len({path for path, _ in slerp}) == 12
    for key, row in slerp.items():
        other = linear[key]
        assert [row[c] for c in ("ids", "rms_slerp", "rms_linear")] == [
            other[c] for c in ("ids", "rms_slerp", "rms_linear")
        ]
        if key[1] != 1:
            assert alike(row["pixels"], other["pixels"])
        else:
            ends = [slerp[key[0], end]["rms_slerp"] for end in (0, 2)]
            assert min(ends) * 0.99 < row["rms_slerp"] < max(ends) * 1.01
            assert row["rms_linear"] < min(ends)
            assert not alike(row["pixels"], other["pixels"])
    svg = (tmp_path / "a/norms.svg").read_text()
    assert "slerp" in svg and "linear" in svg and "99.7 % of Gaussian noise" in svg
    report = (tmp_path / "a/report.html").read_text()
    assert all(f'alt="Path {path}"' in report for path, _ in slerp) and "norms along the way" in report
    assert Image.open(tmp_path / "a/strips.png").size == (3 * 17 - 1, 12 * (16 + 6) - 6)


def test_frames_do_not_depend_on_shards_and_batches(palindrome, encoded, tmp_path):
    flags = ["--latents", encoded, "--pairs", "random:9", "--seed", 4, "--frames", FRAMES, "--steps", 7]
    assert palindrome("interpolate", *flags, "--out", tmp_path / "a").code == 0
    more = ["--shard-size", 12, "--batch-size", 3]
    assert palindrome("interpolate", *flags, *more, "--out", tmp_path / "b").code == 0
    one, other = read(tmp_path / "a"), read(tmp_path / "b")
    assert one.keys() == other.keys() and len(one) == 9 * FRAMES
    assert all(
        row["ids"] == other[key]["ids"] and alike(row["pixels"], other[key]["pixels"]) for key, row in one.items()
    )
    shards = sorted((tmp_path / "b/images").glob("*.parquet"))
    assert len(shards) == 5  # two pairs of five frames in each, but the last
    before = shards[2].read_bytes()
    shards[2].unlink()
    said = palindrome("interpolate", *flags, *more, "--out", tmp_path / "b")
    assert said.code == 0 and "1 to make" in said.out
    assert pq.read_table(shards[2]).drop(["image"]) == pq.read_table(pa.BufferReader(before)).drop(["image"])


def test_paths_through_several_images(palindrome, encoded, reconstructed, tmp_path):
    names = sorted(reconstructed)
    paths = [[names[1], names[22], names[8], names[1]], [names[4], names[5]]]
    flags = ["--latents", encoded, "--frames", 4, "--path", *(quoted(*path) for path in paths)]
    assert palindrome("interpolate", *flags, "--out", tmp_path / "out").code == 0
    found = read(tmp_path / "out")
    assert [key[1] for key in sorted(found) if key[0] == "000000"] == list(range(10))
    for number, path in enumerate(paths):
        for i, name in enumerate(path):
            assert alike(found[f"{number:06d}", 3 * i]["pixels"], reconstructed[name])
    exported = palindrome("export", tmp_path / "out", "--out", tmp_path / "files", "--format", "png")
    assert exported.code == 0, exported.err
    for (path, frame), row in found.items():
        file = tmp_path / "files/images" / path / f"{frame:06d}.png"
        assert np.array_equal(np.asarray(Image.open(file)), row["pixels"])


def test_grids_between_four_images(palindrome, encoded, reconstructed, latents, tmp_path):
    names = sorted(reconstructed)
    corners = [names[2], names[11], names[17], names[23]]
    flags = ["--latents", encoded, "--frames", 3, "--grid", quoted(*corners), "--shard-size", 3]
    assert palindrome("interpolate", *flags, "--out", tmp_path / "out").code == 0
    found = read(tmp_path / "out")
    assert [key[1] for key in sorted(found)] == list(range(9))
    for frame, name in zip((0, 2, 6, 8), corners, strict=True):
        assert alike(found["000000", frame]["pixels"], reconstructed[name])
    a, b, c, d = (latents[name].astype(np.float64) for name in corners)
    middle = eq_67(eq_67(a, c, 0.5), eq_67(b, d, 0.5), 0.5)
    assert found["000000", 4]["rms_slerp"] == pytest.approx(np.sqrt(np.square(middle).mean()), rel=1e-6)
    assert (found["000000", 5]["t"], found["000000", 5]["down"]) == (1, 0.5)
    assert Image.open(tmp_path / "out/strips.png").size == (3 * 17 - 1, 3 * 17 - 1)


def test_frames_of_a_film_are_found_by_their_numbers(palindrome, pngs, model, tmp_path):
    for clip, numbers in {"cat": (8, 9, 10, 12), "dog": (1, 2)}.items():
        (tmp_path / "clips" / clip).mkdir(parents=True)
        for number in numbers:
            (tmp_path / "clips" / clip / f"{number}.png").write_bytes(pngs[number])
    (tmp_path / "clips/cover.png").write_bytes(pngs[0])
    flags = ["--images", tmp_path / "clips", "--model", model, "--steps", 3]
    assert palindrome("encode", *flags, "--out", tmp_path / "run").code == 0
    flags = ["--latents", tmp_path / "run", "--sequence", "--frames", 3]
    said = palindrome("interpolate", *flags, "--out", tmp_path / "out")
    assert said.code == 0 and "2 sequences of 6 images" in said.out
    assert "1 numbers are missing in them" in said.err
    found = read(tmp_path / "out")
    ways = [found["000000", frame]["ids"] for frame in (0, 2, 4)]
    assert ways == [["cat/8.png", "cat/9.png"], ["cat/9.png", "cat/10.png"], ["cat/10.png", "cat/12.png"]]
    assert [key[1] for key in sorted(found)] == [*range(7), *range(3)]


def test_opposite_latents_are_rejected_and_nothing_else_is_lost(palindrome, encoded, tmp_path):
    shutil.copytree(encoded, tmp_path / "run")
    file = min((tmp_path / "run/latents").glob("*.parquet"))
    table = pq.read_table(file)
    x = table["latent"].combine_chunks().to_numpy_ndarray().copy()
    x[1], x[2] = -x[0], 0
    shape = table.schema.field("latent").type
    flat = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 3 * 16 * 16)
    place = table.schema.get_field_index("latent")
    latent = pa.ExtensionArray.from_storage(shape, flat)
    pq.write_table(table.set_column(place, table.schema.field("latent"), latent), file)
    a, b, zero, c = table["image_id"].to_pylist()[:4]
    paths = [quoted(a, b), quoted(zero, c), quoted(b, c, zero, a)]
    flags = ["--latents", tmp_path / "run", "--frames", 2, "--path", *paths]
    said = palindrome("interpolate", *flags, "--out", tmp_path / "out")
    assert said.code == 0 and "4 paths rejected as no_arc" in said.err
    assert {tuple(row["ids"]) for row in read(tmp_path / "out").values()} == {(b, c)}


def test_what_is_wrong_is_named(palindrome, encoded, tmp_path):
    (tmp_path / "pairs.csv").write_text("a\n")
    wrong = {
        "--pairs: give one of --pairs, --path, --grid, --sequence, not none": [],
        "not --pairs and --sequence": ["--pairs", "random:3", "--sequence"],
        "--pairs: random:x is not random:N": ["--pairs", "random:x"],
        "--pairs: line 1: 'a' is not 2 ids": ["--pairs", tmp_path / "pairs.csv"],
        "--pairs: ": ["--pairs", tmp_path / "nosuch.csv"],
        "--pairs: the run has 24 selected latents, fewer than 25": ["--pairs", "nearest:25"],
        "--path: 'a' is not 2 or more ids": ["--path", "a"],
        "--path: there is no latent of 'a', 'b'": ["--path", "a,b"],
        "--grid: 'a,b,c' is not 4 ids": ["--grid", "a,b,c"],
        "--where: --path names the images": ["--path", "a,b", "--where", "label == 3"],
        "--where: 'nosuch' is not a column": ["--pairs", "random:3", "--where", "nosuch == 3"],
        "--frames: 1 is out of range": ["--pairs", "random:3", "--frames", 1],
        "--steps: ": ["--pairs", "random:3", "--steps", 10**6],
    }
    for words, flags in wrong.items():
        said = palindrome("interpolate", "--latents", encoded, *flags, "--out", tmp_path / "out")
        assert said.code == 2 and words in said.err, said.err
        assert not (tmp_path / "out").exists()
    said = palindrome("interpolate", "--latents", tmp_path, "--pairs", "random:3", "--out", tmp_path / "out")
    assert said.code == 2 and "--latents: " in said.err
