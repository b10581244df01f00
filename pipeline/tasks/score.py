"""Images -> scores: one shard of a score run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from palindrome.model.condition import Condition
from palindrome.model.families import Checkpoint
from palindrome.model.inversion import evaluations
from palindrome.model.ladder import Ladder, logsnr_ladder
from palindrome.model.process import VP
from palindrome.model.scores import diffpath, dire, distance, gaussian, invad, secmi, secmi_levels, sectioned, spaced
from palindrome.model.watermarks import Keys
from palindrome.pipeline.images.metrics import finite, to_model
from palindrome.pipeline.images.pixels import picture
from palindrome.pipeline.images.records import Image, Reject, Shard, not_finite
from palindrome.pipeline.runs.kinds import SCORES
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runs.scores import Method, score_schema
from palindrome.pipeline.runs.shards import ShardWriter, parquet_options, tensor_array
from palindrome.pipeline.runs.watermarks import record
from palindrome.pipeline.runtime.device import Model, stopwatch
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.encode import split_by_condition

CORRECTIONS = 3  # a step of exact inversion, as `encode` makes them by default
ON_PATHS: Mapping[str, Callable[..., dict[str, Tensor]]] = {
    "diffpath": diffpath,
    "invad": invad,
    "secmi": secmi,
    "dire": dire,
}


@dataclass(frozen=True)
class Measure:
    """A method on the levels that it visits; `keys` are those of a watermark, which it looks for."""

    method: Method
    levels: Ladder
    keys: Keys | None = None

    @classmethod
    def of(cls, method: Method, model: Checkpoint, steps: int | None = None, keys: Keys | None = None) -> "Measure":
        """Raises ValueError, which begins with the method's name, where the model is none for it, or the steps."""
        try:
            if method.clipped and model.autoencoded:
                raise ValueError("it clips x0 to the range of pixels, which the states of an autoencoder do not have")
            if method.keyed and keys is None:
                raise ValueError("it looks for the keys of --keys, and is given none")
            return cls(method, _levels(method, model, steps), keys)
        except ValueError as e:
            raise ValueError(f"{method.name}: {e}") from e

    @property
    def evaluations(self) -> int:
        """Of the network, an image."""
        steps = len(self.levels) - self.method.from_clean_end
        if self.method.name == "dire-exact":
            return evaluations(steps, CORRECTIONS) + steps
        return 2 * steps if self.method.name == "dire" else steps

    def record(self) -> dict[str, Any]:
        """What run.json has of the method under `methods`."""
        about = {"path": self.method.path, "follows": self.method.follows, "clipped": self.method.clipped}
        if self.keys is not None:
            about["keys"] = record(self.keys)
        return {"levels": list(self.levels), "evaluations": self.evaluations, **about}

    def __call__(self, model: Model, x: Tensor, condition: Condition | None) -> dict[str, Tensor]:
        """Images [B, C, H, W] in [-1, 1] -> the columns of the method, by their names in the table, and in addition
        `map` [B, C, H, W], in [0, 1], and `latent`, if it has them."""
        if self.method.from_clean_end:
            corrections = CORRECTIONS if self.method.name == "dire-exact" else 0
            latent, *_ = model.encode(x, self.levels, corrections, condition=condition)
            if self.keys is not None:
                found = self.keys.find(latent)
            elif corrections:
                found = distance(model.attainable(x), model.decode(latent, self.levels, condition))
            else:
                found = gaussian(latent)
            found |= {"latent": latent}
        else:
            found = model.measure(ON_PATHS[self.method.name], x, self.levels, condition)
        return {f"{self.method.prefix}{name}": values for name, values in found.items()}


def _levels(method: Method, model: Checkpoint, steps: int | None) -> Ladder:
    process, count = model.process, steps or method.steps
    if method.name == "secmi":
        if steps is not None:
            raise ValueError("it has steps of its own")
        if not isinstance(process, VP):
            raise ValueError("its timesteps are those of a variance-preserving process, and the model has another")
        return secmi_levels(process.num_train_timesteps)
    if method.from_clean_end:
        return logsnr_ladder(process, count)
    return (sectioned if method.name == "invad" else spaced)(count, process.num_train_timesteps)


