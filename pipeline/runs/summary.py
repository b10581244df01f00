"""What came of a run, read from its committed shards: the content of `summary.json`."""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.parquet import ParquetFile

from palindrome.pipeline.base.errors import writing
from palindrome.pipeline.base.log import note
from palindrome.pipeline.base.text import figure
from palindrome.pipeline.runs.errors import Errors
from palindrome.pipeline.runs.kinds import IMAGES, LATENTS, RECONSTRUCTIONS, REJECTS, SCORES
from palindrome.pipeline.runs.outcome import Failure
from palindrome.pipeline.runs.schemas import APART
from palindrome.pipeline.runs.scores import LEVEL
from palindrome.pipeline.runs.tallies import Committed, Tally, committed_shards, reasons, tables, tally
from palindrome.pipeline.storage.folder import Folder


def latents_summary(run: Folder, measured: bool) -> dict[str, Any]:
    """Counts, rejects by reason, seconds, and the round-trip error where it was measured."""

    def read(shard: Committed, file: ParquetFile) -> Tally:
        found = Tally.of_footer(file)
        apart = _apart(file)
        for first, rows in tables(file, ["image_id", "mse", "identical", *apart]) if measured else ():
            numbers, identical = first + np.arange(len(rows)), column(rows, "identical")
            others = {name: column(rows, name) for name in apart}
            found.errors[""].add(shard.name, numbers, rows["image_id"], column(rows, "mse"), identical < 1, **others)
        return found

    shards, what = committed_shards(run, LATENTS, with_rejects=True), "measured" if measured else "latents"
    found = tally(run, LATENTS, shards, read, what, run, run)
    summary = {"images": 0, "latents": 0, "rejects": 0, **_account(found), "rejects_by_reason": _sorted(found.reasons)}
    if measured:
        errors = found.errors[""]
        named = [image.image_id for image in errors.first_different]
        about = {"not_identical": errors.different, "not_identical_ids": named}
        summary["round_trip"] = {**error_statistics(errors), **about}
    return summary


def rejects_by_reason(run: Folder, shards: Collection[str]) -> dict[str, int]:
    """Counts over the shards that are done."""
    # A shard that is not committed will write its rejects again.
    sizes = ((name.removesuffix(".parquet"), size) for name, size in run.files(REJECTS).items())
    return _sorted(reasons(run, {name: size for name, size in sizes if name in shards}))


def read_errors(run: Folder, plan: Folder) -> Tally:
    """The tally of a reconstruction, with the errors by number of steps; `plan` is the encode run."""

    def read(shard: Committed, file: ParquetFile) -> Tally:
        found = Tally.of_footer(file)
        apart = _apart(file)
        for first, rows in tables(file, ["image_id", "steps", "status", "mse", "identical", *apart]):
            compared = pc.equal(rows["status"], "compared").to_numpy()
            for steps, numbers, these in _by_steps(rows):
                errors, at = found.errors[steps], compared[numbers]
                errors.uncompared.update(these.filter(pa.array(~at))["status"].to_pylist())
                these = these.filter(pa.array(at))
                others = {name: column(these, name) for name in ("identical", *apart)}
                errors.add(shard.name, first + numbers[at], these["image_id"], column(these, "mse"), **others)
        return found

    shards = committed_shards(run, RECONSTRUCTIONS)
    return tally(run, RECONSTRUCTIONS, shards, read, "reconstructions", plan, run)


def reconstructions_summary(found: Tally, steps: Sequence[int]) -> dict[str, Any]:
    """Of `read_errors`: counts, seconds, and for each number of steps the errors and the images that could not be
    compared."""
    summary = _account(found)
    summary["by_steps"] = []
    for count in steps:
        errors = found.errors[str(count)]
        about = {"identical": errors.mean("identical"), "uncompared": _sorted(errors.uncompared)}
        summary["by_steps"].append({"steps": count, **error_statistics(errors), **about})
    return summary


def generated_summary(run: Folder, with_rejects: bool = False) -> dict[str, Any]:
    """Counts and seconds, and if asked for, rejects by reason."""

    def read(shard: Committed, file: ParquetFile) -> Tally:
        return Tally.of_footer(file)

    found = tally(run, IMAGES, committed_shards(run, IMAGES, with_rejects), read, "images", run, run)
    rejects = {"rejects_by_reason": _sorted(found.reasons)} if with_rejects else {}
    return {"images": 0, **_account(found), **rejects}


