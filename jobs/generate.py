"""palindrome generate: new samples from noise."""

from dataclasses import dataclass
from math import prod
from typing import Annotated, ClassVar, Literal

from palindrome.jobs.arguments import ConfigError, Range, config_error
from palindrome.jobs.config import ConditionOptions, ImagesConfig, LatentOptions
from palindrome.jobs.sharded import Remaining, ShardedJob, remaining_shards, run_sharded
from palindrome.model.execution import Execution
from palindrome.pipeline.images.pixels import grid, pixels_of, png
from palindrome.pipeline.runs.kinds import IMAGES
from palindrome.pipeline.runs.ladders import KINDS, NAMED, resolve
from palindrome.pipeline.runs.manifest import earlier_manifest
from palindrome.pipeline.runs.models import load_model
from palindrome.pipeline.runs.outcome import Failure
from palindrome.pipeline.runs.plan import add_pieces, plan_totals, read_plan
from palindrome.pipeline.runs.schemas import DTYPES
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.runs.summary import generated_summary, put_summary
from palindrome.pipeline.runs.watermarks import read_keys, record
from palindrome.pipeline.runtime.scheduler import Resources
from palindrome.pipeline.storage.folder import Folder, absolute
from palindrome.pipeline.tasks.generate import KIND, Generate, ranges

SHOWN, COLUMNS = 64, 8  # samples in samples.png


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ImagesConfig, LatentOptions, ConditionOptions):
    """Generate images from noise x_T ~ N(0, I), one Parquet file per shard in OUT/images.

    Sample i depends only on the seed, i and the model, not on batches, shards or workers."""

    GROUP: ClassVar[str] = "sampling"
    EXAMPLES: ClassVar[str] = """
    palindrome generate --model checkpoints/cifar10-32 --count 64 --out runs/samples
    palindrome generate --model checkpoints/cifar10-32 --count 50000 --steps 1000 --eta 1 --clip --out runs/ddpm
    """

    model: str
    """The checkpoint: a folder in diffusers' layout, also of a latent diffusion pipeline, or with EDM's config, or a
    .pt file of OpenAI's, a path or an fsspec URI; or a Hugging Face repository, ORG/NAME or ORG/NAME@REVISION, if
    huggingface_hub is installed."""
    count: Annotated[int, Range(1)]
    """The number of samples."""
    seed: Annotated[int, Range(0)] = 0
    """The seed of the noise."""
    steps: Annotated[int, Range(1)] | None = None
    """Steps from noise to image (default: 100, or those of the ladder's file or list)."""
    ladder: str = "linear"
    """The distribution of the steps over the timesteps: linear, quadratic, logsnr, timesteps such as 0,3,11,999, or a
    file that calibrate wrote."""
    eta: Annotated[float, Range(0, 1)] = 0.0
    """The noise added in each step: 0 is DDIM; 1 with --steps for all timesteps is DDPM's ancestral sampling."""
    sigma_hat: bool = False
    """Add noise with the larger standard deviation sigma-hat of section 5 of the DDIM paper."""
    clip: bool = False
    """Clip the predicted image to [-1, 1] in each step, as DDPM does; only with --eta above 0 or --sigma-hat."""
    watermark: str | None = None
    """A file of keys that `palindrome watermark` wrote: sample 0 has the watermark of the first key in its noise x_T,
    sample 1 that of the second, and so on, in turn; the column watermark names it. `score --keys` finds it again."""
    latents: Literal["none", "float16", "float32"] = "none"
    """The dtype in which x_T is stored with each image."""
    shard_size: Annotated[int, Range(1)] = 1024
    """The maximum number of samples per shard. A shard is one output file, and what is computed again if a worker
    dies."""


def run(config: GenerateConfig) -> int:
    """Generates the remaining shards and returns the exit code."""
    if config.clip and not (config.eta or config.sigma_hat):
        raise ConfigError("--clip: requires --eta above 0 or --sigma-hat; DDIM's own samples are not clipped")
    if config.eta and config.sigma_hat:
        raise ConfigError("--sigma-hat: can't be combined with --eta")
    with config_error("--model"):
        where, model = load_model(config.model, config.allow_pickle)
    model = config.conditioned(config.fitted(model))
    with config_error("--out"):
        earlier = earlier_manifest(Folder(absolute(config.out)), "generate")
    if earlier:
        model = model.as_described(earlier.content)
    with config_error("--steps" if config.ladder in KINDS else "--ladder"):
        steps = config.steps or (min(100, model.process.num_train_timesteps) if config.ladder in NAMED else None)
        levels = resolve(config.ladder, steps, model.process, earlier.top if earlier else None, model.own_ladder)
    with config_error("--watermark"):
        file = None if config.watermark is None else absolute(config.watermark)
        keys = None if file is None else read_keys(file)
        if keys is not None:
            keys.check(model.latent_shape)
    how = {"eta": config.eta, "use_sigma_hat": config.sigma_hat, "clip": config.clip}
    dtype = None if config.latents == "none" else config.latents
    facts = {"model_digest": model.digest, "levels": list(levels), **model.describe()}
    if keys is not None:
        facts["watermark"] = record(keys)

    def plan(out: Folder) -> Remaining:
        with config_error("--out"):
            pieces = ranges(config.count, config.seed, config.shard_size)
            totals = plan_totals(out) or add_pieces(out, KIND, pieces, config.shard_size)
        remaining = remaining_shards(out, totals, committed(out, IMAGES))
        print(f"{totals.images} samples in {totals.shards} shards, {remaining.left} to generate", flush=True)
        return remaining

    def work(out: Folder, resources: Resources, execution: Execution) -> Generate:
        about = {**facts, "seed": config.seed, **how}
        return Generate(out, config.seed, levels, how, dtype, execution.batch_size, about, keys)

    def finish(out: Folder, failures: list[Failure]) -> int:
        with config_error("--out"):
            summary = generated_summary(out)
            put_summary(out, summary, failures)
            _put_samples(out)
        print(f"{summary['images']} samples in {config.out}, the first in {config.out}/samples.png")
        return 0

    job = ShardedJob(
        name="generate",
        model=model,
        settings={"model": where, "steps": len(levels) - 1, "watermark": file},
        facts=facts,
        plan=plan,
        evaluations=len(levels) - 1,
        written=prod(model.image_shape) + (prod(model.latent_shape) * DTYPES[dtype].byte_width if dtype else 0),
        work=work,
        finish=finish,
    )
    return run_sharded(config, job)


def _put_samples(out: Folder) -> None:
    """Writes samples.png, a grid of the first committed shard's samples."""
    done = committed(out, IMAGES)
    first = next((shard.name for shard in read_plan(out) if shard.name in done), None)
    if first is not None:
        with out.parquet_file(f"{IMAGES}/{first}.parquet") as file:
            images = next(file.iter_batches(SHOWN, columns=["image"])).column("image").to_pylist()
        out.put("samples.png", png(grid([pixels_of(image["bytes"]) for image in images], COLUMNS)))
