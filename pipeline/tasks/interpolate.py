"""Stored latents -> the images between them: `images/<shard>.parquet`, one row per frame."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from palindrome.model.interpolate import lerp, slerp
from palindrome.model.ladder import Ladder
from palindrome.pipeline.images.metrics import check_finite, to_pixels
from palindrome.pipeline.images.pixels import png
from palindrome.pipeline.images.records import REASONS, Piece, Reject, Shard
from palindrome.pipeline.runs.kinds import IMAGES
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runs.plan import frame_id
from palindrome.pipeline.runs.schemas import FRAME_SCHEMA
from palindrome.pipeline.runs.selection import Selection
from palindrome.pipeline.runs.shards import ShardWriter, check_made, read_latents
from palindrome.pipeline.runtime.device import Model, stopwatch
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.paths import At, Leg, by_shard

METHODS = {"slerp": slerp, "linear": lerp}


@dataclass(frozen=True)
class Interpolate:
    """Decodes `frames` frames per leg, both ends included, interpolated by one of METHODS."""

    run: Folder
    latents: Folder
    method: str
    frames: int
    levels: Ladder
    batch_size: int
    metadata: Mapping[str, Any]

    def process(self, model: Model, shard: Shard) -> Receipt:
        spent = stopwatch(model)
        legs = [(piece, Leg.of(piece)) for piece in shard.pieces]
        found = self._read(model, [leg for _, leg in legs])
        with ShardWriter(self.run, IMAGES, shard.name, FRAME_SCHEMA, self.metadata, once=True) as out:
            left = self._frames(out, legs, found)
            while frames := list(islice(left, self.batch_size)):
                condition = model.condition_of_all(len(frames))
                images = model.decode(torch.stack([x for _, x in frames]), self.levels, condition)
                check_finite(images, [row["image_id"] for row, _ in frames])
                rows = [
                    {**row, "image": {"bytes": png(pixels), "path": None}}
                    for (row, _), pixels in zip(frames, to_pixels(images), strict=True)
                ]
                out.add(pa.Table.from_pylist(rows, FRAME_SCHEMA))
                model.advance(len(rows))
            seconds = spent()
            written = out.commit(seconds, {"images": out.rows, "rejects": out.refused})
            return Receipt(shard.name, out.rows, out.refused, **seconds, bytes=written)

    def _read(self, model: Model, legs: Iterable[Leg]) -> dict[str, Tensor]:
        """Latents [C, H, W] by image id."""
        found: dict[str, Tensor] = {}
        images = (At(image_id, shard) for leg in legs for image_id, shard in zip(leg.ids, leg.shards, strict=True))
        for shard, ids in by_shard(images).items():
            check_made(self.latents, shard)
            for rows, latents in read_latents(self.latents, shard, self.batch_size, Selection(ids)):
                found |= {row["image_id"]: x for row, x in zip(rows, torch.from_numpy(latents), strict=True)}
        return found

    def _frames(
        self, out: ShardWriter, legs: Iterable[tuple[Piece, Leg]], found: Mapping[str, Tensor]
    ) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Rows of FRAME_SCHEMA without their images, and latents [C, H, W]. Legs without a latent, or whose latents
        have no unique arc, are rejected."""
        for piece, leg in legs:
            name = frame_id(piece.name, piece.start)
            if missing := [image_id for image_id in leg.ids if image_id not in found]:
                out.add(None, [Reject(name, " ".join(leg.ids), "no_latent", ", ".join(missing))])
                continue
            t = torch.arange(piece.stop - piece.start, dtype=torch.float64) / (self.frames - 1)
            try:
                by_method = {method: between(method, [found[i] for i in leg.ids], t, leg) for method in METHODS}
            except ValueError:
                out.add(None, [Reject(name, " ".join(leg.ids), "no_arc", REASONS["no_arc"])])
                continue
            rms = {f"rms_{method}": _rms(x) for method, x in by_method.items()}
            for i, x in enumerate(by_method[self.method]):
                frame = piece.start + i
                row = {"image_id": frame_id(piece.name, frame), "path": piece.name, "frame": frame}
                down = leg.row / (leg.rows - 1) if leg.rows else None
                row |= {"ids": leg.ids, "t": t[i].item(), "down": down}
                yield {**row, **{column: values[i].item() for column, values in rms.items()}}, x


def between(method: str, corners: list[Tensor], t: Tensor, leg: Leg) -> Tensor:
    """Latents [F, C, H, W] at t [F] on a leg between the latents `corners`, [C, H, W] each. In a grid, the ends of the
    row are interpolated first, each between two corners. Raises ValueError as model.interpolate does."""
    interpolate = METHODS[method]
    ends = torch.stack(corners)
    if leg.rows:
        ends = interpolate(ends[:2], ends[2:], torch.full((2,), leg.row / (leg.rows - 1), dtype=torch.float64))
    a, b = (end.expand(len(t), *end.shape) for end in ends)
    return interpolate(a, b, t)


def _rms(x: Tensor) -> Tensor:
    return x.double().flatten(1).square().mean(1).sqrt()


def paths_of(run: Folder, shards: Iterable[str]) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
    """The rows of a run, grouped by path; `shards` must be in the plan's order."""

    def rows() -> Iterator[dict[str, Any]]:
        for shard in shards:
            with run.parquet_file(f"{IMAGES}/{shard}.parquet") as file:
                for batch in file.iter_batches(64):
                    yield from batch.to_pylist()

    return groupby(rows(), lambda row: str(row["path"]))
