"""A sweep: the round trip of every image with each of several settings, one file per shard and setting."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow.parquet import ParquetFile
from torch import Tensor

from palindrome.model.condition import Condition
from palindrome.model.ddim import noise_index, sample_noise
from palindrome.pipeline.images.metrics import moments, state_error, to_model
from palindrome.pipeline.images.records import Image, Shard
from palindrome.pipeline.runs.inversion import Inversion
from palindrome.pipeline.runs.kinds import SWEPT, setting_name
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runs.schemas import SWEEP_SCHEMA
from palindrome.pipeline.runs.shards import ShardWriter, shard_metadata
from palindrome.pipeline.runs.summary import column
from palindrome.pipeline.runs.tallies import Committed, Tally, committed_shards, tables, tally
from palindrome.pipeline.runtime.device import Model, stopwatch
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.encode import measure, split_by_condition

AVERAGED = ("identical", "nfe", "mean", "std", "kurtosis", "correlation", "noise_mse")  # columns of SWEEP_SCHEMA
# The DDIM paper's Table 2: reconstruction error by steps.
TABLE_2 = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}


@dataclass(frozen=True)
class Setting:
    """The inversion of one setting; `ladder` is its name in tables and plots."""

    ladder: str
    how: Inversion

    @property
    def most_nfe(self) -> int:
        """Network evaluations per image, encoding and decoding together, if no tolerance saves some."""
        return self.how.nfe_up + self.how.steps

    @property
    def name(self) -> str:
        return setting_name(self.how.levels, self.how.corrections, self.how.tolerance, self.how.dtype)

    def record(self) -> dict[str, Any]:
        """The key `setting` of its files' metadata."""
        return {"ladder": self.ladder, **{k: v for k, v in asdict(self.how).items() if k != "exact"}}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Setting":
        levels = tuple(record["levels"])
        return cls(
            record["ladder"], Inversion(levels, record["corrections"], record["tolerance"], dtype=record["dtype"])
        )


def units(shards: Iterable[Shard], setting: Setting) -> Iterator[Shard]:
    """The shards as units of work of one setting, each named after shard and setting."""
    for shard in shards:
        yield replace(shard, name=f"{shard.name}-{setting.name}")


@dataclass(frozen=True)
class Sweep:
    """Images -> `sweep/<shard>-<setting>.parquet`: their round trips, and with a noise seed those of noise too."""

    run: Folder
    reader: Reader
    settings: Mapping[str, Setting]
    noise_seed: int | None
    metadata: Mapping[str, Any]

    def process(self, model: Model, shard: Shard) -> Receipt:
        spent = stopwatch(model)
        setting = self.settings[shard.name.partition("-")[2]]
        metadata = {**self.metadata, "setting": setting.record()}
        round_trip = 0.0
        with ShardWriter(self.run, SWEPT, shard.name, SWEEP_SCHEMA, metadata, once=True) as out:
            for batch in self.reader.batches(shard):
                images, refused = split_by_condition(model, batch.images)
                rows = None
                if images:
                    x = to_model(np.stack([image.pixels for image in images]))
                    before = model.clock.seconds
                    found = _round_trip(model, x, setting.how, _condition(model, images))
                    round_trip += model.clock.seconds - before
                    rows = self._rows(model, images, found, setting)
                out.add(rows, [*batch.rejects, *refused])
                model.advance(len(batch.images))
            seconds = spent()
            written = out.commit({**seconds, "round_trip_seconds": round(round_trip, 3)})
            return Receipt(shard.name, out.rows, out.refused, **seconds, bytes=written)

    def _rows(self, model: Model, images: Sequence[Image], found: dict[str, Any], setting: Setting) -> pa.Table:
        """Rows of SWEEP_SCHEMA, with the round trip of noise."""
        found["image_id"] = [image.image_id for image in images]
        found["source"] = [image.source for image in images]
        if self.noise_seed is None:
            found["noise_mse"] = pa.nulls(len(images), pa.float64())
        else:
            shape = model.checkpoint.latent_shape
            noise = torch.cat([sample_noise(self.noise_seed, noise_index(i), shape) for i in found["image_id"]])
            found["noise_mse"] = _noise_error(model, noise, setting.how, _condition(model, images))
        return pa.table([pa.array(found[f.name], f.type) for f in SWEEP_SCHEMA], schema=SWEEP_SCHEMA)


