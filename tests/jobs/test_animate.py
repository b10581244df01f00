"""Strips and films of an interpolation, as Pillow and PyAV read them."""

import io
import shutil

import av
import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from palindrome.pipeline.tasks.animate import Film


@pytest.fixture(scope="module")
def run(palindrome, sample, model, tmp_path_factory):
    """Two paths of seven frames and one of three; four frames a shard."""
    folder = tmp_path_factory.mktemp("films")
    flags = ["--limit", 9, "--steps", 2]
    assert palindrome("encode", "--images", sample, "--model", model, "--out", folder / "latents", *flags).code == 0
    names = [name for (name,) in duckdb.sql(f"select image_id from '{folder}/latents/latents/*.parquet'").fetchall()]
    paths = [",".join(names[0:4]), ",".join(names[3:7]), ",".join(names[7:9])]
    flags = ["--latents", folder / "latents", "--frames", 3, "--shard-size", 4, "--path", *paths]
    said = palindrome("interpolate", *flags, "--out", folder / "run")
    assert said.code == 0, said.err
    return folder / "run"


@pytest.fixture(scope="module")
def frames(run):
    """path -> uint8 [F, H, W, C]."""
    rows = duckdb.sql(f"select path, image.bytes from '{run}/images/*.parquet' order by path, frame").fetchall()
    return {
        path: np.stack([np.asarray(Image.open(io.BytesIO(content))) for other, content in rows if other == path])
        for path, _ in rows
    }


def test_webp_holds_the_very_frames(palindrome, run, frames, tmp_path):
    said = palindrome("animate", run, "--format", "webp", "--fps", 20, "--scale", 3, "--out", tmp_path)
    assert said.code == 0 and "3 files written" in said.out
    assert {path: len(found) for path, found in frames.items()} == {"000000": 7, "000001": 7, "000002": 3}
    for path, expected in frames.items():
        with Image.open(tmp_path / "paths" / f"{path}.webp") as film:
            assert film.n_frames == len(expected) and film.info["loop"] == 0
            for i, frame in enumerate(expected):
                film.seek(i)
                film.load()
                assert film.info["duration"] == 50
                assert np.array_equal(np.asarray(film.convert("RGB")), frame.repeat(3, 0).repeat(3, 1))


def test_a_run_s_rows_name_no_file_elsewhere(palindrome, run, tmp_path):
    strange = tmp_path / "strange"
    shutil.copytree(run, strange)
    for file in (strange / "images").glob("*.parquet"):
        table = pq.read_table(file)
        names = [f"../../../{name}" for name in table["path"].to_pylist()]
        place = table.schema.get_field_index("path")
        pq.write_table(table.set_column(place, table.schema.field(place), pa.array(names)), file)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    said = palindrome("animate", strange, "--format", "strip", "--out", tmp_path / "a/b/films")
    assert said.code == 0, said.err
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert len(written) == 4 and all(path.is_relative_to(tmp_path / "a/b/films") for path in written)


def test_gif_holds_them_in_256_colours(palindrome, run, frames, tmp_path):
    assert palindrome("animate", run, "--format", "gif", "--out", tmp_path).code == 0
    for path, expected in frames.items():
        with Image.open(tmp_path / "paths" / f"{path}.gif") as film:
            assert film.info["loop"] == 0
            for i in range(film.n_frames):
                film.seek(i)
                assert np.abs(np.asarray(film.convert("RGB")).astype(int) - expected[i]).mean() < 8
            assert film.n_frames == len(expected)


def test_mp4_is_what_players_play(palindrome, run, frames, tmp_path):
    assert palindrome("animate", run, "--format", "mp4", "--fps", 29.97, "--scale", 4, "--out", tmp_path).code == 0
    for path, expected in frames.items():
        with av.open(str(tmp_path / "paths" / f"{path}.mp4")) as film:
            [stream] = film.streams
            assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
            assert float(stream.average_rate) == pytest.approx(29.97, abs=1e-3)
            assert len(list(film.decode(stream))) == len(expected)


@pytest.mark.parametrize("size", [(32, 32), (31, 29)])
def test_mp4_keeps_colours_and_pads_odd_sizes(pngs, size):
    width, height = size
    frames = [np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))[:height, :width] for content in pngs[:5]]
    with av.open(io.BytesIO(Film("mp4", 5, 1).encoded(frames, False))) as film:
        [stream] = film.streams
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)
        found = [frame.to_ndarray(format="rgb24") for frame in film.decode(stream)]
    assert len(found) == 5
    for image, frame in zip(found, frames, strict=True):
        assert image.shape == (height + height % 2, width + width % 2, 3)
        assert np.abs(image[:height, :width].astype(int) - frame).mean() < 6
        assert np.abs(image[:height, :width].mean((0, 1)) - frame.mean((0, 1))).max() < 2.5


def test_strips_lie_side_by_side(palindrome, run, frames, tmp_path):
    assert palindrome("animate", run, "--format", "strip", "--out", tmp_path).code == 0
    for path, expected in frames.items():
        found = np.asarray(Image.open(tmp_path / "paths" / f"{path}.png"))
        assert found.shape == (16, 17 * len(expected) - 1, 3)
        for i, frame in enumerate(expected):
            assert np.array_equal(found[:, 17 * i : 17 * i + 16], frame)


def test_a_path_that_lacks_frames_waits_for_them(palindrome, run, frames, tmp_path):
    found = {}
    for file in sorted((run / "images").glob("*.parquet")):
        found[file] = {path for (path,) in duckdb.sql(f"select distinct path from '{file}'").fetchall()}
    gone = next(file for file, paths in found.items() if paths == {"000001"})
    flags = ["animate", run, "--format", "strip", "--out", tmp_path / "out"]
    gone.rename(tmp_path / "shard")
    said = palindrome(*flags)
    assert said.code == 1 and "2 files written" in said.out and "1 paths lack frames" in said.err
    (tmp_path / "shard").rename(gone)
    said = palindrome(*flags)
    assert said.code == 0 and "1 files written" in said.out and "2 existed before" in said.out
    said = palindrome(*flags, "--scale", 2)
    assert said.code == 2 and "belongs to another command: --scale was 1, now 2" in said.err
    said = palindrome("animate", tmp_path / "out", "--format", "strip", "--out", tmp_path / "b")
    assert said.code == 1 and "is a run of animate, not of interpolate" in said.err
