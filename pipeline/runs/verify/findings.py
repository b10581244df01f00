"""What `verify` reports."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """What is wrong, and where: a file, a shard, an id. A `warning` does not make the run a bad one."""

    where: str
    what: str
    warning: bool = False


@dataclass
class Account:
    """Totals, kept while the run is read. `rows` are counted once per image id, however many variants there are."""

    shards: int = 0
    rows: int = 0
    rejects: int = 0
    rows_of_shard: dict[str, int] = field(default_factory=dict)  # of shards without a finding
    errors: list[float] = field(default_factory=list)  # round-trip errors of latents that were decoded again


@dataclass
class Checked:
    """The outcome for one shard, or for the plan where `shard` is None."""

    findings: list[Finding] = field(default_factory=list)
    shard: str | None = None
    rows: int = 0
    rejects: int = 0
