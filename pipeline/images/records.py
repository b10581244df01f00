"""What the files hold: shards of the plan, latents, rejects, errors. Arrow schemas and the objects they come from."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

REASONS = {
    "empty": "the file has no bytes",
    "null": "the row has no image",
    "missing": "the file was not there when it was to be read",
    "changed": "the file is another than when it was encoded",
    "unreadable": "the file is there and could not be read",
    "not_an_image": "the bytes are no image of a known format",
    "truncated": "the image breaks off",
    "corrupt": "the image could not be decoded",
    "too_large": "the image has more pixels than --max-pixels",
    "not_finite": "what was computed of the image has values that are no numbers, or are infinite",
    "no_class": "the image has no class, or one that the model does not know",
    "no_prompt": "the image has no prompt, or one that is no text",
    "no_mask": "the image has no mask, or one that is no picture",
    "mask_size": "the mask is of another size than the image",
    "all_known": "the mask leaves no pixel to be filled in",
    "none_known": "the mask leaves no pixel known",
    "wrong_size": "the image is of another size than is needed, and is not to be resized",
    "no_latent": "the encode run has no latent of that image",
    "no_arc": "the latents are opposite, 0 or not finite",
}


@dataclass(frozen=True)
class Piece:
    """Images that stand together: one file, or rows `start` .. `stop` - 1 of a Parquet file or samples of a tar.

    `name` is the path below the collection's root, or the URI as a list has it: image ids are made from it. `size`
    (bytes) and `version` (mtime or ETag) tell whether the object is still the one that was listed. Of a tar, `length`
    bytes from `offset` hold the samples; 0 is all. Of an Arrow file, the batch of rows at `offset` (its number, in a
    stream its first byte) has `length` rows before the piece. `kept` is the columns of a list of URIs, as JSON.
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
    `content_hash` the sha256 of the file's bytes, `kept` the columns that the user asked to keep; `container` and
    `jpeg_quality` as images.container says them, where they were asked for."""

    image_id: str
    source: str
    width: int
    height: int
    content_hash: str
    kept: dict[str, Any]
    pixels: np.ndarray
    container: str | None = None
    jpeg_quality: int | None = None


def not_finite(image: Image, detail: str = REASONS["not_finite"]) -> Reject:
    return Reject(image.image_id, image.source, "not_finite", detail)


def pack(pieces: Iterable[Piece], shard_size: int, limit: int | None = None) -> Iterator[tuple[Piece, ...]]:
    """Consecutive pieces, as many to a group as stay within shard_size images; only the first `limit` images."""
    group: list[Piece] = []
    count, left = 0, limit
    for piece in pieces:
        if left is not None:
            piece = replace(piece, stop=min(piece.stop, piece.start + left))
            left -= piece.stop - piece.start
        size = piece.stop - piece.start
        if group and count + size > shard_size:
            yield tuple(group)
            group, count = [], 0
        if size:
            group.append(piece)
            count += size
        if left == 0:
            break
    if group:
        yield tuple(group)
