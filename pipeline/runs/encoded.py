"""An encode run as the jobs find it that work from its latents."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow.dataset as dataset

from palindrome.model import checkpoint
from palindrome.model.engine import FLOAT32, Execution
from palindrome.model.schedule import Ladder, NoiseSchedule, check_ladder
from palindrome.pipeline.base.errors import ManifestError
from palindrome.pipeline.runs.kinds import LATENTS
from palindrome.pipeline.runs.ladders import KINDS, ladder_of_kind
from palindrome.pipeline.runs.manifest import read_manifest
from palindrome.pipeline.runs.plan import Totals, plan_totals, read_plan
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.storage.folder import Folder, absolute, options_for


def encode_run(latents: Folder) -> tuple[dict[str, Any], Totals, set[str]]:
    """The encode run's `run.json`, what its plan holds, and the shards that are done, at least one. Raises
    ManifestError."""
    if not latents.exists():
        raise ManifestError(f"{latents.uri} does not exist")
    manifest = read_manifest(latents)
    if manifest is None:
        raise ManifestError(f"{latents.uri} is no run folder (it has no run.json)")
    if manifest["job"] != "encode":
        raise ManifestError(f"{latents.uri} is a run of {manifest['job']}, not of encode")
    check_ladder(manifest["levels"], manifest["num_train_timesteps"])
    plan, done = plan_totals(latents), committed(latents)
    if plan is None or not done:
        raise ManifestError(f"{latents.uri} holds no latents yet")
    return manifest, plan, done


def latents_dataset(run: Folder, done: Collection[str]) -> dataset.Dataset:
    """The rows of the shards that are done, in the plan's order."""
    files = [run.path(f"{LATENTS}/{shard.name}.parquet") for shard in read_plan(run) if shard.name in done]
    return dataset.dataset(files, filesystem=run.arrow_fs, format="parquet")


def model_of(encoded: dict[str, Any], asked: str | None) -> tuple[str, checkpoint.Checkpoint]:
    """Where the model is and the model: the one that made the latents, at the place asked for or where encode found it.
    Raises ValueError where it is another."""
    where = absolute(asked or encoded["config"]["model"])
    model = checkpoint.load(where, options_for(where))
    if model.digest != encoded["model_digest"]:
        raise ValueError(
            f"the latents were made by another model: digest {encoded['model_digest'][:12]}…,"
            f" and this one's is {model.digest[:12]}…"
        )
    return where, model


def execution_of(encoded: Mapping[str, Any]) -> Execution:
    """How the network was evaluated that made the latents."""
    return Execution(encoded.get("precision") or FLOAT32.precision)


def ladders_of(encoded: dict[str, Any], steps: Sequence[int], schedule: NoiseSchedule) -> tuple[Ladder, ...]:
    """A ladder for each number of steps, of the run's kind and up to its top level; the run's own where its number is
    named, or none is. Raises ValueError."""
    own, kind = tuple(encoded["levels"]), encoded["config"]["ladder"]
    kind = kind if kind in KINDS else "logsnr"  # a list says nothing of other numbers of steps
    if len(set(steps)) != len(steps):
        raise ValueError("a number is named twice")
    found = (own if count == len(own) - 1 else ladder_of_kind(kind, count, schedule, own[-1]) for count in steps)
    return tuple(found) or (own,)
