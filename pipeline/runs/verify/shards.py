"""Reading one shard of a run and checking it."""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PIL

from palindrome.pipeline.base.text import one_line
from palindrome.pipeline.images.pixels import check_png
from palindrome.pipeline.images.records import REASONS
from palindrome.pipeline.runs.kinds import REJECTS, Kind
from palindrome.pipeline.runs.schemas import REJECT_SCHEMA, SHARD_KEY, metadata_of
from palindrome.pipeline.runs.shards import open_checked
from palindrome.pipeline.runs.verify.findings import Checked, Finding
from palindrome.pipeline.runs.verify.plans import Unit
from palindrome.pipeline.storage.folder import Folder

BATCH_BYTES = 16 << 20  # of latents
BATCH_PICTURES = 64
MAX_BATCH_ROWS = 4096

Shape = tuple[int, int, int]
Variant = tuple[float, ...]


@dataclass
class Read:
    """What was read of a shard: image ids by variant, which is () if the kind has none; ids of rejects. None if they
    could not be read."""

    ids: dict[Variant, list[str]] | None = None
    rejects: list[str] | None = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """The requirements on every shard of a run."""

    kind: Kind
    schema: pa.Schema
    metadata: Mapping[str, Any]  # values that the schema's metadata must have under these keys, if it has them
    check_rows: Callable[[pa.RecordBatch], Iterator[str]]
    compare: Callable[[Unit, Read], Iterator[str]]  # ids and counts with the plan; raises the errors of its store
    kept: tuple[str, ...] = ()  # further columns
    shape: Shape | None = None  # of images: height, width, channels. None: the same within a shard


def check_shard(run: Folder, unit: Unit, wanted: Wanted, has_rejects: bool) -> Checked:
    """Checks the shard of a unit; `has_rejects` is whether it has a file of rejects."""
    checked, read = Checked(shard=unit.name), Read()
    file, rejects = f"{wanted.kind.folder}/{unit.name}.parquet", f"{REJECTS}/{unit.name}.parquet"

    def wrong(where: str, message: str) -> None:
        checked.findings.append(Finding(where, message))

    try:
        with open_checked(run, file) as opened:
            read.counts = dict(json.loads(opened.metadata.metadata[SHARD_KEY])["counts"])
            read.metadata = metadata_of(opened.schema_arrow)
            ids, found = _read_rows(opened, wanted, read.metadata)
        checked.findings += [Finding(file, message) for message in found]
        read.ids = ids
        checked.rows = max(map(len, (ids or {}).values()), default=0)
    except Exception as e:  # damaged files raise errors of many types
        wrong(file, f"can't be read: {one_line(e)}")
    if has_rejects:
        try:
            with open_checked(run, rejects) as opened:
                read.rejects = _check_rejects(opened, lambda message: wrong(rejects, message))
            checked.rejects = len(read.rejects)
            if read.counts and read.counts.get("rejects") != checked.rejects:
                wrong(rejects, f"has {checked.rejects} rejects, and {file} says {read.counts.get('rejects')}")
        except Exception as e:
            read.rejects = None
            wrong(rejects, f"can't be read: {one_line(e)}")
    elif read.counts.get("rejects"):
        read.rejects = None
        wrong(rejects, f"is missing: {file} says that {read.counts['rejects']} images were rejected")
    for message in wanted.compare(unit, read):
        wrong(file, message)
    return checked


def _read_rows(
    file: pq.ParquetFile, wanted: Wanted, metadata: Mapping[str, Any]
) -> tuple[dict[Variant, list[str]] | None, list[str]]:
    """The ids by variant, None if the columns of variants are missing, and what is wrong."""
    found = list(_check_metadata(metadata, wanted))
    schema, kind = file.schema_arrow, wanted.kind
    if schema.names.count("image_id") != 1:
        return {}, [*found, "has no column image_id"]
    matches = True
    for name in (*wanted.schema.names, *wanted.kept):
        if name not in schema.names:
            matches = False
            found.append(f"has no column {name}")
        elif name in wanted.schema.names and schema.field(name).type != wanted.schema.field(name).type:
            matches = False
            found.append(f"column {name} is {schema.field(name).type}, not {wanted.schema.field(name).type}")
    if {*kind.variants} - {*schema.names}:
        return None, found
    ids: dict[Variant, list[str]] = {}
    pictures = Pictures(wanted.shape)
    for group in range(file.metadata.num_row_groups):
        columns = None if matches else ["image_id", *kind.variants]
        for batch in file.iter_batches(_batch_rows(schema), row_groups=[group], columns=columns):
            if matches:
                nulls = [f.name for f in wanted.schema if not f.nullable and batch.column(f.name).null_count]
                found += [f"column {name} has nulls" for name in nulls[:1]] or wanted.check_rows(batch)
                if kind.pictures:
                    found += pictures.check(batch.column("image_id"), batch.column("image").field("bytes"))
            variants = [batch.column(name).to_pylist() for name in kind.variants]
            for image_id, *variant in zip(batch.column("image_id").to_pylist(), *variants, strict=True):
                ids.setdefault(tuple(variant), []).append(str(image_id))
    return ids, found


