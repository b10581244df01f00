"""The checks of each kind of run: its plan, and the requirements on its shards."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from palindrome.pipeline.base.text import one_line
from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.images.records import REASONS
from palindrome.pipeline.runs.kinds import KINDS, REJECTS, Kind, setting_name
from palindrome.pipeline.runs.manifest import Manifest
from palindrome.pipeline.runs.moments import read_moments
from palindrome.pipeline.runs.plan import frame_id, ids_of, sample_id
from palindrome.pipeline.runs.schemas import APART, DTYPES
from palindrome.pipeline.runs.selection import Selection, listed_ids
from palindrome.pipeline.runs.shards import read_ids
from palindrome.pipeline.runs.verify.exports import check_export
from palindrome.pipeline.runs.verify.findings import Checked, Finding
from palindrome.pipeline.runs.verify.plans import (
    EncodePlan,
    OwnPlan,
    Plan,
    Unit,
    expected_metadata,
    names_in,
    open_source,
)
from palindrome.pipeline.runs.verify.shards import Pictures, Read, Shape, Variant, Wanted, check_shard, compare_ids
from palindrome.pipeline.runs.verify.strays import strays
from palindrome.pipeline.storage.folder import Folder

THREADS = 4  # each reads one shard at a time
STATUSES = (*REASONS, "compared")  # of rows compared with originals
UNIT = re.compile(r"[0-9a-f]{24}-([0-9a-f]{12})")  # SHARD-SETTING, a sweep's file


def _in_shards(run: Folder, plan: Plan, wanted: Wanted) -> Iterator[Checked]:
    """Checks every unit of the plan, then the plan itself, files of no unit, and other files in the folders."""
    kind = wanted.kind
    present = names_in(run, kind.folder)
    with_rejects = names_in(run, REJECTS) if kind.rejects else set()
    planned: set[str] = set()

    def units() -> Iterator[Unit]:
        for unit in plan.units():
            planned.add(unit.name)
            yield unit

    def check(unit: Unit) -> Checked:
        if unit.name in present:
            return check_shard(run, unit, wanted, unit.name in with_rejects)
        message = f"is missing: the shard's {unit.shard.images} images are not done" if unit.shard else "is missing"
        return Checked([Finding(f"{kind.folder}/{unit.name}.parquet", message)], unit.name)

    yield from in_threads(check, units(), THREADS)
    findings, complete = plan.conclude()
    if complete:
        for folder, found in ((kind.folder, present), (REJECTS, with_rejects)):
            findings += [Finding(f"{folder}/{name}.parquet", plan.orphan) for name in sorted(found - planned)]
    yield Checked([*findings, *strays(run, ("plan", kind.folder, REJECTS))])


def _encode(run: Folder, manifest: Manifest) -> Iterator[Checked]:
    kind, config, inversion = KINDS["encode"], manifest.config, manifest.content["inversion"]
    exact, corrections = inversion.get("tolerance") == "exact", inversion["corrections"]
    # Where the clean end is at timestep 0, the inversion passes over the step between them, which changes nothing.
    passed = int(bool(corrections) and manifest.levels[1] == 0 and not manifest.content.get("set_alpha_to_one", True))
    wanted = Wanted(
        kind,
        _schema(kind, manifest),
        expected_metadata(manifest),
        _latent_rows(
            steps=len(manifest.levels) - 1 - passed,
            most_nfe=inversion["nfe"] - passed * corrections,
            corrected=corrections > 0,
            tolerance=inversion.get("tolerance"),
            measured=config["measure"] or exact,
        ),
        lambda unit, read: _compare_images(kind, unit, read, "it is neither a latent nor a reject"),
        kept=tuple(config["keep"]),
    )
    return _in_shards(run, OwnPlan(run), wanted)


def _sweep(run: Folder, manifest: Manifest) -> Iterator[Checked]:
    kind = KINDS["sweep"]
    settings = sorted({match[1] for name in names_in(run, kind.folder) if (match := UNIT.fullmatch(name))})

    def compare(unit: Unit, read: Read) -> Iterator[str]:
        setting = read.metadata.get("setting")
        if setting is not None:
            try:
                name = setting_name(*(setting[key] for key in ("levels", "corrections", "tolerance", "dtype")))
            except (KeyError, TypeError):
                name = ""
            if not unit.name.endswith(f"-{name}"):
                yield "has a setting that does not match its name"
        yield from _compare_images(kind, unit, read, "it is neither measured nor a reject")

    wanted = Wanted(kind, _schema(kind, manifest), expected_metadata(manifest), _sweep_rows, compare)
    return _in_shards(run, OwnPlan(run, settings), wanted)


def _score(run: Folder, manifest: Manifest) -> Iterator[Checked]:
    kind, how = KINDS["score"], manifest.content["preprocess"]
    wanted = Wanted(
        kind,
        _schema(kind, manifest),
        expected_metadata(manifest),
        lambda batch: _score_rows(batch, manifest.content["scores"], (how["size"], how["size"], how["channels"])),
        lambda unit, read: _compare_images(kind, unit, read, "it is neither scored nor a reject"),
        kept=tuple(manifest.config["keep"]),
    )
    return _in_shards(run, OwnPlan(run), wanted)


def _evaluate(run: Folder, manifest: Manifest) -> Iterator[Checked]:
    kind, found = KINDS["evaluate"], manifest.content["features"]
    stored = manifest.content["stored"]

    def check(batch: pa.RecordBatch) -> Iterator[str]:
        entropy, ids = _column(batch, "entropy"), batch.column("image_id")
        most = np.log(found["classes"] or 1) + 1e-9
        wrong = {"has an entropy that no such network has": ~((entropy >= -1e-9) & (entropy <= most))}
        yield from _named(ids, wrong if found["classes"] else {"has an entropy": ~_null(batch, "entropy")})
        if stored:
            features = batch.column("features")
            if not isinstance(features.type, pa.FixedShapeTensorType) or features.type.shape != [found["dimensions"]]:
                yield f"column features is {features.type}, not {found['dimensions']} numbers"
            else:
                yield from _named(ids, {"has features that are not finite": ~_finite(features)})

    def compare(unit: Unit, read: Read) -> Iterator[str]:
        yield from _compare_images(kind, unit, read, "it is neither evaluated nor a reject")
        try:
            moments = read_moments(run, unit.name)[0].count
        except Exception as e:  # damaged files raise errors of many types
            yield f"its moments can't be read: {one_line(e)}"
            return
        if moments != read.counts.get(kind.row_count):
            yield f"has moments of {moments} images, and its footer says {read.counts.get(kind.row_count)}"

    kept = ("features",) if stored else ()
    wanted = Wanted(kind, _schema(kind, manifest), expected_metadata(manifest), check, compare, kept=kept)
    return _in_shards(run, OwnPlan(run), wanted)


def _generate(run: Folder, manifest: Manifest) -> Iterator[Checked]:
    kind, config = KINDS["generate"], manifest.config
    settings = {"eta": config.get("eta"), "use_sigma_hat": config.get("sigma_hat"), "clip": config.get("clip")}
    settings = {key: value for key, value in settings.items() if value is not None}  # None: newer than the run
    dtype = None if config.get("latents", "none") == "none" else DTYPES[config["latents"]]
    wanted = Wanted(
        kind,
        _schema(kind, manifest),
        expected_metadata(manifest, seed=config["seed"], **settings),
        lambda batch: _sample_rows(batch, dtype),
        lambda unit, read: _compare_images(kind, unit, read, "there is no such sample"),
        kept=("latent",) if dtype else (),
    )
    return _in_shards(run, OwnPlan(run, images=config["count"]), wanted)


def _restore(run: Folder, manifest: Manifest) -> Iterator[Checked]:
    kind, config = KINDS["restore"], manifest.config
    variations = range(config["variations"])
    channels, height, width = manifest.content["image_shape"]
    has = {
        "mask": manifest.content["restoration"]["task"] == "inpaint",
        "mse": not config["degraded"],
        "ssim": config["ssim"],
    }

    def compare(unit: Unit, read: Read) -> Iterator[str]:
        if read.ids is None:
            return
        others = sorted(read.ids.keys() - {(number,) for number in variations})
        yield from (f"has rows in variation {number}, which the run does not make" for (number,) in others)
        for number in variations:
            of_variation = replace(read, ids={(): read.ids.get((number,), [])})
            wrong = _compare_images(kind, unit, of_variation, "it is neither restored nor a reject")
            yield from (f"{message}, in variation {number}" for message in wrong)

    metadata = expected_metadata(manifest, **{name: config[name] for name in ("eta", "seed", "variations")})
    wanted = Wanted(
        kind,
        _schema(kind, manifest),
        metadata,
        lambda batch: _restored_rows(batch, has),
        compare,
        kept=tuple(config["keep"]),
        shape=(height, width, channels),
    )
    return _in_shards(run, OwnPlan(run), wanted)


def _interpolate(run: Folder, manifest: Manifest) -> Iterator[Checked]:
    kind, config = KINDS["interpolate"], manifest.config
    metadata = expected_metadata(manifest, method=config["method"], frames=config["frames"])
    _, encoded, findings = open_source(manifest.source, KINDS["encode"])
    shape, others = _compare_source(manifest, encoded)
    wanted = Wanted(kind, _schema(kind, manifest), metadata, _frame_rows, _compare_frames, shape=shape)
    return chain([Checked([*findings, *others])], _in_shards(run, OwnPlan(run), wanted))


def _reconstruct(run: Folder, manifest: Manifest) -> Iterator[Checked]:
    variants = [(len(levels) - 1,) for levels in manifest.ladders]
    return _of_latents(KINDS["reconstruct"], run, manifest, variants, _error_rows, {}, Selection())


def _regenerate(run: Folder, manifest: Manifest) -> Iterator[Checked]:
    config = manifest.config
    variants = list(product((len(levels) - 1 for levels in manifest.ladders), range(config["variations"])))
    settings = {"eta": config["eta"], "use_sigma_hat": config["sigma_hat"], "seed": config["seed"]}
    which, findings = _selection(manifest)
    shards = _of_latents(KINDS["regenerate"], run, manifest, variants, _regenerated_rows, settings, which)
    return chain([Checked(findings)], shards)


def _edit(run: Folder, manifest: Manifest) -> Iterator[Checked]:
    variants = [(strength,) for strength in manifest.config["strength"]]
    masked = manifest.content["edit"]["mask"] is not None
    which, findings = _selection(manifest)
    shards = _of_latents(KINDS["edit"], run, manifest, variants, lambda batch: _edited_rows(batch, masked), {}, which)
    return chain([Checked(findings)], shards)


def _selection(manifest: Manifest) -> tuple[Selection | None, list[Finding]]:
    """The latents that a run decodes, None if that is no longer known, with a warning."""
    config, findings = manifest.config, []
    which: Selection | None = Selection(where=config.get("where"))
    if config.get("ids"):
        try:
            which = Selection(listed_ids(config["ids"]), config.get("where"))
            same = which.ids_digest == manifest.content.get("ids_digest")
            problem = "" if same else "has other ids than when the run was made"
        except Exception as e:  # stores raise errors of many types
            problem = f"can't be read: {one_line(e)}"
        if problem:
            which = None
            message = f"{problem}; whether ids are missing is not checked"
            findings.append(Finding(config["ids"], message, warning=True))
    return which, findings


def _of_latents(
    kind: Kind,
    run: Folder,
    manifest: Manifest,
    variants: Sequence[Variant],
    check_rows: Callable[[pa.RecordBatch], Iterator[str]],
    settings: Mapping[str, Any],
    which: Selection | None,
) -> Iterator[Checked]:
    """Checks a run that decodes an encode run's latents, each to all variants or a reject; `which` is None if it is not
    known."""
    plan = EncodePlan(manifest.source, names_in(run, kind.folder))
    shape, findings = _compare_source(manifest, plan.manifest)

    def compare(unit: Unit, read: Read) -> Iterator[str]:
        if read.ids is None:
            return
        ids = {variant: read.ids.get(variant, []) for variant in (*variants, *read.ids)}
        others = sorted(ids.keys() - {*variants}, key=str)
        yield from (f"has rows {_at(kind, v)}, which the run does not make" for v in others)
        for variant, found in ids.items():
            if len(found) != (said := read.counts.get(kind.row_count)):
                yield f"has {len(found)} rows {_at(kind, variant)}, and its footer says {said}"
        total = sum(map(len, ids.values()))
        if kind.row_count != "images" and read.counts.get("images") != total:
            yield f"has {total} images, and its footer says {read.counts.get('images')}"
        if unit.shard is None:
            return
        try:
            stored = Counter(read_ids(plan.latents, unit.name, which or Selection()))
        except Exception as e:
            yield f"its latents can't be read: {one_line(e)}"
            return
        refused = Counter(read.rejects or ())
        first = Counter(ids[variants[0]]) + refused
        for variant, found in ids.items():
            have = Counter(found) + refused
            different = have - stored
            if read.rejects is not None:  # otherwise a missing id may be that of a reject
                different += stored - have if which else first - have
            if different:
                yield f"has other ids {_at(kind, variant)} than its latents: {', '.join(sorted(different)[:3])}"

    metadata = expected_metadata(manifest, **settings)
    wanted = Wanted(kind, _schema(kind, manifest), metadata, check_rows, compare, shape=shape)
    return chain([Checked(findings)], _in_shards(run, plan, wanted))


def _at(kind: Kind, variant: Variant) -> str:
    words = {"steps": "at {} steps", "variation": "in variation {}", "strength": "at strength {}"}
    return " ".join(words[name].format(value) for name, value in zip(kind.variants, variant, strict=True))


def _compare_source(manifest: Manifest, encoded: Manifest | None) -> tuple[Shape | None, list[Finding]]:
    """The images' shape according to the encode run, None if unknown; and a finding if the models differ."""
    if encoded is None:
        return None, []
    findings = []
    if encoded.content.get("model_digest") != manifest.model_digest:
        findings = [Finding("run.json", f"names another model than the latents in {manifest.source}")]
    how = encoded.content.get("preprocess") or {}
    return (how["size"], how["size"], how["channels"]) if {"size", "channels"} <= how.keys() else None, findings


