"""palindrome regenerate: stored latents -> images."""

import sys
from dataclasses import dataclass
from typing import Annotated, ClassVar

from palindrome.jobs.arguments import ConfigError, Range, config_error
from palindrome.jobs.config import ImagesConfig, SelectionOptions
from palindrome.jobs.estimate import Cost, on_cluster
from palindrome.pipeline.reports.regeneration import put_report
from palindrome.pipeline.runs.encoded import encode_run, ladders_of, model_of
from palindrome.pipeline.runs.kinds import IMAGES
from palindrome.pipeline.runs.manifest import claim
from palindrome.pipeline.runs.outcome import Failure
from palindrome.pipeline.runs.plan import read_plan
from palindrome.pipeline.runs.selection import Selection
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.runs.summary import consistency, generated_summary, put_summary
from palindrome.pipeline.runtime.progress import Progress, follow
from palindrome.pipeline.runtime.scheduler import run_shards
from palindrome.pipeline.storage.folder import Folder, absolute
from palindrome.pipeline.tasks.regenerate import Regenerate


@dataclass(frozen=True, kw_only=True)
class RegenerateConfig(ImagesConfig, SelectionOptions):
    """Decode the latents of an encode run to images, one Parquet file a shard in OUT/images."""

    GROUP: ClassVar[str] = "sampling"
    EXAMPLES: ClassVar[str] = """
    palindrome regenerate --latents runs/photos --out runs/by-steps --steps 10 20 50
    palindrome regenerate --latents runs/photos --out runs/variations --eta 0.5 --variations 4 --format png
    """

    latents: str
    """The run folder that encode wrote; a path or an fsspec URI."""
    model: str | None = None
    """The checkpoint folder (default: the one that encode used, where it used it)."""
    steps: tuple[Annotated[int, Range(1)], ...] = ()
    """Numbers of decoding steps, each on a ladder of the run's kind up to the run's top level (default: the
    run's own ladder); equal steps of the log-SNR where that was a list."""
    eta: Annotated[float, Range(0, 1)] = 0.0
    """Noise added in each step: 0 gives the very image, more gives others that are like it."""
    sigma_hat: bool = False
    """Add noise of the larger deviation sigma-hat of the DDIM paper's section 5."""
    variations: Annotated[int, Range(1)] = 1
    """Images of each latent, with noise of their own: for --eta above 0 or --sigma-hat."""
    seed: Annotated[int, Range(0)] = 0
    """Of that noise."""


def run(config: RegenerateConfig) -> int:
    """Regenerates what is not there yet, writes summary and report, and returns the exit code."""
    if config.variations > 1 and not (config.eta or config.sigma_hat):
        raise ConfigError("--variations: without --eta or --sigma-hat all of them are the same image")
    if config.eta and config.sigma_hat:
        raise ConfigError("--sigma-hat: it stands for itself, without --eta")
    latents, out = Folder(absolute(config.latents)), Folder(absolute(config.out))
    with config_error("--latents"):
        encoded, plan, done_latents = encode_run(latents)
    which = config.selection(latents, min(done_latents))
    with config_error("--model"):
        where, model = model_of(encoded, config.model)
    with config_error("--steps"):
        ladders = ladders_of(encoded, config.steps, model.schedule)
    how = {"eta": config.eta, "use_sigma_hat": config.sigma_hat}
    facts = {"model_digest": model.digest, "ladders": [list(levels) for levels in ladders]}
    with config_error("--out"):
        known = {**facts, "ids_digest": which.ids_digest}
        claim(out, "regenerate", config.settings(latents=latents.uri), config.MUTABLE, known, config.defaults())

    done = committed(out, IMAGES)
    left = done_latents - done
    totals = plan.part(len(done_latents))
    print(f"{totals.shards} shards of latents, {len(left)} to go through", flush=True)
    if len(done_latents) < plan.shards:
        print(f"the encode run is not complete: {len(done_latents)} of {plan.shards} shards", file=sys.stderr)
    failures: list[Failure] = []
    if left or config.dry_run:
        nfe = sum(len(levels) - 1 for levels in ladders) * config.variations
        cost = Cost.of(totals, len(left), nfe, len(ladders) * config.variations * model.config.values)
        todo = (shard for shard in read_plan(latents) if shard.name in left)
        with on_cluster(config, model, cost, "actor", lambda _: encoded.get("precision")) as resources:
            about = {**facts, **how, "seed": config.seed}
            noise = (config.variations, config.seed, how)
            work = Regenerate(out, latents, which, ladders, *noise, resources.batch_size, about)
            progress = Progress("regenerate", totals, len(done), alike=which == Selection())
            failures = follow(progress, run_shards(work, model, todo, resources))
            out.clear_unfinished()
    by_steps = consistency(out)
    summary = {**generated_summary(out), "by_steps": by_steps}
    put_summary(out, summary, failures)
    described = {"latents": config.latents, "model": where, "steps": ", ".join(str(row["steps"]) for row in by_steps)}
    described |= {"eta": "sigma-hat" if config.sigma_hat else f"{config.eta:g}", "images": f"{summary['images']:,}"}
    there = committed(out, IMAGES)
    put_report(out, described, by_steps, (shard.name for shard in read_plan(latents) if shard.name in there))
    return _conclude(config, which, summary, failures)


def _conclude(config: RegenerateConfig, which: Selection, summary: dict[str, object], failures: list[Failure]) -> int:
    found = summary.get("latents", 0)
    print(f"{summary['images']} images of {found} latents in {config.out}; report: {config.out}/report.html")
    if which.ids is not None and found != len(which.ids):
        print(f"of {len(which.ids)} ids {found} have a latent that was asked for", file=sys.stderr)
    if failures:
        print(f"{len(failures)} shards failed; the same command tries them again", file=sys.stderr)
        return 1
    if not summary["images"]:
        print("no latent is as was asked for", file=sys.stderr)
        return 1
    return 0