def _condition(model: Model, images: Sequence[Image]) -> Condition | None:
    return model.condition([image.kept for image in images])


def _round_trip(model: Model, x: Tensor, how: Inversion, condition: Condition | None) -> dict[str, Any]:
    """Columns of SWEEP_SCHEMA for the round trip of images [B, C, H, W] in [-1, 1]; the errors are against what an
    autoencoder makes of them, which no setting can better."""
    latents, residual, nfe = model.encode(x, how.levels, how.corrections, how.tolerance, condition)
    stored = latents.to(getattr(torch, how.dtype)).float()
    found = measure(model.attainable(x), model.decode(stored, how.levels, condition))
    return {**found, **moments(stored), "residual": residual.numpy(), "nfe": nfe.numpy()}


def _noise_error(model: Model, noise: Tensor, how: Inversion, condition: Condition | None) -> np.ndarray:
    """Mean squared error [B] of x_T [B, C, H, W] after decoding it to an image, without rounding, and encoding that."""
    images = model.decode(noise, how.levels, condition)
    found, *_ = model.encode(images, how.levels, how.corrections, how.tolerance, condition)
    return state_error(noise, found)


def read_sweep(run: Folder) -> list[dict[str, Any]]:
    """A row for each setting in the folder, sorted by ladder and NFE: its parameters, the number of images, and
    statistics over them. Values that are not finite are None."""
    done: dict[str, list[Committed]] = defaultdict(list)
    for unit in committed_shards(run, SWEPT):
        done[unit.name.partition("-")[2]].append(unit)
    rows = [_row(run, name, units) for name, units in done.items()]
    return sorted(rows, key=lambda row: (row["ladder"], row["corrections"], row["dtype"], row["nfe"]))


def _row(run: Folder, name: str, units: Sequence[Committed]) -> dict[str, Any]:
    """The row of the setting of that name, from its units."""

    def read(unit: Committed, file: ParquetFile) -> Tally:
        found = Tally.of_footer(file)
        for first, rows in tables(file, ["image_id", "mse", *AVERAGED]):
            others = {name: column(rows, name) for name in AVERAGED}
            others["exact"] = others["identical"] == 1
            numbers = first + np.arange(len(rows))
            found.errors[""].add(unit.name, numbers, rows["image_id"], column(rows, "mse"), **others)
        return found

    found = tally(run, SWEPT, units, read, f"sweep_{name}", run, run)
    errors = found.errors[""]
    setting = Setting.of(shard_metadata(run, units[0].name, SWEPT)["setting"])
    how = setting.how
    count, steps = errors.count, how.steps
    plain = not how.corrections
    up = errors.mean("nfe")
    figures = errors.figures()
    return {
        "ladder": setting.ladder,
        "steps": steps,
        "top": how.levels[-1],
        "corrections": how.corrections,
        "tolerance": how.tolerance,
        "dtype": how.dtype,
        "nfe_up": up,
        "nfe_down": steps,
        "nfe": None if up is None else up + steps,
        "images": count,
        **{f"mse_{name}": _finite(figures[name]) for name in ("mean", "median", "p99", "max")},
        "psnr": _finite(figures["psnr"]),
        "values_identical": errors.mean("identical"),
        "images_identical": errors.mean("exact"),
        **{f"latent_{name}": errors.mean(name) for name in ("mean", "std", "kurtosis", "correlation")},
        "noise_mse": errors.mean("noise_mse"),
        "seconds_an_image": found.seconds["round_trip_seconds"] / count if count else None,
        "paper_mse": TABLE_2.get(steps) if plain else None,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
