"""Whether a run folder holds what its plan says, and nothing else. Every byte of the shards is read.

A shard's ids are compared with those that its part of the plan makes, and the plan's ids with one another; so the ids
of a run without findings are unique, and exactly the plan's. Held in memory are the shards' names, a row group of a few
shards, the ids of those, and of all ids a 64-bit hash, `plans.PART` at a time: of more, the plan is read again.
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
    run: Folder, manifest: Manifest, account: Account, each: Callable[[], None] = lambda: None
) -> Iterator[Finding]:
    """What is wrong with a run of one of kinds.VERIFIED, as it is met; `account` is kept on the way, and `each` called
    after each shard. Raises RunError where `run.json` is not as the run's job writes it."""
    kind = manifest.kind
    lacking = [name for name in kind.manifest_keys if name not in manifest.content]
    if lacking:
        raise RunError(f"{run.uri}/run.json lacks {', '.join(lacking)}")
    try:
        shards = CHECKS[kind.name](run, manifest)
    except (KeyError, TypeError) as e:
        raise RunError(f"run.json is not as {kind.name} writes it: {one_line(e)}") from e
    for checked in shards:
        account.shards += checked.shard is not None
        if checked.shard and checked.rows and not checked.findings:
            account.rows_of_shard[checked.shard] = checked.rows
        account.rows += checked.rows
        account.rejects += checked.rejects
        each()
        yield from checked.findings
