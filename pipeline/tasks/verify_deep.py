"""The check of `verify --deep`: decodes some latents and compares them with originals and stored errors."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from palindrome.pipeline.base.text import one_line
from palindrome.pipeline.images.metrics import round_trip_error, to_model
from palindrome.pipeline.images.read import read_image
from palindrome.pipeline.images.records import Reject, Shard
from palindrome.pipeline.images.sources import ONE_EACH, PARQUET, read_raw
from palindrome.pipeline.runs.encoded import EncodeRun, WrongModel
from palindrome.pipeline.runs.kinds import LATENTS
from palindrome.pipeline.runs.plan import read_plan
from palindrome.pipeline.runs.shards import open_checked
from palindrome.pipeline.runs.verify import Account, Finding
from palindrome.pipeline.runtime.device import Model
from palindrome.pipeline.storage.folder import Folder

# Tolerances relative to the stored error: another device or batch size rounds differently, which dominates tiny errors.
RELATIVE, ABSOLUTE = 1e-2, 1e-8


def verify_decoding(run: Folder, count: int, account: Account) -> Iterator[Finding]:
    """What is wrong with `count` latents of an encode run, spread evenly over the shards without findings. `verify` has
    filled `account`; the latents' round-trip errors are added to it."""
    if not account.rows_of_shard:
        return
    encoded = EncodeRun.open(run)
    uri = encoded.model
    try:
        _, loaded = encoded.load_model(None)
    except WrongModel as e:
        yield Finding("--deep", f"the model {uri} is not the run's: {e}")
        return
    except Exception as e:  # stores raise errors of many types
        yield Finding("--deep", f"the model {uri} can't be loaded: {one_line(e)}")
        return
    model, levels = Model(loaded, execution=encoded.execution), encoded.inversion.levels
    how, collection = encoded.preprocess, encoded.collection
    more = [of.column for of in (encoded.classes, encoded.texts) if of is not None and of.column is not None]
    for shard, positions in _spread(run, account.rows_of_shard, count):
        file = f"{LATENTS}/{shard.name}.parquet"
        for row in _rows(run, file, positions, more):
            image_id = row["image_id"]
            found = read_raw(collection, _only(shard, image_id))
            image = read_image(next(raw for raw in found if raw.image_id == image_id), how)
            if isinstance(image, Reject):
                yield Finding(file, f"{image_id}: its original can't be read again: {image.reason}: {image.detail}")
                continue
            if image.content_hash != row["content_hash"]:
                yield Finding(file, f"{image_id}: its original has changed: content_hash differs")
                continue
            x, latent = to_model(np.stack([image.pixels])), torch.from_numpy(np.stack([row["latent"]]))
            mse = float(round_trip_error(x, model.decode(latent, levels, model.condition([row])))[0])
            account.errors.append(mse)
            stored = row["mse"]
            if not math.isfinite(mse):
                yield Finding(file, f"{image_id}: the decoded image is not finite")
            elif stored is not None and not math.isclose(mse, stored, rel_tol=RELATIVE, abs_tol=ABSOLUTE):
                yield Finding(file, f"{image_id}: round-trip error {mse:.4g}, and {stored:.4g} is stored")


def _spread(run: Folder, of_shard: Mapping[str, int], count: int) -> Iterator[tuple[Shard, list[int]]]:
    """Shards, and the positions of the rows to decode in each."""
    total = sum(of_shard.values())
    if not total:
        return
    wanted = iter(sorted({(2 * i + 1) * total // (2 * count) for i in range(count)}))
    position, before = next(wanted, None), 0
    for shard in read_plan(run):
        in_shard, after = [], before + of_shard.get(shard.name, 0)
        while position is not None and position < after:
            in_shard.append(position - before)
            position = next(wanted, None)
        before = after
        if in_shard:
            yield shard, in_shard
        if position is None:
            return


def _rows(run: Folder, file: str, positions: list[int], more: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows at these positions, with `more` columns."""
    columns = list(dict.fromkeys(["image_id", "content_hash", "latent", "mse", *more]))
    first = 0
    with open_checked(run, file) as opened:
        for group in range(opened.metadata.num_row_groups):
            rows = opened.metadata.row_group(group).num_rows
            in_group = [position - first for position in positions if first <= position < first + rows]
            first += rows
            if in_group:
                table = opened.read_row_group(group, columns).take(in_group)
                latents = table["latent"].combine_chunks().to_numpy_ndarray().astype(np.float32)
                for row, latent in zip(table.drop_columns(["latent"]).to_pylist(), latents, strict=True):
                    yield {**row, "latent": latent}


def _only(shard: Shard, image_id: str) -> Shard:
    """A shard of only the piece with that image; of a Parquet file, only its row."""
    if shard.kind in ONE_EACH:
        return Shard.of(shard.kind, [piece for piece in shard.pieces if piece.name == image_id])
    name, _, number = image_id.rpartition("#")
    row = int(number)
    [piece] = [p for p in shard.pieces if p.name == name and p.start <= row < p.stop]
    return Shard.of(shard.kind, [replace(piece, start=row, stop=row + 1) if shard.kind == PARQUET else piece])
