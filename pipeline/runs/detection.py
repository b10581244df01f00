"""How well scores tell two runs apart: by what detectors and membership attacks are judged."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from palindrome.pipeline.base.errors import ManifestError, SettingError
from palindrome.pipeline.runs.manifest import Manifest
from palindrome.pipeline.runs.scores import DIFFPATH_SUMS, METHODS
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.storage.folder import Folder

DIFFPATH = tuple(f"{METHODS['diffpath'].prefix}{name}" for name in DIFFPATH_SUMS)
ABOUT_FILES = ("container", "jpeg_quality", "width", "height")
MIXTURE = "mixture"  # the column of mixture_scores
MEASURES = ("auroc", "ap", "tpr_at_1", "tpr_at_5", "asr")
TELLING = 0.6  # an AUROC above which what a file is like tells the sets apart


@dataclass(frozen=True, eq=False)
class Scores:
    """The rows of a run: `ids` and `shards` of each, `values` of each column, float64 [N], NaN where there is none, and
    what the run knows of the files, by ABOUT_FILES."""

    run: Folder
    manifest: Manifest
    ids: list[str]
    shards: list[str]
    values: dict[str, np.ndarray]
    files: dict[str, list[Any]]

    @property
    def said(self) -> dict[str, Any]:
        """What the run says of its columns of scores; {} if it is no run of scores."""
        return dict(self.manifest.content.get("scores") or {})


def numeric_columns(run: Folder, manifest: Manifest) -> list[str]:
    """The columns of numbers that the run's rows have, without those that say what a file is like."""
    shard = min(committed(run, manifest.kind.folder), default=None)
    if shard is None:
        raise ManifestError(f"{run.uri} holds no rows yet")
    with run.parquet_file(f"{manifest.kind.folder}/{shard}.parquet") as file:
        schema = file.schema_arrow
    kinds = (pa.types.is_integer, pa.types.is_floating)
    others = {*ABOUT_FILES, *manifest.kind.variants, "index", "frame"}
    return [f.name for f in schema if any(kind(f.type) for kind in kinds) and f.name not in others]


def read_scores(run: Folder, manifest: Manifest, columns: Sequence[str], steps: int | None) -> Scores:
    """The rows of the committed shards, sorted by shard; of a run with several rows an image, those of `steps`. Raises
    SettingError for a column that is no number or is not there, and where `steps` does not say which rows."""
    kind, ids, shards = manifest.kind, list[str](), list[str]()
    there = numeric_columns(run, manifest)
    if missing := [name for name in columns if name not in there]:
        known = ", ".join(there) or "none"
        raise SettingError(f"{run.uri} has no column {missing[0]!r} of numbers; it has {known}", "column")
    values: dict[str, list[np.ndarray]] = defaultdict(list)
    files: dict[str, list[Any]] = defaultdict(list)
    for shard in sorted(committed(run, kind.folder)):
        with run.parquet_file(f"{kind.folder}/{shard}.parquet") as file:
            about = [name for name in ABOUT_FILES if name in file.schema_arrow.names]
            rows = file.read(["image_id", *kind.variants, *about, *columns])
        if "steps" in kind.variants and steps is not None:
            rows = rows.filter(pc.equal(rows["steps"], steps))
        ids += rows["image_id"].to_pylist()
        shards += [shard] * len(rows)
        for name in columns:
            values[name].append(rows[name].to_numpy().astype(np.float64))
        for name in about:
            files[name] += rows[name].to_pylist()
    if kind.variants and len(set(ids)) < len(ids):
        raise SettingError(f"{run.uri} has several rows of an image: say which number of steps is meant", "steps")
    if not ids:
        raise SettingError(f"{run.uri} has no rows" + ("" if steps is None else f" of {steps} steps"), "steps")
    return Scores(run, manifest, ids, shards, {name: np.concatenate(parts) for name, parts in values.items()}, files)


@dataclass(frozen=True)
class Separation:
    """How well one column tells positive from negative images, with the bounds of each measure's 95 % interval.

    `sign` is -1 where lower values are positive, `missing` how many images of either run have no finite value and were
    left out. `auroc`: the probability that a positive has the higher score; `ap`: average precision; `tpr_at_1` and
    `tpr_at_5`: the largest share of positives found at a threshold that takes at most 1 % and 5 % of the negatives;
    `asr`: the largest mean of the shares of positives and negatives that are told right."""

    column: str
    sign: int
    of: str
    positives: int
    negatives: int
    missing: int
    measures: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


