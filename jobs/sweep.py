"""palindrome sweep: round-trip error against network evaluations, over settings, on a collection."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

from palindrome.jobs.arguments import ConfigError, Range, config_error
from palindrome.jobs.config import (
    CollectionOptions,
    ConditionColumnOptions,
    LatentEncodingOptions,
    PictureOptions,
    ReadingConfig,
    open_model,
)
from palindrome.jobs.sharded import Remaining, ShardedJob, run_sharded
from palindrome.model.execution import Execution
from palindrome.model.families import Checkpoint
from palindrome.model.ladder import TOP_LOG_SNR
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.images.sources import open_collection
from palindrome.pipeline.reports.sweep import put_report
from palindrome.pipeline.runs.inversion import Inversion
from palindrome.pipeline.runs.kinds import SWEPT
from palindrome.pipeline.runs.ladders import KINDS, NAMED, resolve
from palindrome.pipeline.runs.manifest import earlier_manifest
from palindrome.pipeline.runs.outcome import Failure
from palindrome.pipeline.runs.plan import Totals, plan_totals, read_plan, write_plan
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.runs.summary import put_summary, rejects_by_reason
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.runtime.scheduler import Resources
from palindrome.pipeline.storage.folder import Folder, absolute
from palindrome.pipeline.tasks.sweep import Setting, Sweep, read_sweep, units


@dataclass(frozen=True, kw_only=True)
class SweepConfig(CollectionOptions, PictureOptions, LatentEncodingOptions, ConditionColumnOptions, ReadingConfig):
    """Encode and decode a collection with every combination of the settings, and report the error against the network
    evaluations as a table, a CSV file and a plot.

    Repeating the command with other settings adds them to the folder."""

    GROUP: ClassVar[str] = "inversion"
    EXAMPLES: ClassVar[str] = """
    palindrome sweep --images photos/ --model checkpoints/cifar10-32 --limit 256 --out runs/sweep
    palindrome sweep --images photos/ --model checkpoints/cifar10-32 --ladder linear logsnr --out runs/sweep
    """

    MUTABLE: ClassVar[frozenset[str]] = ReadingConfig.MUTABLE | {
        *("steps", "corrections", "ladder", "tolerance", "dtype", "max_nfe"),
    }

    model: str
    """The checkpoint: a folder in diffusers' layout, also of a latent diffusion pipeline, or with EDM's config, or a
    .pt file of OpenAI's, a path or an fsspec URI; or a Hugging Face repository, ORG/NAME or ORG/NAME@REVISION, if
    huggingface_hub is installed."""
    steps: tuple[Annotated[int, Range(1)], ...] = (10, 20, 50, 100)
    """Numbers of steps; ladders given as lists or files have their own."""
    corrections: tuple[Annotated[int, Range(0, 100)], ...] = (0, 1, 2, 3)
    """Numbers of additional network evaluations per step, which correct the step; 0 is the paper's inversion."""
    ladder: tuple[str, ...] = ("logsnr",)
    """Ladders: linear, quadratic, logsnr, timesteps such as 0,3,11,800, or files that calibrate wrote."""
    tolerance: tuple[Annotated[float, Range(0)], ...] = (0.0,)
    """Tolerances of the residual, as for encode; --corrections is then the maximum per step. 0 is no tolerance."""
    dtype: tuple[Literal["float32", "float16"], ...] = ("float32",)
    """The dtypes to which latents are rounded before they are decoded."""
    max_nfe: Annotated[int, Range(1)] | None = None
    """Leave out settings that may take more network evaluations per image, encoding and decoding together (default: no
    limit)."""
    recover_noise: bool = False
    """Also generate an image from noise, encode it, and measure the error of the recovered noise."""
    seed: int = 0
    """The seed of that noise."""
    shard_size: Annotated[int, Range(1)] = 256
    """The maximum number of images per shard; one shard with one setting is a unit of work."""
    limit: Annotated[int, Range(1)] | None = None
    """The number of images to use, from the first one on (default: all)."""


