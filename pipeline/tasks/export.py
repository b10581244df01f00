"""Exporting the images of a run: image files in folders, WebDataset tars, Hugging Face Parquet.

Each shard of the run is exported on its own, and the names of its files depend only on its rows. So a shard needs no
knowledge of other shards, and exporting it again writes the same files.
"""

import hashlib
import io
import json
import math
import re
import tarfile
import threading
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image as PIL

from palindrome.pipeline.base.errors import RunError, StoreError, writing
from palindrome.pipeline.base.text import one_line
from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.images.pixels import check_png
from palindrome.pipeline.runs.exports import PICTURES
from palindrome.pipeline.runs.kinds import DATA, IMAGES, INDEX, Kind
from palindrome.pipeline.runs.schemas import METADATA_KEY, PICTURE
from palindrome.pipeline.runs.shards import open_checked
from palindrome.pipeline.storage.folder import TEMPORARY, Folder, TableWriter

JPEG_QUALITY = 95
THREADS = 16  # each writes one image file at a time
BATCH = 64  # rows
MAX_NAMED = 3  # broken images named in an error
PLAIN = ("string", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FEATURES = {  # Hugging Face's names of Arrow's types; it infers all others
    "halffloat": "float16",
    "float": "float32",
    "double": "float64",
    **dict(zip(PLAIN, PLAIN, strict=True)),
}

# Maximum bytes of a name's component, and of its folders together. ext4 allows 255 per component, S3 1024 in total.
MAX_COMPONENT, MAX_FOLDERS = 180, 600
UNSAFE = re.compile(r"[^A-Za-z0-9 _.,()+=@&!'#\x80-\U0010ffff-]")  # for shells, URLs or Windows; and ~, used below
INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)  # device names on Windows
EXTENSIONS = (*PICTURES.values(), ".json", ".parquet")  # of exported files
LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


class Broken(ValueError):
    """The shard can't be read, or has an image that can't be exported."""


def name_of(image_id: str, dotless: bool = False) -> str:
    """The path of an image's file below the export's folder, without extension: the id itself, folders included, if it
    is a safe path. Otherwise it is made safe, and ends in `~` and 16 hexadecimal digits of the id's hash.

    Different ids have different names, also on file systems that ignore case or normalise Unicode: a name with capitals
    ends in `~` and up to 15 hexadecimal digits, a bit mask of its capital letters. No folder has the name of an image's
    file. In a `dotless` name, dots of the last component become commas, because the key of a WebDataset sample ends at
    the first dot.
    """
    *folders, last = image_id.split("/")
    parts = [_safe(part, folder=True) for part in folders if part]
    if len("/".join(parts).encode()) > MAX_FOLDERS:
        parts = []
    end = _safe(last.replace(",", "_") if dotless else last, folder=False)
    tag = _tag(image_id, changed="/".join([*parts, end]) != image_id)
    return "/".join([*parts, end.replace(".", ",") if dotless else end]) + tag


def _safe(part: str, folder: bool) -> str:
    """A component of a path, changed if necessary so that every file system accepts it."""
    text = INVISIBLE.sub("_", UNSAFE.sub("_", unicodedata.normalize("NFC", part)))
    text = "".join(c if c.isprintable() else "_" for c in text).lstrip(" .-")
    text = text.encode()[:MAX_COMPONENT].decode(errors="ignore").rstrip(" .") or "_"
    if RESERVED.fullmatch(text):
        text = f"_{text}"
    return f"{text}_" if folder and text.casefold().endswith(EXTENSIONS) else text


def _tag(image_id: str, changed: bool) -> str:
    """The end of a name that makes it unique to its id."""
    lower = image_id.translate(LOWER)
    # Whether no other letters equal these after Unicode normalisation and case folding.
    unambiguous = unicodedata.normalize("NFKC", lower).casefold() == lower.upper().lower() == lower
    if unambiguous and not changed:
        if lower == image_id:
            return ""
        capitals = "".join("01"[c.isupper()] for c in image_id if c.isascii() and c.isalpha())
        if len(bits := f"{int(capitals, 2):x}") < 16:
            return f"~{bits}"
    return "~" + hashlib.sha256(image_id.encode(errors="surrogatepass")).hexdigest()[:16]


