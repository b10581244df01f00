"""palindrome encode: images -> latents in Parquet, by DDIM inversion."""

import sys
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, ClassVar, Literal

from palindrome.jobs.arguments import ConfigError, Range, config_error
from palindrome.jobs.config import (
    CollectionOptions,
    ConditionColumnOptions,
    LatentEncodingOptions,
    PictureOptions,
    WholeCollectionConfig,
    open_model,
)
from palindrome.jobs.sharded import (
    Remaining,
    ShardedJob,
    exit_code,
    over_budget,
    plan_collection,
    print_rejects,
    run_sharded,
)
from palindrome.model.execution import FLOAT32, Execution
from palindrome.model.families import Checkpoint
from palindrome.pipeline.base.text import figure
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.read import first_images
from palindrome.pipeline.images.sources import Collection, open_collection
from palindrome.pipeline.runs.inversion import Inversion
from palindrome.pipeline.runs.kinds import LATENTS
from palindrome.pipeline.runs.ladders import KINDS, resolve
from palindrome.pipeline.runs.manifest import earlier_manifest, note, read_manifest
from palindrome.pipeline.runs.outcome import Failure
from palindrome.pipeline.runs.plan import Totals
from palindrome.pipeline.runs.schemas import DTYPES, LATENT_COLUMNS
from palindrome.pipeline.runs.summary import apart_words, latents_summary, put_summary
from palindrome.pipeline.runtime.executor import Executor
from palindrome.pipeline.runtime.precision import MIN_IMAGES_FOR_TRIAL, TRIAL_IMAGES, try_precisions
from palindrome.pipeline.runtime.progress import Budget
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.runtime.scheduler import Resources
from palindrome.pipeline.storage.folder import Folder, absolute
from palindrome.pipeline.tasks.encode import Encode


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(
    CollectionOptions, PictureOptions, LatentEncodingOptions, ConditionColumnOptions, WholeCollectionConfig
):
    """Encode an image collection to latents by DDIM inversion, one Parquet file per shard in OUT/latents."""

    GROUP: ClassVar[str] = "inversion"
    EXAMPLES: ClassVar[str] = """
    palindrome encode --images photos/ --model checkpoints/cifar10-32 --out runs/photos
    palindrome encode --images photos/ --model checkpoints/cifar10-32 --out runs/exact --tolerance exact --measure
    palindrome encode --images 's3://bucket/{000..099}.tar' --model s3://bucket/model --out s3://bucket/run --dry-run
    """

    MUTABLE: ClassVar[frozenset[str]] = WholeCollectionConfig.MUTABLE

    model: str
    """The checkpoint: a folder in diffusers' layout, also of a latent diffusion pipeline, or with EDM's config, or a
    .pt file of OpenAI's, a path or an fsspec URI; or a Hugging Face repository, ORG/NAME or ORG/NAME@REVISION, if
    huggingface_hub is installed."""
    steps: Annotated[int, Range(1)] | None = None
    """Steps from the image to its latent (default: 20, or those of the ladder's file or list)."""
    corrections: Annotated[int, Range(0, 100)] = 3
    """Additional network evaluations per step, which correct the step so that the latent decodes to the same image; 0
    is the paper's inversion. With --tolerance, the maximum per step."""
    tolerance: str | None = None
    """Stop correcting a step of an image once its residual (root mean square, pixels in [-1, 1]) is expected to be
    below this number. `exact`: also decode every latent, and spend more evaluations on the images that are not
    recovered bit by bit."""
    ladder: str = "logsnr"
    """The distribution of the steps over the timesteps: linear, quadratic, logsnr (equal steps of the log-SNR),
    timesteps such as 0,3,11,800, or a file that calibrate wrote."""
    dtype: Literal["float16", "float32"] = "float32"
    """The dtype of the stored latents: float16 halves their size; its rounding adds about 5e-9 to the error."""
    vae_latent: bool = False
    """Also store the state that the autoencoder of a latent diffusion model makes of each image, which is inverted."""
    measure: bool = False
    """Also decode each latent during the run, which takes one evaluation per step more, and store the round trip's mse,
    psnr and fraction of identical 8-bit values."""


