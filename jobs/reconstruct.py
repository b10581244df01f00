"""palindrome reconstruct: stored latents -> images, compared with the originals."""

import sys
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, ClassVar

from palindrome.jobs.arguments import Range, config_error
from palindrome.jobs.config import ReadingConfig
from palindrome.jobs.sharded import Remaining, ShardedJob, remaining_latents, run_sharded
from palindrome.model.execution import Execution
from palindrome.pipeline.base.text import figure
from palindrome.pipeline.reports.comparison import choose_examples, series_at
from palindrome.pipeline.reports.reconstruction import reconstruction_report
from palindrome.pipeline.runs.encoded import EncodeRun
from palindrome.pipeline.runs.kinds import RECONSTRUCTIONS
from palindrome.pipeline.runs.outcome import Failure
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.runs.summary import apart_words, mean_nfe, put_summary, read_errors, reconstructions_summary
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.runtime.scheduler import Resources
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
    """The checkpoint folder (default: the one that encode used, at the same path)."""
    steps: tuple[Annotated[int, Range(1)], ...] = ()
    """Numbers of decoding steps, each on a ladder of the encode run's kind (logsnr if that was a list or
    diffusers) up to its top level (default: the encode run's own ladder)."""


def run(config: ReconstructConfig) -> int:
    """Reconstructs the remaining shards, writes summary and report, and returns the exit code."""
    with config_error("--latents"):
        encoded = EncodeRun.open(Folder(absolute(config.latents)))
    with config_error("--model"):
        _, model = encoded.load_model(config.model, config.allow_pickle)
    with config_error("--steps"):
        ladders = encoded.ladders(config.steps, model.process)
    collection, how = encoded.collection, encoded.preprocess
    facts = {"model_digest": model.digest, "ladders": [list(levels) for levels in ladders], **model.told()}
    if model.autoencoded:
        facts["autoencoder"] = model.describe()["autoencoder"]

    def plan(out: Folder) -> Remaining:
        return remaining_latents(encoded, committed(out, RECONSTRUCTIONS), "reconstruct")

    def work(out: Folder, resources: Resources, execution: Execution) -> Reconstruct:
        reader = Reader(collection, how, execution.batch_size, resources.decode_in_tasks)
        return Reconstruct(out, encoded.folder, reader, ladders, {"model_digest": model.digest})

    def finish(out: Folder, failures: list[Failure]) -> int:
        found, steps = read_errors(out, encoded.folder), [len(levels) - 1 for levels in ladders]
        summary = reconstructions_summary(found, steps)
        put_summary(out, summary, failures)
        nfe, errors = mean_nfe(encoded.folder, out), {count: found.errors[str(count)] for count in sorted(steps)}
        series = [series_at(of_steps, count, nfe) for count, of_steps in errors.items()]
        examples = choose_examples(out, encoded.folder, collection, how, errors[max(steps)], max(steps))
        described = {
            "latents": config.latents,
            "images": collection.uri,
            "model": f"{encoded.model} (digest {model.digest[:16]})",
            **encoded.described(),
            "evaluations": f"{nfe:.4g} an image to encode it",
        }
        out.put("report.html", reconstruction_report("Reconstruction", described, series, examples).encode())
        _conclude(config, summary)
        return 0

    job = ShardedJob(
        name="reconstruct",
        model=model,
        settings={"latents": encoded.folder.uri},
        facts=facts,
        plan=plan,
        evaluations=sum(len(levels) - 1 for levels in ladders),
        written=len(ladders) * prod(model.image_shape),
        work=work,
        finish=finish,
        decode=config.decode,
        precision=lambda *_: encoded.manifest.precision,
    )
    return run_sharded(config, job)


def _conclude(config: ReconstructConfig, summary: dict[str, Any]) -> None:
    for row in summary["by_steps"]:
        if row["count"]:
            if row["not_finite"]:
                left_out = f"{row['not_finite']} images are not finite, and left out of the mean"
                print(f"{row['steps']} steps: {left_out}", file=sys.stderr)
            mean, median, p99 = (figure(row[name]) for name in ("mean", "median", "p99"))
            print(
                f"{row['steps']} steps: round-trip error {mean} (mean squared error, pixels in [0, 1]; median {median},"
                f" p99 {p99}), {row['identical']:.1%} of 8-bit values identical"
            )
            if words := apart_words(row):
                print(words)
        for reason, count in row["uncompared"].items():
            print(f"{row['steps']} steps: {count} images not compared: {reason}")
    print(f"report: {config.out}/report.html")
