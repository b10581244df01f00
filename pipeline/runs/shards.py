"""Writing shards, and reading committed shards of latents and their rejects."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from palindrome.pipeline.base.errors import RunError
from palindrome.pipeline.base.text import one_line
from palindrome.pipeline.images.records import Image, Reject
from palindrome.pipeline.runs.entries import entries
from palindrome.pipeline.runs.kinds import LATENTS, REJECTS
from palindrome.pipeline.runs.manifest import Manifest, read_manifest
from palindrome.pipeline.runs.schemas import (
    APART,
    MEASURED,
    REJECT_SCHEMA,
    SHARD_KEY,
    metadata_of,
    rejects_table,
    with_metadata,
)
from palindrome.pipeline.runs.selection import Selection
from palindrome.pipeline.storage.folder import Folder, TableWriter, open_ranges

if TYPE_CHECKING:
    import pyarrow.dataset as dataset

TENSORS = ("latent", "vae_latent")  # columns of arrays
MADE = {"model_digest": "by model", "levels": "on the ladder", "preprocess": "from images preprocessed as"}


def latent_rows(
    schema: pa.Schema, images: Sequence[Image], latents: np.ndarray, measured: Mapping[str, Any]
) -> pa.Table:
    """Rows of schemas.latent_schema: a batch of images, their latents [B, C, H, W], and columns of MEASURED, each of
    length B. Missing columns and NaN residuals become null."""

    def column(field: pa.Field) -> pa.Array:
        if field.name == "latent":
            return tensor_array(field.type, latents)
        if field.name == "vae_latent":
            return tensor_array(field.type, measured[field.name])
        if field.name in measured:
            found = np.asarray(measured[field.name], field.type.to_pandas_dtype())
            return pa.array(found, mask=np.isnan(found) if field.name == "residual" else None)
        if field.name in MEASURED or field.name in APART:
            return pa.nulls(len(images), field.type)
        values = [i.kept[field.name] if field.name in i.kept else getattr(i, field.name) for i in images]
        return pa.array(values, field.type)

    return pa.table([column(field) for field in schema], schema=schema)


def tensor_array(tensor: pa.FixedShapeTensorType, values: np.ndarray) -> pa.Array:
    """An array [B, ...] as a column of Arrow fixed-shape tensors."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), tensor.value_type)
    return pa.ExtensionArray.from_storage(tensor, pa.FixedSizeListArray.from_arrays(flat, math.prod(tensor.shape)))


class ShardWriter:
    """Writes a shard batch by batch: its rejects, and `<below>/<name>.parquet`, whose atomic put commits the shard.
    `metadata` describes the rows to other programs. With `once`, a shard that another attempt has committed meanwhile
    is kept."""

    def __init__(
        self,
        run: Folder,
        below: str,
        name: str,
        schema: pa.Schema,
        metadata: Mapping[str, Any],
        once: bool = False,
        **parquet: Any,
    ) -> None:
        self.run, self.name, self.rows, self.refused = run, name, 0, 0
        self.path, self.once = f"{below}/{name}.parquet", once
        self.table = TableWriter(run, self.path, with_metadata(schema, metadata), once, **parquet)
        self.rejects: TableWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for writer in (self.table, self.rejects):
            if writer is not None:
                writer.__exit__()

    def add(self, rows: pa.Table | None, rejects: Sequence[Reject] = ()) -> None:
        if rows is not None:
            self.table.add(rows)
            self.rows += rows.num_rows
        if rejects:
            self.rejects = self.rejects or TableWriter(self.run, f"{REJECTS}/{self.name}.parquet", REJECT_SCHEMA)
            self.rejects.add(rejects_table(rejects))
            self.refused += len(rejects)

    def commit(self, timings: Mapping[str, float], counts: Mapping[str, int] | None = None) -> int:
        """Returns the size of the rows' file in bytes. `counts` replaces `self.counts`, which are of latents."""
        if self.once and self.run.fs.isfile(self.run.path(self.path)):
            return int(self.run.fs.size(self.run.path(self.path)))
        if self.rejects is not None:
            self.rejects.commit({})
        else:
            self.run.remove(f"{REJECTS}/{self.name}.parquet")  # of an earlier attempt that rejected inputs
        about = {"counts": dict(self.counts if counts is None else counts), "timings": dict(timings)}
        return self.table.commit({SHARD_KEY: json.dumps(about)})

    @property
    def counts(self) -> dict[str, int]:
        """Of a shard of latents."""
        return {"images": self.rows + self.refused, "latents": self.rows, "rejects": self.refused}


def latent_writer(
    run: Folder, shard: str, schema: pa.Schema, metadata: Mapping[str, Any], once: bool = False
) -> ShardWriter:
    """A writer for rows of schemas.latent_schema."""
    return ShardWriter(run, LATENTS, shard, schema, metadata, once, **parquet_options(schema))


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """How rows with latents are written."""
    tensors = {f.name: f.type.value_type for f in schema if isinstance(f.type, pa.FixedShapeTensorType)}
    others = [f.name for f in schema if f.name not in tensors]  # statistics and dictionaries of latents are useless
    # BYTE_STREAM_SPLIT compresses better, but DuckDB (2.0) can't read it for float16.
    split = [f"{name}.list.element" for name, dtype in tensors.items() if dtype == pa.float32()]
    return {"use_dictionary": others, "write_statistics": others, "use_byte_stream_split": split or False}


