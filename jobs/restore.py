"""palindrome restore: images of which a part is known -> whole images."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import prod
from typing import Annotated, Any, ClassVar, Literal

import pyarrow as pa

from palindrome.jobs.arguments import ConfigError, Range, config_error
from palindrome.jobs.config import (
    CollectionOptions,
    ConditionColumnOptions,
    LatentOptions,
    PictureOptions,
    WholeCollectionConfig,
    column_error,
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
from palindrome.model.execution import Execution
from palindrome.model.families import Checkpoint
from palindrome.pipeline.base.text import figure
from palindrome.pipeline.images.masks import Masks
from palindrome.pipeline.images.metrics import SSIM_WINDOW
from palindrome.pipeline.images.sources import Collection, open_collection
from palindrome.pipeline.images.sources.tables import byte_columns
from palindrome.pipeline.reports.restoration import put_report
from palindrome.pipeline.runs.kinds import IMAGES
from palindrome.pipeline.runs.ladders import KINDS, NAMED, resolve
from palindrome.pipeline.runs.manifest import earlier_manifest
from palindrome.pipeline.runs.outcome import Failure
from palindrome.pipeline.runs.schemas import RESTORED_SCHEMA
from palindrome.pipeline.runs.summary import put_summary, restored_summary
from palindrome.pipeline.runtime.progress import Budget
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.runtime.scheduler import Resources
from palindrome.pipeline.storage.folder import Folder, absolute
from palindrome.pipeline.tasks.restore import Degradation, Restore


@dataclass(frozen=True, kw_only=True)
class RestoreConfig(CollectionOptions, PictureOptions, LatentOptions, ConditionColumnOptions, WholeCollectionConfig):
    """Restore images of which a part is known, by DDNM: fill in what masks leave out, upscale, or colour them. The
    results agree with what is known. One Parquet file per shard in OUT/images.

    By default the images are whole ones, of which that part is taken first: an experiment, whose results are compared
    with the originals. With --degraded they are what is known."""

    GROUP: ClassVar[str] = "sampling"
    EXAMPLES: ClassVar[str] = """
    palindrome restore --images photos/ --model checkpoints/cifar10-32 --task inpaint --mask box:0.25 --out runs/filled
    palindrome restore --images small/ --model model/ --task upscale --factor 4 --degraded --out runs/larger
    palindrome restore --images photos/ --model model/ --task colorize --variations 4 --out runs/coloured
    """

    model: str
    """The checkpoint: a folder in diffusers' layout, also of a latent diffusion pipeline, or with EDM's config, or a
    .pt file of OpenAI's, a path or an fsspec URI; or a Hugging Face repository, ORG/NAME or ORG/NAME@REVISION, if
    huggingface_hub is installed."""
    task: Literal["inpaint", "upscale", "colorize"]
    """What is missing: the pixels that --mask leaves out; all but one of FACTOR x FACTOR pixels; or the colours."""
    mask: str | None = None
    """The pixels to be filled in, for inpaint. box:FRACTION: a centred square of that fraction of the area. file:URI: a
    picture, white where pixels are missing, of the size of the model's images; or a folder with one for each image:
    ID.png for the image ID. column:NAME: a column of such pictures."""
    factor: Annotated[int, Range(2)] | None = None
    """How many times as wide and as high the images become, for upscale (default: 4)."""
    operator: Literal["average", "bicubic"] | None = None
    """How images were made smaller, for upscale: by the mean of each FACTOR x FACTOR pixels, or by Pillow's bicubic
    filter (default: average)."""
    degraded: bool = False
    """The images are already what is known: with a part missing, small, or gray. They are not resized; one that does
    not fit the model is rejected. There is nothing to compare the results with."""
    eta: Annotated[float, Range(0, 1)] = 0.85
    """The part of each step's noise that is new."""
    steps: Annotated[int, Range(1)] | None = None
    """Steps from noise to image (default: 100, or those of the ladder's file or list)."""
    ladder: str = "linear"
    """The distribution of the steps over the timesteps: linear, quadratic, logsnr, timesteps such as 0,3,11,999, or a
    file that calibrate wrote."""
    variations: Annotated[int, Range(1)] = 1
    """The number of results per image, each with its own noise."""
    seed: Annotated[int, Range(0)] = 0
    """The seed of the noise, which an image's id and the variation determine besides."""
    ssim: bool = False
    """Also measure the structural similarity to the originals (SSIM), by scikit-image (palindrome[restore])."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("fit", "resample") if self.degraded else ():
            if getattr(self, name) != getattr(PictureOptions, name):
                raise ConfigError(f"--{name}: with --degraded nothing is resized")
        if self.ssim and self.degraded:
            raise ConfigError("--ssim: with --degraded there are no originals to compare with")

    @property
    def mask_column(self) -> str | None:
        kind, _, name = (self.mask or "").partition(":")
        return name if kind == "column" and name else None


def run(config: RestoreConfig) -> int:
    """Restores the remaining shards, writes summary and report, and returns the exit code."""
    columns = {"class_column": config.class_column, "prompt_column": config.prompt_column, "mask": config.mask_column}
    with config_error("--images"), column_error(**columns):
        uri = absolute(config.images)
        keep = config.with_columns(config.keep)
        read = dict.fromkeys([*keep, *filter(None, [config.mask_column])])
        collection = open_collection(uri, keep=list(read), reserved=RESTORED_SCHEMA.names, **config.reading())
    where, model, how = open_model(config)
    degradation = _degradation(config, model, collection)
    if config.degraded:
        how = replace(how, size=degradation.size, fit="exact")
    with config_error("--out"):
        earlier = earlier_manifest(Folder(absolute(config.out)), "restore")
    if earlier:
        model = model.as_described(earlier.content)
    with config_error("--steps" if config.ladder in KINDS else "--ladder"):
        steps = config.steps or (min(100, model.process.num_train_timesteps) if config.ladder in NAMED else None)
        levels = resolve(config.ladder, steps, model.process, earlier.top if earlier else None, model.own_ladder)
    facts = {
        "model_digest": model.digest,
        "levels": list(levels),
        **model.describe(),
        "restoration": degradation.record(),
        "image_shape": list(model.image_shape),
        "preprocess": how.record(),
    }
    kept = tuple(field for field in collection.kept if field.name in keep)
    budget = Budget(config.max_failed_shards, config.max_reject_fraction)

    def plan(out: Folder) -> Remaining:
        remaining, _ = plan_collection(config, out, collection, IMAGES, "restore")
        return remaining

    def work(out: Folder, resources: Resources, execution: Execution) -> Restore:
        reader = Reader(collection, how, execution.batch_size, resources.decode_in_tasks)
        noise = {"eta": config.eta, "variations": config.variations, "seed": config.seed}
        about = {**facts, **noise, "precision": execution.precision}
        what = (degradation, kept, levels, config.eta, config.variations, config.seed)
        return Restore(out, reader, *what, about, config.retry_rejects, config.ssim)

    def finish(out: Folder, failures: list[Failure]) -> int:
        summary = restored_summary(out)
        put_summary(out, summary, failures)
        described = {
            "images": uri,
            "model": f"{where} (digest {model.digest[:16]})",
            **degradation.described(),
            "sampling": f"{len(levels) - 1} steps, eta {config.eta:g}, seed {config.seed}",
        }
        put_report(out, described, summary, collection, how, degradation)
        return _conclude(config, summary, over_budget(out, budget, failures, summary))

    job = ShardedJob(
        name="restore",
        model=model,
        settings={"images": uri, "model": where, "keep": keep, "steps": len(levels) - 1, **degradation.settings()},
        facts={**facts, "collection": collection.record()},
        plan=plan,
        evaluations=(len(levels) - 1) * config.variations,
        written=prod(model.image_shape) * config.variations,
        work=work,
        finish=finish,
        decode=config.decode,
        stall_timeout=config.stall,
        budget=budget,
    )
    return run_sharded(config, job)


def _degradation(config: RestoreConfig, model: Checkpoint, collection: Collection) -> Degradation:
    """Raises ConfigError."""
    _, size, _ = model.image_shape
    if config.ssim and find_spec("skimage") is None:
        raise ConfigError("--ssim: needs scikit-image (palindrome[restore])")
    if config.ssim and size < SSIM_WINDOW:
        raise ConfigError(f"--ssim: the model's {size} pixels are fewer than the {SSIM_WINDOW} of its window")
    masks = None
    if config.mask is not None:
        with config_error("--mask"):
            masks = Masks.of(config.mask, size)
    if config.mask_column:
        field = pa.schema(collection.kept).field(config.mask_column)
        if not byte_columns(pa.schema([field])):
            raise ConfigError(f"--mask: column {field.name!r} has {field.type}, not pictures")
    with config_error("--task"):
        return Degradation.of(model, config.task, masks, config.factor, config.operator, config.degraded)


def _conclude(config: RestoreConfig, summary: dict[str, Any], exceeded: str | None) -> int:
    print(f"{summary['restored']} images restored and {summary['rejects']} rejects in {config.out}")
    print_rejects(summary)
    if summary["restored"]:
        result, stored = (figure(summary[name]["max"]) for name in ("observation_error", "picture_error"))
        print(f"largest distance to an observation: {result}, of the picture in 8 bits {stored} (pixels in [0, 1])")
    if "results" in summary:
        found, alone = summary["results"], summary["baseline"]
        psnr, before = (f"{figure(row['psnr'])} dB" for row in (found, alone))
        print(f"mean PSNR {psnr}; of the observations alone {before}")
        if "ssim" in found:
            print(f"mean SSIM {figure(found['ssim'])}; of the observations alone {figure(alone['ssim'])}")
    print(f"report: {config.out}/report.html")
    return exit_code(summary["restored"], "restored", exceeded)