def encoded(png: bytes, form: str, quality: int | None) -> bytes:
    """A PNG converted to one of PICTURES; for png, the same bytes. WebP is lossless without a quality (1 to 100)."""
    if form == "png":
        return png
    image: PIL.Image = PIL.open(io.BytesIO(png), formats=["PNG"])
    content = io.BytesIO()
    if form == "webp":
        options = {"lossless": True} if quality is None else {"quality": quality}
        image.save(content, "WEBP", exact=True, **options)
    else:
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
        image.save(content, "JPEG", quality=quality or JPEG_QUALITY, subsampling=0)  # no chroma subsampling
    return content.getvalue()


@dataclass(frozen=True)
class Export:
    """A run's shards -> files in `out`. `folder_columns` are the columns that distinguish the images of an id: each of
    their values gets a folder of its own. With `only_steps`, only the images of that number of steps."""

    run: Folder
    kind: Kind
    out: Folder
    form: str
    quality: int | None
    folder_columns: tuple[str, ...]
    only_steps: int | None
    stop: threading.Event  # once set, the shards in flight are dropped

    def process(self, shard: str) -> int:
        """Exports a shard and returns its number of images. Raises Broken naming the images that can't be exported: the
        shard is then not done, though image files of its other images may exist. Raises RunError if `out` can't be
        written."""
        if self.form == "webdataset":
            return self._tar(shard)
        return self._table(shard) if self.form == "parquet" else self._pictures(shard)

    def name(self, row: dict[str, Any]) -> str:
        """The path of a row's image file without its extension."""
        name = name_of(row["image_id"], dotless=self.form == "webdataset")
        return "/".join([*(f"{column}-{row[column]}" for column in self.folder_columns), name])

    def _pictures(self, shard: str) -> int:
        schema, batches = self._read(shard)
        broken: list[str] = []

        def put(row: dict[str, Any]) -> dict[str, Any] | None:
            name = self.name(row) + PICTURES[self.form]
            try:
                content = encoded(row["image"], self.form, self.quality)
            except Exception as e:  # Pillow raises errors of many types; list.append is thread-safe
                broken.append(f"{row['image_id']}: {one_line(e)}")
                return None
            self.out.put(f"{IMAGES}/{name}", content)
            return {**row, "file_name": name, "shard": shard}

        with writing(self.out.uri), self._index(shard, schema) as index:
            rows = in_threads(put, self._checked(batches, broken), THREADS)
            count = _add(index, _index_schema(schema), (row for row in rows if row))
            _raise_if_broken(broken)
            index.commit({})  # commits the shard
        return count

    def _tar(self, shard: str) -> int:
        schema, batches = self._read(shard)
        others = [f.name for f in schema if not _is_bytes(f.type)]
        broken: list[str] = []
        with (
            writing(self.out.uri),
            self._index(shard, schema) as index,
            self.out.create(f"{DATA}/{shard}.tar") as new,
        ):

            def added(tar: tarfile.TarFile) -> Iterator[dict[str, Any]]:
                for row in self._checked(batches, broken):
                    key = self.name(row)
                    metadata = {name: _json_value(row[name]) for name in others}
                    members = {f"{key}.png": row["image"], f"{key}.json": json.dumps(metadata, default=str).encode()}
                    for name, content in members.items():
                        member = tarfile.TarInfo(name)  # without time and user, so that the same rows give the same tar
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
                    yield {**row, "file_name": f"{key}.png", "shard": shard}

            with tarfile.open(fileobj=new.file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                count = _add(index, _index_schema(schema), added(tar))
            _raise_if_broken(broken)
            index.commit({})
            new.commit()
        return count

    def _table(self, shard: str) -> int:
        schema, batches = self._read(shard)
        position = schema.get_field_index("image")
        image = pa.field("image", PICTURE)
        features = {
            f.name: {"dtype": FEATURES[str(f.type)], "_type": "Value"} for f in schema if str(f.type) in FEATURES
        }
        hints = {"huggingface": json.dumps({"info": {"features": {**features, "image": {"_type": "Image"}}}})}
        ours = {key: value for key, value in (schema.metadata or {}).items() if key == METADATA_KEY}
        schema = schema.set(position, image).with_metadata({**ours, **hints})
        broken: list[str] = []
        count = 0
        name = f"{DATA}/{shard}.parquet"
        others = [f.name for f in schema if f.name != "image"]  # a dictionary is useless for images
        with writing(self.out.uri), TableWriter(self.out, name, schema, use_dictionary=others) as table:
            for batch in batches:
                rows = list(self._checked([batch], broken))
                if len(rows) == batch.num_rows:  # otherwise the shard fails, and only its broken images are collected
                    pictures = [{"bytes": row["image"], "path": f"{self.name(row)}.png"} for row in rows]
                    columns = [*batch.columns]
                    columns[position] = pa.array(pictures, image.type)
                    table.add(pa.Table.from_arrays(columns, schema=schema))
                    count += len(rows)
            _raise_if_broken(broken)
            table.commit({})
        return count

    def _read(self, shard: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """The schema of a shard, and its rows, filtered by `only_steps`."""
        name = f"{self.kind.folder}/{shard}.parquet"
        try:
            file = open_checked(self.run, name)
        except (OSError, ValueError) as e:  # the base classes of pyarrow's errors
            raise self._unreadable(name, e) from e
        missing = {"image_id", "image", *self.kind.variants} - {*file.schema_arrow.names}
        if missing:
            raise Broken(f"{self.run.uri}/{name} has no column {' and no '.join(sorted(map(str, missing)))}")
        return file.schema_arrow, self._batches(name, file)

    def _batches(self, name: str, file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
        try:
            with file:
                for group in range(file.num_row_groups):  # one at a time, or the whole file would be in memory
                    for batch in file.iter_batches(BATCH, row_groups=[group]):
                        if self.only_steps is not None:
                            batch = batch.filter(pc.equal(batch["steps"], self.only_steps))
                        yield batch
        except (OSError, ValueError) as e:
            raise self._unreadable(name, e) from e

    def _unreadable(self, name: str, e: Exception) -> Exception:
        outage = isinstance(e, StoreError) and e.outage  # the next shard would fail as well
        return (RunError if outage else Broken)(f"{self.run.uri}/{name} can't be read: {one_line(e)}")

    def _checked(self, batches: Iterable[pa.RecordBatch], broken: list[str]) -> Iterator[dict[str, Any]]:
        """The rows with the bytes of their PNG as `image`. For each row without a whole PNG, an error is added to
        `broken`."""
        for batch in batches:
            for row in batch.to_pylist():
                if self.stop.is_set():
                    raise Broken("stopped")
                content = (row["image"] or {}).get("bytes")
                try:
                    check_png(content)
                except ValueError as e:
                    broken.append(f"{row['image_id']}: {e}")
                else:
                    yield {**row, "image": content}

    def _index(self, shard: str, schema: pa.Schema) -> TableWriter:
        return TableWriter(self.out, f"{INDEX}/{shard}.parquet", _index_schema(schema))


def _index_schema(schema: pa.Schema) -> pa.Schema:
    """The file name of each image, the run's columns except images, and the shard."""
    columns = [f for f in schema if not _is_bytes(f.type) and f.name not in ("file_name", "shard")]
    return pa.schema([("file_name", pa.string()), *columns, ("shard", pa.string())])


def _is_bytes(kind: pa.DataType) -> bool:
    nested = pa.types.is_struct(kind) and any(_is_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return nested or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _add(table: TableWriter, schema: pa.Schema, rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    while batch := list(islice(rows, BATCH)):
        batch = [{name: row[name] for name in schema.names} for row in batch]  # without the image
        table.add(pa.Table.from_pylist(batch, schema))
        count += len(batch)
    return count


def _raise_if_broken(broken: Collection[str]) -> None:
    if broken:
        more = f", and {len(broken) - MAX_NAMED} more" if len(broken) > MAX_NAMED else ""
        raise Broken("; ".join(sorted(broken)[:MAX_NAMED]) + more)


def _json_value(value: Any) -> Any:
    """None for NaN and infinity, which JSON does not have; the PSNR of identical images is infinite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def put_index(out: Folder, name: str) -> None:
    """Merges the Parquet files of the folder INDEX into one. Raises RunError."""
    shards = sorted(file for file in out.files(INDEX) if file.endswith(".parquet"))
    if not shards:
        return

    def read(file: str) -> pa.Table:
        return out.read_parquet(f"{INDEX}/{file}")

    with writing(f"{out.uri}/{name}"), TableWriter(out, name, read(shards[0]).schema) as table:
        for rows in in_threads(read, shards, THREADS):
            table.add(rows)
        table.commit({})


def clear_unfinished(out: Folder) -> None:
    """Removes temporary image files of killed writers, in all subfolders."""
    if out.is_local:
        for file in Path(out.path(IMAGES)).rglob(f"{TEMPORARY}*"):
            file.unlink(missing_ok=True)