def committed(run: Folder, below: str = LATENTS) -> set[str]:
    """The names of the committed shards."""
    return {name.removesuffix(".parquet") for name in run.files(below) if name.endswith(".parquet")}


def shard_metadata(run: Folder, shard: str, below: str = LATENTS) -> dict[str, Any]:
    """The metadata of a committed shard, with its counts and timings; reads only the footer."""
    with run.parquet_file(f"{below}/{shard}.parquet") as file:
        return {**metadata_of(file.schema_arrow), **json.loads(file.metadata.metadata.get(SHARD_KEY, b"{}"))}


def check_made(run: Folder, shard: str) -> None:
    """Raises ValueError if a shard's latents do not match `run.json`: made by another model, which would decode them to
    noise, on another ladder, or from images preprocessed differently."""
    manifest = read_manifest(run)
    found, expected = shard_metadata(run, shard), manifest.facts if manifest else {}
    for name, how in MADE.items():
        if found[name] != expected.get(name):
            raise ValueError(f"the latents of shard {shard} were made {how} {found[name]}, not {expected.get(name)}")


def read_latents(
    run: Folder, shard: str, batch_size: int, which: Selection | None = None
) -> Iterator[tuple[list[dict[str, Any]], np.ndarray]]:
    """Batches of a shard's rows without latents, and their latents, float32 [B, C, H, W]. Row groups without a selected
    row are not read."""
    which = None if which == Selection() else which
    for batch in _all(run, shard, batch_size) if which is None else _selected(run, shard, batch_size, which):
        latents = batch.column("latent").to_numpy_ndarray().astype(np.float32)
        tensors = [name for name in TENSORS if name in batch.schema.names]
        yield batch.drop_columns(tensors).to_pylist(), latents


def _all(run: Folder, shard: str, batch_size: int) -> Iterator[pa.RecordBatch]:
    with run.parquet_file(f"{LATENTS}/{shard}.parquet") as file:
        yield from file.iter_batches(batch_size)


def _selected(run: Folder, shard: str, batch_size: int, which: Selection) -> Iterator[pa.RecordBatch]:
    """Full batches of the selected rows, even if each row group has only a few of them."""
    with _fragment(run, shard, which) as (fragment, selected):
        buffered: list[pa.RecordBatch] = []
        for batch in fragment.to_batches(filter=selected, batch_size=batch_size, use_threads=False):
            buffered += [batch] if len(batch) else []
            if sum(map(len, buffered)) >= batch_size:
                *full, rest = pa.Table.from_batches(buffered).combine_chunks().to_batches(max_chunksize=batch_size)
                yield from full if len(rest) < batch_size else [*full, rest]
                buffered = [rest] if len(rest) < batch_size else []
        yield from buffered and pa.Table.from_batches(buffered).combine_chunks().to_batches()


def count_rows(run: Folder, shard: str, which: Selection) -> int:
    """The number of selected rows in a shard."""
    with _fragment(run, shard, which) as (fragment, selected):
        return int(fragment.count_rows(filter=selected, use_threads=False))


def read_ids(run: Folder, shard: str, which: Selection) -> list[str]:
    """The ids of the selected rows, in the file's order."""
    with _fragment(run, shard, which) as (fragment, selected):
        return list(fragment.to_table(columns=["image_id"], filter=selected, use_threads=False)["image_id"].to_pylist())


@contextmanager
def _fragment(
    run: Folder, shard: str, which: Selection
) -> Iterator[tuple["dataset.ParquetFileFragment", pc.Expression | None]]:
    """A shard's file as a dataset fragment, whose readers skip row groups, and the selection as its filter."""
    with open_ranges(run.fs, run.path(f"{LATENTS}/{shard}.parquet")) as file:
        import pyarrow.dataset as dataset  # imports pandas, if it is installed

        fragment = dataset.ParquetFileFormat().make_fragment(file)
        yield fragment, which.expression(fragment.physical_schema)


def rejects(run: Folder, manifest: Manifest, reason: str | None = None) -> Iterator[dict[str, Any]]:
    """The rejects of the committed shards, shard by shard, as rows of schemas.REJECT_SCHEMA. A sweep's rejects come
    once, not once per setting. Raises RunError naming a file that can't be read."""
    kind = manifest.kind
    done = {entry.shard for entry in entries(run, kind.folder)}
    previous = None
    for shard in sorted(entry.shard for entry in entries(run, REJECTS) if entry.shard and entry.shard in done):
        planned = kind.planned(shard)
        if planned == previous:
            continue
        previous, name = planned, f"{REJECTS}/{shard}.parquet"
        try:
            with open_checked(run, name) as file:
                for batch in file.iter_batches(1024, columns=["image_id", "source", "reason", "detail"]):
                    yield from (row for row in batch.to_pylist() if reason in (None, row["reason"]))
        except (OSError, ValueError) as e:  # the base classes of pyarrow's errors
            raise RunError(f"{run.uri}/{name} can't be read: {one_line(e)}") from e


def open_checked(run: Folder, name: str) -> pq.ParquetFile:
    """Opens a Parquet file whose pages are checked against their checksums as they are read."""
    return pq.ParquetFile(run.fs.open(run.path(name), "rb"), pre_buffer=True, page_checksum_verification=True)
