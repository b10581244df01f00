"""Configs of jobs: dataclasses with a docstring under each field, from which the command line is made."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from palindrome.jobs.arguments import ConfigError, Options, Range, config_error, flag_of
from palindrome.pipeline.storage.folder import by_protocol

if TYPE_CHECKING:
    from palindrome.infra.submission import Cluster
    from palindrome.model.engine import Execution
    from palindrome.pipeline.images.decode import Preprocess
    from palindrome.pipeline.runs.selection import Selection
    from palindrome.pipeline.storage.folder import Folder

STORAGE_OPTIONS, LOG = "PALINDROME_STORAGE_OPTIONS", "PALINDROME_LOG"  # of the environment


class Planned(Exception):
    """A dry run has said what there is to say."""


@dataclass(frozen=True, kw_only=True)
class StorageOptions(Options):
    """The flag of every command that opens URIs. No job's config holds it: it is written nowhere and may differ at each
    start."""

    storage_options: str | None = dataclasses.field(default=None, repr=False)
    """How stores are opened: JSON by protocol, as in {"s3": {"endpoint_url": "https://...", "key": "...", "secret":
    "..."}}, each as fsspec takes it for that protocol; or the name of a file that holds it (default:
    $PALINDROME_STORAGE_OPTIONS). The AWS environment and profiles stand in for what it does not name."""

    def read(self) -> dict[str, dict[str, Any]]:
        """By protocol. Raises ConfigError, whose words say nothing of what is in it."""
        text, flag = self.storage_options or os.environ.get(STORAGE_OPTIONS), flag_of("storage_options")
        if text is None:
            return {}
        if not text.lstrip().startswith("{"):
            try:
                text = Path(text).expanduser().read_text()
            except (OSError, ValueError) as e:
                why = e.strerror if isinstance(e, OSError) else "no text"
                raise ConfigError(f"{flag}: no JSON object, and no file that can be read: {why}") from None
        try:
            options = json.loads(text)
        except ValueError as e:
            where = f", line {e.lineno} column {e.colno}" if isinstance(e, json.JSONDecodeError) else ""
            raise ConfigError(f"{flag}: it is no JSON{where}") from None
        if not by_protocol(options):
            raise ConfigError(f'{flag}: it takes an object by protocol, as {{"s3": {{"endpoint_url": "https://..."}}}}')
        return dict(options)


@dataclass(frozen=True, kw_only=True)
class LogOptions(Options):
    """The flag of every command that works for a while. No job's config holds it."""

    log: Literal["auto", "text", "json"] | None = None
    """How what is said is written: as text, or as JSON objects, one a line, for programs that collect logs; auto: as
    text on a terminal, as JSON elsewhere (default: $PALINDROME_LOG, else text)."""

    def as_json(self, terminal: bool) -> bool:
        """Raises ConfigError where the environment names no such form."""
        form = self.log or os.environ.get(LOG) or "text"
        if form not in (forms := ("auto", "text", "json")):
            raise ConfigError(f"${LOG}: {form!r} is none of {', '.join(forms)}")
        return form == "json" or (form == "auto" and not terminal)


@dataclass(frozen=True, kw_only=True)
class OutOptions(Options):
    """Fields of every job that writes something."""

    OUT_IS_FILE: ClassVar[bool] = False
    """Whether `out` is one file, written at the end, and no folder."""

    out: str
    """The folder to write to, a path or an fsspec URI. The same command again resumes."""
    dry_run: bool = False
    """Look at what goes in and where it goes to, say what there is to do and to write, and do nothing."""


