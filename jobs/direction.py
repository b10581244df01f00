"""palindrome direction: two groups of latents -> the direction from one to the other, for edit."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from palindrome.jobs.arguments import ConfigError, Range, config_error
from palindrome.jobs.config import OutOptions, Planned
from palindrome.pipeline.base import interrupt
from palindrome.pipeline.base.errors import RunError
from palindrome.pipeline.base.log import note
from palindrome.pipeline.base.text import figure
from palindrome.pipeline.images.metrics import check_finite
from palindrome.pipeline.runs.directions import Direction, write_direction
from palindrome.pipeline.runs.encoded import EncodeRun
from palindrome.pipeline.runs.kinds import LATENTS
from palindrome.pipeline.runs.plan import read_plan
from palindrome.pipeline.runs.selection import Selection, parse
from palindrome.pipeline.runs.shards import check_made, count_rows, read_ids, read_latents
from palindrome.pipeline.runtime.device import Model
from palindrome.pipeline.storage.folder import Folder, absolute

BATCH = 64  # latents on the device at once
NAMED = 5  # ids in an error

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class DirectionConfig(OutOptions):
    """Write the direction from one group of latents to another: the mean of x over the first less that over the second.
    `edit --direction` adds it to the latents of images. Runs in this process."""

    GROUP: ClassVar[str] = "input"
    EXAMPLES: ClassVar[str] = """
    palindrome direction --latents runs/photos --where 'label == 3' --against 'label == 5' --out cat.safetensors
    palindrome edit --latents runs/photos --where 'label == 5' --direction cat.safetensors --out runs/cats
    """
    OUT_IS_FILE: ClassVar[bool] = True

    out: str
    """The file to write, safetensors; a path or an fsspec URI."""
    latents: str
    """The run folder that encode wrote; a path or an fsspec URI."""
    where: str
    """A condition on the columns of the latents, which the first group meets, such as 'label == 3'."""
    against: str
    """A condition that the second group meets. No image may meet both."""
    at: Annotated[float, Range(0, 1)] = 0.0
    """The fraction of the steps, from the latent on, after which x is taken: 0 is the latent itself, for which no model
    is loaded; more is nearer to the image."""
    model: str | None = None
    """The checkpoint folder, for --at (default: the one that encode used, at the same path)."""
    allow_pickle: bool = False
    """Also load weights that are a pickle (.bin, .pt), as tensors alone: for checkpoints that you trust."""


@dataclass
class Group:
    """The sums of a group's x and of its squares, float64 [C, H, W]."""

    count: int
    total: np.ndarray
    squares: np.ndarray

    @property
    def scatter(self) -> float:
        """The sum of squared differences from the mean, over images and values."""
        return float((self.squares - self.total**2 / self.count).sum())


def run(config: DirectionConfig) -> int:
    """Writes the file and returns the exit code."""
    with config_error("--latents"):
        encoded = EncodeRun.open(Folder(absolute(config.latents)))
    shards = [shard.name for shard in read_plan(encoded.folder) if shard.name in encoded.done]
    wanted = {"--where": config.where, "--against": config.against}
    counts = _counts(encoded, shards, wanted)
    levels, steps = encoded.manifest.levels, round(config.at * (len(encoded.manifest.levels) - 1))
    print(f"{counts[0]} latents for which {config.where}, {counts[1]} for which {config.against}")
    if len(shards) < encoded.planned.shards:
        print(f"the encode run is not complete: {len(shards)} of {encoded.planned.shards} shards", file=sys.stderr)
    with config_error("--model"):
        model = encoded.load_model(config.model, config.allow_pickle)[1] if steps else None
    if config.dry_run:
        print(f"{steps * sum(counts):,} network evaluations; one file of the size of a latent to write")
        raise Planned
    loaded = None if model is None else Model(model, execution=encoded.execution)

    def along(rows: Rows, x: Tensor) -> Tensor:
        return x if loaded is None else loaded.partly_decode(x, levels, steps, loaded.condition(rows))

    first, second = (_group(encoded, shards, where, along) for where in wanted.values())
    values = first.total / first.count - second.total / second.count
    found = Direction(
        values=torch.from_numpy(values).float(),
        model_digest=encoded.manifest.model_digest,
        levels=levels,
        num_train_timesteps=encoded.manifest.content["num_train_timesteps"],
        steps=steps,
        where=config.where,
        against=config.against,
        counts=counts,
    )
    with config_error("--out"):
        write_direction(found, config.out)
    norm, chance = float(np.linalg.norm(values)), _by_chance(first, second)
    note(summary={"counts": counts, "level": found.level, "norm": norm, "by_chance": chance})
    print(f"direction at level {found.level:g}, of norm {figure(norm)}, in {config.out}")
    if math.isfinite(chance):
        print(f"the norm between random groups of as many images: {figure(chance)}")
    if norm < chance * (1 + 3 / math.sqrt(2 * values.size)):  # three deviations of it
        print("the direction is no longer than between random groups: it says nothing of these", file=sys.stderr)
    return 0


def _counts(encoded: EncodeRun, shards: list[str], wanted: dict[str, str]) -> tuple[int, int]:
    """The sizes of the groups. Raises ConfigError for an expression that is none, a group without an image, and images
    that are in both."""
    with config_error("--latents"), encoded.folder.parquet_file(f"{LATENTS}/{shards[0]}.parquet") as file:
        schema = file.schema_arrow
    found = []
    for flag, where in wanted.items():
        with config_error(flag):
            parse(where, schema)
            found.append(sum(count_rows(encoded.folder, shard, Selection(where=where)) for shard in shards))
        if not found[-1]:
            raise ConfigError(f"{flag}: no latent matches {where}")
    both = Selection(where=" and ".join(f"({where}\n)" for where in wanted.values()))
    ids = [name for shard in shards for name in read_ids(encoded.folder, shard, both)]
    if ids:
        more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
        raise ConfigError(f"--against: in both groups are {', '.join(ids[:NAMED])}{more}")
    first, second = found
    return first, second


def _group(encoded: EncodeRun, shards: list[str], where: str, along: Callable[[Rows, Tensor], Tensor]) -> Group:
    """Sums over a group, shard by shard. Raises RunError where x is not finite."""
    group = Group(0, np.zeros(()), np.zeros(()))
    for shard in shards:
        check_made(encoded.folder, shard)
        for rows, latents in read_latents(encoded.folder, shard, BATCH, Selection(where=where)):
            interrupt.check()
            x = along(rows, torch.from_numpy(latents))
            try:
                check_finite(x, [row["image_id"] for row in rows])
            except ValueError as e:
                raise RunError(str(e)) from e
            values = x.double().numpy()
            group.total = group.total + values.sum(0)
            group.squares = group.squares + np.square(values).sum(0)
            group.count += len(values)
    return group


def _by_chance(first: Group, second: Group) -> float:
    """The norm to be expected between the means of two groups of n and m images, were they all of one kind: by the
    variance of x within the groups. Of latents, D standard normal values, that is sqrt(D (1 / n + 1 / m)). NaN where
    each group is a single image."""
    n, m = first.count, second.count
    within = (first.scatter + second.scatter) / (n + m - 2) if n + m > 2 else math.nan
    return math.sqrt(within * (1 / n + 1 / m))
