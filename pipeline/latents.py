"""Committed shards of latents: write and read."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.records import MEASURED, Image, Reject, metadata_of, rejects_table, with_metadata
from pipeline.storage import Folder

LATENTS, REJECTS = "latents", "rejects"
ROWS_A_GROUP = 1024


def latent_rows(
    schema: pa.Schema, images: Sequence[Image], latents: np.ndarray, measured: Mapping[str, Any]
) -> pa.Table:
    """Rows of records.latent_schema: images of one batch, their latents [B, C, H, W], and columns of MEASURED, each of
    length B (a NaN residual is none); those that are not given are null."""
    tensor = schema.field("latent").type
    flat = pa.array(np.ascontiguousarray(latents).reshape(-1), tensor.value_type)

    def column(field: pa.Field) -> pa.Array:
        if field.name == "latent":
            return pa.ExtensionArray.from_storage(
                tensor, pa.FixedSizeListArray.from_arrays(flat, math.prod(tensor.shape))
            )
        if field.name in measured:
            found = np.asarray(measured[field.name], field.type.to_pandas_dtype())
            return pa.array(found, mask=np.isnan(found) if field.name == "residual" else None)
        if field.name in MEASURED:
            return pa.nulls(len(images), field.type)
        values = [i.kept[field.name] if field.name in i.kept else getattr(i, field.name) for i in images]
        return pa.array(values, field.type)

    return pa.table([column(field) for field in schema], schema=schema)


def commit(
    run: Folder,
    shard: str,
    rows: pa.Table,
    rejects: Sequence[Reject],
    metadata: Mapping[str, Any],
    timings: Mapping[str, float],
) -> int:
    """Writes a shard: its rejects first, then the latents, whose file is the commit. Returns the file's bytes.

    `metadata` is what another program needs to decode the latents; the counts and timings are put beside it.
    """
    put_rejects(run, shard, rejects)
    counts = {"images": rows.num_rows + len(rejects), "latents": rows.num_rows, "rejects": len(rejects)}
    table = with_metadata(rows, {**metadata, "counts": counts, "timings": dict(timings)})
    # Bytes split by significance compress better, but DuckDB (2.0) can't read that encoding of float16.
    split = ["latent.list.element"] if rows.schema.field("latent").type.value_type == pa.float32() else False
    texts = [f.name for f in rows.schema if f.name != "latent"]
    return run.put_parquet(
        f"{LATENTS}/{shard}.parquet",
        table,
        row_group_size=ROWS_A_GROUP,
        use_dictionary=texts,
        use_byte_stream_split=split,
    )


def put_rejects(run: Folder, shard: str, rejects: Sequence[Reject]) -> None:
    """Writes a shard's rejects, before its commit."""
    if rejects:
        run.put_parquet(f"{REJECTS}/{shard}.parquet", rejects_table(rejects))


def committed(run: Folder, below: str = LATENTS) -> set[str]:
    """The names of the shards that are done."""
    return {name.removesuffix(".parquet") for name in run.files(below) if name.endswith(".parquet")}


def shard_metadata(run: Folder, shard: str, below: str = LATENTS) -> dict[str, Any]:
    """What a committed shard's file says of itself; reads its footer only."""
    with run.parquet_file(f"{below}/{shard}.parquet") as file:
        return metadata_of(file.schema_arrow)


def read_latents(run: Folder, shard: str, batch_size: int) -> Iterator[tuple[list[dict[str, Any]], np.ndarray]]:
    """Batches of a shard's rows without their latents, and the latents, float32 [B, C, H, W]."""
    with run.parquet_file(f"{LATENTS}/{shard}.parquet") as file:
        for batch in file.iter_batches(batch_size):
            latents = batch.column("latent").to_numpy_ndarray().astype(np.float32)
            yield batch.drop_columns(["latent"]).to_pylist(), latents


def read_rejects(run: Folder, done: Collection[str]) -> Iterator[dict[str, Any]]:
    """The rejects of the shards that are done, as rows of records.REJECT_SCHEMA."""
    for name in run.files(REJECTS):
        if name.removesuffix(".parquet") in done:  # else its shard was cut short, and will write them again
            yield from run.read_parquet(f"{REJECTS}/{name}").to_pylist()
