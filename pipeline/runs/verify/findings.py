"""The findings and totals of `verify`."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """Something wrong with a run, and where: a file, a shard, an id. A `warning` does not make `verify` fail."""

    where: str
    what: str
    warning: bool = False


@dataclass
class Account:
    """Totals, updated while the run is read. `rows` counts each image id once, regardless of variants."""

    shards: int = 0
    rows: int = 0
    rejects: int = 0
    rows_of_shard: dict[str, int] = field(default_factory=dict)  # only shards without a finding
    errors: list[float] = field(default_factory=list)  # round-trip errors of the latents that --deep decoded


@dataclass
class Checked:
    """The result for one shard, or for the plan if `shard` is None."""

    findings: list[Finding] = field(default_factory=list)
    shard: str | None = None
    rows: int = 0
    rejects: int = 0