def _schema(kind: Kind, manifest: Manifest) -> pa.Schema:
    assert kind.schema is not None
    return kind.schema(manifest.content)


def _compare_images(kind: Kind, unit: Unit, read: Read, missing: str) -> Iterator[str]:
    """Checks that there is a row or a reject for each id of the shard; `missing` is the message if there is not."""
    assert unit.shard is not None
    rows = None if read.ids is None else read.ids.get((), [])
    yield from _compare_count(kind, rows, read)
    if read.counts and read.counts.get("images") != unit.shard.images:
        counted, images = read.counts.get("images"), unit.shard.images
        yield f"has {counted} images according to its footer, and the plan has {images} in the shard"
    if rows is not None:
        known = read.rejects is not None  # otherwise a missing id may be that of a reject
        yield from compare_ids([*rows, *(read.rejects or ())], ids_of(unit.shard), missing if known else None)


def _compare_count(kind: Kind, rows: list[str] | None, read: Read) -> Iterator[str]:
    if rows is not None and read.counts.get(kind.row_count) != len(rows):
        yield f"has {len(rows)} {kind.noun}, and its footer says {read.counts.get(kind.row_count)}"


def _compare_frames(unit: Unit, read: Read) -> Iterator[str]:
    """Checks that there are all frames of each piece of the plan, or one reject with the id of its first frame."""
    assert unit.shard is not None
    rows = None if read.ids is None else read.ids.get((), [])
    yield from _compare_count(KINDS["interpolate"], rows, read)
    pieces = [[frame_id(p.name, frame) for frame in range(p.start, p.stop)] for p in unit.shard.pieces]
    rejected = Counter(read.rejects or ())
    firsts = {first for first, *_ in pieces}
    yield from (f"{image_id} is not in the plan of this shard" for image_id in sorted(rejected.keys() - firsts))
    yield from (f"{image_id} is rejected {n} times" for image_id, n in sorted(rejected.items()) if n > 1)
    if rows is not None:
        planned = (frame for piece in pieces if piece[0] not in rejected for frame in piece)
        missing = "there is neither the frame nor a reject" if read.rejects is not None else None
        yield from compare_ids(rows, planned, missing)


