"""palindrome interpolate: images between the latents of an encode run."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, ClassVar, Literal

from palindrome.jobs.arguments import ConfigError, Range, config_error, flag_of
from palindrome.jobs.config import ConditionOptions, ImagesConfig, SelectionOptions
from palindrome.jobs.sharded import Remaining, ShardedJob, remaining_shards, run_sharded
from palindrome.model.execution import Execution
from palindrome.pipeline.images.records import REASONS
from palindrome.pipeline.reports.interpolation import put_report
from palindrome.pipeline.runs.encoded import EncodeRun
from palindrome.pipeline.runs.kinds import IMAGES
from palindrome.pipeline.runs.outcome import Failure
from palindrome.pipeline.runs.plan import add_pieces, plan_totals, read_plan
from palindrome.pipeline.runs.selection import Selection
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.runs.summary import generated_summary, put_summary
from palindrome.pipeline.runtime.scheduler import Resources
from palindrome.pipeline.storage.folder import Folder, absolute
from palindrome.pipeline.tasks.interpolate import Interpolate
from palindrome.pipeline.tasks.paths import (
    KIND,
    At,
    digest_of,
    every,
    grid_pieces,
    ids_of,
    located,
    nearest_pairs,
    path_pieces,
    random_pairs,
    read_pairs,
    sequences,
)

DRAWN = {"random": random_pairs, "nearest": nearest_pairs}
PATH_FLAGS = ("pairs", "path", "grid", "sequence")  # exactly one is required


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig(ImagesConfig, SelectionOptions, ConditionOptions):
    """Decode images between the latents of an encode run: one Parquet file per shard in OUT/images, one row per
    frame."""

    GROUP: ClassVar[str] = "interpolation"
    EXAMPLES: ClassVar[str] = """
    palindrome interpolate --latents runs/photos --pairs random:8 --out runs/paths
    palindrome interpolate --latents runs/photos --path cat.png,dog.png,car.png --frames 7 --out runs/path --format png
    """

    latents: str
    """The run folder that encode wrote; a path or an fsspec URI."""
    pairs: str | None = None
    """Interpolate between pairs of images: random:N draws N pairs; nearest:N draws N images, each paired with the image
    of the nearest latent; or a CSV file with two ids per line."""
    path: tuple[str, ...] = ()
    """Interpolate along paths through several images, each given as ID,ID,ID. Ids with commas need double quotes."""
    grid: tuple[str, ...] = ()
    """Interpolate in grids between four images, each given as ID,ID,ID,ID: upper left, upper right, lower left, lower
    right."""
    sequence: bool = False
    """Interpolate between the frames of each numbered sequence: images whose ids differ only in their last number."""
    frames: Annotated[int, Range(2)] = 11
    """Images from one given image to the next, both included; for a grid, in each direction."""
    method: Literal["slerp", "linear"] = "slerp"
    """slerp: on the sphere, eq. 67 of the DDIM paper; linear: on the straight line, for comparison."""
    model: str | None = None
    """The checkpoint folder (default: the one that encode used, at the same path)."""
    steps: Annotated[int, Range(1)] | None = None
    """Decoding steps, on a ladder of the encode run's kind (default: that run's own ladder)."""
    seed: Annotated[int, Range(0)] = 0
    """The seed for drawing pairs."""
    shard_size: Annotated[int, Range(1)] = 1024
    """The maximum number of frames per shard; the frames between two images are never split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [flag_of(name) for name in PATH_FLAGS if getattr(self, name)]
        if len(given) != 1:
            raise ConfigError(
                f"--pairs: give one of {', '.join(map(flag_of, PATH_FLAGS))}, not {' and '.join(given) or 'none'}"
            )
        selects = self.sequence or self.drawn() is not None
        if (self.ids or self.where) and not selects:
            raise ConfigError(f"--{'ids' if self.ids else 'where'}: {given[0]} names the images")

    def drawn(self) -> tuple[str, int] | None:
        """The method and the number of pairs if --pairs draws them, else None. Raises ConfigError."""
        how, _, count = (self.pairs or "").partition(":")
        if how not in DRAWN:
            return None
        if not (count.isascii() and count.isdigit() and int(count)):
            raise ConfigError(f"--pairs: {self.pairs} is not {how}:N")
        return how, int(count)


