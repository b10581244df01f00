"""Committed shards, as any Arrow program reads them: bare pyarrow, DuckDB and polars."""

import datetime
import json
from functools import partial

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palindrome.pipeline.images.records import Image, Reject
from palindrome.pipeline.runs.schemas import latent_schema
from palindrome.pipeline.runs.shards import (
    committed,
    latent_rows,
    latent_writer,
    read_latents,
    shard_metadata,
)
from palindrome.pipeline.runs.summary import rejects_by_reason
from palindrome.pipeline.storage.folder import Folder

SHAPE = (3, 4, 5)
METADATA = {"levels": [-1, 0, 800], "model_digest": "ab" * 32, "prediction_type": "epsilon"}
TIMINGS = {"seconds": 1.5, "device_seconds": 0.5}
ODD = (0.0, -0.0, np.inf, -np.inf, 65504.0, 6e-8, -6e-8, 1 / 3)  # of them float16's largest and smallest
KEPT = {
    "label": (pa.int64(), [3, None, -(2**60)]),
    "caption": (pa.string(), ["a cat", None, "ein Hündchen\n\0"]),
    "score": (pa.float64(), [0.1, None, float("inf")]),
    "sharp": (pa.bool_(), [True, False, None]),
    "tags": (pa.list_(pa.string()), [["x", "y"], [], None]),
    "box": (pa.struct([("x", pa.int32()), ("y", pa.int32())]), [{"x": 1, "y": 2}, None, {"x": None, "y": 0}]),
    "raw": (pa.binary(), [b"\0\xff", b"", None]),
    "taken": (
        pa.timestamp("us", "UTC"),
        [datetime.datetime(2020, 1, 2, 3, 4, 5, 6, datetime.UTC), None, None],
    ),
}


@pytest.fixture
def run(tmp_path):
    return Folder(str(tmp_path / "run"))


def images(count, kept=lambda i: {}):
    return [Image(f"a/{i}.png", f"file:///x/a/{i}.png", 30 + i, 20, f"{i:064x}", kept(i), None) for i in range(count)]


def draw(count, dtype, seed=0):
    latents = np.random.default_rng(seed).standard_normal((count, *SHAPE)).astype(dtype)
    latents.reshape(-1)[: len(ODD)] = np.array(ODD, dtype)
    return latents


def commit(run, shard, rows, rejects, metadata, timings):
    with latent_writer(run, shard, rows.schema, metadata) as out:
        out.add(rows, rejects)
        return out.commit(timings)


def put(run, shard, latents, rejects=(), **measured):
    schema = latent_schema(SHAPE, str(latents.dtype))
    commit(run, shard, latent_rows(schema, images(len(latents)), latents, measured), rejects, METADATA, TIMINGS)
    return run.path(f"latents/{shard}.parquet")


def by_pyarrow(path):
    table = pq.read_table(path)
    return table["image_id"].to_pylist(), table["latent"].combine_chunks().to_numpy_ndarray()


def by_polars(path):
    frame = polars.read_parquet(path)
    return frame["image_id"].to_list(), frame["latent"].to_numpy()


def by_duckdb(path):
    table = duckdb.sql(f"SELECT image_id, latent FROM '{path}'").to_arrow_table()
    return table["image_id"].to_pylist(), table["latent"].combine_chunks().flatten().to_numpy()


READERS = {"pyarrow": by_pyarrow, "polars": by_polars, "duckdb": by_duckdb}
each_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
each_dtype = pytest.mark.parametrize("dtype", ["float16", "float32"])


@each_reader
@each_dtype
def test_rows_come_back_to_the_bit(run, read, dtype):
    latents = draw(70, dtype)
    ids, found = read(put(run, "s", latents))
    wider = np.float32 if read is by_duckdb else dtype  # DuckDB has no float16
    assert ids == [image.image_id for image in images(70)]
    assert found.dtype == wider
    assert found.tobytes() == latents.astype(wider).tobytes()


@each_reader
@each_dtype
def test_a_nan_stays_a_nan(run, read, dtype):
    latents = draw(2, dtype)
    latents[1, 2, 3, 4] = np.nan
    _, found = read(put(run, "s", latents))
    assert np.array_equal(np.isnan(found.reshape(-1)), np.isnan(latents.reshape(-1)))


@each_reader
def test_more_rows_than_a_row_group_holds(run, read):
    latents = draw(2500, "float16")
    path = put(run, "s", latents)
    assert pq.ParquetFile(path).num_row_groups == 3
    ids, found = read(path)
    assert ids == [image.image_id for image in images(2500)]
    assert found.astype(np.float16).tobytes() == latents.tobytes()