def _named(ids: pa.Array, wrong: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Messages for the rows at fault: `wrong` has a boolean array [rows] by message."""
    for message, rows in wrong.items():
        yield from (f"{ids[int(row)].as_py()} {message}" for row in np.flatnonzero(rows))


def _column(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """The column as float64; nulls become NaN."""
    return batch.column(name).to_numpy(zero_copy_only=False).astype(np.float64)


def _null(batch: pa.RecordBatch, name: str) -> np.ndarray:
    return np.asarray(pc.is_null(batch.column(name)))


def _is_error(values: np.ndarray) -> np.ndarray:
    return (values >= 0) & np.isfinite(values)


def _is_psnr(psnr: np.ndarray, mse: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.isclose(psnr, -10 * np.log10(mse), rtol=1e-6, atol=1e-6) | ~(mse >= 0)


def _finite(latents: pa.Array) -> np.ndarray:
    return np.isfinite(latents.to_numpy_ndarray()).reshape(len(latents), -1).all(1)


def _wrong_of_files(batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    hashed = pc.match_substring_regex(batch.column("content_hash"), "^[0-9a-f]{64}$")
    return {
        "has a width or height below 1": (_column(batch, "width") < 1) | (_column(batch, "height") < 1),
        "has a content_hash that is not a sha256": ~np.asarray(hashed),
    }


def _wrong_of_masks(batch: pa.RecordBatch, masked: bool) -> dict[str, np.ndarray]:
    hashed = pc.fill_null(pc.match_substring_regex(batch.column("mask_hash"), "^[0-9a-f]{64}$"), False)
    return {
        "has a mask_hash that is not a sha256": masked & ~np.asarray(hashed),
        "has a mask_hash, though the run has no masks": ~_null(batch, "mask_hash") & (not masked),
    }


def _latent_rows(
    steps: int, most_nfe: int, corrected: bool, tolerance: Any, measured: bool
) -> Callable[[pa.RecordBatch], Iterator[str]]:
    def check(batch: pa.RecordBatch) -> Iterator[str]:
        nfe, residual, mse, identical = (_column(batch, name) for name in ("nfe", "residual", "mse", "identical"))
        apart = [name for name in APART if name in batch.schema.names]
        wrong = {
            "has a latent that is not finite": ~_finite(batch.column("latent")),
            **_wrong_of_files(batch),
            f"has an nfe below {steps}": ~(nfe >= steps),
        }
        if tolerance is None:
            wrong[f"has an nfe other than {most_nfe}"] = (nfe >= steps) & (nfe != most_nfe)
        elif tolerance != "exact":
            wrong[f"has an nfe above {most_nfe}"] = nfe > most_nfe
        if corrected:
            wrong["has a residual that is not a number of 0 or more"] = ~_is_error(residual)
        else:
            wrong["has a residual, though the run makes no corrections"] = ~_null(batch, "residual")
        if measured:
            psnr = _column(batch, "psnr")
            wrong["has an mse that is not a number of 0 or more"] = ~_is_error(mse)
            wrong["has an `identical` outside of 0 to 1"] = ~((identical >= 0) & (identical <= 1))
            wrong["has a psnr that does not match its mse"] = ~_null(batch, "mse") & ~_is_psnr(psnr, mse)
            for name in apart:
                wrong[f"has a {name} that is not a number of 0 or more"] = ~_is_error(_column(batch, name))
        else:
            present = [~_null(batch, name) for name in ("mse", "psnr", "identical", *apart)]
            wrong["has a measured error, though the run measures none"] = np.logical_or.reduce(present)
        yield from _named(batch.column("image_id"), wrong)

    return check


def _sweep_rows(batch: pa.RecordBatch) -> Iterator[str]:
    """Errors may be infinite or NaN: a sweep also shows settings that fail."""
    identical, mse = _column(batch, "identical"), _column(batch, "mse")
    wrong = {
        "has an nfe below 1": ~(_column(batch, "nfe") >= 1),
        "has a negative mse": mse < 0,
        "has an `identical` outside of 0 to 1": ~((identical >= 0) & (identical <= 1)),
        "has a psnr that does not match its mse": np.isfinite(mse) & ~_is_psnr(_column(batch, "psnr"), mse),
    }
    yield from _named(batch.column("image_id"), wrong)


def _score_rows(batch: pa.RecordBatch, scores: Collection[str], shape: Shape) -> Iterator[str]:
    quality, names = _column(batch, "jpeg_quality"), batch.schema.names
    wrong = {
        **_wrong_of_files(batch),
        "has a jpeg_quality outside of 1 to 100": ~(_null(batch, "jpeg_quality") | (quality >= 1) & (quality <= 100)),
    }
    for name in scores:
        values = _column(batch, name)
        wrong[f"has a {name} that is not finite"] = ~np.isfinite(values)
        if (parts := f"{name}_steps") in names:
            sums = np.array([sum(row or ()) for row in batch.column(parts).to_pylist()])
            wrong[f"has {parts} that do not sum to its {name}"] = ~np.isclose(sums, values, rtol=1e-9, atol=1e-6)
    for name in (name for name in names if isinstance(batch.schema.field(name).type, pa.FixedShapeTensorType)):
        wrong[f"has a {name} that is not finite"] = ~_finite(batch.column(name))
    yield from _named(batch.column("image_id"), wrong)
    for name in (name for name in names if name.endswith("_map") and name.removesuffix("map") + "l1" in scores):
        yield from Pictures(shape).check(batch.column("image_id"), batch.column(name).field("bytes"))


def _sample_rows(batch: pa.RecordBatch, dtype: pa.DataType | None) -> Iterator[str]:
    ids = batch.column("image_id")
    matching = [i == sample_id(n) for i, n in zip(ids.to_pylist(), _numbers(batch, "index"), strict=True)]
    wrong = {"has the index of another sample": ~np.array(matching, bool)}
    if dtype is not None:
        latents = batch.column("latent")
        if not isinstance(latents.type, pa.FixedShapeTensorType) or latents.type.value_type != dtype:
            yield f"column latent is {latents.type}, not a tensor of {dtype}"
        elif latents.null_count:
            yield "column latent has nulls"
        else:
            wrong["has a latent that is not finite"] = ~_finite(latents)
    yield from _named(ids, wrong)


def _numbers(batch: pa.RecordBatch, name: str) -> list[int]:
    return [-1 if value is None else value for value in batch.column(name).to_pylist()]


def _frame_rows(batch: pa.RecordBatch) -> Iterator[str]:
    ids, t = batch.column("image_id"), _column(batch, "t")
    frames = zip(ids.to_pylist(), batch.column("path").to_pylist(), _numbers(batch, "frame"), strict=True)
    wrong = {
        "has the path or the frame of another": np.array([i != frame_id(path, n) for i, path, n in frames], bool),
        "has a t outside of 0 to 1": ~((t >= 0) & (t <= 1)),
        "has a latent that is not finite": ~np.isfinite(_column(batch, "rms_slerp") + _column(batch, "rms_linear")),
    }
    yield from _named(ids, wrong)


def _regenerated_rows(batch: pa.RecordBatch) -> Iterator[str]:
    wrong = {"has a to_longest that is not a number of 0 or more": ~_is_error(_column(batch, "to_longest"))}
    yield from _named(batch.column("image_id"), wrong)


def _restored_rows(batch: pa.RecordBatch, has: Mapping[str, bool]) -> Iterator[str]:
    """Which of `mask`, `mse` and `ssim` a run `has`."""
    wrong = {**_wrong_of_files(batch), **_wrong_of_masks(batch, has["mask"])}
    for name in ("observation_error", "picture_error"):
        wrong[f"has a {name} that is not a number of 0 or more"] = ~_is_error(_column(batch, name))
    for prefix in ("", "baseline_"):
        mse, psnr, ssim = (_column(batch, f"{prefix}{name}") for name in ("mse", "psnr", "ssim"))
        if has["mse"]:
            wrong[f"has a {prefix}mse that is not a number of 0 or more"] = ~_is_error(mse)
            wrong[f"has a {prefix}psnr that does not match its {prefix}mse"] = ~_is_psnr(psnr, mse)
        else:
            present = ~_null(batch, f"{prefix}mse") | ~_null(batch, f"{prefix}psnr")
            wrong[f"has a {prefix}mse or {prefix}psnr, though the originals are not known"] = present
        wrong[f"has a {prefix}ssim outside of -1 to 1, or that the run does not measure"] = (
            ~((ssim >= -1) & (ssim <= 1)) if has["ssim"] else ~_null(batch, f"{prefix}ssim")
        )
    yield from _named(batch.column("image_id"), wrong)


def _edited_rows(batch: pa.RecordBatch, masked: bool) -> Iterator[str]:
    compared = np.asarray(pc.fill_null(pc.equal(batch.column("status"), "compared"), False))
    changed, values = _column(batch, "changed_outside"), _column(batch, "values_outside")
    wrong = {
        **_wrong_of_files(batch),
        **_wrong_of_masks(batch, masked),
        "has a status that is none": ~np.asarray(pc.is_in(batch.column("status"), pa.array(STATUSES))),
        "has a changed_outside that is not from 0 to its values_outside": masked
        & ~np.where(compared, (changed >= 0) & (changed <= values), _null(batch, "changed_outside") & (values > 0)),
        "has values outside of a mask, though the run has no masks": ~np.isnan(values) & (not masked),
    }
    for name in ("own_mse", "change"):
        there = np.where(compared, _is_error(_column(batch, name)), _null(batch, name))
        wrong[f"has a {name} that does not match its status"] = ~there
    yield from _named(batch.column("image_id"), wrong)


def _error_rows(batch: pa.RecordBatch) -> Iterator[str]:
    for row in batch.select(["image_id", "steps", "status", "mse"]).to_pylist():
        at, mse = f"{row['image_id']} at {row['steps']} steps", row["mse"]
        if row["status"] not in STATUSES:
            yield f"{at} has the status {row['status']}, which is not a status"
        elif row["status"] == "compared" and not (mse is not None and np.isfinite(mse) and mse >= 0):
            yield f"{at} has an mse that is not a number of 0 or more"


CHECKS: Mapping[str, Callable[[Folder, Manifest], Iterator[Checked]]] = {
    "encode": _encode,
    "reconstruct": _reconstruct,
    "sweep": _sweep,
    "score": _score,
    "evaluate": _evaluate,
    "generate": _generate,
    "regenerate": _regenerate,
    "restore": _restore,
    "edit": _edit,
    "interpolate": _interpolate,
    "export": check_export,
}
