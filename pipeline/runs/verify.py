"""Whether a run folder holds what its plan says, and nothing else: everything is read but the images.

A shard's ids are compared with those that its part of the plan makes, and the plan's ids with one another; so the ids
of a run that is found well are unique, and exactly the plan's. Held in memory are the shards' names, a row group of a
few shards, the ids of those, and of all ids a 64-bit hash, `PART` at a time: of more, the plan is read again.
"""

import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from palindrome.pipeline.base.errors import RunError
from palindrome.pipeline.base.text import one_line
from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.images.records import REASONS, Shard
from palindrome.pipeline.images.sources import ONE_EACH
from palindrome.pipeline.runs.entries import Entry, entries
from palindrome.pipeline.runs.kinds import FOLDERS, LATENTS, REJECTS
from palindrome.pipeline.runs.plan import plan_totals, read_plan
from palindrome.pipeline.runs.schemas import REJECT_SCHEMA, SHARD_KEY, latent_schema, metadata_of
from palindrome.pipeline.runs.shards import open_checked
from palindrome.pipeline.storage.folder import Folder

THREADS = 4  # shards read at a time
BATCH_BYTES = 16 << 20  # of latents
PART = 20_000_000  # ids whose hashes are held at once
NEEDED = {
    "encode": ("model_digest", "levels", "inversion", "preprocess", "collection"),
    "reconstruct": ("model_digest", "ladders"),
}


@dataclass(frozen=True)
class Finding:
    """What is wrong, and where: a file, a shard, an id. A `warning` makes no run a bad one."""

    where: str
    what: str
    warning: bool = False


@dataclass
class Account:
    """What was met on the way."""

    shards: int = 0
    latents: int = 0
    rejects: int = 0
    of_shard: dict[str, int] = field(default_factory=dict)  # its latents, where it is all well
    errors: list[float] = field(default_factory=list)  # of latents that were decoded again


@dataclass
class _Checked:
    """Of one shard, or of none: what was found, and the counts."""

    findings: list[Finding] = field(default_factory=list)
    shard: str | None = None
    latents: int = 0
    rejects: int = 0


def verify(
    run: Folder, manifest: Mapping[str, Any], account: Account, each: Callable[[], None] = lambda: None
) -> Iterator[Finding]:
    """What is wrong with a run of encode or reconstruct, as it is met; `account` is kept on the way, and `each` called
    after each shard. Raises RunError where `run.json` is no such run's."""
    job = manifest["job"]
    lacking = [name for name in NEEDED[job] if name not in manifest]
    if lacking:
        raise RunError(f"{run.uri}/run.json lacks {', '.join(lacking)}")
    for checked in (_encoded if job == "encode" else _reconstructed)(run, manifest):
        account.shards += checked.shard is not None
        if checked.shard and checked.latents and not checked.findings:
            account.of_shard[checked.shard] = checked.latents
        account.latents += checked.latents
        account.rejects += checked.rejects
        each()
        yield from checked.findings
    yield from _strays(run, FOLDERS[job])


def _encoded(run: Folder, manifest: Mapping[str, Any]) -> Iterator[_Checked]:
    wanted = _Wanted.of(manifest)
    present = {entry.shard for entry in entries(run, LATENTS) if entry.shard}
    refused = {entry.shard for entry in entries(run, REJECTS) if entry.shard}
    planned: set[str] = set()
    damaged: list[Finding] = []
    totals = _totals(run, damaged)
    images = 0

    def shards() -> Iterator[Shard]:
        nonlocal images
        for shard in _plan(run, damaged):
            if shard.name in planned:
                damaged.append(Finding("plan", f"shard {shard.name} is there twice"))
                continue
            planned.add(shard.name)
            images += shard.images
            if shard.name != Shard.of(shard.kind, shard.pieces).name:
                damaged.append(Finding("plan", f"shard {shard.name} is not named by its content"))
            yield shard

    def check(shard: Shard) -> _Checked:
        file = f"{LATENTS}/{shard.name}.parquet"
        if shard.name not in present:
            missing = Finding(file, f"is missing: the shard's {shard.images} images are not done")
            return _Checked([missing], shard.name)
        return _check_shard(run, shard, wanted, shard.name in refused)

    yield from in_threads(check, shards(), THREADS)
    if not damaged:
        if totals != (len(planned), images):
            what = f"says {totals[0]} shards and {totals[1]} images, and there are {len(planned)} and {images}"
            damaged.append(Finding("plan/complete.json", what))
        damaged += [Finding("plan", f"{name} is there {n} times") for name, n in _doubled(run, images)]
        for below, found in ((LATENTS, present), (REJECTS, refused)):
            orphans = sorted(str(name) for name in found - planned)
            damaged += [Finding(f"{below}/{name}.parquet", "is of no shard of the plan") for name in orphans]
    yield _Checked(damaged)


