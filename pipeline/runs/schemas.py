"""The Arrow schemas of a run folder's files, and conversion between rows and objects."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from palindrome.pipeline.images.records import Piece, Reject, Shard

METADATA_KEY = b"palindrome"  # in the schema's metadata: a JSON object that describes the rows
SHARD_KEY = b"palindrome.shard"  # only in the footer, as it is known last: counts and timings
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
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # a file, and a name for it
IMAGE_FIELDS = (
    pa.field("image_id", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("content_hash", pa.string(), nullable=False),
)
"""What rows made of an image say of it."""
REJECT_SCHEMA = pa.schema([(name, pa.string()) for name in ("image_id", "source", "reason", "detail")])
ERROR_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("source", pa.string()),
        ("steps", pa.int32()),
        ("status", pa.string()),  # compared, or why not: missing, changed, or a reject's reason
        ("mse", pa.float64()),
        ("psnr", pa.float64()),
        ("identical", pa.float64()),  # the fraction of identical 8-bit values
        ("image", PICTURE),
    ]
)


def shards_table(shards: Iterable[Shard]) -> pa.Table:
    rows = [{**vars(shard), "pieces": [vars(piece) for piece in shard.pieces]} for shard in shards]  # asdict is slow
    return pa.Table.from_pylist(rows, SHARD_SCHEMA)


def shard_of(row: dict[str, Any]) -> Shard:
    return Shard(row["name"], row["kind"], row["images"], tuple(Piece(**p) for p in row["pieces"]))


def rejects_table(rejects: Iterable[Reject]) -> pa.Table:
    return pa.Table.from_pylist([asdict(reject) for reject in rejects], REJECT_SCHEMA)


DTYPES = {"float16": pa.float16(), "float32": pa.float32()}  # of stored latents
MEASURED = {
    "residual": pa.float32(),
    "nfe": pa.int32(),
    "mse": pa.float64(),
    "psnr": pa.float64(),
    "identical": pa.float64(),
}


APART = {
    "latent_mse": pa.float64(),  # of the decoded state, against that of the image
    "vae_mse": pa.float64(),  # of the autoencoder's own round trip, against the image: no inversion has less
    "mse_from_vae": pa.float64(),  # of the decoded image, against that round trip
}
"""The errors of latent diffusion, apart. `mse` is all of them together, against the image, and `identical` against the
autoencoder's round trip. The first is of states; the others are of pixels in [0, 1]."""


def latent_schema(
    shape: Sequence[int],
    dtype: str,
    kept: Sequence[pa.Field] = (),
    autoencoded: bool = False,
    states: bool = False,
) -> pa.Schema:
    """One row per image. `latent` is x at the ladder's top level, an Arrow fixed-shape tensor [C, H, W] of float16 or
    float32. `residual` is that of model.inversion, null for the paper's inversion; `nfe` is the number of network
    evaluations. `mse`, `psnr` and `identical`, the fraction of identical 8-bit values, are null if not measured, and so
    are the columns of APART, which only `autoencoded` latents have. With `states`, `vae_latent` is the state x0 that
    the autoencoder makes."""
    tensor = pa.fixed_shape_tensor(DTYPES[dtype], tuple(shape))
    return pa.schema(
        [
            *IMAGE_FIELDS,
            *kept,
            pa.field("latent", tensor, nullable=False),
            *([pa.field("vae_latent", tensor, nullable=False)] if states else []),
            *MEASURED.items(),
            *(APART.items() if autoencoded else ()),
        ]
    )


def error_schema(autoencoded: bool = False) -> pa.Schema:
    """ERROR_SCHEMA; of latent diffusion with the columns of APART, and the image that the autoencoder makes of the
    original."""
    if not autoencoded:
        return ERROR_SCHEMA
    return pa.schema([*ERROR_SCHEMA, *APART.items(), ERROR_SCHEMA.field("image").with_name("vae_image")])


LATENT_COLUMNS = frozenset(latent_schema((1,), "float16").names)


def with_metadata(schema: pa.Schema, metadata: Mapping[str, Any]) -> pa.Schema:
    """The schema with one JSON object under the key `palindrome` in its metadata."""
    return schema.with_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True)})


def metadata_of(schema: pa.Schema) -> dict[str, Any]:
    """The object that `with_metadata` stored; {} if there is none."""
    return dict(json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}")))


def sample_schema(shape: tuple[int, ...], dtype: str | None, watermarked: bool = False) -> pa.Schema:
    """One row per sample: `image_id` is its index with at least nine digits, `latent` is x_T [C, H, W] if `dtype`,
    `watermark` the name of the key in it, if any."""
    latent = [("latent", pa.fixed_shape_tensor(DTYPES[dtype], shape))] if dtype else []
    key = [("watermark", pa.string())] if watermarked else []
    return pa.schema([("image_id", pa.string()), ("index", pa.int64()), *key, ("image", PICTURE), *latent])


