"""What came of a shard: committed, or given up on."""

from dataclasses import dataclass

from palindrome.pipeline.images.records import Shard


@dataclass(frozen=True)
class Receipt:
    """What the driver learns of a committed shard: counts, seconds, bytes written."""

    shard: str
    images: int
    rejects: int
    seconds: float
    device_seconds: float
    bytes: int


@dataclass(frozen=True)
class Failure:
    """A shard given up on, with the last error's words."""

    shard: Shard
    error: str
