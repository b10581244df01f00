"""The schemas, as other programs see them."""

import json
from dataclasses import replace

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palindrome.pipeline.images.records import REASONS, Piece, Reject, Shard
from palindrome.pipeline.runs.schemas import (
    LATENT_COLUMNS,
    METADATA_KEY,
    REJECT_SCHEMA,
    latent_schema,
    metadata_of,
    rejects_table,
    shard_of,
    shards_table,
    with_metadata,
)

SHARDS = [
    Shard.of("files", [Piece(f"s3://b/{i}.png", f"{i}.png", 10 * i, "e-tag") for i in range(3)]),
    Shard.of("parquet", [Piece("file:///ü 漢.parquet", "ü 漢.parquet", 2**40, "", 5, 2**33)]),
]
REJECTS = [Reject(f"{i}.png", f"file:///{i}.png", reason, REASONS[reason]) for i, reason in enumerate(REASONS)]


def test_shards_come_back_from_parquet(tmp_path):
    pq.write_table(shards_table(SHARDS), tmp_path / "a.parquet")
    assert [shard_of(row) for row in pq.read_table(tmp_path / "a.parquet").to_pylist()] == SHARDS


def test_shard_counts_its_images():
    assert [shard.images for shard in SHARDS] == [3, 2**33 - 5]


def test_rejects_are_read_by_duckdb_and_polars(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(rejects_table(REJECTS), path)
    expected = [(r.image_id, r.source, r.reason, r.detail) for r in REJECTS]
    assert duckdb.sql(f"select image_id, source, reason, detail from '{path}'").fetchall() == expected
    assert polars.read_parquet(path).rows() == expected


def test_no_rejects_are_a_table_with_the_columns():
    assert rejects_table([]).schema.names == ["image_id", "source", "reason", "detail"]


def test_metadata_is_one_json_object_in_the_file(tmp_path):
    metadata = {"model_digest": "ab", "levels": [-1, 0, 5], "preprocess": {"size": 32, "background": [255, 255, 255]}}
    pq.write_table(rejects_table(REJECTS).cast(with_metadata(REJECT_SCHEMA, metadata)), tmp_path / "a.parquet")
    schema = pq.read_schema(tmp_path / "a.parquet")
    assert json.loads(schema.metadata[b"palindrome"]) == metadata
    assert metadata_of(schema) == metadata
    found = duckdb.sql(f"select value from parquet_kv_metadata('{tmp_path}/a.parquet') where key = 'palindrome'")
    assert [json.loads(value) for (value,) in found.fetchall()] == [metadata]


def test_metadata_of_a_foreign_file_is_empty():
    assert metadata_of(pa.schema([("a", pa.int64())])) == {}
    assert metadata_of(pa.schema([("a", pa.int64())], metadata={b"other": b"1"})) == {}


def test_equal_metadata_gives_equal_bytes():
    one, other = ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1})
    schemas = [with_metadata(REJECT_SCHEMA, metadata) for metadata in (one, other)]
    assert schemas[0].metadata[METADATA_KEY] == schemas[1].metadata[METADATA_KEY]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_latent_schema_goes_through_parquet(dtype, tmp_path):
    kept = [pa.field("label", pa.int64()), pa.field("caption", pa.string())]
    schema = latent_schema((3, 8, 8), dtype, kept)
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    found = pq.read_schema(tmp_path / "a.parquet")
    assert found.names == schema.names
    assert found.field("latent").type == pa.fixed_shape_tensor(getattr(pa, dtype)(), (3, 8, 8))
    assert found.names.index("label") == found.names.index("content_hash") + 1
    assert set(found.names) == LATENT_COLUMNS | {"label", "caption"}


def test_latents_may_be_of_two_types_only():
    with pytest.raises(KeyError):
        latent_schema((3, 8, 8), "float64")


def test_shards_with_the_same_pieces_are_equal_and_hashable():
    again = Shard.of("files", [replace(piece) for piece in SHARDS[0].pieces])
    assert len({SHARDS[0], again}) == 1
