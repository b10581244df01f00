"""palindrome regenerate: stored latents -> images."""

import sys
from dataclasses import dataclass
from math import prod
from typing import Annotated, ClassVar

from palindrome.jobs.arguments import ConfigError, Range, config_error
from palindrome.jobs.config import ConditionOptions, ImagesConfig, SelectionOptions
from palindrome.jobs.sharded import Remaining, ShardedJob, remaining_latents, run_sharded
from palindrome.model.execution import Execution
from palindrome.pipeline.reports.regeneration import put_report
from palindrome.pipeline.runs.encoded import EncodeRun
from palindrome.pipeline.runs.kinds import IMAGES
from palindrome.pipeline.runs.outcome import Failure
from palindrome.pipeline.runs.plan import read_plan
from palindrome.pipeline.runs.selection import Selection
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.runs.summary import put_summary, regenerated_summary
from palindrome.pipeline.runtime.scheduler import Resources
from palindrome.pipeline.storage.folder import Folder, absolute
from palindrome.pipeline.tasks.regenerate import Regenerate


@dataclass(frozen=True, kw_only=True)
class RegenerateConfig(ImagesConfig, SelectionOptions, ConditionOptions):
    """Decode the latents of an encode run to images, one Parquet file per shard in OUT/images."""

    GROUP: ClassVar[str] = "sampling"
    EXAMPLES: ClassVar[str] = """
    palindrome regenerate --latents runs/photos --out runs/by-steps --steps 10 20 50
    palindrome regenerate --latents runs/photos --out runs/variations --eta 0.5 --variations 4 --format png
    palindrome regenerate --latents runs/photos --out runs/edited --prompt 'a painting of a cat' --keep-until 0.3
    """

    latents: str
    """The run folder that encode wrote; a path or an fsspec URI."""
    model: str | None = None
    """The checkpoint folder (default: the one that encode used, at the same path)."""
    steps: tuple[Annotated[int, Range(1)], ...] = ()
    """Numbers of decoding steps, each on a ladder of the encode run's kind (logsnr if that was a list or
    diffusers) up to its top level (default: the encode run's own ladder)."""
    eta: Annotated[float, Range(0, 1)] = 0.0
    """The noise added in each step: 0 reproduces the image, more gives variations of it."""
    sigma_hat: bool = False
    """Add noise with the larger standard deviation sigma-hat of section 5 of the DDIM paper."""
    variations: Annotated[int, Range(1)] = 1
    """The number of images per latent, each with its own noise; requires --eta above 0 or --sigma-hat."""
    seed: Annotated[int, Range(0)] = 0
    """The seed of the noise."""
    keep_until: Annotated[float, Range(0, 1)] = 0.0
    """The fraction of the steps, from the latent on, that are taken under the class or the text that the images were
    encoded with; the others under --class, --prompt and --guidance. More keeps more of an image's structure."""


def run(config: RegenerateConfig) -> int:
    """Decodes the remaining shards, writes summary and report, and returns the exit code."""
    if config.variations > 1 and not (config.eta or config.sigma_hat):
        raise ConfigError("--variations: without --eta or --sigma-hat all of them are the same image")
    if config.eta and config.sigma_hat:
        raise ConfigError("--sigma-hat: can't be combined with --eta")
    with config_error("--latents"):
        encoded = EncodeRun.open(Folder(absolute(config.latents)))
    latents = encoded.folder
    which = config.selection(latents, min(encoded.done))
    with config_error("--model"):
        where, model = encoded.load_model(config.model, config.allow_pickle)
    source, model = model.told(), config.conditioned(model)
    if config.keep_until and model.told() == source:
        raise ConfigError("--keep-until: there is no other class, text or guidance for the steps after it")
    with config_error("--steps"):
        ladders = encoded.ladders(config.steps, model.process)
    how = {"eta": config.eta, "use_sigma_hat": config.sigma_hat}
    facts = {"model_digest": model.digest, "ladders": [list(levels) for levels in ladders], **model.told()}

    def plan(out: Folder) -> Remaining:
        return remaining_latents(encoded, committed(out, IMAGES), "decode")

    def work(out: Folder, resources: Resources, execution: Execution) -> Regenerate:
        kept = {"keep_until": config.keep_until} if config.keep_until else {}
        about = {**facts, **how, **kept, "seed": config.seed}
        noise = (config.variations, config.seed, how)
        size = execution.batch_size
        return Regenerate(out, latents, which, ladders, *noise, size, about, source, config.keep_until)

    def finish(out: Folder, failures: list[Failure]) -> int:
        summary = regenerated_summary(out, latents)
        put_summary(out, summary, failures)
        by_steps = summary["by_steps"]
        steps = ", ".join(str(row["steps"]) for row in by_steps)
        described = {"latents": config.latents, "model": where, "steps": steps}
        described |= {"eta": "sigma-hat" if config.sigma_hat else f"{config.eta:g}", "images": f"{summary['images']:,}"}
        done = committed(out, IMAGES)
        put_report(out, described, by_steps, (shard.name for shard in read_plan(latents) if shard.name in done))
        return _conclude(config, which, summary)

    job = ShardedJob(
        name="regenerate",
        model=model,
        settings={"latents": latents.uri},
        facts={**facts, "ids_digest": which.ids_digest},
        plan=plan,
        evaluations=sum(len(levels) - 1 for levels in ladders) * config.variations,
        written=len(ladders) * config.variations * prod(model.image_shape),
        work=work,
        finish=finish,
        precision=lambda *_: encoded.manifest.precision,
        uniform_cost=which == Selection(),
    )
    return run_sharded(config, job)


def _conclude(config: RegenerateConfig, which: Selection, summary: dict[str, object]) -> int:
    found = summary.get("latents", 0)
    print(f"{summary['images']} images of {found} latents in {config.out}; report: {config.out}/report.html")
    if which.ids is not None and found != len(which.ids):
        print(f"{found} of {len(which.ids)} ids have a latent that matches", file=sys.stderr)
    if not summary["images"]:
        print("no latent matches --ids and --where", file=sys.stderr)
        return 1
    return 0
