"""The outcome of a shard: committed, or failed."""

from dataclasses import dataclass

from palindrome.pipeline.images.records import Shard


@dataclass(frozen=True)
class Receipt:
    """A committed shard, as reported to the driver: counts, seconds, bytes written."""

    shard: str
    images: int
    rejects: int
    seconds: float
    device_seconds: float
    bytes: int


@dataclass(frozen=True)
class Failure:
    """A shard that failed after all retries, with its last error in one line."""

    shard: Shard
    error: str