@each_reader
@each_dtype
def test_a_shard_without_one_good_image_is_an_empty_file_that_opens(run, read, dtype):
    rejects = [Reject("a", "s/a", "empty", "0 bytes")]
    path = put(run, "s", np.zeros((0, *SHAPE), dtype), rejects=rejects)
    ids, found = read(path)
    assert (ids, found.size) == ([], 0)
    assert committed(run) == {"s"}
    assert shard_metadata(run, "s")["counts"] == {"images": 1, "latents": 0, "rejects": 1}
    assert list(read_latents(run, "s", 8)) == []


def test_pyarrow_knows_the_shape_without_being_told(run):
    latents = draw(7, "float16")
    _, found = by_pyarrow(put(run, "s", latents))
    assert found.shape == (7, *SHAPE)
    kind = pq.read_schema(run.path("latents/s.parquet")).field("latent").type
    assert (kind.extension_name, list(kind.shape), kind.value_type) == (
        "arrow.fixed_shape_tensor",
        list(SHAPE),
        pa.float16(),
    )


def test_the_other_columns(run):
    path = put(
        run, "s", draw(2, "float16"), mse=[0.01, 0.0], psnr=[20.0, np.inf], residual=np.array([np.nan, 0.5]), nfe=[4, 5]
    )
    rows = pq.read_table(path).drop_columns(["latent"]).to_pylist()
    expected = {"image_id": "a/1.png", "source": "file:///x/a/1.png", "width": 31, "height": 20}
    expected |= {"content_hash": f"{1:064x}", "residual": 0.5, "nfe": 5, "mse": 0.0}
    expected |= {"psnr": float("inf"), "identical": None}
    assert rows[1] == expected
    assert (rows[0]["mse"], rows[0]["psnr"], rows[0]["residual"]) == (0.01, 20, None)


def test_errors_are_null_where_they_were_not_measured(run):
    rows = pq.read_table(put(run, "s", draw(2, "float32"))).to_pylist()
    assert {(row["mse"], row["psnr"], row["residual"]) for row in rows} == {(None, None, None)}


def test_the_metadata_is_one_json_object_under_one_key(run):
    path = put(run, "s", draw(3, "float16"), rejects=[Reject("x", "s/x", "empty", "0 bytes")])
    metadata = pq.read_schema(path).metadata
    assert list(metadata) == [b"palindrome"]
    found = json.loads(metadata[b"palindrome"])
    assert found == METADATA
    footer = pq.read_metadata(path).metadata
    known_last = json.loads(footer[b"palindrome.shard"])
    assert known_last == {"counts": {"images": 4, "latents": 3, "rejects": 1}, "timings": TIMINGS}
    assert shard_metadata(run, "s") == {**found, **known_last}


def test_duckdb_reads_the_metadata_too(run):
    path = put(run, "s", draw(3, "float16"))
    query = f"SELECT decode(value) FROM parquet_kv_metadata('{path}') WHERE decode(key) = 'palindrome'"
    [[text]] = duckdb.sql(query).fetchall()
    assert json.loads(text)["levels"] == METADATA["levels"]


@pytest.mark.parametrize("name", KEPT)
def test_kept_columns_keep_type_and_values(run, name):
    kind, values = KEPT[name]
    schema = latent_schema(SHAPE, "float16", [pa.field(name, kind)])
    listed = images(3, lambda i: {name: values[i]})
    commit(run, "s", latent_rows(schema, listed, draw(3, "float16"), {}), [], METADATA, TIMINGS)
    path = run.path("latents/s.parquet")
    table = pq.read_table(path)
    assert table.schema.field(name).type == kind
    assert table[name].to_pylist() == values
    assert polars.read_parquet(path)[name].to_list() == values
    assert duckdb.sql(f"SELECT count(*) FROM '{path}' WHERE {name} IS NULL").fetchall() == [(values.count(None),)]


def test_tables_of_several_batches_make_one_file(run):
    schema = latent_schema(SHAPE, "float16")
    latents = draw(5, "float16")
    listed = images(5)
    make = partial(latent_rows, schema, measured={})
    parts = [schema.empty_table(), make(listed[:3], latents[:3]), make(listed[3:], latents[3:])]
    commit(run, "s", pa.concat_tables(parts), [], METADATA, TIMINGS)
    ids, found = by_pyarrow(run.path("latents/s.parquet"))
    assert ids == [image.image_id for image in listed]
    assert found.tobytes() == latents.tobytes()


