"""palindrome edit: stored latents -> the images, changed."""

import sys
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from palindrome.jobs.arguments import ConfigError, Range, config_error
from palindrome.jobs.config import ConditionOptions, ImagesConfig, ReadingConfig, SelectionOptions, column_error
from palindrome.jobs.sharded import Remaining, ShardedJob, print_rejects, remaining_latents, run_sharded
from palindrome.model.execution import Execution
from palindrome.pipeline.base.text import figure
from palindrome.pipeline.images.masks import Masks
from palindrome.pipeline.reports.editing import put_report
from palindrome.pipeline.runs.directions import Direction, read_direction
from palindrome.pipeline.runs.encoded import EncodeRun
from palindrome.pipeline.runs.kinds import IMAGES, REJECTS
from palindrome.pipeline.runs.outcome import Failure
from palindrome.pipeline.runs.selection import Selection
from palindrome.pipeline.runs.shards import committed, read_latents
from palindrome.pipeline.runs.summary import edited_summary, put_summary
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.runtime.scheduler import Resources
from palindrome.pipeline.storage.folder import Folder, absolute
from palindrome.pipeline.tasks.edit import Change, Edit
from palindrome.pipeline.tasks.paths import located


@dataclass(frozen=True, kw_only=True)
class EditConfig(ImagesConfig, ReadingConfig, SelectionOptions, ConditionOptions):
    """Change the images of an encode run, and with --mask only a part of them: another class or text, towards another
    image, or along a direction. One Parquet file per shard in OUT/images.

    Outside of the mask each image is held to its own path from latent to image. If its inversion is exact, no pixel
    changes there."""

    GROUP: ClassVar[str] = "sampling"
    MUTABLE: ClassVar[frozenset[str]] = (
        ImagesConfig.MUTABLE
        | ReadingConfig.MUTABLE
        | {
            "retry_rejects",
            "direction",  # what the file holds is a fact of its own
        }
    )
    EXAMPLES: ClassVar[str] = """
    palindrome edit --latents runs/photos --towards cat.png --strength 0.3 0.6 --mask box:0.25 --out runs/edited
    palindrome edit --latents runs/photos --direction smile.safetensors --strength -2 2 --out runs/smiling
    palindrome edit --latents runs/photos --prompt 'a red car' --keep-until 0.3 --mask file:masks/ --out runs/red
    """

    latents: str
    """The run folder that encode wrote; a path or an fsspec URI."""
    model: str | None = None
    """The checkpoint folder (default: the one that encode used, at the same path)."""
    steps: Annotated[int, Range(1)] | None = None
    """Decoding steps, on a ladder of the encode run's kind (default: that run's own ladder, on which alone an exact
    inversion is exact)."""
    keep_until: Annotated[float, Range(0, 1)] = 0.0
    """The fraction of the steps, from the latent on, that are taken under the class or the text that the images were
    encoded with; the others under --class, --prompt and --guidance. More keeps more of an image's structure."""
    towards: str | None = None
    """The id of an image of the run, towards whose latent the latents are moved, on the sphere."""
    direction: str | None = None
    """A file that palindrome direction wrote: what is added to the latents, or to x at its level along the path."""
    strength: tuple[float, ...] = ()
    """How far to move: with --towards the part of the angle, 0 to 1; with --direction the number that it is multiplied
    by, also a negative one. Each gives a picture of every image (default: 1)."""
    mask: str | None = None
    """Where the images may change. box:FRACTION: a centred square of that fraction of the area. file:URI: a picture,
    white where it may change, of the size of the model's images; or a folder with one for each image: ID.png for the
    image ID. column:NAME: a column of such pictures beside the images. (default: everywhere)"""
    retry_rejects: bool = False
    """Compute shards with rejects again: by now a mask or an original may exist."""

    @property
    def strengths(self) -> tuple[float, ...]:
        return self.strength or (1.0,)