def separation(
    column: str, positive: np.ndarray, negative: np.ndarray, sign: int, of: str, resamples: int, seed: int
) -> Separation:
    """Of float64 [N] and [M]. The intervals are percentiles over `resamples` draws with replacement of as many
    positives and negatives. Raises ValueError where either has no finite value."""
    kept = [values[np.isfinite(values)] for values in (positive, negative)]
    if not all(map(len, kept)):
        which = "positive" if not len(kept[0]) else "negative"
        raise ValueError(f"{column} has no finite value in the {which} run")
    missing = len(positive) + len(negative) - sum(map(len, kept))
    scores, label = sign * np.concatenate(kept), np.repeat([1, 0], [len(kept[0]), len(kept[1])])
    measures = measured(label, scores)
    random, drawn = np.random.default_rng(seed), defaultdict(list)
    sides = np.flatnonzero(label == 1), np.flatnonzero(label == 0)
    for _ in range(resamples):
        weights = np.zeros(len(label))
        for side in sides:
            weights[side] = np.bincount(random.integers(0, len(side), len(side)), minlength=len(side))
        for name, value in measured(label, scores, weights).items():
            drawn[name].append(value)
    bounds = {name: np.percentile(values, (2.5, 97.5)) for name, values in drawn.items()}
    intervals = {name: (float(low), float(high)) for name, (low, high) in bounds.items()}
    return Separation(column, sign, of, len(kept[0]), len(kept[1]), missing, measures, intervals)


def measured(label: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
    """MEASURES of labels 1 and 0 [N] and scores [N], each image counted `weights` [N] times. Images of one score are
    told alike. The values are scikit-learn's, whose functions take milliseconds each: intervals need a thousand."""
    order = np.argsort(-scores, kind="stable")
    weights = np.ones(len(label)) if weights is None else weights[order]
    label, scores = label[order], scores[order]
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of each threshold's images
    found, wrong = (np.append(0.0, np.cumsum(weights * side)[ends]) for side in (label == 1, label == 0))
    tpr, fpr = found / found[-1], wrong / wrong[-1]
    precision = found / np.maximum(found + wrong, 1)
    return {
        "auroc": float(np.trapezoid(tpr, fpr)),
        "ap": float((np.diff(tpr) * precision[1:]).sum()),
        "tpr_at_1": float(tpr[fpr <= 0.01].max()),
        "tpr_at_5": float(tpr[fpr <= 0.05].max()),
        "asr": float((tpr + 1 - fpr).max() / 2),
    }


def mixture_scores(
    fit: Scores, others: Sequence[Scores], columns: Sequence[str], components: Sequence[int], folds: int, seed: int
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """How unlikely the rows of `others` are under a mixture of Gaussians that is fitted to those of `fit`: minus the
    log likelihood, float64 [N] each, NaN where a column has no finite value; and what was chosen.

    As DiffPath's eval_6d.py: StandardScaler, then the mixture whose number of `components` and kind of covariance have
    the best cross-validated likelihood, over `folds` parts. Raises SettingError where there are too few rows."""
    from sklearn.mixture import GaussianMixture  # of an extra
    from sklearn.model_selection import GridSearchCV, KFold
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    def stacked(of: Scores) -> tuple[np.ndarray, np.ndarray]:
        x = np.column_stack([of.values[name] for name in columns])
        return x, np.isfinite(x).all(1)

    x, good = stacked(fit)
    x = x[good]
    least = len(x) - -(-len(x) // folds)  # rows of the smallest part that a mixture is fitted to
    if least < max(components):
        message = f"{max(components)} are more than the {max(least, 0)} rows of {fit.run.uri} that they are fitted to"
        raise SettingError(message, "components")
    steps = [("scaler", StandardScaler()), ("mixture", GaussianMixture(max_iter=200, random_state=seed))]
    grid = {
        "mixture__n_components": list(components),
        "mixture__covariance_type": ["full", "tied", "diag", "spherical"],
    }
    search = GridSearchCV(Pipeline(steps), grid, cv=KFold(folds), error_score="raise").fit(x)
    chosen = {name.partition("__")[2]: value for name, value in search.best_params_.items()}
    scores = []
    for of in others:
        values, good = stacked(of)
        found = np.full(len(values), np.nan)
        if good.any():
            found[good] = -search.best_estimator_.score_samples(values[good])
        scores.append(found)
    return scores, {**chosen, "columns": list(columns), "rows": len(x), "log_likelihood": float(search.best_score_)}


def told_by_files(positive: Scores, negative: Scores) -> dict[str, float]:
    """The AUROC at which what a file is like tells the sets apart, by `container`, `jpeg_quality` and `pixels`, of
    those that both runs know: 0.5 is not at all. Containers are ordered by their share of positives; the others are
    taken in the direction that tells more."""
    label = np.repeat([1, 0], [len(positive.ids), len(negative.ids)])
    found: dict[str, float] = {}

    def of(name: str) -> list[Any] | None:
        both = [scores.files.get(name) for scores in (positive, negative)]
        return None if None in both else [value for values in both for value in values or ()]

    if (containers := of("container")) is not None:
        shares = {name: label[[c == name for c in containers]].mean() for name in set(containers)}
        found["container"] = measured(label, np.array([shares[name] for name in containers]))["auroc"]
    numbers = {"jpeg_quality": of("jpeg_quality")}
    width, height = of("width"), of("height")
    numbers["pixels"] = None if width is None or height is None else [w * h for w, h in zip(width, height, strict=True)]
    for name, values in numbers.items():
        if values is not None:
            auroc = measured(label, np.array([-1.0 if value is None else value for value in values]))["auroc"]
            found[name] = max(auroc, 1 - auroc)
    return found