def regenerated_summary(run: Folder, plan: Folder) -> dict[str, Any]:
    """Counts, seconds, and for each number of steps images, mean and 99th percentile of `to_longest`; `plan` is the
    encode run."""

    def read(shard: Committed, file: ParquetFile) -> Tally:
        found = Tally.of_footer(file)
        for first, rows in tables(file, ["image_id", "steps", "to_longest"]):
            for steps, numbers, these in _by_steps(rows):
                distances = column(these, "to_longest")
                found.errors[steps].add(shard.name, first + numbers, these["image_id"], distances)
        return found

    found = tally(run, IMAGES, committed_shards(run, IMAGES), read, "regenerated", plan, run)
    by_steps = []
    for steps, errors in sorted(found.errors.items(), key=lambda item: int(item[0])):
        figures = errors.figures()
        by_steps.append({"steps": int(steps), "images": errors.count, "mean": figures["mean"], "p99": figures["p99"]})
    return {"images": 0, **_account(found), "by_steps": by_steps}


def edited_summary(run: Folder, plan: Folder, strengths: Sequence[float]) -> dict[str, Any]:
    """Of an edit run: counts, rejects by reason, seconds, the errors of the images' `own` reconstructions, and how many
    originals were not compared; the `change` `by_strength`; and with masks how many of the `values` of 8 bits `outside`
    of them are not the originals', in all, at most in a row, and of which images. `plan` is the encode run."""

    def read(shard: Committed, file: ParquetFile) -> Tally:
        found = Tally.of_footer(file)
        columns = ["own_mse", "change", "changed_outside", "values_outside"]
        for first, rows in tables(file, ["image_id", "strength", "status", *columns]):
            numbers, compared = first + np.arange(len(rows)), pc.equal(rows["status"], "compared").to_numpy()
            strength, outside = column(rows, "strength"), column(rows, "changed_outside")
            once = strength == strengths[0]
            found.errors["own"].uncompared.update(rows.filter(pa.array(once & ~compared))["status"].to_pylist())
            parts = {"own": ("own_mse", once & compared), "outside": ("changed_outside", np.isfinite(outside))}
            parts |= {_change(each): ("change", (strength == each) & compared) for each in strengths}
            for name, (values, at) in parts.items():
                these = rows.filter(pa.array(at))
                others = {"values": column(these, "values_outside")} if name == "outside" else {}
                found.errors[name].add(shard.name, numbers[at], these["image_id"], column(these, values), **others)
        return found

    found = tally(run, IMAGES, committed_shards(run, IMAGES, with_rejects=True), read, "edited", plan, run)
    summary = {"latents": 0, "images": 0, "rejects": 0, **_account(found), "rejects_by_reason": _sorted(found.reasons)}
    own, outside = found.errors["own"], found.errors["outside"]
    summary["own"] = {**error_statistics(own), "uncompared": _sorted(own.uncompared)}
    summary["by_strength"] = [{"strength": each, **error_statistics(found.errors[_change(each)])} for each in strengths]
    if outside.count:
        values, _ = outside.sums["values"]
        named = [image.image_id for image in outside.worst if image.error]
        of_all = {"values": round(values), "changed": round(outside.total), "rows": outside.count}
        of_one = {"changed_rows": outside.positive, "most": round(outside.most), "worst": named}
        summary["outside"] = of_all | of_one
    return summary


def _change(strength: float) -> str:
    return f"change at {strength}"


def restored_summary(run: Folder) -> dict[str, Any]:
    """Of a restore run: counts, rejects by reason, seconds, and of the results mean and largest `observation_error` and
    `picture_error`; where the originals are known, the errors of the `results` and of the observations alone, the
    `baseline`, as error_statistics has them, and the mean SSIM if it was measured."""

    def read(shard: Committed, file: ParquetFile) -> Tally:
        found = Tally.of_footer(file)
        columns = {"observation_error": None, "picture_error": None, "mse": "ssim", "baseline_mse": "baseline_ssim"}
        similarities = [name for name in columns.values() if name]
        for first, rows in tables(file, ["image_id", "variation", *columns, *similarities]):
            numbers, once = first + np.arange(len(rows)), column(rows, "variation") == 0
            for name, similarity in columns.items():
                there = (once | (name != "baseline_mse")) & ~np.asarray(pc.is_null(rows[name]))
                these = rows.filter(pa.array(there))
                others = {"ssim": column(these, similarity)} if similarity else {}
                found.errors[name].add(shard.name, numbers[there], these["image_id"], column(these, name), **others)
        return found

    found = tally(run, IMAGES, committed_shards(run, IMAGES, with_rejects=True), read, "restored", run, run)
    summary = {"images": 0, "restored": 0, "rejects": 0, **_account(found), "rejects_by_reason": _sorted(found.reasons)}
    for name in ("observation_error", "picture_error"):
        figures = error_statistics(found.errors[name])
        summary[name] = {key: figures[key] for key in ("mean", "max")}
    for name, errors in (("results", found.errors["mse"]), ("baseline", found.errors["baseline_mse"])):
        if errors.count:
            similarity = errors.mean("ssim")
            summary[name] = error_statistics(errors) | ({} if similarity is None else {"ssim": similarity})
    return summary