def run(config: InterpolateConfig) -> int:
    """Decodes the remaining frames, writes summary and report, and returns the exit code."""
    latents, out = Folder(absolute(config.latents)), Folder(absolute(config.out))
    with config_error("--latents"):
        encoded = EncodeRun.open(latents)
    if len(encoded.done) < encoded.planned.shards:
        message = f"the encode run is not complete: {len(encoded.done)} of {encoded.planned.shards} shards"
        print(message, file=sys.stderr)
    which = config.selection(latents, min(encoded.done))
    with config_error("--pairs"):
        pairs = read_pairs(config.pairs) if config.pairs and not config.drawn() else None
    with config_error("--model"):
        where, model = encoded.load_model(config.model, config.allow_pickle)
    if config.class_ is None and encoded.classes and encoded.classes.value is None:
        raise ConfigError("--class: the images have classes of their own: which one are the frames between them of?")
    if config.prompt is None and encoded.texts and encoded.texts.column is not None:
        raise ConfigError("--prompt: the images have texts of their own: which one are the frames between them of?")
    model = config.conditioned(model)
    with config_error("--steps"):
        [levels] = encoded.ladders(() if config.steps is None else (config.steps,), model.process)
    with config_error("--out"):
        known = plan_totals(out)
    # A requested image may not exist: that is reported before the folder is claimed.
    paths = _paths(config, latents, sorted(encoded.done), which, pairs) if known is None else []
    facts = {"model_digest": model.digest, "levels": list(levels), **model.told()}

    def plan(out: Folder) -> Remaining:
        pieces = (grid_pieces if config.grid else path_pieces)(paths, config.frames)
        totals = known or add_pieces(out, KIND, pieces, config.shard_size)
        remaining = remaining_shards(out, totals, committed(out, IMAGES))
        print(f"{totals.images} frames in {totals.shards} shards, {remaining.left} to make", flush=True)
        return remaining

    def work(out: Folder, resources: Resources, execution: Execution) -> Interpolate:
        about = {**facts, "method": config.method, "frames": config.frames}
        return Interpolate(out, latents, config.method, config.frames, levels, execution.batch_size, about)

    def finish(out: Folder, failures: list[Failure]) -> int:
        done = committed(out, IMAGES)
        summary = generated_summary(out, with_rejects=True)
        put_summary(out, summary, failures)
        described = {"latents": config.latents, "model": where, "steps": str(len(levels) - 1), "method": config.method}
        put_report(
            out, described, (shard.name for shard in read_plan(out) if shard.name in done), prod(model.image_shape)
        )
        return _conclude(config, summary)

    job = ShardedJob(
        name="interpolate",
        model=model,
        settings={"latents": latents.uri},
        facts={**facts, "ids_digest": which.ids_digest, "pairs_digest": None if pairs is None else digest_of(pairs)},
        plan=plan,
        evaluations=len(levels) - 1,
        written=prod(model.image_shape),
        work=work,
        finish=finish,
        precision=lambda *_: encoded.manifest.precision,
    )
    return run_sharded(config, job)


def _paths(
    config: InterpolateConfig,
    latents: Folder,
    shards: Sequence[str],
    which: Selection,
    pairs: Sequence[Sequence[str]] | None,
) -> Sequence[Sequence[At]]:
    """The requested paths or grids. Raises ConfigError."""
    with config_error("--pairs"):
        if pairs is not None:
            return located(latents, shards, pairs)
        if drawn := config.drawn():
            how, count = drawn
            return DRAWN[how](latents, shards, which, count, config.seed)
    with config_error("--path"):
        if config.path:
            return located(latents, shards, [ids_of(text, 2) for text in config.path], must=True)
    with config_error("--grid"):
        if config.grid:
            return located(latents, shards, [ids_of(text, 4, 4) for text in config.grid], must=True)
    found, missing = sequences(every(latents, shards, which))
    if not found:
        raise ConfigError("--sequence: there are no two images whose ids differ only in their last number")
    print(f"{len(found)} sequences of {sum(map(len, found))} images")
    if missing:
        print(f"{missing} numbers are missing in them; paths skip these", file=sys.stderr)
    return found


def _conclude(config: InterpolateConfig, summary: Mapping[str, Any]) -> int:
    print(f"{summary['images']} frames in {config.out}; report: {config.out}/report.html")
    for reason, count in summary["rejects_by_reason"].items():
        print(f"{count} paths rejected as {reason}: {REASONS[reason]}", file=sys.stderr)
    return 0 if summary["images"] else 1
