"""palindrome score: images -> what DDIM paths say of them, one row per image."""

import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import prod
from typing import Annotated, Any, ClassVar, Literal

from palindrome.jobs.arguments import ConfigError, Range, config_error
from palindrome.jobs.config import (
    CollectionOptions,
    ConditionColumnOptions,
    LatentOptions,
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
from palindrome.model.execution import Execution
from palindrome.model.watermarks import Keys
from palindrome.pipeline.base.text import figure
from palindrome.pipeline.images.sources import open_collection
from palindrome.pipeline.reports.scores import put_report
from palindrome.pipeline.runs.kinds import SCORES
from palindrome.pipeline.runs.manifest import earlier_manifest
from palindrome.pipeline.runs.outcome import Failure
from palindrome.pipeline.runs.scores import LEVEL, METHODS, Method, score_schema, scores_of
from palindrome.pipeline.runs.summary import put_summary, read_scores, scores_summary
from palindrome.pipeline.runs.watermarks import read_keys
from palindrome.pipeline.runtime.progress import Budget
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.runtime.scheduler import Resources
from palindrome.pipeline.storage.folder import Folder, absolute
from palindrome.pipeline.tasks.score import Measure, Score

EXACT = (
    "dire-exact: exact inversion brings every image back, real or generated: a score near 0 says that the inversion"
    " worked, and nothing of the image"
)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(CollectionOptions, PictureOptions, LatentOptions, ConditionColumnOptions, WholeCollectionConfig):
    """Score an image collection by what a diffusion model's DDIM paths say of each image, one Parquet file per shard in
    OUT/scores: whether it is out of distribution, was in the training set, or was generated."""

    GROUP: ClassVar[str] = "scoring"
    EXAMPLES: ClassVar[str] = """
    palindrome score --images photos/ --model checkpoints/cifar10-32 --method diffpath secmi --out runs/scores
    palindrome score --images photos/ --model lsun_bedroom.pt --allow-pickle --method dire --maps --out runs/dire
    palindrome score --images photos/ --model MODEL --method tree-ring --keys keys.json --out runs/marked
    palindrome score --images photos/ --model model/ --method nll --recompress jpeg:90 --through 32 --out runs/nll
    """

    model: str
    """The checkpoint: a folder in diffusers' layout, also of a latent diffusion pipeline, or with EDM's config, or a
    .pt file of OpenAI's, a path or an fsspec URI; or a Hugging Face repository, ORG/NAME or ORG/NAME@REVISION, if
    huggingface_hub is installed."""
    method: tuple[
        Literal["nll", "diffpath", "invad", "secmi", "dire", "dire-exact", "tree-ring", "gaussian-shading"], ...
    ]
    """What to compute, one or several. nll: the Gaussian density and the norm of the latent. diffpath: sums of epsilon
    and of its change. invad: density and range of norms of the latent. secmi: the t-error. dire: the distance to the
    reconstruction of clipped DDIM. dire-exact: that of exact inversion, which is near 0 for every image. tree-ring,
    gaussian-shading: the p-value of a watermark in the latent, and the nearest of the keys."""
    keys: tuple[str, ...] = ()
    """Files of keys that `palindrome watermark` wrote, paths or fsspec URIs: one for each of the methods tree-ring and
    gaussian-shading."""
    steps: Annotated[int, Range(1)] | None = None
    """Steps of the path up (default: nll and diffpath 10, invad 3, dire, dire-exact and watermarks 20). secmi has 11
    evaluations of its own."""
    resample: Literal["lanczos", "bicubic", "bilinear", "box", "area", "openai"] = "openai"
    """The filter that resizes images to the model's size; openai is the one of guided-diffusion, with which DIRE reads
    its images."""
    through: Annotated[int, Range(1)] | None = None
    """First resize the images to THROUGH x THROUGH pixels, by the same filter, as DiffPath does with images of unequal
    sizes: what is blurred alike is told apart less easily."""
    recompress: str | None = None
    """First make a JPEG of every image, in memory: jpeg:90 is one of quality 90. A score then tells JPEGs from PNGs
    less easily."""
    latents: bool = False
    """Also store each method's latent, float32, in METHOD_latent; secmi has none."""
    maps: bool = False
    """Also store where an image differs from its reconstruction by dire and dire-exact, as a PNG, in METHOD_map."""


def run(config: ScoreConfig) -> int:
    """Scores the remaining shards, writes summary and report, and returns the exit code."""
    methods = [method for name, method in METHODS.items() if name in config.method]
    _check(config, methods)
    reserved = frozenset(score_schema(methods, (1,) if config.latents else None, config.maps).names)
    with config_error("--images"), config.column_error():
        uri = absolute(config.images)
        keep = config.with_columns(config.keep)
        collection = open_collection(uri, keep=keep, reserved=reserved, **config.reading())
    where, model, how = open_model(config)
    with config_error("--recompress"):
        how = replace(how, recompress=config.recompress, through=config.through)
    with config_error("--out"):
        earlier = earlier_manifest(Folder(absolute(config.out)), "score")
    if earlier:
        model = model.as_described(earlier.content)
    with config_error("--keys"):
        keys = _keys(config, methods, model.latent_shape)
    with config_error("--steps" if config.steps else "--method"):
        measures = tuple(Measure.of(method, model, config.steps, keys.get(method.name)) for method in methods)
    scores = scores_of(methods)
    facts = {
        "model_digest": model.digest,
        **model.describe(),
        "methods": {measure.method.name: measure.record() for measure in measures},
        "scores": scores,
        "preprocess": how.record(),
    }
    budget = Budget(config.max_failed_shards, config.max_reject_fraction)

    def plan(out: Folder) -> Remaining:
        remaining, _ = plan_collection(config, out, collection, SCORES, "score")
        return remaining

    def work(out: Folder, resources: Resources, execution: Execution) -> Score:
        reader = Reader(collection, how, execution.batch_size, resources.decode_in_tasks, containers=True)
        about = {**facts, "precision": execution.precision}
        return Score(out, reader, measures, config.maps, config.latents, about, config.retry_rejects)

    def finish(out: Folder, failures: list[Failure]) -> int:
        found = read_scores(out, scores)
        summary = scores_summary(found, scores)
        put_summary(out, summary, failures)
        described = {
            "images": uri,
            "model": f"{where} (digest {model.digest[:16]})",
            "methods": ", ".join(f"{m.method.name} ({m.evaluations} evaluations)" for m in measures),
            "resized": how.resample + (f", through {how.through} pixels" if how.through else ""),
            **({"recompressed": how.recompress} if how.recompress else {}),
        }
        put_report(out, described, summary, found, collection, how)
        return _conclude(config, summary, over_budget(out, budget, failures, summary))

    job = ShardedJob(
        name="score",
        model=model,
        settings={
            "images": uri,
            "model": where,
            "keep": keep,
            "method": [method.name for method in methods],
            "keys": [absolute(file) for file in config.keys],
        },
        facts={**facts, "collection": collection.record()},
        plan=plan,
        evaluations=sum(measure.evaluations for measure in measures),
        written=_written(config, methods, model.image_shape, model.latent_shape),
        work=work,
        finish=finish,
        decode=config.decode,
        stall_timeout=config.stall,
        budget=budget,
    )
    return run_sharded(config, job)


def _check(config: ScoreConfig, methods: list[Method]) -> None:
    """Raises ConfigError."""
    names = ", ".join(method.name for method in methods)
    if len(set(config.method)) != len(config.method):
        raise ConfigError("--method: a method is given twice")
    if config.maps and not any(method.map for method in methods):
        raise ConfigError(f"--maps: {names} makes no map; dire and dire-exact do")
    if config.latents and not any(method.latent for method in methods):
        raise ConfigError(f"--latents: {names} has no latent")


def _keys(config: ScoreConfig, methods: list[Method], shape: tuple[int, ...]) -> dict[str, Keys]:
    """The keys of each method. Raises ConfigError, ValueError and OSError."""
    keyed = [method.name for method in methods if method.keyed]
    if keyed and find_spec("scipy") is None:
        raise ConfigError(f"--method: {keyed[0]} needs scipy, which palindrome[watermark] installs")
    found: dict[str, Keys] = {}
    for file in config.keys:
        keys = read_keys(file)
        method = keys.watermark.METHOD
        if method not in keyed or method in found:
            raise ConfigError(f"--keys: {file} has keys of {method}, {'again' if method in found else 'not computed'}")
        keys.check(shape)
        found[method] = keys
    return found


def _written(config: ScoreConfig, methods: list[Method], image: tuple[int, ...], latent: tuple[int, ...]) -> int:
    """Bytes per image, at most."""
    maps = prod(image) * sum(method.map for method in methods) if config.maps else 0
    return maps + (4 * prod(latent) * sum(method.latent for method in methods) if config.latents else 0)


def _conclude(config: ScoreConfig, summary: dict[str, Any], exceeded: str | None) -> int:
    print(f"{summary['scored']} images scored and {summary['rejects']} rejects in {config.out}")
    print_rejects(summary)
    for name, found in summary["scores"].items():
        if "significant" in found:
            print(f"{name}: at most {LEVEL:g} for {found['significant']} images ({found['of']})")
        elif found["count"]:
            mean, std = figure(found["mean"]), figure(found["std"])
            print(f"{name}: mean {mean}, standard deviation {std} ({found['positive']}: {found['of']})")
    print(f"report: {config.out}/report.html")
    if "dire-exact" in config.method:
        print(EXACT, file=sys.stderr)
    return exit_code(summary["scored"], "scored", exceeded)