def _batch_rows(schema: pa.Schema) -> int:
    """The number of rows per batch, which bounds the memory for large columns."""
    if any(pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0 for f in schema):
        return BATCH_PICTURES
    tensors = [f.type for f in schema if isinstance(f.type, pa.FixedShapeTensorType)]
    size = sum(int(np.prod(tensor.shape)) * tensor.value_type.bit_width // 8 for tensor in tensors)
    return min(MAX_BATCH_ROWS, max(1, BATCH_BYTES // max(1, size)))


def _check_metadata(metadata: Mapping[str, Any], wanted: Wanted) -> Iterator[str]:
    required = wanted.kind.shard_keys
    for name in (*required, *sorted(metadata.keys() & wanted.metadata.keys() - {*required})):
        if name not in metadata:
            yield f"has no {name} in its metadata"
        elif name in wanted.metadata and metadata[name] != wanted.metadata[name]:
            yield f"says {name} {short(metadata[name])}, and run.json {short(wanted.metadata[name])}"


def short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:39] + "…"


class Pictures:
    """Checks that images can be decoded and have the same shape: `shape`, or else the first image's."""

    def __init__(self, shape: Shape | None, form: str = "PNG") -> None:
        self.shape, self.form = shape, form

    def check(self, names: Iterable[Any], contents: Iterable[Any]) -> Iterator[str]:
        """What is wrong with images, by name. Also accepts Arrow scalars, so that few copies are in memory."""
        for name, content in zip(names, contents, strict=True):
            if fault := self.fault(_plain(content)):
                yield f"{_plain(name)} {fault}"

    def fault(self, content: bytes | None) -> str | None:
        if not content:
            return "has no image"
        try:
            if self.form == "PNG":
                check_png(content)  # Pillow ignores what follows the last pixel
            with PIL.open(io.BytesIO(content), formats=[self.form]) as image:
                image.load()
                shape = (image.height, image.width, len(image.getbands()))
        except Exception as e:  # Pillow raises errors of many types
            return f"has an image that is not a whole {self.form}: {one_line(e)}"
        self.shape = self.shape or shape
        if shape != self.shape:
            return f"has an image of {_described(shape)}, not {_described(self.shape)}"
        return None


def _plain(value: Any) -> Any:
    return value.as_py() if isinstance(value, pa.Scalar) else value


def _described(shape: Shape) -> str:
    height, width, channels = shape
    return f"{width} x {height} pixels and {channels} channels"


def compare_ids(found: Iterable[str], planned: Iterable[str], missing: str | None) -> Iterator[str]:
    """What is wrong with a shard's ids; `missing` is the message for missing ones, None to ignore them."""
    have, want = Counter(found), set(planned)
    for image_id in sorted(have.keys() | want):
        if image_id not in want:
            yield f"{image_id} is not in the plan of this shard"
        elif image_id not in have:
            if missing:
                yield f"lacks {image_id}: {missing}"
        elif have[image_id] > 1:
            yield f"{image_id} occurs {have[image_id]} times"


def _check_rejects(file: pq.ParquetFile, wrong: Callable[[str], None]) -> list[str]:
    """Checks a shard's rejects and returns their ids."""
    ids: list[str] = []
    if not file.schema_arrow.equals(REJECT_SCHEMA):
        wrong(f"has columns {short(file.schema_arrow.names)} of other names or types than rejects have")
    for batch in file.iter_batches(1024, columns=["image_id", "reason"]):
        found = [(str(row["image_id"]), row["reason"]) for row in batch.to_pylist()]
        for image_id, reason in found:
            if reason not in REASONS:
                wrong(f"{image_id} is rejected as {reason}, which is not a reason")
        ids += [image_id for image_id, _ in found]
    return ids
