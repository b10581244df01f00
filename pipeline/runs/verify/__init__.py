"""Checks that a run folder contains what its plan requires, and nothing else. Every byte of the shards is read.

The ids of each shard are compared with those of its plan, and the ids of the plan with one another. So the ids of a run
without findings are unique, and exactly the plan's. In memory are the shards' names, one row group of a few shards, the
ids of those shards, and 64-bit hashes of all ids, at most `plans.MAX_HASHES` per pass over the plan.
"""

from collections.abc import Callable, Iterator

from palindrome.pipeline.base.errors import RunError
from palindrome.pipeline.base.text import one_line
from palindrome.pipeline.runs.manifest import Manifest
from palindrome.pipeline.runs.verify.checks import CHECKS
from palindrome.pipeline.runs.verify.findings import Account as Account
from palindrome.pipeline.runs.verify.findings import Finding as Finding
from palindrome.pipeline.storage.folder import Folder


def verify(
    run: Folder, manifest: Manifest, account: Account, on_shard: Callable[[], None] = lambda: None
) -> Iterator[Finding]:
    """Yields what is wrong with a run of one of kinds.VERIFIED. Updates `account` and calls `on_shard` after each
    shard. Raises RunError if `run.json` is not what the run's job writes."""
    kind = manifest.kind
    missing = [name for name in kind.manifest_keys if name not in manifest.content]
    if missing:
        raise RunError(f"{run.uri}/run.json lacks {', '.join(missing)}")
    try:
        shards = CHECKS[kind.name](run, manifest)
    except (KeyError, TypeError) as e:
        raise RunError(f"run.json is not what {kind.name} writes: {one_line(e)}") from e
    for checked in shards:
        account.shards += checked.shard is not None
        if checked.shard and checked.rows and not checked.findings:
            account.rows_of_shard[checked.shard] = checked.rows
        account.rows += checked.rows
        account.rejects += checked.rejects
        on_shard()
        yield from checked.findings
