"""Distances between two sets of images, by the features that a network makes of each. Everything is in float64."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

ROWS = 512  # of a matrix of distances, in memory at once


@dataclass(frozen=True, eq=False)
class Moments:
    """How many features there are, their mean [D], and their scatter [D, D], the sum of (f - mean)(f - mean)^T.

    Those of two sets merge to that of both (Chan, Golub, LeVeque 1979, equation 2.1b). Unlike sums of f f^T, from which
    n mean mean^T is subtracted in the end, that loses no digits where the mean is far from 0.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Of features [N, D]."""
        if not len(features):
            return cls.none(features.shape[1])
        x = features.astype(np.float64)
        mean = x.mean(0)
        x -= mean
        return cls(len(x), mean, x.T @ x)

    @classmethod
    def none(cls, dimensions: int) -> "Moments":
        return cls(0, np.zeros(dimensions), np.zeros((dimensions, dimensions)))

    def merge(self, other: "Moments") -> "Moments":
        if not (self.count and other.count):
            return self if self.count else other
        count, apart = self.count + other.count, other.mean - self.mean
        between = np.outer(apart, apart) * (self.count * other.count / count)
        mean = self.mean + apart * (other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """[D, D], with N - 1 below, as np.cov has it. Raises ValueError for fewer than two."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two images, and there are {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(mean_1: np.ndarray, sigma_1: np.ndarray, mean_2: np.ndarray, sigma_2: np.ndarray) -> float:
    """The squared Frechet distance of two Gaussians, |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson and Landau
    1982; Heusel et al. 2017, equation 6), of means [D] and covariances [D, D].

    With S = R R^T the last trace is the sum of the singular values of R1^T R2. The root of a product S1 S2, which other
    programs take, magnifies the rounding of zero eigenvalues from 1e-16 to 1e-8: there are such whenever there are
    fewer images than features. Raises ValueError for values that are not finite.
    """
    if not all(np.isfinite(values).all() for values in (mean_1, sigma_1, mean_2, sigma_2)):
        raise ValueError("a mean or a covariance has values that are not finite")
    if np.array_equal(mean_1, mean_2) and np.array_equal(sigma_1, sigma_2):
        return 0.0
    between = np.linalg.svd(_root(sigma_1).T @ _root(sigma_2), compute_uv=False).sum()
    return float(np.square(mean_1 - mean_2).sum() + np.trace(sigma_1) + np.trace(sigma_2) - 2 * between)


def _root(sigma: np.ndarray) -> np.ndarray:
    """R [D, r] with R R^T = S, r being the numerical rank of S."""
    values, vectors = np.linalg.eigh(sigma)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])


def kernel_distance(
    first: np.ndarray, second: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of the unbiased squared maximum mean discrepancy of features
    [N, D] and [M, D] with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, KID). Subsets have `size` images of each
    set; they are drawn as torch-fidelity draws them."""
    size = min(size, len(first), len(second))
    if size < 2:
        raise ValueError(f"the kernel distance needs two images of each set, and there are {size}")
    random = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        x = first[random.choice(len(first), size, replace=False)].astype(np.float64)
        y = second[random.choice(len(second), size, replace=False)].astype(np.float64)
        within = [(k.sum() - np.trace(k)) / (size * (size - 1)) for k in (_kernel(x, x), _kernel(y, y))]
        found.append(sum(within) - 2 * _kernel(x, y).mean())
    return float(np.mean(found)), float(np.std(found))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


@dataclass(frozen=True, eq=False)
class Neighbours:
    """`precision`: the share of the generated images that lie within the distance of a real image to its k-th nearest
    real one; `recall` the other way round (Kynkaanniemi et al. 2019, equation 2). `nearest`: which real image is the
    nearest to each generated one, int [M], and `distance`, float64 [M], how far it is."""

    precision: float
    recall: float
    nearest: np.ndarray
    distance: np.ndarray


def neighbours(real: np.ndarray, generated: np.ndarray, k: int = 3) -> Neighbours:
    """Of features [N, D] and [M, D]. Raises ValueError unless both sets have more than k."""
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"precision and recall need more than {k} images of each set")
    radius = _radius(real, k)
    nearest, distance, within = [], [], []
    recalled = np.zeros(len(real), bool)
    own = _radius(generated, k)
    for start, squared in _squared(generated, real):
        nearest.append(squared.argmin(1))
        distance.append(np.sqrt(squared.min(1)))
        within.append((squared <= radius).any(1))
        recalled |= (squared <= own[start : start + len(squared), None]).any(0)
    precision = float(np.concatenate(within).mean())
    return Neighbours(precision, float(recalled.mean()), np.concatenate(nearest), np.concatenate(distance))


def _radius(features: np.ndarray, k: int) -> np.ndarray:
    """The squared distance of each to its k-th nearest other one."""
    found = []
    for start, squared in _squared(features, features):
        rows = np.arange(len(squared))
        squared[rows, start + rows] = -1.0  # itself, whatever rounding makes of it
        found.append(np.partition(squared, k, axis=1)[:, k])
    return np.concatenate(found)


def _squared(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The squared distances of some of `first` at a time to all of `second`, and the number of the first of them."""
    centre = second.mean(0, dtype=np.float64)  # the nearer to 0, the smaller the rounding
    y = second.astype(np.float64) - centre
    norms = np.square(y).sum(1)
    for start in range(0, len(first), ROWS):
        x = first[start : start + ROWS].astype(np.float64) - centre
        yield start, np.maximum(np.square(x).sum(1)[:, None] + norms - 2 * x @ y.T, 0.0)


@dataclass(frozen=True, eq=False)
class Labels:
    """What an Inception score is made of, for each split of the images: how many there are [S], the sums of their
    p(y|x) [S, K], and of sum_y p log p [S]. Those of two sets add up to that of both."""

    counts: np.ndarray
    probabilities: np.ndarray
    negentropies: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, split: np.ndarray, splits: int) -> "Labels":
        """Of logits [N, K]; `split` [N] has the number of each image's split."""
        p, log_p = softmax(logits)
        each = (p * log_p).sum(1)
        rows = [split == i for i in range(splits)]
        counts = np.array([int(row.sum()) for row in rows])
        return cls(counts, np.stack([p[row].sum(0) for row in rows]), np.array([each[row].sum() for row in rows]))

    def merge(self, other: "Labels") -> "Labels":
        return Labels(*(mine + others for mine, others in zip(vars(self).values(), vars(other).values(), strict=True)))

    def scores(self) -> np.ndarray:
        """exp of the mean of KL(p(y|x) || p(y)), where p(y) is the mean of p(y|x), of each split that has images
        (Salimans et al. 2016)."""
        there = self.counts > 0
        counts, sums = self.counts[there], self.probabilities[there]
        marginal = sums / counts[:, None]
        log = np.log(marginal, out=np.zeros_like(marginal), where=marginal > 0)
        return np.asarray(np.exp(self.negentropies[there] / counts - (marginal * log).sum(1)))

    def whole(self) -> float:
        """The score of all images in one split."""
        sums = (values.sum(0, keepdims=True) for values in vars(self).values())
        return float(Labels(*sums).scores()[0])


def softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p and log p of logits [N, K], float64."""
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
    return np.exp(log_p), log_p
