"""palindrome reconstruct: stored latents -> images, compared with the originals."""

import sys
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from palindrome.jobs.arguments import Range, config_error
from palindrome.jobs.config import ReadingConfig
from palindrome.jobs.estimate import Cost, on_cluster
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.sources import Collection
from palindrome.pipeline.reports.comparison import choose_examples, series_at
from palindrome.pipeline.reports.reconstruction import reconstruction_report
from palindrome.pipeline.runs.encoded import encode_run, execution_of, ladders_of, model_of
from palindrome.pipeline.runs.kinds import RECONSTRUCTIONS
from palindrome.pipeline.runs.manifest import claim
from palindrome.pipeline.runs.outcome import Failure
from palindrome.pipeline.runs.plan import read_plan
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.runs.summary import mean_nfe, put_summary, read_errors, reconstructions_summary
from palindrome.pipeline.runtime.progress import Progress, follow
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.runtime.scheduler import run_shards
from palindrome.pipeline.storage.folder import Folder, absolute
from palindrome.pipeline.tasks.reconstruct import Reconstruct


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(ReadingConfig):
    """Decode the latents of an encode run, compare the images with the originals, and report the error."""

    GROUP: ClassVar[str] = "sampling"
    EXAMPLES: ClassVar[str] = """
    palindrome reconstruct --latents runs/photos --out runs/reconstructed
    palindrome reconstruct --latents runs/photos --out runs/by-steps --steps 10 20 50
    """

    latents: str
    """The run folder that encode wrote; a path or an fsspec URI."""
    model: str | None = None
    """The checkpoint folder (default: the one that encode used, where it used it)."""
    steps: tuple[Annotated[int, Range(1)], ...] = ()
    """Numbers of decoding steps, each on a ladder of the run's kind up to the run's top level (default: the
    run's own ladder); equal steps of the log-SNR where that was a list."""


def run(config: ReconstructConfig) -> int:
    """Reconstructs what is not reconstructed yet, writes summary and report, and returns the exit code."""
    latents, out = Folder(absolute(config.latents)), Folder(absolute(config.out))
    with config_error("--latents"):
        encoded, plan, done_latents = encode_run(latents)
    with config_error("--model"):
        _, model = model_of(encoded, config.model)
    with config_error("--steps"):
        ladders = ladders_of(encoded, config.steps, model.schedule)
    with config_error("--out"):
        facts = {"model_digest": model.digest, "ladders": [list(levels) for levels in ladders]}
        claim(out, "reconstruct", config.settings(latents=latents.uri), config.MUTABLE, facts, config.defaults())
    how = Preprocess(**encoded["preprocess"])
    collection = Collection(**encoded["collection"])

    done = committed(out, RECONSTRUCTIONS)
    totals = plan.part(len(done_latents))
    left = done_latents - done
    print(f"{totals.shards} shards of latents, {len(left)} to reconstruct", flush=True)
    if len(done_latents) < plan.shards:
        print(f"the encode run is not complete: {len(done_latents)} of {plan.shards} shards", file=sys.stderr)
    failures: list[Failure] = []
    if left or config.dry_run:
        decoding = sum(len(levels) - 1 for levels in ladders)
        cost = Cost.of(totals, len(left), decoding, len(ladders) * model.config.values)
        todo = (shard for shard in read_plan(latents) if shard.name in left)
        with on_cluster(config, model, cost, config.decode, lambda _: encoded.get("precision")) as resources:
            reader = Reader(collection, how, resources.batch_size, resources.read_by_tasks)
            work = Reconstruct(out, latents, reader, ladders, {"model_digest": model.digest})
            failures = follow(Progress("reconstruct", totals, len(done)), run_shards(work, model, todo, resources))
            out.clear_unfinished()
    rows, steps = read_errors(out), [len(levels) - 1 for levels in ladders]
    summary = reconstructions_summary(out, rows, steps)
    put_summary(out, summary, failures)
    inversion = encoded["inversion"]
    nfe = mean_nfe(latents)
    described: dict[str, str] = {
        "latents": config.latents,
        "images": collection.uri,
        "model": f"{encoded['config']['model']} (digest {model.digest[:16]})",
        "inversion": f"{inversion['method']}, corrections a step: {inversion['corrections']},"
        f" tolerance: {inversion.get('tolerance') or 'none'}, evaluations: {nfe:.4g}",
        "ladder": f"{encoded['config']['ladder']}, {len(encoded['levels']) - 1} steps to {encoded['levels'][-1]}",
        "precision": f"{execution_of(encoded).precision}; stored as {encoded['config']['dtype']}",
    }
    series = [series_at(rows, count, nfe) for count in sorted(steps)]
    examples = choose_examples(out, latents, collection, how, rows, max(steps))
    out.put("report.html", reconstruction_report("Reconstruction", described, series, examples).encode())
    return _conclude(config, summary, failures)


def _conclude(config: ReconstructConfig, summary: dict[str, Any], failures: list[Failure]) -> int:
    for row in summary["by_steps"]:
        if row["count"]:
            print(
                f"{row['steps']} steps: round-trip error {row['mean']:.3g} (mean squared error, pixels in [0, 1];"
                f" median {row['median']:.3g}, p99 {row['p99']:.3g}), {row['identical']:.1%} of 8-bit values identical"
            )
        for reason, count in row["uncompared"].items():
            print(f"{row['steps']} steps: {count} images not compared: {reason}")
    print(f"report: {config.out}/report.html")
    if failures:
        print(f"{len(failures)} shards failed; the same command tries them again", file=sys.stderr)
        return 1
    return 0