@dataclass(frozen=True, kw_only=True)
class Config(OutOptions):
    """Fields that every job has which takes a cluster."""

    MUTABLE: ClassVar[frozenset[str]] = frozenset()
    """Fields that a resume may change: they say where and how fast, not what comes out."""

    address: str | None = None
    """A Ray cluster's address (default: $RAY_ADDRESS, else a Ray started on this machine)."""

    APART: ClassVar[frozenset[str]] = frozenset({"out", "address", "dry_run", "calibrate", "calibration"})
    """Fields that are no settings of a run."""

    def settings(self, **resolved: Any) -> dict[str, Any]:
        """The fields for `run.json`, some of them resolved."""
        found = {k: v for k, v in dataclasses.asdict(self).items() if k not in self.APART}
        return {**found, **resolved}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What the settings are that a command does not name. A setting that is new has as its default what was done
        before there was a choice, so that runs of earlier versions go on."""
        fields = (f for f in dataclasses.fields(cls) if f.name not in cls.APART)
        return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


@dataclass(frozen=True, kw_only=True)
class ShardedConfig(Config):
    """Fields of the jobs that map shards of images over processes which hold a model."""

    MUTABLE: ClassVar[frozenset[str]] = frozenset(
        {"workers", "batch_size", "model", "compile", "gpus_per_worker", "resources"}
    )

    batch_size: Annotated[int, Range(1)] | None = None
    """Images on the device at once (default: 64); halved where they do not fit. On a GPU, a run of 1,000 images or more
    for which nobody says it takes as few as make it as fast as it gets, by trial."""
    workers: tuple[Annotated[int, Range(1)], ...] = ()
    """Processes that hold the model, at most (default: one a GPU; without GPUs, one a node). Of two numbers the first
    is the fewest to go on with: where the cluster has no room for so many for half an hour, the run ends."""
    gpus_per_worker: Annotated[float, Range(0.01, 1)] | None = None
    """The part of a GPU that each of them takes: 0.5 for two on one (default: 1 where the cluster has a GPU). No more
    than one, as a model is on one. Where it is given, a GPU is waited for, and CPUs do not stand in."""
    resources: str | None = None
    """Resources of your own that each of them takes of its node, JSON, as {"a100": 1}: they are put nowhere else."""
    precision: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "auto"
    """What the network computes in; all else is float32. auto: encode, of 1,000 images or more, tries on some of them
    which are faster, and takes the fastest that brings them back as well as float32 does, within 10 %; what works from
    latents takes what they were encoded in; else float32."""
    compile: bool = False
    """Have torch.compile make the network's kernels, which takes up to a minute at the first start."""
    calibrate: bool = False
    """Measure first, for some seconds, how fast a device of this cluster is, and estimate the time; behind the run, say
    how far off that was."""
    calibration: str | None = None
    """A JSON file of such measurements of one cluster: --calibrate adds its own, and without it the estimate is from
    what the file says of this model; a path or an fsspec URI."""

    def execution(self, encoded_in: str | None = None) -> "Execution":
        """How the network is evaluated, where the latents were encoded in that precision, or were by float32."""
        from palindrome.model.engine import FLOAT32, Execution  # brings torch

        chosen = encoded_in or FLOAT32.precision if self.precision == "auto" else self.precision
        return Execution(chosen, self.compile)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.workers) > 2 or list(self.workers) != sorted(self.workers):
            raise ConfigError(f"--workers: {' '.join(map(str, self.workers))} is no number, and no MIN MAX")
        self.custom()

    def custom(self) -> dict[str, float]:
        """--resources by name. Raises ConfigError."""
        try:
            found = json.loads(self.resources or "{}")
        except ValueError:
            found = None
        amounts = found.values() if isinstance(found, dict) else (None,)
        if not all(isinstance(n, int | float) and not isinstance(n, bool) and 1e-4 <= n < 1e9 for n in amounts):
            raise ConfigError(f'--resources: {self.resources} is no JSON of names and numbers, as {{"a100": 1}}')
        if ours := {"CPU", "GPU", "memory", "object_store_memory"} & found.keys():
            raise ConfigError(f"--resources: {min(ours)} is none of your own; for GPUs there is --gpus-per-worker")
        return dict(found)


