"""The images of a run as others want them: pictures in folders, WebDataset tars, Hugging Face Parquet.

Each shard of the run is exported on its own, to files whose names are functions of its rows alone: nothing has to be
known of other shards, and a shard that is exported again is exported to the same files.
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
from palindrome.pipeline.runs.schemas import METADATA_KEY
from palindrome.pipeline.runs.shards import open_checked
from palindrome.pipeline.storage.folder import TEMPORARY, Folder, TableWriter

JPEG_QUALITY = 95
THREADS = 16  # pictures of a shard that are put at once
BATCH = 64  # rows
NAMED = 3  # broken images named in an error
PLAIN = ("string", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FEATURES = {  # what Hugging Face calls Arrow's types; it finds the others by itself
    "halffloat": "float16",
    "float": "float32",
    "double": "float64",
    **dict(zip(PLAIN, PLAIN, strict=True)),
}

LONGEST, DEEPEST = 180, 600  # bytes of a part of a name, of its folders together; ext4 takes 255, S3 1024 for all
REFUSED = re.compile(r"[^A-Za-z0-9 _.,()+=@&!'#\x80-\U0010ffff-]")  # by shells, URLs or Windows; and ~, which is ours
UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)  # devices, on Windows
OURS = (*PICTURES.values(), ".json", ".parquet")
LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


class Broken(ValueError):
    """A shard that holds an image that can't be exported, or can't be read itself."""


def name_of(image_id: str, dotless: bool = False) -> str:
    """The path of an id's picture below the folder of pictures, without an extension: the id itself where it can be
    one, folders included. Else it is made one, and ends in `~` and 16 digits of the id's hash.

    Different ids have different names, also where a file system does not tell upper from lower case or one form of a
    letter from another: a name with capitals ends in `~` and up to 15 hexadecimal digits, a bit a letter, that say
    which those are. No folder has the name of a picture. A `dotless` name has commas for dots in its last part, as the
    key of a WebDataset sample, which ends at the first dot.
    """
    *folders, last = image_id.split("/")
    parts = [_safe(part, folder=True) for part in folders if part]
    if len("/".join(parts).encode()) > DEEPEST:
        parts = []
    end = _safe(last.replace(",", "_") if dotless else last, folder=False)
    tag = _tag(image_id, changed="/".join([*parts, end]) != image_id)
    return "/".join([*parts, end.replace(".", ",") if dotless else end]) + tag


def _safe(part: str, folder: bool) -> str:
    """A part of a path as every file system takes it: the part itself where that is so."""
    text = UNSEEN.sub("_", REFUSED.sub("_", unicodedata.normalize("NFC", part)))
    text = "".join(c if c.isprintable() else "_" for c in text).lstrip(" .-")
    text = text.encode()[:LONGEST].decode(errors="ignore").rstrip(" .") or "_"
    if RESERVED.fullmatch(text):
        text = f"_{text}"
    return f"{text}_" if folder and text.casefold().endswith(OURS) else text


def _tag(image_id: str, changed: bool) -> str:
    """What a name ends in, so that no other id has the same."""
    lower = image_id.translate(LOWER)
    alone = unicodedata.normalize("NFKC", lower).casefold() == lower.upper().lower() == lower  # in its letters' forms
    if alone and not changed:
        if lower == image_id:
            return ""
        capitals = "".join("01"[c.isupper()] for c in image_id if c.isascii() and c.isalpha())
        if len(bits := f"{int(capitals, 2):x}") < 16:
            return f"~{bits}"
    return "~" + hashlib.sha256(image_id.encode(errors="surrogatepass")).hexdigest()[:16]


def encoded(png: bytes, form: str, quality: int | None) -> bytes:
    """A PNG as one of PICTURES; a PNG stays the same bytes. WebP is lossless where no quality (1 to 100) is given."""
    if form == "png":
        return png
    image: PIL.Image = PIL.open(io.BytesIO(png), formats=["PNG"])
    content = io.BytesIO()
    if form == "webp":
        given = {"lossless": True} if quality is None else {"quality": quality}
        image.save(content, "WEBP", exact=True, **given)
    else:
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
        image.save(content, "JPEG", quality=quality or JPEG_QUALITY, subsampling=0)  # colours as sharp as the rest
    return content.getvalue()


@dataclass(frozen=True)
class Export:
    """A run's shards -> files in `out`, in a folder for each value of the columns `apart`, in which the images of an id
    differ; with `only`, those of so many steps."""

    run: Folder
    kind: Kind
    out: Folder
    form: str
    quality: int | None
    apart: tuple[str, ...]
    only: int | None
    stop: threading.Event  # once set, what is under way is dropped

    def process(self, shard: str) -> int:
        """Exports a shard; returns how many images. Raises Broken naming what can't be exported: of the pictures in
        folders the others are there, and the shard is not done. Raises RunError where `out` can't be written."""
        if self.form == "webdataset":
            return self._tar(shard)
        return self._table(shard) if self.form == "parquet" else self._pictures(shard)

    def name(self, row: dict[str, Any]) -> str:
        """The path of a row's picture without its extension."""
        name = name_of(row["image_id"], dotless=self.form == "webdataset")
        return "/".join([*(f"{column}-{row[column]}" for column in self.apart), name])

    def _pictures(self, shard: str) -> int:
        schema, batches = self._read(shard)
        broken: list[str] = []

        def put(row: dict[str, Any]) -> dict[str, Any] | None:
            name = self.name(row) + PICTURES[self.form]
            try:
                content = encoded(row["image"], self.form, self.quality)
            except Exception as e:  # Pillow raises errors of many kinds; threads that append do not disturb each other
                broken.append(f"{row['image_id']}: {one_line(e)}")
                return None
            self.out.put(f"{IMAGES}/{name}", content)
            return {**row, "file_name": name, "shard": shard}

        with writing(self.out.uri), self._index(shard, schema) as index:
            rows = in_threads(put, self._whole(batches, broken), THREADS)
            count = _add(index, _index_schema(schema), (row for row in rows if row))
            _refuse(broken)
            index.commit({})  # by which the shard is done
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
                for row in self._whole(batches, broken):
                    key = self.name(row)
                    about = {name: _json_value(row[name]) for name in others}
                    members = {f"{key}.png": row["image"], f"{key}.json": json.dumps(about, default=str).encode()}
                    for name, content in members.items():
                        member = tarfile.TarInfo(name)  # of no time and no user
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
                    yield {**row, "file_name": f"{key}.png", "shard": shard}

            with tarfile.open(fileobj=new.file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                count = _add(index, _index_schema(schema), added(tar))
            _refuse(broken)
            index.commit({})
            new.commit()
        return count

    def _table(self, shard: str) -> int:
        schema, batches = self._read(shard)
        place = schema.get_field_index("image")
        image = pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        features = {
            f.name: {"dtype": FEATURES[str(f.type)], "_type": "Value"} for f in schema if str(f.type) in FEATURES
        }
        hints = {"huggingface": json.dumps({"info": {"features": {**features, "image": {"_type": "Image"}}}})}
        ours = {key: value for key, value in (schema.metadata or {}).items() if key == METADATA_KEY}
        schema = schema.set(place, image).with_metadata({**ours, **hints})
        broken: list[str] = []
        count = 0
        name = f"{DATA}/{shard}.parquet"
        texts = [f.name for f in schema if f.name != "image"]  # no two images are alike
        with writing(self.out.uri), TableWriter(self.out, name, schema, use_dictionary=texts) as table:
            for batch in batches:
                rows = list(self._whole([batch], broken))
                if len(rows) == batch.num_rows:  # else there is nothing to come of the shard but what is broken
                    pictures = [{"bytes": row["image"], "path": f"{self.name(row)}.png"} for row in rows]
                    columns = [*batch.columns]
                    columns[place] = pa.array(pictures, image.type)
                    table.add(pa.Table.from_arrays(columns, schema=schema))
                    count += len(rows)
            _refuse(broken)
            table.commit({})
        return count

    def _read(self, shard: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """The schema of a shard and its rows, those of `only`."""
        name = f"{self.kind.folder}/{shard}.parquet"
        try:
            file = open_checked(self.run, name)
        except (OSError, ValueError) as e:  # pyarrow's errors are one or the other
            raise self._unreadable(name, e) from e
        missing = {"image_id", "image", *self.kind.variants} - {*file.schema_arrow.names}
        if missing:
            raise Broken(f"{self.run.uri}/{name} has no column {' and no '.join(sorted(map(str, missing)))}")
        return file.schema_arrow, self._batches(name, file)

    def _batches(self, name: str, file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
        try:
            with file:
                for group in range(file.num_row_groups):  # of several at once the file's bytes would all be held
                    for batch in file.iter_batches(BATCH, row_groups=[group]):
                        if self.only is not None:
                            batch = batch.filter(pc.equal(batch["steps"], self.only))
                        yield batch
        except (OSError, ValueError) as e:
            raise self._unreadable(name, e) from e

    def _unreadable(self, name: str, e: Exception) -> Exception:
        outage = isinstance(e, StoreError) and e.outage  # which the next shard would meet as well
        return (RunError if outage else Broken)(f"{self.run.uri}/{name} can't be read: {one_line(e)}")

    def _whole(self, batches: Iterable[pa.RecordBatch], broken: list[str]) -> Iterator[dict[str, Any]]:
        """The rows, with `image` the bytes of a PNG; those that have none go to `broken`, in words."""
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
    """The name of each picture's file, what is known of the picture, and its shard."""
    about = [f for f in schema if not _is_bytes(f.type) and f.name not in ("file_name", "shard")]
    return pa.schema([("file_name", pa.string()), *about, ("shard", pa.string())])


def _is_bytes(kind: pa.DataType) -> bool:
    nested = pa.types.is_struct(kind) and any(_is_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return nested or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _add(table: TableWriter, schema: pa.Schema, rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    while some := list(islice(rows, BATCH)):
        some = [{name: row[name] for name in schema.names} for row in some]  # without the image
        table.add(pa.Table.from_pylist(some, schema))
        count += len(some)
    return count


def _refuse(broken: Collection[str]) -> None:
    if broken:
        more = f", and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise Broken("; ".join(sorted(broken)[:NAMED]) + more)


def _json_value(value: Any) -> Any:
    """JSON has no infinity, which is the PSNR of what came back the same, and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def put_index(out: Folder, name: str) -> None:
    """Writes what is in the folder INDEX, shard by shard, as one Parquet file. Raises RunError."""
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
    """Removes what writers that were killed have left of pictures, in folders of any depth."""
    if out.is_local:
        for half in Path(out.path(IMAGES)).rglob(f"{TEMPORARY}*"):
            half.unlink(missing_ok=True)