def run(config: SweepConfig) -> int:
    """Measures the remaining units, writes table and plot, and returns the exit code."""
    with config_error("--images"), config.column_error():
        uri = absolute(config.images)
        collection = open_collection(uri, keep=config.with_columns(()), **config.reading())
    where, model, how = open_model(config)
    with config_error("--out"):
        earlier = earlier_manifest(Folder(absolute(config.out)), "sweep")
    # Sweeps of versions before go on to 0.8 of the timesteps.
    top_log_snr = earlier.content.get("top_log_snr") if earlier else TOP_LOG_SNR
    settings = _settings(config, model, None if top_log_snr else model.process.num_train_timesteps * 4 // 5)

    def plan(out: Folder) -> Remaining:
        with config_error("--images"):
            planned = plan_totals(out) or write_plan(out, collection, config.shard_size, config.limit)
        done = committed(out, SWEPT)

        def todo() -> Iterator[Shard]:
            every = (unit for setting in settings for unit in units(read_plan(out), setting))
            return (unit for unit in every if unit.name not in done)

        left, count = sum(1 for _ in todo()), len(settings)
        print(f"{planned.images} images in {planned.shards} shards, {count} settings: {left} to do", flush=True)
        return Remaining(Totals(planned.shards * count, planned.images * count), left, todo())

    def work(out: Folder, resources: Resources, execution: Execution) -> Sweep:
        reader = Reader(collection, how, execution.batch_size, resources.decode_in_tasks)
        seed = config.seed if config.recover_noise else None
        return Sweep(out, reader, {s.name: s for s in settings}, seed, {"model_digest": model.digest})

    def finish(out: Folder, failures: list[Failure]) -> int:
        rows, images = read_sweep(out), (plan_totals(out) or Totals(0, 0)).images
        # Every setting has the same rejects.
        units_of_one = {unit for unit in committed(out, SWEPT) if unit.endswith(settings[0].name)}
        rejects = rejects_by_reason(out, units_of_one)
        put_summary(out, {"images": images, "rejects_by_reason": rejects, "settings": rows}, failures)
        described = {"images": uri, "model": f"{where} (digest {model.digest[:16]})"}
        put_report(out, described, rows, rejects)
        return _conclude(config, rows, rejects)

    job = ShardedJob(
        name="sweep",
        model=model,
        settings={"images": uri, "model": where},
        facts={
            "model_digest": model.digest,
            "top_log_snr": top_log_snr,
            **model.told(),
            "preprocess": how.record(),
            "collection": collection.record(),
        },
        plan=plan,
        evaluations=sum(setting.most_nfe for setting in settings) / len(settings),
        written=0,
        work=work,
        finish=finish,
        decode=config.decode,
        uniform_cost=False,
    )
    return run_sharded(config, job)


def _settings(config: SweepConfig, model: Checkpoint, top: int | None) -> list[Setting]:
    """Every combination once, by ascending number of network evaluations; `top` is the last level of ladders of a kind
    other than linear. Raises ConfigError if none is left."""
    found: dict[str, Setting] = {}
    for named in config.ladder:
        with config_error("--steps" if named in KINDS else "--ladder"):
            counts = config.steps if named in NAMED else (None,)
            last = None if named == "linear" else top
            ladders = [
                resolve(named, n, model.process, last and max(last, (n or 1) - 1), model.own_ladder) for n in counts
            ]
        label = PurePosixPath(named).stem if named.endswith(".json") else named
        for levels, count, tolerance, dtype in product(ladders, config.corrections, config.tolerance, config.dtype):
            # Without corrections the tolerance has no effect.
            setting = Setting(label, Inversion(levels, count, tolerance if count else 0.0, dtype=dtype))
            found.setdefault(setting.name, setting)
    most = config.max_nfe or float("inf")
    settings = sorted((s for s in found.values() if s.most_nfe <= most), key=lambda s: s.most_nfe)
    if not settings:
        raise ConfigError(f"--max-nfe: every setting takes more than {config.max_nfe}")
    return settings


def _conclude(config: SweepConfig, rows: list[dict[str, Any]], rejects: dict[str, int]) -> int:
    for row in rows:
        error = "no error measured" if row["mse_mean"] is None else f"error {row['mse_mean']:.3g}"
        print(f"{row['ladder']}, {row['steps']} steps, {row['corrections']} corrections, {row['dtype']}: {error}")
    for reason, count in rejects.items():
        print(f"{count} rejected as {reason}")
    print(f"report: {config.out}/report.html, table: {config.out}/table.csv, plot: {config.out}/error.svg")
    if not any(row["images"] for row in rows):
        print("no image could be encoded", file=sys.stderr)
        return 1
    return 0