@dataclass(frozen=True, kw_only=True)
class ReadingConfig(ShardedConfig):
    """Fields of those among them that read images."""

    MUTABLE: ClassVar[frozenset[str]] = ShardedConfig.MUTABLE | {"decode"}

    decode: Literal["auto", "tasks", "actor"] = "auto"
    """Where images are read and decoded: in Ray tasks on free CPUs, or in the model's process."""


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(ShardedConfig):
    """A field of those among them that make images."""

    MUTABLE: ClassVar[frozenset[str]] = ShardedConfig.MUTABLE | {"format"}

    format: Literal["png", "webp", "jpeg", "webdataset", "parquet"] | None = None
    """Write the images for others too, in OUT/FORMAT, as the command export does."""


@dataclass(frozen=True, kw_only=True)
class CollectionOptions(Options):
    """Fields of the jobs that read images: where they are, and as what."""

    images: str
    """The images: a folder, a glob, Parquet files with a column of images, WebDataset tars (`{00000..00099}.tar`), or
    one text, CSV or Parquet file that lists URIs; a path or an fsspec URI."""
    format: Literal["auto", "files", "parquet", "webdataset", "list"] = "auto"
    """What --images is, where it is not recognised as what it is meant to be."""
    extensions: tuple[str, ...] = ()
    """Only files that end in one of these, such as jpg png."""
    image_column: str | None = None
    """The column that holds the images or URIs, or the extension of the images in tars (default: it is found)."""

    def reading(self) -> dict[str, Any]:
        """What `open_collection` is told."""
        kind = None if self.format == "auto" else self.format
        return {"kind": kind, "image_column": self.image_column, "extensions": self.extensions}


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(Options):
    """Fields of the jobs that take some of a run's latents."""

    ids: str | None = None
    """Only the images whose ids stand in this file, one a line; a path or an fsspec URI."""
    where: str | None = None
    """Only the latents for which this is true of their columns, such as 'label == 3 and mse < 1e-6'."""

    def selection(self, latents: "Folder", shard: str) -> "Selection":
        """Of the latents of a run that has that shard. Raises ConfigError."""
        from palindrome.pipeline.runs.kinds import LATENTS  # few commands need pyarrow's expressions
        from palindrome.pipeline.runs.selection import Selection, listed_ids, parse

        if self.where is not None:
            with config_error("--latents"), latents.parquet_file(f"{LATENTS}/{shard}.parquet") as file:
                schema = file.schema_arrow
            with config_error("--where"):
                parse(self.where, schema)
        with config_error("--ids"):
            return Selection(None if self.ids is None else listed_ids(self.ids), self.where)


@dataclass(frozen=True, kw_only=True)
class ClusterOptions(Options):
    """A field of the commands that ask a cluster about its jobs."""

    address: str | None = None
    """The URL of the cluster's dashboard (default: $RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)."""

    def cluster(self) -> "Cluster":
        """The one that is meant. Raises ConfigError where it can't be used."""
        from palindrome.infra.submission import Cluster, SubmissionError, address_of  # brings Ray

        with config_error("--address", SubmissionError):
            return Cluster(address_of(self.address))


@dataclass(frozen=True, kw_only=True)
class PictureOptions(Options):
    """Fields of the jobs that read images: how each becomes the model's input."""

    fit: Literal["crop", "pad"] = "crop"
    """What is taken of an image that is not square: its largest centred square, or all of it, on the background."""
    resample: Literal["lanczos", "bicubic", "box", "area"] = "lanczos"
    """The filter that brings images to the model's size."""
    background: tuple[Annotated[int, Range(0, 255)], ...] = (255, 255, 255)
    """Red, green and blue, 0 to 255 each, of what lies behind transparent pixels and around padded images."""
    max_pixels: Annotated[int, Range(1)] = 100_000_000
    """Larger images are rejected."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.background) != 3:
            raise ConfigError(f"--background: {' '.join(map(str, self.background))} is not red, green and blue")

    def preprocess(self, size: int, channels: int) -> "Preprocess":
        """For a model of images of so many pixels a side and so many channels."""
        from palindrome.pipeline.images.decode import (
            Preprocess,  # every command imports this module, and few need Pillow
        )

        red, green, blue = self.background
        return Preprocess(size, channels, self.max_pixels, (red, green, blue), self.resample, self.fit)