@dataclass(frozen=True)
class Score:
    """Images -> `scores/<shard>.parquet`. Committed shards are overwritten only with `again`. `maps` and `latents` say
    whether those are stored."""

    run: Folder
    reader: Reader
    measures: tuple[Measure, ...]
    maps: bool
    latents: bool
    metadata: Mapping[str, Any]
    again: bool = False

    def process(self, model: Model, shard: Shard) -> Receipt:
        spent = stopwatch(model)
        shape = model.checkpoint.latent_shape if self.latents else None
        methods = [measure.method for measure in self.measures]
        schema = score_schema(methods, shape, self.maps, self.reader.collection.kept)
        how = parquet_options(schema)
        with ShardWriter(self.run, SCORES, shard.name, schema, self.metadata, once=not self.again, **how) as out:
            cut = 0
            for batch in self.reader.batches(shard):
                images, rejects = split_by_condition(model, batch.images)
                found: dict[str, Tensor] = {}
                if images:
                    x = to_model(np.stack([image.pixels for image in images]))
                    kept = [image.kept for image in images]
                    condition, cut = model.condition(kept), cut + model.prompts_cut(kept)
                    for measure in self.measures:
                        found |= measure(model, x, condition)
                    images, found, refused = _without_not_finite(images, found, self.measures)
                    rejects += refused
                out.add(_rows(schema, images, found, self._keys) if images else None, [*batch.rejects, *rejects])
                model.advance(len(batch.images))
            seconds = spent()
            counts = {"images": out.rows + out.refused, "scored": out.rows, "rejects": out.refused}
            written = out.commit(seconds, {**counts, **({"prompts_cut": cut} if cut else {})})
            return Receipt(shard.name, out.rows, out.refused, **seconds, bytes=written)

    @property
    def _keys(self) -> dict[str, tuple[str, ...]]:
        """The names of the keys whose numbers a column of the methods has."""
        keyed = [(measure.method, measure.keys) for measure in self.measures if measure.keys is not None]
        return {f"{method.prefix}{column}": keys.names for method, keys in keyed for column in method.texts}


def _without_not_finite(
    images: Sequence[Image], found: Mapping[str, Tensor], measures: Sequence[Measure]
) -> tuple[list[Image], dict[str, Tensor], list[Reject]]:
    """Without the images one of whose scores is not finite, which are rejects that name the first such method."""
    bad: dict[int, str] = {}
    for method in (measure.method for measure in measures):
        values = torch.stack([found[f"{method.prefix}{column}"] for column in method.columns], 1)
        for row in np.flatnonzero(~finite(values)).tolist():
            bad.setdefault(row, f"{method.name}: the score is no number, or is infinite")
    if not bad:
        return list(images), dict(found), []
    good = np.array([row not in bad for row in range(len(images))])
    rejects = [not_finite(images[row], why) for row, why in sorted(bad.items())]
    return list(compress(images, good)), {name: values[good] for name, values in found.items()}, rejects


def _rows(
    schema: pa.Schema, images: Sequence[Image], found: Mapping[str, Tensor], names: Mapping[str, Sequence[str]]
) -> pa.Table:
    def column(field: pa.Field) -> pa.Array:
        if isinstance(field.type, pa.FixedShapeTensorType) and field.name in found:
            return tensor_array(field.type, found[field.name].float().numpy())
        if field.name in found and pa.types.is_struct(field.type):
            # As DIRE's code rounds it: downwards.
            pixels = (found[field.name] * 255).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
            return pa.array([picture(i.image_id, p) for i, p in zip(images, pixels, strict=True)], field.type)
        if field.name in names:
            return pa.array([names[field.name][number] for number in found[field.name].tolist()], field.type)
        if field.name in found:
            return pa.array(list(found[field.name].numpy()), field.type)
        values = [i.kept[field.name] if field.name in i.kept else getattr(i, field.name) for i in images]
        return pa.array(values, field.type)

    return pa.table([column(field) for field in schema], schema=schema)