def run(config: EncodeConfig) -> int:
    """Encodes the remaining shards and returns the exit code."""
    with config_error("--images"), config.column_error():
        uri = absolute(config.images)
        keep = config.with_columns(config.keep)
        collection = open_collection(uri, keep=keep, reserved=LATENT_COLUMNS, **config.reading())
    where, model, how = open_model(config)
    with config_error("--out"):
        earlier = earlier_manifest(Folder(absolute(config.out)), "encode")
    if earlier:
        model = model.as_described(earlier.content)
    with config_error("--steps" if config.ladder in KINDS else "--ladder"):
        levels = resolve(config.ladder, config.steps, model.process, earlier.top if earlier else None, model.own_ladder)
    if config.vae_latent and not model.autoencoded:
        raise ConfigError("--vae-latent: the model has no autoencoder")
    tolerance, exact = _tolerance(config)
    inversion = Inversion(levels, config.corrections, tolerance, exact, config.dtype)
    measured = config.measure or exact
    facts = {
        "model_digest": model.digest,
        "levels": list(levels),
        **model.describe(),
        "inversion": inversion.record(),
        "preprocess": how.record(),
    }
    budget = Budget(config.max_failed_shards, config.max_reject_fraction)
    totals, done = Totals(0, 0), set[str]()

    def plan(out: Folder) -> Remaining:
        nonlocal totals, done
        remaining, done = plan_collection(config, out, collection, LATENTS, "encode")
        totals = remaining.totals
        return remaining

    def precision(executor: Executor, resources: Resources, batch_size: int) -> str:
        trial = totals.images >= MIN_IMAGES_FOR_TRIAL and not (done or exact)
        return _precision(config, model, collection, how, inversion if trial else None, executor, resources, batch_size)

    def work(out: Folder, resources: Resources, execution: Execution) -> Encode:
        reader = Reader(collection, how, execution.batch_size, resources.decode_in_tasks)
        about = {**facts, "precision": execution.precision}
        return Encode(out, reader, inversion, config.measure, about, config.retry_rejects, config.vae_latent)

    def finish(out: Folder, failures: list[Failure]) -> int:
        summary = latents_summary(out, measured)
        put_summary(out, summary, failures)
        return _conclude(config, summary, over_budget(out, budget, failures, summary))

    job = ShardedJob(
        name="encode",
        model=model,
        settings={"images": uri, "model": where, "steps": inversion.steps, "keep": keep},
        facts={**facts, "collection": collection.record()},
        plan=plan,
        evaluations=inversion.nfe_up + inversion.steps * measured,
        written=prod(model.latent_shape) * DTYPES[config.dtype].byte_width * (1 + config.vae_latent),
        work=work,
        finish=finish,
        decode=config.decode,
        precision=precision,
        stall_timeout=config.stall,
        budget=budget,
    )
    return run_sharded(config, job)


def _precision(
    config: EncodeConfig,
    model: Checkpoint,
    collection: Collection,
    how: Preprocess,
    trial: Inversion | None,
    executor: Executor,
    resources: Resources,
    batch_size: int,
) -> str:
    """The precision of the run, which its first start records in the manifest: that of --precision; for `auto`, the one
    that a trial finds, or float32 if `trial` is None."""
    out = Folder(absolute(config.out))
    manifest = read_manifest(out)
    if manifest and manifest.precision:
        return manifest.precision
    found: dict[str, Any] = {"precision": FLOAT32.precision if config.precision == "auto" else config.precision}
    if config.precision == "auto" and trial:
        try:
            pixels = first_images(collection, how, TRIAL_IMAGES)
        except ValueError:  # the first images are all rejects
            pixels = None
        if pixels is not None:
            found = try_precisions(model, pixels, trial, resources, batch_size, executor)
            print(f"precision: {found['precision']} ({_described(found['tried'])})", flush=True)
    note(out, **found)
    return str(found["precision"])


def _described(tried: dict[str, dict[str, Any]]) -> str:
    """A trial's figures for the log."""
    texts = []
    for precision, figures in tried.items():
        text = f"{precision}: {figures['per_second']:,.0f} network evaluations a second"
        if "round_trip" in figures:
            error = figures["round_trip"]
            text += ", its round trips fail" if error is None else f", round-trip error {error:.3g}"
        texts.append(text)
    return "; ".join(texts)


def _tolerance(config: EncodeConfig) -> tuple[float, bool]:
    """--tolerance as a number, 0 for none, and whether it is `exact`. Raises ConfigError."""
    if config.tolerance is None:
        return 0.0, False
    if not config.corrections:
        raise ConfigError("--tolerance: with --corrections 0 there is no correction to stop")
    if config.tolerance == "exact":
        return 0.0, True
    try:
        tolerance = float(config.tolerance)
    except ValueError:
        tolerance = -1.0
    if not 0 < tolerance < float("inf"):
        raise ConfigError(f"--tolerance: {config.tolerance!r} is neither a number above 0 nor exact")
    return tolerance, False


def _conclude(config: EncodeConfig, summary: dict[str, Any], exceeded: str | None) -> int:
    print(f"{summary['latents']} latents and {summary['rejects']} rejects in {config.out}")
    print_rejects(summary)
    if "round_trip" in summary and summary["latents"]:
        measured = summary["round_trip"]
        if measured["not_finite"]:
            print(f"{measured['not_finite']} round trips are not finite, and left out of the mean", file=sys.stderr)
        print(
            f"round-trip error {figure(measured['mean'])} (mean squared error, pixels in [0, 1]),"
            f" {summary['latents'] - measured['not_identical']} of {summary['latents']} images identical to the bit"
        )
        if words := apart_words(measured):
            print(words)
        if config.tolerance == "exact" and measured["not_identical"]:
            print(f"not identical: {', '.join(measured['not_identical_ids'])}", file=sys.stderr)
    return exit_code(summary["latents"], "encoded", exceeded)