REGENERATED_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("source", pa.string()),
        ("steps", pa.int32()),
        ("variation", pa.int32()),
        ("to_longest", pa.float64()),  # mean squared error to the image with the most steps, pixels in [0, 1]
        ("image", PICTURE),
    ]
)

RESTORED_SCHEMA = pa.schema(
    [
        *IMAGE_FIELDS,
        ("variation", pa.int32()),
        ("mask_hash", pa.string()),  # of images.masks.mask_hash, null without a mask
        ("observation_error", pa.float64()),  # the largest |A x - y| of the result, pixels in [0, 1]
        ("picture_error", pa.float64()),  # the same of `image`, which is clipped and rounded to 8 bits
        ("mse", pa.float64()),  # of `image` to the original, null where that is not known, as the next five
        ("psnr", pa.float64()),
        ("ssim", pa.float64()),  # null without --ssim
        ("baseline_mse", pa.float64()),  # of the observation alone: of A⁺ y, clipped and rounded
        ("baseline_psnr", pa.float64()),
        ("baseline_ssim", pa.float64()),
        ("image", PICTURE),
    ]
)


def restored_schema(kept: Sequence[pa.Field]) -> pa.Schema:
    """RESTORED_SCHEMA with the columns kept of the collection after those of the file."""
    fields = list(RESTORED_SCHEMA)
    return pa.schema([*fields[: len(IMAGE_FIELDS)], *kept, *fields[len(IMAGE_FIELDS) :]])


EDITED_SCHEMA = pa.schema(
    [
        *IMAGE_FIELDS,
        ("strength", pa.float64()),  # 1 where nothing is moved
        ("status", pa.string()),  # compared, or why not: missing, changed, or a reject's reason
        ("mask_hash", pa.string()),  # of images.masks.mask_hash, null without a mask
        ("own_mse", pa.float64()),  # of the image's own reconstruction to the original, neither clipped nor rounded
        ("change", pa.float64()),  # mean squared difference of `image` to the original, where it may change
        ("changed_outside", pa.int64()),  # values of `image` that are not the original's, where it is to stay
        ("values_outside", pa.int64()),  # of so many; both are null without a mask
        ("image", PICTURE),
        ("own", PICTURE),  # the image's own reconstruction, in the row of the first strength alone
    ]
)
"""Without an original that can be compared with, `own_mse`, `change` and `changed_outside` are null. Pixels are in
[0, 1], and values those in 8 bits of each channel."""

FRAME_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),  # path/frame
        ("path", pa.string()),
        ("frame", pa.int64()),
        ("ids", pa.list_(pa.string())),  # of the images that it lies between
        ("t", pa.float64()),  # 0 at the first of them, 1 at the second; in a grid, from left to right
        ("down", pa.float64()),  # in a grid, 0 in the upper row, 1 in the lower; else null
        ("rms_slerp", pa.float64()),  # root mean square of the latent's values, for each method
        ("rms_linear", pa.float64()),
        ("image", PICTURE),
    ]
)

EVALUATED_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),  # real/… or generated/…
        pa.field("source", pa.string(), nullable=False),
        ("picture", pa.string()),  # the image_id in the run that it is from, null if from none
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),
        ("entropy", pa.float64()),  # of p(y|x), in nats, null without classes
    ]
)


def evaluated_schema(dimensions: int | None) -> pa.Schema:
    """EVALUATED_SCHEMA; with a number of dimensions, the features are a further column."""
    if dimensions is None:
        return EVALUATED_SCHEMA
    features = pa.field("features", pa.fixed_shape_tensor(pa.float32(), (dimensions,)), nullable=False)
    return pa.schema([*EVALUATED_SCHEMA, features])


SWEEP_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("source", pa.string()),
        ("mse", pa.float64()),  # of the round trip of the latent as stored, pixels in [0, 1]
        ("psnr", pa.float64()),
        ("identical", pa.float64()),  # the fraction of identical 8-bit values
        ("residual", pa.float32()),  # of model.inversion, NaN for the paper's inversion
        ("nfe", pa.int32()),  # network evaluations to encode the image
        ("mean", pa.float64()),  # of the latent's values, like the next three
        ("std", pa.float64()),
        ("kurtosis", pa.float64()),
        ("correlation", pa.float64()),
        ("noise_mse", pa.float64()),  # of x_T -> image -> x_T, null without --recover-noise
    ]
)