def read_scores(run: Folder, scores: Mapping[str, Mapping[str, Any]]) -> Tally:
    """The tally of a score run, with the values of each column of scores under its name; `scores` is that of
    run.json."""

    def read(shard: Committed, file: ParquetFile) -> Tally:
        found = Tally.of_footer(file)
        for first, rows in tables(file, ["image_id", *scores]):
            numbers = first + np.arange(len(rows))
            for name, about in scores.items():
                values = column(rows, name)
                others = {"significant": values <= LEVEL} if "p_value" in about else {}
                found.errors[name].add(shard.name, numbers, rows["image_id"], values, squares=values**2, **others)
        return found

    return tally(run, SCORES, committed_shards(run, SCORES, with_rejects=True), read, "scores", run, run)


def scores_summary(found: Tally, scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of `read_scores`: counts, rejects by reason, seconds, and of each column figures over the images."""
    summary = {"images": 0, "scored": 0, "rejects": 0, **_account(found), "rejects_by_reason": _sorted(found.reasons)}
    return {
        **summary,
        "scores": {name: {**about, **score_figures(found.errors[name])} for name, about in scores.items()},
    }


def score_figures(values: Errors) -> dict[str, Any]:
    """mean, std, min, median, p99 and max of scores, None where there are none; of p-values how many are
    `significant`, at most LEVEL; and the ids with the lowest and the highest."""
    named = {"lowest": [i.image_id for i in values.best], "highest": [i.image_id for i in values.worst]}
    mean, squares = values.total / max(values.count, 1), values.mean("squares")
    if squares is None:
        return {"count": 0, **dict.fromkeys(("mean", "std", "min", "median", "p99", "max")), **named}
    figures = {"mean": mean, "std": math.sqrt(max(squares - mean**2, 0.0)), "min": values.quantile(0.0)}
    figures |= {"median": values.quantile(0.5), "p99": values.quantile(0.99), "max": values.most}
    if (significant := values.mean("significant")) is not None:
        figures["significant"] = round(significant * values.count)
    return {"count": values.count, **figures, **named}


def mean_nfe(latents: Folder, run: Folder) -> float:
    """Network evaluations that encoding spent on an image, over all rows of an encode run: a tolerance makes them
    differ. `run` is the run that asks, which keeps what was read."""

    def read(shard: Committed, file: ParquetFile) -> Tally:
        nfe = file.read(["nfe"], use_threads=False)["nfe"]
        return Tally(1, Counter(nfe=pc.sum(nfe).as_py() or 0, latents=len(nfe)))

    found = tally(latents, LATENTS, committed_shards(latents, LATENTS), read, "nfe", latents, run)
    return found.counts["nfe"] / max(found.counts["latents"], 1)


def error_statistics(errors: Errors) -> dict[str, Any]:
    """count, how many of them are `not_finite` and left out of the figures, mean, median, p99, max of `mse`, the mean
    PSNR of those that are not exact, the means of the columns of schemas.APART, if there are some, and the worst ids,
    worst first. What has no finite value is None."""
    figures = {name: value if math.isfinite(value) else None for name, value in errors.figures().items()}
    worst = [image.image_id for image in errors.worst]
    apart = {name: mean for name in APART if (mean := errors.mean(name)) is not None}
    return {"count": errors.count, "not_finite": errors.not_finite, **figures, **apart, "worst": worst}


def apart_words(statistics: Mapping[str, Any]) -> str:
    """The mean errors of latent diffusion apart, in words; "" of a pixel model's."""
    if "latent_mse" not in statistics:
        return ""
    latent, vae, from_vae = (figure(statistics.get(name)) for name in APART)
    return (
        f"in the latent space {latent}; in pixels {from_vae} from the autoencoder's round trip, which has {vae} itself"
    )


def put_summary(run: Folder, summary: dict[str, Any], failures: Sequence[Failure]) -> None:
    failed = [{"shard": f.shard.name, "images": f.shard.images, "error": f.error} for f in failures]
    note(summary=summary, failed_shards=len(failed))
    with writing(f"{run.uri}/summary.json"):
        run.put("summary.json", (json.dumps({**summary, "failed_shards": failed}, indent=2) + "\n").encode())


def _apart(file: ParquetFile) -> list[str]:
    """The columns of schemas.APART that it has."""
    return [name for name in APART if name in file.schema_arrow.names]


def column(rows: pa.Table, name: str) -> np.ndarray:
    """A column as float64, NaN where it is null."""
    return rows[name].to_numpy().astype(np.float64)


def _by_steps(rows: pa.Table) -> Iterator[tuple[str, np.ndarray, pa.Table]]:
    """For each number of steps: its name, the indices of its rows, and its rows."""
    steps = rows["steps"].to_numpy()
    for count in np.unique(steps).tolist():
        at = np.flatnonzero(steps == count)
        yield str(count), at, rows.take(pa.array(at))


def _account(found: Tally) -> dict[str, Any]:
    return {"shards": found.shards, **found.counts, **{k: round(v, 3) for k, v in found.seconds.items()}}


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))
