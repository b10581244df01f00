"""The errors of any number of images, in bounded memory: figures, a histogram, and the images to be named."""

import hashlib
import math
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
from datasketches import kll_doubles_sketch

EXACT = 4096  # errors up to which the quantiles are exact, and the k of the sketch
BINS = 20  # of the histogram, per factor of ten
WORST, BEST, SAMPLE = 20, 12, 12  # images named
NAMED = 1000  # of those that do not come back to the bit; the rows say it of all


class Measured(NamedTuple):
    """An image, with where its row is."""

    error: float
    shard: str
    row: int
    image_id: str


@dataclass
class Errors:
    """The errors of a set of images: numbers of at least 0, or not finite. Or their scores, which may be negative: of
    these `exact`, `least`, `bins` and the figure `psnr` say nothing.

    Errors of two sets merge to those of both, whatever the order. All is exact, but for the rounding of sums, and the
    quantiles of more than EXACT errors: these come from a KLL sketch, which draws at random what it drops. In 99 of 100
    cases their rank is off by less than 0.071 % of the number of errors. An instance takes 0.3 MB at most.
    """

    count: int = 0
    not_finite: int = 0
    """Of `count`; they are in no figure below."""
    exact: int = 0
    """Errors equal to 0."""
    total: float = 0.0
    logs: float = 0.0
    """The sum of log10 of the errors above 0."""
    least: float = math.inf
    """The smallest error above 0."""
    most: float = -math.inf
    bins: Counter[int] = field(default_factory=Counter)
    """The histogram of the errors above 0: bin b counts those with floor(BINS * log10(error)) == b."""
    sketch: kll_doubles_sketch = field(default_factory=lambda: kll_doubles_sketch(EXACT))
    worst: list[Measured] = field(default_factory=list)
    """The WORST largest, worst first, those not finite before all others."""
    best: list[Measured] = field(default_factory=list)
    """The BEST smallest, best first."""
    sample: list[Measured] = field(default_factory=list)
    """SAMPLE images of all, by a hash of where they are."""
    different: int = 0
    """Images with a pixel that does not come back to the bit."""
    first_different: list[Measured] = field(default_factory=list)
    """The first NAMED of them, by shard and row."""
    uncompared: Counter[str] = field(default_factory=Counter)
    """Images without an error, by reason; not in `count`."""
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Of other columns: the sum and the number of their finite values."""

    def add(
        self,
        shard: str,
        rows: np.ndarray,
        ids: pa.Array | pa.ChunkedArray,
        errors: np.ndarray,
        different: np.ndarray | None = None,
        **others: np.ndarray,
    ) -> None:
        """Adds N images of a shard: the numbers of their rows, int [N], ascending, their ids, errors, float64 [N],
        which of them do not come back to the bit, bool [N], if that is to be known, and columns to be averaged, numbers
        or booleans [N]. NaN stands for null."""
        finite = np.isfinite(errors)
        values = errors[finite]
        positive = values[values > 0]
        logs = np.log10(positive)
        self.count += len(errors)
        self.not_finite += len(errors) - len(values)
        self.exact += len(values) - len(positive)
        self.total += float(values.sum())
        self.logs += float(logs.sum())
        self.least = min(self.least, float(positive.min(initial=math.inf)))
        self.most = max(self.most, float(values.max(initial=-math.inf)))
        bins, counts = np.unique(np.floor(logs * BINS).astype(np.int64), return_counts=True)
        self.bins.update(dict(zip(bins.tolist(), counts.tolist(), strict=True)))
        self.sketch.update(np.ascontiguousarray(values, np.float64))

        def named(indices: np.ndarray) -> list[Measured]:
            columns = errors[indices].tolist(), rows[indices].tolist(), ids.take(pa.array(indices)).to_pylist()
            return [Measured(error, shard, row, name) for error, row, name in zip(*columns, strict=True)]

        ordered = np.argsort(np.where(finite, errors, np.inf), kind="stable")
        largest = np.argsort(-np.where(finite, errors, np.inf), kind="stable")
        spread = np.linspace(0, len(errors) - 1, min(SAMPLE, len(errors))).astype(np.int64)  # enough of one shard
        self._name(named(largest[:WORST]), named(ordered[:BEST]), named(spread))
        if different is not None:
            self.different += int(different.sum())
            found = named(np.flatnonzero(different)[:NAMED])
            self.first_different = _first(_place, NAMED, self.first_different, found)
        for name, column in others.items():
            kept = column[np.isfinite(column)]
            self._sum(name, float(kept.sum()), len(kept))

    def merge(self, other: "Errors") -> None:
        """Adds another set of images."""
        self.count += other.count
        self.not_finite += other.not_finite
        self.exact += other.exact
        self.total += other.total
        self.logs += other.logs
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        self.bins.update(other.bins)
        self.sketch.merge(other.sketch)
        self._name(other.worst, other.best, other.sample)
        self.different += other.different
        self.first_different = _first(_place, NAMED, self.first_different, other.first_different)
        self.uncompared.update(other.uncompared)
        for name, (total, count) in other.sums.items():
            self._sum(name, total, count)

    def _name(self, worst: list[Measured], best: list[Measured], sample: list[Measured]) -> None:
        self.worst = _first(_worst, WORST, self.worst, worst)
        self.best = _first(_best, BEST, self.best, best)
        self.sample = _first(_drawn, SAMPLE, self.sample, sample)

    def _sum(self, name: str, total: float, count: int) -> None:
        before, counted = self.sums.get(name, (0.0, 0))
        self.sums[name] = before + total, counted + count

    @property
    def positive(self) -> int:
        """The number of finite errors above 0."""
        return self.count - self.not_finite - self.exact

    def figures(self) -> dict[str, float]:
        """`mean`, `median`, `p99` and `max` of the finite errors, and `psnr`, the mean in dB of those that are not
        exact, the peak being 1; NaN where there are none, as images.metrics.statistics."""
        count = self.count - self.not_finite
        if not count:
            return dict.fromkeys(("mean", "median", "p99", "max", "psnr"), math.nan)
        psnr = -10 * self.logs / self.positive if self.positive else math.inf
        median, p99 = self.quantile(0.5), self.quantile(0.99)
        return {"mean": self.total / count, "median": median, "p99": p99, "max": self.most, "psnr": psnr}

    def quantile(self, fraction: float) -> float:
        """A quantile of the finite errors, interpolated as by numpy; NaN where there are none."""
        count = self.sketch.n
        if not count:
            return math.nan
        index = fraction * (count - 1)
        below, above = math.floor(index), math.ceil(index)
        # The error of an index has the ranks from index / count to (index + 1) / count: half-way is on no edge.
        low, high = (self.sketch.get_quantile((i + 0.5) / count) for i in (below, above))
        return float(np.quantile([low, high], index - below))

    def linear_histogram(self, bins: int) -> tuple[np.ndarray, np.ndarray]:
        """Equally wide bins from the smallest to the largest finite value, at least one of them: edges, float64
        [bins + 1], and the number of values in each, float64 [bins], from the sketch. One bin where all are equal."""
        low, high = self.sketch.get_min_value(), self.sketch.get_max_value()
        edges = np.unique(np.linspace(low, high, bins + 1))  # fewer where the values differ in their last digits alone
        if len(edges) < 3:
            return np.array([low, high]), np.array([float(self.sketch.n)])
        return edges, np.array(self.sketch.get_pmf(edges[1:-1].tolist())) * self.sketch.n

    def mean(self, column: str) -> float | None:
        """The mean of the finite values of a column of `add`, None where there are none."""
        total, count = self.sums.get(column, (0.0, 0))
        return total / count if count else None

    def record(self) -> dict[str, Any]:
        """As JSON."""
        found = dict(vars(self))
        found["bins"] = list(self.bins.items())
        found["sketch"] = b64encode(self.sketch.serialize()).decode()
        return found

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """What `record` wrote. Raises an error of any type where it did not."""
        found = dict(record)
        for name in ("worst", "best", "sample", "first_different"):
            found[name] = [Measured(*row) for row in found[name]]
        found["bins"] = Counter(dict(found["bins"]))
        found["sketch"] = kll_doubles_sketch.deserialize(b64decode(found["sketch"]))
        found["uncompared"] = Counter(found["uncompared"])
        found["sums"] = {name: (total, count) for name, (total, count) in found["sums"].items()}
        return cls(**found)


def _first(key: Callable[[Measured], Any], most: int, known: list[Measured], more: list[Measured]) -> list[Measured]:
    """The first of two lists in order of a key that no two images have in common: the same whichever way lists are
    merged."""
    if len(known) == most and (not more or key(known[-1]) < min(map(key, more))):
        return known
    return sorted([*known, *more], key=key)[:most]


def _place(image: Measured) -> tuple[str, int]:
    return image.shard, image.row


def _worst(image: Measured) -> tuple[float, str, int]:
    return -image.error if math.isfinite(image.error) else -math.inf, image.shard, image.row


def _best(image: Measured) -> tuple[float, str, int]:
    return image.error if math.isfinite(image.error) else math.inf, image.shard, image.row


def _drawn(image: Measured) -> bytes:
    return hashlib.blake2b(f"{image.shard}/{image.row}".encode(), digest_size=8).digest()
