"""What every kind of collection shares: how one is described, and what is read of it."""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from palindrome.pipeline.storage.folder import Options, current_options

FILES, PARQUET, ARROW, WEBDATASET, LIST = "files", "parquet", "arrow", "webdataset", "list"
FORMATS = (FILES, PARQUET, ARROW, WEBDATASET, LIST)
ONE_EACH = (FILES, LIST)  # whose pieces are one image; those of the others are rows
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif", ".ppm", ".pgm")
PARQUETS = (".parquet", ".pq")
ARROWS = (".arrow", ".feather", ".ipc")
TABLES = (*PARQUETS, *ARROWS)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zstd", ".lz4")
TARS = (".tar", *(f".tar{ending}" for ending in COMPRESSED), ".tgz", ".tbz", ".tbz2", ".txz", ".tzst")
CSV, JSON, LINES = (".csv", ".tsv"), (".jsonl", ".ndjson"), (".txt",)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # what describes the pictures beside it
LISTS = tuple(f"{ending}{packed}" for ending in (*CSV, *JSON, *LINES) for packed in ("", *COMPRESSED))


@dataclass(frozen=True)
class Collection:
    """Where the images are and what is read of them. Made by `open_collection`."""

    uri: str
    kind: str
    image_column: str | None = None
    kept: tuple[pa.Field, ...] = ()
    extensions: tuple[str, ...] = ()
    storage_options: Options = field(default_factory=current_options, repr=False)
    recognised: bool = False
    """Whether `kind` is what the first names looked like, and was not said."""

    def record(self) -> dict[str, Any]:
        """For run.json; `Collection(**record)` reads the same images, without columns besides."""
        return {"uri": self.uri, "kind": self.kind, "image_column": self.image_column}


@dataclass(frozen=True)
class RawImage:
    """One input before decoding: its bytes, or None with the reason why there are none."""

    image_id: str
    source: str
    data: bytes | None
    kept: dict[str, Any]
    reason: str = ""
    detail: str = ""
