"""How a command gets hold of a run folder: it checks that the run is its own, takes the lease, and only then writes."""

from collections.abc import Collection, Mapping
from typing import Any

from palindrome.jobs.arguments import config_error
from palindrome.jobs.config import OutOptions
from palindrome.pipeline.runs import lease
from palindrome.pipeline.runs.manifest import claim
from palindrome.pipeline.storage.folder import Folder


def hold_run(
    out: Folder,
    job: str,
    config: OutOptions,
    settings: Mapping[str, Any],
    mutable: Collection[str] = (),
    facts: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> bool:
    """Whether the run goes on from an earlier one, as `claim` says. The lease is held until the command ends. Raises
    ConfigError for the run of another command, or one that another process is writing."""
    with config_error("--out"):
        if not config.dry_run:  # which has a folder of its own
            claim(out, job, settings, mutable, facts or {}, defaults, check_only=True)
            lease.acquire(out, job, config.take_over)
        resumed = claim(out, job, settings, mutable, facts or {}, defaults)
        out.clear_unfinished()
    return resumed