def _totals(run: Folder, damaged: list[Finding]) -> tuple[int, int]:
    try:
        totals = plan_totals(run)
    except Exception as e:
        damaged.append(Finding("plan/complete.json", f"can't be read: {one_line(e)}"))
        return 0, 0
    if totals is None:
        damaged.append(Finding("plan", "is not complete: the run was cut short while it listed the images"))
        return 0, 0
    return totals.shards, totals.images


def _plan(run: Folder, damaged: list[Finding]) -> Iterator[Shard]:
    """As much of the plan as can be read; the files that can't are added to `damaged`."""
    if damaged:
        return
    try:
        yield from read_plan(run)
    except Exception as e:
        named = False
        for name in sorted(entry.name for entry in entries(run, "plan") if entry.shard):
            try:
                with open_checked(run, f"plan/{name}") as file:
                    for _ in file.iter_batches(1024):
                        pass
            except Exception as why:
                named = True
                damaged.append(Finding(f"plan/{name}", f"can't be read: {one_line(why)}"))
        if not named:
            damaged.append(Finding("plan", f"can't be read: {one_line(e)}"))


def ids_of(shard: Shard) -> Iterator[str]:
    """The image ids that pipeline.sources makes of a shard."""
    for piece in shard.pieces:
        if shard.kind in ONE_EACH:
            yield piece.name
        else:
            yield from (f"{piece.name}#{row}" for row in range(piece.start, piece.stop))


