"""palindrome export: the images of a run as image files, tars or Parquet."""

import json
import sys
import threading
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from palindrome.jobs.arguments import ConfigError, Range, config_error
from palindrome.jobs.config import OutOptions, Planned
from palindrome.jobs.holding import hold_run
from palindrome.pipeline.base import interrupt
from palindrome.pipeline.base.errors import ManifestError, RunError
from palindrome.pipeline.base.log import note
from palindrome.pipeline.base.text import one_line, printable, size
from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.runs.exports import TABLES, exported, merged_index
from palindrome.pipeline.runs.kinds import DATA, IMAGES, WITH_PICTURES, Kind
from palindrome.pipeline.runs.manifest import open_run
from palindrome.pipeline.runs.plan import Totals
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.runtime.progress import Progress, log_failed_shard
from palindrome.pipeline.storage.folder import Folder, absolute
from palindrome.pipeline.tasks.export import (
    Broken,
    Export,
    clear_unfinished,
    put_index,
)

SHARDS_AT_ONCE = 4  # each of which writes several files at once (pipeline/tasks/export.py)
SAMPLE = 32  # shards whose images are counted, for the estimate of the time left


@dataclass(frozen=True, kw_only=True)
class ExportConfig(OutOptions):
    """Write the images of a run as image files, WebDataset tars or Hugging Face Parquet, named by their image ids."""

    GROUP: ClassVar[str] = "output"
    EXAMPLES: ClassVar[str] = """
    palindrome export runs/samples --format png --out samples/
    palindrome export runs/samples --format webdataset --out s3://bucket/samples
    """

    POSITIONAL: ClassVar[frozenset[str]] = frozenset({"run"})

    run: str
    """The run folder of reconstruct, regenerate, generate or interpolate, a path or an fsspec URI."""
    format: Literal["png", "webp", "jpeg", "webdataset", "parquet"]
    """One file per image in OUT/images: png, the bytes that the run stored; webp, lossless unless --quality is given;
    jpeg. Or one file per shard in OUT/data, with the PNGs: webdataset, tars of NAME.png and NAME.json; parquet, which
    Hugging Face's datasets library loads as images."""
    quality: Annotated[int, Range(1, 100)] | None = None
    """The quality of jpeg (default: 95), or of webp, which is then lossy."""
    steps: Annotated[int, Range(1)] | None = None
    """For a run with several --steps: the number of steps whose images are exported (default: all, each in its own
    folder)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quality is not None and self.format not in ("webp", "jpeg"):
            raise ConfigError(f"--quality: {self.format} is lossless")


def run(config: ExportConfig) -> int:
    """Exports the remaining shards and returns the exit code."""
    out = Folder(absolute(config.out))
    with config_error("RUN"):
        source, manifest = open_run(config.run, *WITH_PICTURES)
        kind = manifest.kind
        shards = committed(source, kind.folder)
        if not shards:
            raise ManifestError(f"{config.run} holds no images yet")
    variants = [len(levels) - 1 for levels in manifest.ladders] if "steps" in kind.variants else []
    if config.steps is not None and config.steps not in variants:
        raise ConfigError(f"--steps: {config.run} holds images of {' and '.join(map(str, variants)) or 'no'} steps")
    of = {"source": {"job": manifest.job, **manifest.facts}, "source_config": manifest.config}
    resumed = hold_run(out, "export", config, {**config.recorded(), "run": source.uri}, facts=of)
    with config_error("--out"):
        done = exported(out, config.format) & shards
    left = sorted(shards - done)
    print(f"{len(shards)} shards of images, {len(left)} to export", flush=True)
    if not _complete(source, len(shards)):
        print(f"{config.run} is not complete; repeat the command to export further shards", file=sys.stderr)
    if resumed and left:
        clear_unfinished(out)
    per_id = 1 if config.steps is None else len(variants)  # rows per image id, of which one is exported
    if config.dry_run:
        count, stored = (amount // per_id for amount in _amount(source, kind, left))
        same = config.format in ("png", "webdataset", "parquet")
        print(f"about {count:,} images; about {size(stored)} " + ("to write" if same else "of PNGs to read"))
        raise Planned
    columns = ["steps"] if config.steps is None and len(variants) > 1 else []
    columns += ["variation"] if manifest.config.get("variations", 1) > 1 else []
    columns += ["strength"] if len(manifest.config.get("strength", ())) > 1 else []
    failed = 0
    if left:
        totals = Totals(len(shards), _amount(source, kind, left)[0] // per_id * len(shards) // len(left))
        work = Export(source, kind, out, config.format, config.quality, tuple(columns), config.steps, threading.Event())
        failed = _follow(Progress("export", totals, len(done)), work, left)
    images, index = DATA if config.format in TABLES else IMAGES, merged_index(config.format)
    if index and (failed < len(left) or not out.exists(index)):
        put_index(out, index)
    note(shards=len(shards), failed_shards=failed)
    listed = f"; {index} describes each" if index else ""
    print(f"the images are in {config.out}/{images}{listed}")
    if failed:
        print(f"{failed} shards failed; repeat the command to retry them", file=sys.stderr)
        return 1
    return 0


def _follow(progress: Progress, work: Export, shards: list[str]) -> int:
    """Exports the shards with a progress display, logs each failure at once, and returns the number of failures."""

    def attempt(shard: str) -> tuple[str, int | str]:
        try:
            return shard, work.process(shard)
        except RunError:
            raise
        except Broken as e:
            return shard, printable(str(e))
        except Exception as e:
            return shard, one_line(e)

    try:
        for shard, outcome in in_threads(attempt, shards, SHARDS_AT_ONCE):
            interrupt.check()
            if isinstance(outcome, int):
                progress.add(outcome, 0)
            else:
                progress.failed += 1
                log_failed_shard(shard, str(outcome))
    finally:
        work.stop.set()
    progress.show(last=True)
    return progress.failed


def _amount(source: Folder, kind: Kind, shards: list[str]) -> tuple[int, int]:
    """Estimates the rows of the shards and the bytes of their images, from a sample. Shards are named by hashes, so the
    first ones are a random sample."""
    sample = shards[:SAMPLE]

    def measured(shard: str) -> tuple[int, int]:
        try:
            with source.parquet_file(f"{kind.folder}/{shard}.parquet") as file:
                groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        except (OSError, ValueError):  # the export itself reports it
            return 0, 0
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        pictures = (c.total_uncompressed_size for c in columns if c.path_in_schema == "image.bytes")
        return sum(group.num_rows for group in groups), sum(pictures)

    rows, stored = map(sum, zip((0, 0), *in_threads(measured, sample), strict=True))
    return rows * len(shards) // max(1, len(sample)), stored * len(shards) // max(1, len(sample))


def _complete(source: Folder, shards: int) -> bool:
    """Whether the run is finished with all its shards, according to its summary."""
    try:
        summary: Any = json.loads(source.read("summary.json"))
        return summary["shards"] == shards and not summary["failed_shards"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