def test_rejects_have_a_file_only_where_there_are_some(run):
    rejects = [Reject("a", "s/a", "empty", "0 bytes"), Reject("b", "s/b", "corrupt", "Ä\n")]
    put(run, "with", draw(1, "float16"), rejects=rejects)
    put(run, "without", draw(1, "float16"))
    assert list(run.files("rejects")) == ["with.parquet"]
    assert run.read_parquet("rejects/with.parquet").to_pylist() == [vars(reject) for reject in rejects]
    assert rejects_by_reason(run, {"with", "without"}) == {"corrupt": 1, "empty": 1}
    assert rejects_by_reason(run, {"without"}) == {}


def test_rejects_are_written_before_the_commit(run, tmp_path):
    (tmp_path / "run/latents/s.parquet").mkdir(parents=True)  # a folder stands where the file should
    with pytest.raises(OSError):
        put(run, "s", draw(1, "float16"), rejects=[Reject("a", "s/a", "empty", "0 bytes")])
    assert list(run.files("rejects")) == ["s.parquet"]
    assert [path.name for path in (tmp_path / "run/latents").iterdir()] == ["s.parquet"]


def test_rejects_of_a_try_that_could_read_less_are_gone(run):
    put(run, "s", draw(1, "float16"), rejects=[Reject("a", "s/a", "unreadable", "")])
    put(run, "s", draw(2, "float16"))
    assert list(run.files("rejects")) == []
    assert shard_metadata(run, "s")["counts"]["rejects"] == 0


def test_a_shard_that_fails_on_the_way_leaves_nothing(run, tmp_path):
    schema = latent_schema(SHAPE, "float16")
    with pytest.raises(RuntimeError), latent_writer(run, "s", schema, METADATA) as out:
        for part in range(3):
            listed = images(1000)
            out.add(latent_rows(schema, listed, draw(1000, "float16"), {}), [Reject(str(part), "s", "empty", "")])
        raise RuntimeError("the device is gone")
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []


def test_a_row_group_is_written_as_soon_as_it_is_full(run, tmp_path):
    schema = latent_schema(SHAPE, "float32")
    with latent_writer(run, "s", schema, METADATA) as out:
        for _ in range(5):
            out.add(latent_rows(schema, images(512), draw(512, "float32"), {}))
        [half] = (tmp_path / "run/latents").iterdir()
        assert half.stat().st_size > 0 and half.name.startswith(".tmp-")
        assert sum(table.num_rows for table in out.table.buffered) == 512
        out.commit(TIMINGS)
    assert pq.read_metadata(tmp_path / "run/latents/s.parquet").num_rows == 2560


def test_no_commit_where_the_rejects_can_not_be_written(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rejects").write_text("a file stands where the folder should")
    with pytest.raises(OSError):
        put(run, "s", draw(1, "float16"), rejects=[Reject("a", "s/a", "empty", "0 bytes")])
    assert committed(run) == set()


def test_a_shard_written_twice_is_there_once(run):
    put(run, "s", draw(4, "float16", seed=1))
    again = draw(4, "float16", seed=2)
    _, found = by_pyarrow(put(run, "s", again))
    assert found.tobytes() == again.tobytes()
    assert list(run.files("latents")) == ["s.parquet"]


def test_committed_counts_whole_parquet_files_only(run, tmp_path):
    assert committed(run) == set()
    put(run, "s", draw(1, "float16"))
    (tmp_path / "run/latents/.tmp-0123-t.parquet").write_bytes(b"half")
    (tmp_path / "run/latents/notes.txt").write_text("")
    assert committed(run) == {"s"}


def test_commit_returns_the_size_of_the_file(run, tmp_path):
    schema = latent_schema(SHAPE, "float16")
    rows = latent_rows(schema, images(3), draw(3, "float16"), {})
    size = commit(run, "s", rows, [], METADATA, TIMINGS)
    assert size == (tmp_path / "run/latents/s.parquet").stat().st_size


@each_dtype
@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_read_latents_goes_through_all_rows_in_order(run, dtype, batch_size):
    latents = draw(7, dtype)
    put(run, "s", latents)
    batches = list(read_latents(run, "s", batch_size))
    assert max(len(rows) for rows, _ in batches) == min(batch_size, 7)
    assert [row["image_id"] for rows, _ in batches for row in rows] == [image.image_id for image in images(7)]
    assert all("latent" not in row for rows, _ in batches for row in rows)
    found = np.concatenate([part for _, part in batches])
    assert found.dtype == np.float32
    assert found.tobytes() == latents.astype(np.float32).tobytes()


def test_read_latents_across_row_groups(run):
    latents = draw(1100, "float16")
    put(run, "s", latents)
    found = np.concatenate([part for _, part in read_latents(run, "s", 1000)])
    assert found.tobytes() == latents.astype(np.float32).tobytes()