def run(config: EditConfig) -> int:
    """Edits the remaining shards, writes summary and report, and returns the exit code."""
    with config_error("--latents"):
        encoded = EncodeRun.open(Folder(absolute(config.latents)))
    latents = encoded.folder
    which = config.selection(latents, min(encoded.done))
    with config_error("--model"):
        where, model = encoded.load_model(config.model, config.allow_pickle)
    told = config.conditioned(model).told()
    tells = told != model.told()
    if config.keep_until and not tells:
        raise ConfigError("--keep-until: there is no other class, text or guidance for the steps after it")
    if not tells and config.towards is None and config.direction is None:
        raise ConfigError("--towards: nothing is to change: give it, --direction, or another class, text or guidance")
    if config.strength and config.towards is None and config.direction is None:
        raise ConfigError("--strength: goes with --towards or --direction")
    with config_error("--steps"):
        [levels] = encoded.ladders(() if config.steps is None else (config.steps,), model.process)
    collection = encoded.collection
    with config_error("--mask"):
        masks = None if config.mask is None else Masks.of(config.mask, encoded.preprocess.size)
    if masks is not None and masks.column is not None:
        with config_error("--mask"), column_error(mask=masks.column):
            collection = encoded.collection_with(masks.column)
    other = None if config.towards is None else _latent_of(encoded, config.towards)
    with config_error("--direction"):
        direction = None if config.direction is None else read_direction(config.direction)
        if direction is not None:
            direction.check(model.digest, levels, model.latent_shape)
    what = {
        "towards": config.towards,
        "direction": direction and direction.record(),
        "told": told if tells else None,
        "keep_until": config.keep_until,
        "mask": masks and masks.record(),
    }
    facts = {"model_digest": model.digest, "levels": list(levels), **model.told(), "edit": what}
    with config_error("--strength"):
        change = Change(levels, config.strengths, other, direction, told if tells else None, config.keep_until, masks)

    def plan(out: Folder) -> Remaining:
        again = committed(out, REJECTS) if config.retry_rejects else set()
        return remaining_latents(encoded, committed(out, IMAGES) - again, "edit")

    def work(out: Folder, resources: Resources, execution: Execution) -> Edit:
        reader = Reader(collection, encoded.preprocess, execution.batch_size, resources.decode_in_tasks)
        return Edit(out, latents, which, reader, change, facts, config.retry_rejects)

    def finish(out: Folder, failures: list[Failure]) -> int:
        summary = edited_summary(out, latents, config.strengths)
        put_summary(out, summary, failures)
        described = {
            "latents": config.latents,
            "model": f"{where} (digest {model.digest[:16]})",
            **encoded.described(),
            "edit": _described(config, direction, tells),
            "mask": masks.recipe if masks else "none",
            "steps": str(len(levels) - 1),
        }
        put_report(out, described, summary, encoded, config.strengths)
        return _conclude(config, which, summary)

    job = ShardedJob(
        name="edit",
        model=model,
        settings={
            "latents": latents.uri,
            "strength": config.strengths,
            "mask": masks and masks.recipe,
        },
        facts={**facts, "ids_digest": which.ids_digest},
        plan=plan,
        evaluations=(len(levels) - 1) * (1 + len(config.strengths)),
        written=prod(model.image_shape) * (1 + len(config.strengths)),
        work=work,
        finish=finish,
        decode=config.decode,
        precision=lambda *_: encoded.manifest.precision,
        uniform_cost=which == Selection(),
    )
    return run_sharded(config, job)


def _latent_of(encoded: EncodeRun, image_id: str) -> Tensor:
    """Raises ConfigError where the run has none of that image."""
    with config_error("--towards"):
        [[(_, shard)]] = located(encoded.folder, encoded.done, [[image_id]], must=True)
        assert shard is not None  # else refused
        [(_, [latent])] = read_latents(encoded.folder, shard, 1, Selection((image_id,)))
        return torch.from_numpy(latent)


def _described(config: EditConfig, direction: Direction | None, tells: bool) -> str:
    """The edit in words."""
    moved = []
    if config.towards is not None:
        moved = [f"towards {config.towards}"]
    if direction is not None:
        moved = [f"along {direction.where} less {direction.against}, at level {direction.level:g}"]
    told = {"class": config.class_, "prompt": config.prompt, "guidance": config.guidance} if tells else {}
    said = [f"{name} {value}" for name, value in told.items() if value is not None]
    kept = [f"the first {config.keep_until:.0%} of the steps as encoded"] if config.keep_until else []
    return "; ".join([*moved, *said, *kept])


def _conclude(config: EditConfig, which: Selection, summary: dict[str, Any]) -> int:
    made, found, refused = summary["images"], summary["latents"], summary["rejects"]
    print(f"{made} pictures of {found} images and {refused} rejects in {config.out}")
    print_rejects(summary)
    for row in summary["by_strength"]:
        if row["count"]:
            of = f" at strength {row['strength']:g}" if config.strength else ""
            print(f"mean squared change{of}: {figure(row['mean'])} (where it may change, pixels in [0, 1])")
    if "outside" in summary:
        there = summary["outside"]
        most = f"; at most {there['most']:,} of a picture ({there['worst'][0]})" if there["changed"] else ""
        print(f"{there['changed']:,} of {there['values']:,} values outside the masks changed{most}")
    for reason, count in summary["own"]["uncompared"].items():
        print(f"{count} images not compared: {reason}")
    print(f"report: {config.out}/report.html")
    if which.ids is not None and found + refused != len(which.ids):
        print(f"{found + refused} of {len(which.ids)} ids have a latent that matches", file=sys.stderr)
    if not found:
        print("no image could be edited" if refused else "no latent matches --ids and --where", file=sys.stderr)
        return 1
    return 0
