"""Images -> latents: one shard of an encode run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palindrome.model.condition import Condition
from palindrome.model.ladder import Ladder
from palindrome.pipeline.images.metrics import errors_apart, finite, psnr, round_trip_error, to_model, to_pixels
from palindrome.pipeline.images.records import Image, Reject, Shard, not_finite
from palindrome.pipeline.runs.inversion import Inversion
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runs.schemas import latent_schema
from palindrome.pipeline.runs.shards import latent_rows, latent_writer
from palindrome.pipeline.runtime.device import Model, stopwatch
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.storage.folder import Folder

STRICTER = (1e-4, 1e-6)  # tolerances of the further tries of an image that is to come back to the bit
MOST_CORRECTIONS = 50  # a step, in those


@dataclass(frozen=True)
class Encode:
    """Images -> `latents/<shard>.parquet`, with the round trip's errors where they are to be `measured`. Committed
    shards are overwritten only with `again`."""

    run: Folder
    reader: Reader
    inversion: Inversion
    measured: bool
    metadata: Mapping[str, Any]
    again: bool = False
    states: bool = False
    """Whether the states that an autoencoder makes are stored too."""

    def process(self, model: Model, shard: Shard) -> Receipt:
        spent = stopwatch(model)
        shape, columns = model.checkpoint.latent_shape, self.reader.collection.kept
        schema = latent_schema(shape, self.inversion.dtype, columns, model.checkpoint.autoencoded, self.states)
        with latent_writer(self.run, shard.name, schema, self.metadata, once=not self.again) as out:
            cut = 0
            for batch in self.reader.batches(shard):
                images, refused = split_by_condition(model, batch.images)
                rows, rejects = None, [*batch.rejects, *refused]
                if images:
                    x = to_model(np.stack([image.pixels for image in images]))
                    kept = [image.kept for image in images]
                    condition, cut = model.condition(kept), cut + model.prompts_cut(kept)
                    latents, found = latents_of(model, x, self.inversion, self.measured, condition)
                    if self.states:
                        found["vae_latent"] = model.autoencode(x)[0].to(latents.dtype).numpy()
                    good = finite(latents)
                    if not good.all():  # to pick rows copies them
                        rejects += [not_finite(image) for image in compress(images, ~good)]
                        images = list(compress(images, good))
                        latents, found = latents[good], {name: values[good] for name, values in found.items()}
                    rows = latent_rows(schema, images, latents.numpy(), found)
                out.add(rows, rejects)
                model.advance(len(batch.images))
            seconds = spent()
            written = out.commit(seconds, {**out.counts, **({"prompts_cut": cut} if cut else {})})
            return Receipt(shard.name, out.rows, out.refused, **seconds, bytes=written)


def split_by_condition(model: Model, images: Sequence[Image]) -> tuple[list[Image], list[Reject]]:
    """The images that the network can be told of, and rejects of the others."""
    why = [model.checkpoint.refusal(image.kept) for image in images]
    refused = [Reject(i.image_id, i.source, model.checkpoint.REFUSED, w) for i, w in zip(images, why, strict=True) if w]
    return [image for image, w in zip(images, why, strict=True) if not w], refused


def latents_of(
    model: Model, x: Tensor, how: Inversion, measured: bool = False, condition: Condition | None = None
) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Images in [-1, 1] -> their latents as stored, and the columns of schemas.MEASURED that are known."""
    stored = getattr(torch, how.dtype)
    latents, residual, nfe = model.encode(x, how.levels, how.corrections, how.tolerance, condition)
    latents = latents.to(stored)
    found = {"residual": residual.numpy(), "nfe": nfe.numpy()}
    if not (measured or how.exact):
        return latents, found
    found |= measured_of(model, x, latents, how.levels, condition)
    exactness = "latent_mse" if model.checkpoint.autoencoded else "mse"
    for stricter in STRICTER if how.exact else ():
        left = np.flatnonzero(found["identical"] < 1)
        if not len(left):
            break
        of_left = None if condition is None else condition[torch.from_numpy(left)]
        again, residual, nfe = model.encode(x[left], how.levels, MOST_CORRECTIONS, stricter, of_left)
        again = again.to(stored)
        tried = measured_of(model, x[left], again, how.levels, of_left)
        found["nfe"][left] += nfe.numpy()
        better = tried[exactness] < found[exactness][left]
        latents[left[better]] = again[better]
        for name, values in {"residual": residual.numpy(), **tried}.items():
            found[name][left[better]] = values[better]
    return latents, found


def measured_of(
    model: Model, x: Tensor, latents: Tensor, levels: Ladder, condition: Condition | None
) -> dict[str, np.ndarray]:
    """`measure` of images [B, C, H, W] in [-1, 1] and their latents as stored, which are decoded; and the columns of
    schemas.APART where the model has an autoencoder."""
    state, decoded = model.decode_both(latents.float(), levels, condition)
    if not model.checkpoint.autoencoded:
        return measure(x, decoded)
    own = model.autoencode(x)
    return {**measure(x, decoded, own[1]), **errors_apart(x, decoded, state, own)}


def measure(x: Tensor, decoded: Tensor, wanted: Tensor | None = None) -> dict[str, np.ndarray]:
    """mse, psnr (dB) and the share of 8-bit values identical to those `wanted`, [B] each, of images [B, C, H, W] in
    [-1, 1]; by default x are wanted."""
    mse = round_trip_error(x, decoded)
    same = (to_pixels(x if wanted is None else wanted) == to_pixels(decoded)).reshape(len(x), -1).mean(1)
    return {"mse": mse, "psnr": np.array([psnr(e) for e in mse]), "identical": np.where(np.isfinite(mse), same, 0.0)}
