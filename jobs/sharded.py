"""The frame of every sharded job: claim, plan, cost, cluster, progress, summary."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from palindrome.jobs.arguments import config_error
from palindrome.jobs.config import ShardedConfig, WholeCollectionConfig
from palindrome.jobs.estimate import Cost, prepared
from palindrome.jobs.holding import hold_run
from palindrome.model.execution import Execution
from palindrome.model.families import Checkpoint
from palindrome.pipeline.images.records import REASONS, Shard
from palindrome.pipeline.images.sources import Collection
from palindrome.pipeline.runs.encoded import EncodeRun
from palindrome.pipeline.runs.kinds import REJECTS
from palindrome.pipeline.runs.outcome import Failure
from palindrome.pipeline.runs.plan import Totals, extend_plan, plan_totals, read_plan, write_plan
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.runs.summary import rejects_by_reason
from palindrome.pipeline.runtime.actor import Work
from palindrome.pipeline.runtime.executor import Executor
from palindrome.pipeline.runtime.progress import Budget, Progress, follow
from palindrome.pipeline.runtime.scheduler import STALL_TIMEOUT, Resources
from palindrome.pipeline.storage.folder import Folder, absolute


@dataclass(frozen=True)
class Remaining:
    """The size of the plan, the number of shards left, those shards, read lazily, and the rejects in the others, where
    there is a budget for them."""

    totals: Totals
    left: int
    shards: Iterator[Shard]
    rejects: int = 0


@dataclass(frozen=True, kw_only=True)
class ShardedJob:
    """What distinguishes a job."""

    name: str
    """The command, which is also the kind of the run."""
    model: Checkpoint
    settings: Mapping[str, Any]
    """Resolved fields of the config, for run.json."""
    facts: Mapping[str, Any]
    """Properties of the inputs, such as the model's digest, that must be the same when the run is resumed."""
    plan: Callable[[Folder], Remaining]
    """Makes the run's plan, or reads it if there is one, and prints what is left."""
    evaluations: float
    """Network evaluations per image, at most."""
    written: float
    """Bytes written per image, at most."""
    work: Callable[[Folder, Resources, Execution], Work]
    """What a worker does with a shard."""
    finish: Callable[[Folder, list[Failure]], int]
    """Writes summary and report, prints the result, and returns the exit code, apart from failed shards."""
    decode: str = "actor"
    """Where images are read and decoded: the `decode` of `scheduler.choose_resources`."""
    precision: Callable[[Executor, Resources, int], str | None] = lambda executor, resources, batch_size: None
    """The precision for `--precision auto`, possibly found by a trial; None means float32."""
    uniform_cost: bool = True
    """Whether all images cost the same; otherwise there is no ETA."""
    stall_timeout: float = STALL_TIMEOUT
    budget: Budget = field(default_factory=Budget)


def run_sharded(config: ShardedConfig, job: ShardedJob) -> int:
    """Runs or resumes a job and returns the exit code. Raises ConfigError, and Planned in a dry run."""
    out = Folder(absolute(config.out))
    hold_run(out, job.name, config, config.settings(**job.settings), config.MUTABLE, job.facts, config.defaults())
    remaining = job.plan(out)
    totals, left = remaining.totals, remaining.left
    failures: list[Failure] = []
    if left or config.dry_run:
        cost = Cost.of(totals, left, job.evaluations, job.written)
        with prepared(config, job.model, cost, job.decode, job.precision) as (executor, resources, execution):
            work = job.work(out, resources, execution)
            outcomes = executor.run(work, job.model, remaining.shards, resources, execution, job.stall_timeout)
            progress = Progress(job.name, totals, totals.shards - left, job.uniform_cost)
            failures = follow(progress, outcomes, job.budget, remaining.rejects)
            out.clear_unfinished()
    code = job.finish(out, failures)
    if failures:
        print(f"{len(failures)} shards failed; repeat the command to retry them", file=sys.stderr)
    return 1 if len(failures) > job.budget.tolerated else code


def plan_collection(
    config: WholeCollectionConfig, out: Folder, collection: Collection, below: str, verb: str
) -> tuple[Remaining, set[str]]:
    """What is left of a run over a collection, which it prints, and the shards that are done: those in the folder
    `below`. Raises ConfigError."""
    with config_error("--images"):
        totals = _planned(config, out, collection)
    done = committed(out, below) - (committed(out, REJECTS) if config.retry_rejects else set())
    remaining = remaining_shards(out, totals, done)
    print(f"{totals.images} images in {totals.shards} shards, {remaining.left} to {verb}", flush=True)
    if config.max_reject_fraction < 1:
        remaining = replace(remaining, rejects=sum(rejects_by_reason(out, done).values()))
    return remaining, done


def _planned(config: WholeCollectionConfig, out: Folder, collection: Collection) -> Totals:
    """Makes the plan; or extends an earlier one by new images, and prints what changed, unless the run keeps to its
    first listing."""
    totals = plan_totals(out)
    if totals is None:
        return write_plan(out, collection, config.shard_size, config.limit)
    if not config.relist or config.limit is not None:
        return totals
    totals, changes = extend_plan(out, collection, config.shard_size)
    if changes.added:
        print(f"{changes.added} images are new")
    if changes.changed or changes.removed:
        print(
            f"warning: of the files planned, {changes.changed} changed since and {changes.removed} are gone"
            f" ({', '.join(changes.names)}{', …' if changes.changed + changes.removed > len(changes.names) else ''});"
            " what was made of them is kept as it is",
            file=sys.stderr,
        )
    return totals


def print_rejects(summary: Mapping[str, Any]) -> None:
    for reason, count in summary["rejects_by_reason"].items():
        print(f"  {count} rejected as {reason}: {REASONS[reason]}")
    if cut := summary.get("prompts_cut"):
        print(f"{cut} prompts are longer than the model can be told, and were cut", file=sys.stderr)


def over_budget(out: Folder, budget: Budget, failures: list[Failure], summary: Mapping[str, Any]) -> str | None:
    """Why a run over a collection is aborted, if it is: what failed and was rejected, of all that is planned."""
    totals = plan_totals(out)
    return budget.exceeded(len(failures), summary["rejects"], totals.images if totals else 0)


def exit_code(rows: int, verb: str, exceeded: str | None) -> int:
    """Of a run over a collection, apart from failed shards: why the budget is `exceeded`, if it is, and whether any
    image could be used are said."""
    if exceeded:
        print(f"aborted: {exceeded}", file=sys.stderr)
    elif not rows:
        print(f"no image could be {verb}", file=sys.stderr)
    return 1 if exceeded or not rows else 0


def remaining_shards(out: Folder, totals: Totals, done: set[str]) -> Remaining:
    """What is left of a run with its own plan; `done` may name shards that the plan does not have."""
    left = sum(shard.name not in done for shard in read_plan(out))
    return Remaining(totals, left, (shard for shard in read_plan(out) if shard.name not in done))


def remaining_latents(encoded: EncodeRun, done: set[str], verb: str) -> Remaining:
    """What is left of a job over an encode run's shards: those committed there but not here. Prints it."""
    planned, ready = encoded.planned, encoded.done
    totals, left = planned.part(len(ready)), ready - done
    print(f"{totals.shards} shards of latents, {len(left)} to {verb}", flush=True)
    if len(ready) < planned.shards:
        print(f"the encode run is not complete: {len(ready)} of {planned.shards} shards", file=sys.stderr)
    return Remaining(totals, len(left), (shard for shard in read_plan(encoded.folder) if shard.name in left))
