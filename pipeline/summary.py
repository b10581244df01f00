"""What came of a run, read from its committed shards: the content of `summary.json`."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.actors import RECONSTRUCTIONS
from pipeline.latents import LATENTS, REJECTS, committed, shard_metadata
from pipeline.run import Failure
from pipeline.storage import Folder

WORST = 20  # ids named


def latents_summary(run: Folder, measured: bool) -> dict[str, Any]:
    """Counts, rejects by reason, seconds, and the round-trip error where it was measured."""
    shards = sorted(committed(run))
    summary = _account(run, shards, LATENTS)
    reasons: Counter[str] = Counter()
    for name in run.files(REJECTS):
        if name.removesuffix(".parquet") in shards:
            reasons.update(run.read_parquet(f"{REJECTS}/{name}", ["reason"]).column(0).to_pylist())
    summary["rejects_by_reason"] = dict(sorted(reasons.items()))
    if measured:
        tables = (run.read_parquet(f"{LATENTS}/{shard}.parquet", ["image_id", "mse"]) for shard in shards)
        summary["round_trip"] = error_statistics(pa.concat_tables(tables)) if shards else error_statistics(None)
    return summary


def reconstructions_summary(run: Folder, steps: Sequence[int]) -> dict[str, Any]:
    """Counts, seconds, and for each number of steps the errors, and the images that could not be compared."""
    shards = sorted(committed(run, RECONSTRUCTIONS))
    summary = _account(run, shards, RECONSTRUCTIONS)
    table = errors(run)
    summary["by_steps"] = []
    for count in steps:
        rows = table.filter(pa.compute.equal(table["steps"], count))
        compared = rows.filter(pa.compute.equal(rows["status"], "compared"))
        others = Counter(s for s in rows["status"].to_pylist() if s != "compared")
        identical = compared["identical"].to_numpy()
        summary["by_steps"].append(
            {
                "steps": count,
                **error_statistics(compared),
                "identical": float(identical.mean()) if len(identical) else None,
                "uncompared": dict(sorted(others.items())),
            }
        )
    return summary


def errors(run: Folder) -> pa.Table:
    """All rows of a reconstruction, without the images."""
    columns = ["image_id", "source", "steps", "status", "mse", "psnr", "identical"]
    tables = [
        run.read_parquet(f"{RECONSTRUCTIONS}/{s}.parquet", columns) for s in sorted(committed(run, RECONSTRUCTIONS))
    ]
    return pa.concat_tables(tables)


def error_statistics(rows: pa.Table) -> dict[str, Any]:
    """count, mean, median, p99 of `mse`, the mean of the per-image PSNRs, and the worst ids, worst first."""
    mse = rows["mse"].to_numpy().astype(np.float64)
    if not len(mse):
        return {"count": 0, "mean": None, "median": None, "p99": None, "psnr": None, "worst": []}
    worst = np.argsort(-mse, kind="stable")[:WORST]
    with np.errstate(divide="ignore"):
        psnr = -10 * np.log10(mse)
    return {
        "count": len(mse),
        "mean": float(mse.mean()),
        "median": float(np.median(mse)),
        "p99": float(np.quantile(mse, 0.99)),
        "psnr": float(psnr[np.isfinite(psnr)].mean()) if np.isfinite(psnr).any() else None,
        "worst": rows["image_id"].take(pa.array(worst)).to_pylist(),
    }


def put_summary(run: Folder, summary: dict[str, Any], failures: Sequence[Failure]) -> None:
    failed = [{"shard": f.shard.name, "images": f.shard.images, "error": f.error} for f in failures]
    run.put("summary.json", (json.dumps({**summary, "failed_shards": failed}, indent=2) + "\n").encode())


def _account(run: Folder, shards: Sequence[str], below: str) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for metadata in _metadata(run, shards, below):
        counts.update(metadata["counts"])
        seconds.update(metadata["timings"])
    return {"shards": len(shards), **counts, **{k: round(v, 3) for k, v in seconds.items()}}


def _metadata(run: Folder, shards: Sequence[str], below: str) -> Iterator[dict[str, Any]]:
    for shard in shards:
        yield shard_metadata(run, shard, below)
