"""What came of a run, read from its committed shards: the content of `summary.json`."""

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from palindrome.pipeline.base.errors import writing
from palindrome.pipeline.base.log import note
from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.images.metrics import statistics
from palindrome.pipeline.runs.kinds import IMAGES, LATENTS, RECONSTRUCTIONS
from palindrome.pipeline.runs.outcome import Failure
from palindrome.pipeline.runs.schemas import ERROR_SCHEMA, REGENERATED_SCHEMA
from palindrome.pipeline.runs.shards import committed, read_rejects, shard_metadata
from palindrome.pipeline.storage.folder import Folder

T = TypeVar("T")
READS = 32  # shards read at once
WORST = 20  # ids named
NAMED = 1000  # ids named of the images that do not come back to the bit; the rows say it of all


def latents_summary(run: Folder, measured: bool) -> dict[str, Any]:
    """Counts, rejects by reason, seconds, and the round-trip error where it was measured."""
    shards = sorted(committed(run))
    summary = {"images": 0, "latents": 0, "rejects": 0, **_account(run, shards, LATENTS)}
    summary["rejects_by_reason"] = rejects_by_reason(run, shards)
    if measured:
        columns = {"image_id": pa.string(), "mse": pa.float64(), "identical": pa.float64()}
        tables = _of_each(lambda shard: run.read_parquet(f"{LATENTS}/{shard}.parquet", list(columns)), shards)
        nothing = pa.schema(columns).empty_table()
        rows = pa.concat_tables([nothing, *tables], promote_options="permissive")
        others = rows.filter(pc.less(rows["identical"], 1))["image_id"]
        summary["round_trip"] = {
            **error_statistics(rows),
            "not_identical": len(others),
            "not_identical_ids": others.slice(0, NAMED).to_pylist(),
        }
    return summary


def rejects_by_reason(run: Folder, shards: Collection[str]) -> dict[str, int]:
    """Counts over the shards that are done."""
    return dict(sorted(Counter(reject["reason"] for reject in read_rejects(run, shards)).items()))


def reconstructions_summary(run: Folder, rows: pa.Table, steps: Sequence[int]) -> dict[str, Any]:
    """Counts, seconds, and for each number of steps the errors in `rows` and the images that could not be compared."""
    summary = _account(run, sorted(committed(run, RECONSTRUCTIONS)), RECONSTRUCTIONS)
    summary["by_steps"] = []
    for count in steps:
        compared, uncompared = split_by_status(rows, count)
        identical = pc.mean(compared["identical"]).as_py()
        found = {**error_statistics(compared), "identical": identical, "uncompared": uncompared}
        summary["by_steps"].append({"steps": count, **found})
    return summary


def generated_summary(run: Folder) -> dict[str, Any]:
    """Counts and seconds."""
    return {"images": 0, **_account(run, sorted(committed(run, IMAGES)), IMAGES)}


def read_errors(run: Folder) -> pa.Table:
    """All rows of a reconstruction, with the name of their `shard`, without the images."""
    columns = [name for name in ERROR_SCHEMA.names if name != "image"]
    nothing = ERROR_SCHEMA.empty_table().select(columns)
    tables = [nothing.append_column("shard", pa.array([], pa.string()))]

    def read(shard: str) -> pa.Table:
        rows = run.read_parquet(f"{RECONSTRUCTIONS}/{shard}.parquet", columns).replace_schema_metadata()
        return rows.append_column("shard", pa.repeat(shard, len(rows)))

    return pa.concat_tables([*tables, *_of_each(read, sorted(committed(run, RECONSTRUCTIONS)))])


def mean_nfe(run: Folder) -> float:
    """Network evaluations that encoding spent on an image, over all its rows: a tolerance makes them differ."""
    spent = count = 0
    for table in _of_each(lambda shard: run.read_parquet(f"{LATENTS}/{shard}.parquet", ["nfe"]), committed(run)):
        nfe = table["nfe"]
        spent, count = spent + (pc.sum(nfe).as_py() or 0), count + len(nfe)
    return spent / max(count, 1)


def split_by_status(rows: pa.Table, steps: int) -> tuple[pa.Table, dict[str, int]]:
    """Of the rows at a number of steps: those compared, and reason -> count of those that were not."""
    rows = rows.filter(pc.equal(rows["steps"], steps))
    others = Counter(status for status in rows["status"].to_pylist() if status != "compared")
    return rows.filter(pc.equal(rows["status"], "compared")), dict(sorted(others.items()))


def error_statistics(rows: pa.Table) -> dict[str, Any]:
    """count, how many of them are `not_finite` and left out of the figures, mean, median, p99, max of `mse`, the mean
    PSNR of those that are not exact, and the worst ids, worst first. What has no finite value is None."""
    mse = rows["mse"].to_numpy()
    figures = {name: value if math.isfinite(value) else None for name, value in statistics(mse).items()}
    worst = np.argsort(-np.where(np.isfinite(mse), mse, np.inf), kind="stable")[:WORST]
    not_finite = int((~np.isfinite(mse)).sum())
    return {
        "count": len(mse),
        "not_finite": not_finite,
        **figures,
        "worst": rows["image_id"].take(pa.array(worst)).to_pylist(),
    }


def put_summary(run: Folder, summary: dict[str, Any], failures: Sequence[Failure]) -> None:
    failed = [{"shard": f.shard.name, "images": f.shard.images, "error": f.error} for f in failures]
    note(summary=summary, failed_shards=len(failed))
    with writing(f"{run.uri}/summary.json"):
        run.put("summary.json", (json.dumps({**summary, "failed_shards": failed}, indent=2) + "\n").encode())


def _account(run: Folder, shards: Sequence[str], below: str) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for metadata in _of_each(lambda shard: shard_metadata(run, shard, below), shards):
        counts.update(metadata["counts"])
        seconds.update(metadata["timings"])
    return {"shards": len(shards), **counts, **{k: round(v, 3) for k, v in seconds.items()}}


def _of_each(read: Callable[[str], T], shards: Iterable[str]) -> Iterator[T]:
    """What is read of each shard, in their order; many at once, as an object store takes tens of milliseconds each."""
    return in_threads(read, shards, READS)


def consistency(run: Folder) -> list[dict[str, Any]]:
    """For each number of steps: images, mean and 99th percentile of `to_longest`."""
    nothing = REGENERATED_SCHEMA.empty_table().select(["steps", "to_longest"])
    names = sorted(committed(run, IMAGES))
    tables = _of_each(lambda shard: run.read_parquet(f"{IMAGES}/{shard}.parquet", nothing.column_names), names)
    rows = pa.concat_tables([nothing, *(table.replace_schema_metadata() for table in tables)])
    found = []
    for steps in sorted(pc.unique(rows["steps"]).to_pylist()):
        distances = rows.filter(pc.equal(rows["steps"], steps))["to_longest"].to_numpy()
        about = {"steps": steps, "images": len(distances), "mean": float(distances.mean())}
        found.append({**about, "p99": float(np.quantile(distances, 0.99))})
    return found
