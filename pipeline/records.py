"""What the files hold: shards of the plan, latents, rejects, errors. Arrow schemas and the objects they come from."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

METADATA_KEY = b"palindrome"  # in the schema's metadata: one JSON object that says what the rows are
SHARD_KEY = b"palindrome.shard"  # in the footer alone, since it is known last: counts and timings

REASONS = {
    "empty": "the file has no bytes",
    "null": "the row has no image",
    "missing": "the file was not there when it was to be read",
    "unreadable": "the file is there and could not be read",
    "not_an_image": "the bytes are no image of a known format",
    "truncated": "the image breaks off",
    "corrupt": "the image could not be decoded",
    "too_large": "the image has more pixels than --max-pixels",
    "no_latent": "the encode run has no latent of that image",
    "no_arc": "the latents are opposite, 0 or not finite",
}


@dataclass(frozen=True)
class Piece:
    """Images that stand together: one file, or rows `start` .. `stop` - 1 of a Parquet file or samples of a tar.

    `name` is the path below the collection's root, or the URI as a list has it: image ids are made from it. `size`
    (bytes) and `version` (mtime or ETag) tell whether the object is still the one that was listed. Of a tar, `length`
    bytes from `offset` hold the samples; 0 is all. `kept` is the columns of a list of URIs, as JSON.
    """

    uri: str
    name: str
    size: int
    version: str
    start: int = 0
    stop: int = 1
    offset: int = 0
    length: int = 0
    kept: str = ""


@dataclass(frozen=True)
class Shard:
    """A unit of work. `name` is derived from the content listed, not from the position in the plan."""

    name: str
    kind: str
    images: int
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, kind: str, pieces: Sequence[Piece]) -> "Shard":
        described = [(p.name, p.size, p.version, p.start, p.stop, *filter(None, [p.kept])) for p in pieces]
        digest = hashlib.sha256(json.dumps([kind, described]).encode()).hexdigest()[:24]
        return cls(digest, kind, sum(p.stop - p.start for p in pieces), tuple(pieces))


@dataclass(frozen=True)
class Reject:
    """An input that could not be used: one of `REASONS`, and words that are the same in every run."""

    image_id: str
    source: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Image:
    """A decoded image: `pixels` uint8 [H, W, C] after preprocessing, `width` and `height` (pixels) before it,
    `content_hash` the sha256 of the file's bytes, `kept` the columns that the user asked to keep."""

    image_id: str
    source: str
    width: int
    height: int
    content_hash: str
    kept: dict[str, Any]
    pixels: np.ndarray


SHARD_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("kind", pa.string()),
        ("images", pa.int64()),
        (
            "pieces",
            pa.list_(
                pa.struct(
                    [
                        ("uri", pa.string()),
                        ("name", pa.string()),
                        ("size", pa.int64()),
                        ("version", pa.string()),
                        ("start", pa.int64()),
                        ("stop", pa.int64()),
                        ("offset", pa.int64()),
                        ("length", pa.int64()),
                        ("kept", pa.string()),
                    ]
                )
            ),
        ),
    ]
)

REJECT_SCHEMA = pa.schema([(name, pa.string()) for name in ("image_id", "source", "reason", "detail")])

ERROR_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("source", pa.string()),
        ("steps", pa.int32()),
        ("status", pa.string()),  # compared, or why not: missing, changed, or a reject's reason
        ("mse", pa.float64()),
        ("psnr", pa.float64()),
        ("identical", pa.float64()),  # the share of 8-bit values that came back the same
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ]
)


def shards_table(shards: Iterable[Shard]) -> pa.Table:
    rows = [{**vars(shard), "pieces": [vars(piece) for piece in shard.pieces]} for shard in shards]  # asdict is slow
    return pa.Table.from_pylist(rows, SHARD_SCHEMA)


def shard_of(row: dict[str, Any]) -> Shard:
    return Shard(row["name"], row["kind"], row["images"], tuple(Piece(**p) for p in row["pieces"]))


def rejects_table(rejects: Iterable[Reject]) -> pa.Table:
    return pa.Table.from_pylist([asdict(reject) for reject in rejects], REJECT_SCHEMA)


DTYPES = {"float16": pa.float16(), "float32": pa.float32()}  # that latents are stored in
MEASURED = {
    "residual": pa.float32(),
    "nfe": pa.int32(),
    "mse": pa.float64(),
    "psnr": pa.float64(),
    "identical": pa.float64(),
}


def latent_schema(shape: Sequence[int], dtype: str, kept: Sequence[pa.Field] = ()) -> pa.Schema:
    """One row an image. `latent` is x at the ladder's top, [C, H, W] of float16 or float32, as Arrow's fixed-shape
    tensor. `residual` is that of model.inversion, null for the paper's inversion; `nfe` the network evaluations spent;
    `mse`, `psnr` and `identical`, the share of 8-bit values that come back the same, are null where not measured."""
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("content_hash", pa.string(), nullable=False),
            *kept,
            pa.field("latent", pa.fixed_shape_tensor(DTYPES[dtype], tuple(shape)), nullable=False),
            *MEASURED.items(),
        ]
    )


LATENT_COLUMNS = frozenset(latent_schema((1,), "float16").names)


def with_metadata(schema: pa.Schema, metadata: Mapping[str, Any]) -> pa.Schema:
    """The schema with one JSON object under the key `palindrome` in its metadata."""
    return schema.with_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True)})


def metadata_of(schema: pa.Schema) -> dict[str, Any]:
    """That object; {} where the file has none."""
    return dict(json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}")))