def _doubled(run: Folder, images: int) -> Iterator[tuple[str, int]]:
    """Ids that stand more than once in the plan, and how often. By hashes; where two are equal, the ids are."""
    parts = -(-images // PART)
    for part in range(parts):
        hashes = array("q")
        for shard in read_plan(run):
            of_all = map(hash, ids_of(shard))
            hashes.extend(of_all if parts == 1 else (h for h in of_all if h % parts == part))
        found = np.array(hashes)
        found.sort()
        twice = set(found[1:][found[1:] == found[:-1]].tolist())
        if twice:
            count = Counter(i for shard in read_plan(run) for i in ids_of(shard) if hash(i) in twice)
            yield from ((image_id, n) for image_id, n in sorted(count.items()) if n > 1)


@dataclass(frozen=True)
class _Wanted:
    """What every shard's rows of a run of encode are to be."""

    schema: pa.Schema
    kept: tuple[str, ...]
    about: Mapping[str, Any]
    steps: int
    most_nfe: int
    corrected: bool
    tolerance: Any
    measured: bool

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "_Wanted":
        config, how, inversion = manifest["config"], manifest["preprocess"], manifest["inversion"]
        try:
            return cls(
                schema=latent_schema((how["channels"], how["size"], how["size"]), config["dtype"]),
                kept=tuple(config["keep"]),
                about={k: v for k, v in manifest.items() if k not in ("job", "config", "collection", "versions")},
                steps=len(manifest["levels"]) - 1,
                most_nfe=inversion["nfe"],
                corrected=inversion["corrections"] > 0,
                tolerance=inversion.get("tolerance"),
                measured=config["measure"] or inversion.get("tolerance") == "exact",
            )
        except (KeyError, TypeError) as e:
            raise RunError(f"run.json is not as encode writes it: {one_line(e)}") from e


def _check_shard(run: Folder, shard: Shard, wanted: _Wanted, refused: bool) -> _Checked:
    checked = _Checked(shard=shard.name)
    file, rejects = f"{LATENTS}/{shard.name}.parquet", f"{REJECTS}/{shard.name}.parquet"

    def wrong(where: str, what: str) -> None:
        checked.findings.append(Finding(where, what))

    ids: list[str] | None = []
    counts: dict[str, Any] = {}
    try:
        with open_checked(run, file) as opened:
            counts = _counts(opened)
            ids, found = _check_latents(opened, wanted)
            checked.findings += [Finding(file, what) for what in found]
        checked.latents = len(ids)
        if counts.get("latents") != len(ids):
            wrong(file, f"has {len(ids)} latents, and its footer says {counts.get('latents')}")
    except Exception as e:  # damage shows as errors of many kinds
        ids = None
        wrong(file, f"can't be read: {one_line(e)}")
    others: list[str] | None = []
    if refused:
        try:
            with open_checked(run, rejects) as opened:
                others = _check_rejects(opened, lambda what: wrong(rejects, what))
            checked.rejects = len(others)
            if counts and counts.get("rejects") != len(others):
                wrong(rejects, f"has {len(others)} rejects, and {file} says {counts.get('rejects')}")
        except Exception as e:
            others = None
            wrong(rejects, f"can't be read: {one_line(e)}")
    elif counts.get("rejects"):
        others = None
        wrong(rejects, f"is missing: {file} says that {counts['rejects']} images were rejected")
    if counts and counts.get("images") != shard.images:
        wrong(file, f"is of {counts.get('images')} images by its footer, and the plan has {shard.images} in the shard")
    if ids is not None and others is not None:
        for what in _compare_ids([*ids, *others], ids_of(shard)):
            wrong(file, what)
    elif ids is not None:
        for what in _compare_ids(ids, ids_of(shard)):
            if not what.startswith("lacks"):  # it may be among the rejects
                wrong(file, what)
    return checked


def _counts(file: pq.ParquetFile) -> dict[str, Any]:
    return dict(json.loads(file.metadata.metadata[SHARD_KEY])["counts"])


def _compare_ids(found: Iterable[str], planned: Iterable[str]) -> Iterator[str]:
    have, want = Counter(found), set(planned)
    for image_id in sorted(have.keys() | want):
        if image_id not in want:
            yield f"{image_id} is not in the plan of this shard"
        elif image_id not in have:
            yield f"lacks {image_id}: it is neither a latent nor a reject"
        elif have[image_id] > 1:
            yield f"{image_id} is there {have[image_id]} times"


def _check_latents(file: pq.ParquetFile, wanted: _Wanted) -> tuple[list[str], list[str]]:
    """The ids, and what is wrong."""
    found = list(_check_about(metadata_of(file.schema_arrow), wanted.about))
    schema = file.schema_arrow
    if schema.names.count("image_id") != 1:
        return [], [*found, "has no column image_id"]
    fit = True
    for name in (*wanted.schema.names, *wanted.kept):
        if name not in schema.names:
            fit = False
            found.append(f"has no column {name}")
        elif name in wanted.schema.names and schema.field(name).type != wanted.schema.field(name).type:
            fit = False
            found.append(f"column {name} is {schema.field(name).type}, not {wanted.schema.field(name).type}")
    tensor = wanted.schema.field("latent").type
    rows = max(1, BATCH_BYTES // (int(np.prod(tensor.shape)) * tensor.value_type.bit_width // 8))
    ids: list[str] = []
    for group in range(file.metadata.num_row_groups):
        for batch in file.iter_batches(min(rows, 4096), row_groups=[group], columns=None if fit else ["image_id"]):
            ids += [str(i) for i in batch.column("image_id").to_pylist()]
            if fit:
                found += _check_rows(batch, wanted)
    return ids, found


def _check_about(about: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    for name in ("model_digest", "levels", *sorted(about.keys() & wanted.keys() - {"model_digest", "levels"})):
        if name not in about:
            yield f"does not say its {name}"
        elif about[name] != wanted.get(name):
            yield f"says {name} {_short(about[name])}, and run.json {_short(wanted.get(name))}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _check_rows(batch: pa.RecordBatch, wanted: _Wanted) -> Iterator[str]:
    """What is wrong with rows of the right types, by id."""
    for field_ in wanted.schema:
        if not field_.nullable and batch.column(field_.name).null_count:
            yield f"column {field_.name} has nulls"
            return
    ids = batch.column("image_id")

    def column(name: str) -> np.ndarray:
        return batch.column(name).to_numpy(zero_copy_only=False).astype(np.float64)  # nulls are NaN

    def null(name: str) -> np.ndarray:
        return np.asarray(pc.is_null(batch.column(name)))

    latents = batch.column("latent").to_numpy_ndarray()
    nfe, residual, mse, identical = (column(name) for name in ("nfe", "residual", "mse", "identical"))
    hashed = pc.match_substring_regex(batch.column("content_hash"), "^[0-9a-f]{64}$")
    wrong = {
        "has a latent that is not finite": ~np.isfinite(latents).reshape(len(batch), -1).all(1),
        "has a width or height below 1": (column("width") < 1) | (column("height") < 1),
        "has no sha256 as its content_hash": ~np.asarray(hashed),
        f"has an nfe below {wanted.steps}": ~(nfe >= wanted.steps),
    }
    if wanted.tolerance is None:
        wrong[f"has an nfe other than {wanted.most_nfe}"] = (nfe >= wanted.steps) & (nfe != wanted.most_nfe)
    elif wanted.tolerance != "exact":
        wrong[f"has an nfe above {wanted.most_nfe}"] = nfe > wanted.most_nfe
    if wanted.corrected:
        wrong["has a residual that is no number of 0 or more"] = ~((residual >= 0) & np.isfinite(residual))
    else:
        wrong["has a residual, of an inversion that has none"] = ~null("residual")
    if wanted.measured:
        wrong["has an mse that is no number of 0 or more"] = ~((mse >= 0) & np.isfinite(mse))
        wrong["has an `identical` that is no share"] = ~((identical >= 0) & (identical <= 1))
        wrong["has a psnr that is not that of its mse"] = ~null("mse") & ~_is_psnr(column("psnr"), mse)
    else:
        there = ~null("mse") | ~null("psnr") | ~null("identical")
        wrong["has a measured error, of a run that measures none"] = there
    for what, rows in wrong.items():
        yield from (f"{ids[int(row)].as_py()} {what}" for row in np.flatnonzero(rows))


def _is_psnr(psnr: np.ndarray, mse: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.isclose(psnr, -10 * np.log10(mse), rtol=1e-6, atol=1e-6) | ~(mse >= 0)


def _check_rejects(file: pq.ParquetFile, wrong: Callable[[str], None]) -> list[str]:
    """The ids."""
    ids: list[str] = []
    if not file.schema_arrow.equals(REJECT_SCHEMA):
        wrong(f"has columns {_short(file.schema_arrow.names)} of other names or types than rejects have")
    for batch in file.iter_batches(1024, columns=["image_id", "reason"]):
        found = [(str(row["image_id"]), row["reason"]) for row in batch.to_pylist()]
        for image_id, reason in found:
            if reason not in REASONS:
                wrong(f"{image_id} is rejected as {reason}, which is no reason")
        ids += [image_id for image_id, _ in found]
    return ids


def _reconstructed(run: Folder, manifest: Mapping[str, Any]) -> Iterator[_Checked]:
    latents = Folder(str(manifest["config"].get("latents")))
    below = FOLDERS["reconstruct"]
    present = {entry.shard for entry in entries(run, below) if entry.shard}
    try:
        encoded: set[str | None] | None = {entry.shard for entry in entries(latents, LATENTS) if entry.shard}
        why = "" if encoded else "holds no latents"
    except Exception as e:  # of whichever store
        encoded, why = None, f"can't be read: {one_line(e)}"
    if why:
        yield _Checked([Finding(latents.uri, f"{why}; it is what was reconstructed")])
    steps = [len(levels) - 1 for levels in manifest["ladders"]]

    def check(shard: str) -> _Checked:
        if shard not in present:
            return _Checked([Finding(f"{below}/{shard}.parquet", "is missing: the shard is not done")], shard)
        stored = latents if encoded and shard in encoded else None
        return _check_errors(run, stored, shard, manifest["model_digest"], steps)

    yield from in_threads(check, sorted(str(s) for s in present | (encoded or set())), THREADS)
    orphans = sorted(str(s) for s in present - (encoded or present))
    what = f"is of no shard of {latents.uri}"
    yield _Checked([Finding(f"{below}/{name}.parquet", what) for name in orphans])


def _check_errors(run: Folder, latents: Folder | None, shard: str, digest: str, steps: Sequence[int]) -> _Checked:
    checked = _Checked(shard=shard)
    file = f"{FOLDERS['reconstruct']}/{shard}.parquet"

    def wrong(what: str) -> None:
        checked.findings.append(Finding(file, what))

    ids: dict[int, list[str]] = {count: [] for count in steps}
    try:
        with open_checked(run, file) as opened:
            if metadata_of(opened.schema_arrow).get("model_digest") != digest:
                wrong("says another model_digest than run.json")
            counts = _counts(opened)
            for group in range(opened.metadata.num_row_groups):
                for batch in opened.iter_batches(256, row_groups=[group]):
                    for row in batch.to_pylist():
                        ids.setdefault(row["steps"], []).append(str(row["image_id"]))
                        for what in _check_error(row):
                            wrong(f"{row['image_id']} at {row['steps']} steps {what}")
    except Exception as e:
        wrong(f"can't be read: {one_line(e)}")
        return checked
    if sorted(ids) != sorted(steps):
        wrong(f"has rows at {sorted(ids)} steps, and run.json says {sorted(steps)}")
    checked.latents = counts.get("images", 0)
    for count, found in ids.items():
        if len(found) != checked.latents:
            wrong(f"has {len(found)} rows at {count} steps, and its footer says {checked.latents}")
    if latents is None:
        return checked
    try:
        with open_checked(latents, f"{LATENTS}/{shard}.parquet") as opened:
            stored = opened.read(["image_id"])["image_id"].to_pylist()
    except Exception as e:
        wrong(f"its latents can't be read: {one_line(e)}")
        return checked
    for count, found in ids.items():
        if Counter(found) != Counter(stored):
            differ = sorted((Counter(found) - Counter(stored)) + (Counter(stored) - Counter(found)))
            wrong(f"has other ids at {count} steps than its latents: {', '.join(differ[:3])}")
    return checked


def _check_error(row: Mapping[str, Any]) -> Iterator[str]:
    compared = row["status"] == "compared"
    if compared and not (row["mse"] is not None and np.isfinite(row["mse"]) and row["mse"] >= 0):
        yield "has an mse that is no number of 0 or more"
    if not compared and row["status"] not in {*REASONS, "missing", "changed"}:
        yield f"has the status {row['status']}, which is none"
    if not (row["image"] and row["image"]["bytes"]):
        yield "has no image"


def _strays(run: Folder, below: str) -> Iterator[Finding]:
    """What lies in the folder beside the shards; it does no harm."""
    found: list[tuple[str, Entry]] = []
    for folder in ("", "plan", below, REJECTS):
        kept = {"plan": "complete.json"}.get(folder)
        here = ((f"{folder}/{e.name}".lstrip("/"), e) for e in entries(run, folder))
        found += [(name, e) for name, e in here if (_is_temporary(e) if not folder else not e.shard and e.name != kept)]
    for name, entry in sorted(found):
        what = (
            "is a temporary file, of a writer at work or of one that was killed"
            if _is_temporary(entry)
            else "is nothing that a run writes"
        )
        yield Finding(name, what, warning=True)


def _is_temporary(entry: Entry) -> bool:
    return bool(re.match(r"\.tmp-", entry.name))
