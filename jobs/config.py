"""Options that several commands share: dataclasses, from which jobs/arguments.py makes the command line."""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from palindrome.jobs.arguments import ConfigError, Options, Range, config_error, flag_of
from palindrome.pipeline.base.errors import SourceError
from palindrome.pipeline.storage.folder import by_protocol

if TYPE_CHECKING:
    from palindrome.infra.submission import Cluster
    from palindrome.model.condition import ClassOf, TextOf
    from palindrome.model.execution import Execution
    from palindrome.model.families import Checkpoint
    from palindrome.pipeline.images.decode import Preprocess
    from palindrome.pipeline.runs.selection import Selection
    from palindrome.pipeline.storage.folder import Folder

STORAGE_OPTIONS, LOG = "PALINDROME_STORAGE_OPTIONS", "PALINDROME_LOG"  # environment variables


class Planned(Exception):
    """Ends a dry run after everything has been printed."""


@dataclass(frozen=True, kw_only=True)
class StorageOptions(Options):
    """The flag of every command that opens URIs. It belongs to no job's config, is never written to disk, and may
    change when a run is resumed."""

    GROUP: ClassVar[str] = "storage and logging"

    storage_options: str | None = dataclasses.field(default=None, repr=False)
    """fsspec's options by protocol, as JSON: {"s3": {"endpoint_url": "https://...", "key": "...", "secret": "..."}}; or
    the path of a file with that JSON (default: $PALINDROME_STORAGE_OPTIONS). AWS environment variables and profiles
    apply to options that are not given."""

    def read(self) -> dict[str, dict[str, Any]]:
        """The options by protocol. Raises ConfigError, without the value in its message, as that may hold a secret."""
        text, flag = self.storage_options or os.environ.get(STORAGE_OPTIONS), flag_of("storage_options")
        if text is None:
            return {}
        if not text.lstrip().startswith("{"):
            try:
                text = Path(text).expanduser().read_text()
            except (OSError, ValueError) as e:
                why = e.strerror if isinstance(e, OSError) else "not a text file"
                raise ConfigError(f"{flag}: neither a JSON object nor a readable file: {why}") from None
        try:
            options = json.loads(text)
        except ValueError as e:
            where = f" at line {e.lineno} column {e.colno}" if isinstance(e, json.JSONDecodeError) else ""
            raise ConfigError(f"{flag}: invalid JSON{where}") from None
        if not by_protocol(options):
            raise ConfigError(f'{flag}: must map protocols to options, as {{"s3": {{"endpoint_url": "https://..."}}}}')
        return dict(options)


@dataclass(frozen=True, kw_only=True)
class LogOptions(Options):
    """The flag of every command that writes a log. It is in no job's config."""

    GROUP: ClassVar[str] = "storage and logging"

    log: Literal["auto", "text", "json"] | None = None
    """The log's format: text; json, one object a line, for log collectors; auto, text on a terminal and JSON elsewhere
    (default: $PALINDROME_LOG, else text)."""

    def as_json(self, terminal: bool) -> bool:
        """Raises ConfigError if the environment variable is invalid."""
        chosen = self.log or os.environ.get(LOG) or "text"
        if chosen not in (formats := ("auto", "text", "json")):
            raise ConfigError(f"${LOG}: must be one of {', '.join(formats)}; got {chosen!r}")
        return chosen == "json" or (chosen == "auto" and not terminal)


@dataclass(frozen=True, kw_only=True)
class OutOptions(Options):
    """Options of every command that writes."""

    GROUP: ClassVar[str] = "output"

    OUT_IS_FILE: ClassVar[bool] = False
    """Whether `out` is one file, written at the end, instead of a folder."""

    out: str
    """The folder to write to, a path or an fsspec URI. Repeating the command resumes it."""
    dry_run: bool = False
    """Check the input and the output, print what would be computed and written, and exit."""
    take_over: bool = False
    """Write into the run even if another command holds its lease: for one that was killed on another machine, which is
    else waited for, for a minute."""

    UNRECORDED: ClassVar[frozenset[str]] = frozenset({"out", "dry_run", "take_over"})
    """Fields that are not recorded in `run.json`."""

    def recorded(self) -> dict[str, Any]:
        """The fields for `run.json`."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in self.UNRECORDED}


@dataclass(frozen=True, kw_only=True)
class Config(OutOptions):
    """Options of every command that runs on a Ray cluster."""

    GROUP: ClassVar[str] = "cluster"
    MUTABLE: ClassVar[frozenset[str]] = frozenset()
    """Fields that a resume may change: they affect where and how fast a run is computed, not its result."""

    address: str | None = None
    """The address of a Ray cluster (default: $RAY_ADDRESS, else Ray is started on this machine)."""

    UNRECORDED: ClassVar[frozenset[str]] = OutOptions.UNRECORDED | {
        *("address", "inline", "calibrate", "calibration", "allow_pickle"),
    }

    def settings(self, **resolved: Any) -> dict[str, Any]:
        """The fields for `run.json`; `resolved` overrides some of them."""
        return {**self.recorded(), **resolved}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The default settings. A new setting's default is what earlier versions did, so that their runs can be
        resumed."""
        fields = (f for f in dataclasses.fields(cls) if f.name not in cls.UNRECORDED)
        return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


@dataclass(frozen=True, kw_only=True)
class ComputeConfig(Config):
    """Options of the commands that compute with a model, on Ray or in this process."""

    inline: bool = False
    """Compute in this process, without Ray, on one GPU or all CPUs: for tens of images, or to debug."""
    allow_pickle: bool = False
    """Also load weights that are a pickle (.bin, .pt), as tensors alone: for checkpoints that you trust."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inline and self.address:
            raise ConfigError("--inline: it uses no cluster, but --address names one")


@dataclass(frozen=True, kw_only=True)
class ShardedConfig(ComputeConfig):
    """Options of the commands that distribute shards to worker processes, each of which holds a model."""

    MUTABLE: ClassVar[frozenset[str]] = frozenset(
        {"workers", "batch_size", "model", "compile", "gpus_per_worker", "resources"}
    )

    batch_size: Annotated[int, Range(1)] | None = None
    """Images per batch on the device; halved if they do not fit into its memory (default: 64; on a GPU, for 1,000
    images or more, the smallest batch that reaches full speed in a trial)."""
    workers: tuple[Annotated[int, Range(1)], ...] = ()
    """The maximum number of worker processes, each with its own copy of the model (default: one per GPU; without GPUs,
    one per node). Two numbers are the minimum and the maximum: the run fails if the cluster lacks capacity for the
    minimum for 30 minutes."""
    gpus_per_worker: Annotated[float, Range(0.01, 1)] | None = None
    """The fraction of a GPU for each worker: 0.5 places two on one GPU (default: 1 if the cluster has GPUs). If given,
    the run waits for a GPU instead of using CPUs."""
    resources: str | None = None
    """Custom Ray resources that each worker requires of its node, as JSON: {"a100": 1}."""
    precision: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "auto"
    """The network's precision; everything else is float32. auto: for 1,000 images or more, encode tries the faster ones
    on some of the images, and uses the fastest whose round-trip error is within 10 % of float32's; commands that read
    latents use the precision of their encode run; otherwise float32."""
    compile: bool = False
    """Compile the network with torch.compile, which takes up to a minute at the first start."""
    calibrate: bool = False
    """Measure the speed of one of the cluster's devices for some seconds first, and estimate the run's duration; after
    the run, print the error of the estimate."""
    calibration: str | None = None
    """A JSON file of such measurements on one cluster, a path or an fsspec URI. With --calibrate, the new measurement
    is added to it; without, the recorded measurement of this model is used for the estimate."""

    def execution(self, auto: str | None, batch_size: int) -> "Execution":
        """How the network is evaluated; `auto` is the precision for `--precision auto`, None means float32."""
        from palindrome.model.execution import FLOAT32, Execution  # imports torch

        chosen = auto or FLOAT32.precision if self.precision == "auto" else self.precision
        return Execution(chosen, self.compile, batch_size)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.workers) > 2 or list(self.workers) != sorted(self.workers):
            raise ConfigError(
                f"--workers: must be MAX, or MIN MAX with MIN <= MAX; got {' '.join(map(str, self.workers))}"
            )
        self.custom()
        if self.inline and (self.workers not in ((), (1,)) or self.gpus_per_worker or self.resources):
            raise ConfigError(
                "--inline: it runs one worker in this process; --workers, --gpus-per-worker, --resources are for Ray"
            )

    def custom(self) -> dict[str, float]:
        """The custom resources by name. Raises ConfigError."""
        try:
            found = json.loads(self.resources or "{}")
        except ValueError:
            found = None
        amounts = found.values() if isinstance(found, dict) else (None,)
        if not all(isinstance(n, int | float) and not isinstance(n, bool) and 1e-4 <= n < 1e9 for n in amounts):
            raise ConfigError(f'--resources: must be JSON of names and numbers, as {{"a100": 1}}; got {self.resources}')
        if builtin := {"CPU", "GPU", "memory", "object_store_memory"} & found.keys():
            raise ConfigError(f"--resources: {min(builtin)} is not a custom resource; for GPUs, use --gpus-per-worker")
        return dict(found)


@dataclass(frozen=True, kw_only=True)
class ReadingConfig(ShardedConfig):
    """Options of the sharded commands that read images."""

    MUTABLE: ClassVar[frozenset[str]] = ShardedConfig.MUTABLE | {"decode"}

    decode: Literal["auto", "tasks", "actor"] = "auto"
    """Where images are read and decoded: in Ray tasks on free CPUs, or in the worker process. auto: in tasks if the
    cluster has more CPUs than workers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inline and self.decode == "tasks":
            raise ConfigError("--inline: there are no Ray tasks for --decode tasks")


@dataclass(frozen=True, kw_only=True)
class WholeCollectionConfig(ReadingConfig):
    """Options of the commands that make a row of every image of a collection, and a reject of what is none."""

    GROUP: ClassVar[str] = "input"
    MUTABLE: ClassVar[frozenset[str]] = ReadingConfig.MUTABLE | {
        *("relist", "retry_rejects", "max_failed_shards", "max_reject_fraction", "stall"),
        "format",  # what it says is a fact of its own, the collection's kind
    }

    shard_size: Annotated[int, Range(1)] = 1024
    """The maximum number of images per shard. A shard is one output file, and what is computed again if a worker
    dies."""
    limit: Annotated[int, Range(1)] | None = None
    """The number of images to use, from the first one on (default: all)."""
    relist: bool = True
    """When the run is resumed, list the images again, add the new ones, and report those that changed or were removed.
    A run with --limit keeps its first listing."""
    keep: tuple[str, ...] = ()
    """Columns of the Parquet files or the list, or extensions of tar members, to store with the rows."""
    retry_rejects: bool = False
    """Compute shards with rejected inputs again: by now the inputs may exist or be repaired."""
    max_failed_shards: Annotated[int, Range(0)] | None = None
    """The number of failed shards up to which the run succeeds; one more aborts it (default: never abort, but fail if
    any shard failed)."""
    max_reject_fraction: Annotated[float, Range(0, 1)] = 1.0
    """The fraction of rejected images above which the run aborts and fails."""
    stall: Annotated[float, Range(1)] = 600.0
    """The stall timeout: seconds without a batch read or a network evaluation, after which a shard is retried on
    another worker."""


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(ShardedConfig):
    """Options of the sharded commands that write images."""

    GROUP: ClassVar[str] = "output"

    MUTABLE: ClassVar[frozenset[str]] = ShardedConfig.MUTABLE | {"format"}

    format: Literal["png", "webp", "jpeg", "webdataset", "parquet"] | None = None
    """Also export the images to OUT/FORMAT, as the export command does."""


@dataclass(frozen=True, kw_only=True)
class CollectionOptions(Options):
    """Options of the commands that read images: their location and format."""

    GROUP: ClassVar[str] = "input"

    images: str
    """The images: a folder, a glob, Parquet or Arrow files with a column of images, WebDataset tars
    (`{00000..00099}.tar`), or text, CSV, JSON lines or Parquet files that list URIs; a path or an fsspec URI."""
    format: Literal["auto", "files", "parquet", "arrow", "webdataset", "list"] = "auto"
    """The format of --images; auto recognises it."""
    extensions: tuple[str, ...] = ()
    """Only files with one of these extensions are read, such as: jpg png."""
    image_column: str | None = None
    """The column that holds the images or URIs, or the extension of the images in tars (default: detected)."""

    def reading(self) -> dict[str, Any]:
        """Arguments of `open_collection`."""
        kind = None if self.format == "auto" else self.format
        return {"kind": kind, "image_column": self.image_column, "extensions": self.extensions}


@contextmanager
def column_error(**columns: str | None) -> Iterator[None]:
    """An error about a column that is read as those of --keep are names the flag of that column: `class_column` or
    `prompt_column`."""
    try:
        yield
    except SourceError as e:
        e.field = next((flag for flag, column in columns.items() if column and column == e.column), e.field)
        raise


@dataclass(frozen=True, kw_only=True)
class ConditionOptions(Options):
    """Options of the commands that tell a model the same of all images: a class or a text."""

    GROUP: ClassVar[str] = "model"
    CLASS_FLAG: ClassVar[str] = "--class"
    """The flag that is missing where no class is told."""

    class_: Annotated[int, Range(0)] | None = None
    """The number of the class that all images are taken to be of, for a class-conditional model."""
    prompt: str | None = None
    """The text that describes the images, for a model of texts (default: the empty text, with which inversion is most
    exact; for latents, that of their encode run)."""
    guidance: Annotated[float, Range(0)] | None = None
    """The weight W of classifier-free guidance, u + W (c - u): each network evaluation is then one with the class or
    the text, c, and one without, u (default: 1, no guidance; for latents, that of their encode run)."""
    null_class: Annotated[int, Range(0)] | None = None
    """The number of the class that stands for none, for --guidance (default: the one that the model was trained
    with)."""
    negative_prompt: str | None = None
    """The text to be guided away from, for --guidance (default: none, as the model was trained with)."""

    def classes(self) -> "ClassOf | None":
        """None if no flag says it. Raises ConfigError."""
        from palindrome.model.condition import ClassOf  # imports torch

        return None if self.class_ is None else ClassOf(value=self.class_)

    def texts(self) -> "TextOf | None":
        """None if no flag says it."""
        from palindrome.model.condition import TextOf  # imports torch

        return None if self.prompt is None else TextOf(text=self.prompt)

    def conditioned(self, model: "Checkpoint") -> "Checkpoint":
        """The model, told the classes or texts that the flags say, or else what it was told before. Raises ConfigError
        if it needs to be told and is not, or is not one to be told that."""
        classes, texts = self.classes(), self.texts()
        if classes is None and model.class_conditional and not model.told():
            raise ConfigError(f"{self.CLASS_FLAG}: the model is class-conditional, and is told no class")
        if classes is not None:
            with config_error("--class" if classes.column is None else "--class-column"):
                model = model.with_classes(classes)
        if texts is not None:
            with config_error("--prompt" if texts.column is None else "--prompt-column"):
                model = model.with_texts(texts)
        fields = ("null_class", "negative_prompt")
        given = [name for name in fields if getattr(self, name) is not None]
        if self.guidance is None:
            if given:
                raise ConfigError(f"{flag_of(given[0])}: goes with --guidance")
            return model
        with config_error(flag_of(given[0]) if given else "--guidance"):
            return model.with_guidance(self.guidance, self.null_class, self.negative_prompt)


@dataclass(frozen=True, kw_only=True)
class ConditionColumnOptions(ConditionOptions):
    """Options of the commands that tell a model of each image's class or text."""

    GROUP: ClassVar[str] = "model"
    CLASS_FLAG: ClassVar[str] = "--class-column"

    class_column: str | None = None
    """The column with the number of each image's class, for a class-conditional model."""
    prompt_column: str | None = None
    """The column with each image's text, for a model of texts; --prompt is then the text of images that have none
    (default: they are rejected)."""

    def classes(self) -> "ClassOf | None":
        from palindrome.model.condition import ClassOf  # imports torch

        if self.class_column is not None and self.class_ is not None:
            raise ConfigError("--class-column: can't be combined with --class")
        return super().classes() or (None if self.class_column is None else ClassOf(self.class_column))

    def texts(self) -> "TextOf | None":
        from palindrome.model.condition import TextOf  # imports torch

        return super().texts() if self.prompt_column is None else TextOf(self.prompt_column, self.prompt)

    def with_columns(self, keep: Sequence[str]) -> tuple[str, ...]:
        """The columns to read with the images: `keep`, and those of classes and texts."""
        return tuple(dict.fromkeys([*keep, *filter(None, (self.class_column, self.prompt_column))]))

    def column_error(self) -> AbstractContextManager[None]:
        return column_error(class_column=self.class_column, prompt_column=self.prompt_column)


@dataclass(frozen=True, kw_only=True)
class LatentOptions(Options):
    """Options of the commands that choose the size of images, and how an autoencoder makes them."""

    GROUP: ClassVar[str] = "model"

    size: Annotated[int, Range(1)] | None = None
    """The images have SIZE x SIZE pixels, for a model that is not bound to one size, such as those of latent diffusion
    (default: the size that it was trained on)."""
    vae_tile: bool = False
    """The autoencoder of a latent diffusion model works on tiles of the images: with less memory, and seams."""

    def fitted(self, model: "Checkpoint") -> "Checkpoint":
        """The model for images of that size. Raises ConfigError for what it can't be."""
        with config_error("--size"):
            model = model if self.size is None else model.with_size(self.size)
        with config_error("--vae-tile"):
            return model.with_autoencoder(tiled=self.vae_tile)


@dataclass(frozen=True, kw_only=True)
class LatentEncodingOptions(LatentOptions):
    """Options of the commands that encode images."""

    GROUP: ClassVar[str] = "model"

    decode_inversion: Annotated[int, Range(0)] = 0
    """Refine the state that the autoencoder of a latent diffusion model makes of each image in that many steps of
    gradient descent, so that it decodes to the image: a step takes about as long as two decodings."""

    def fitted(self, model: "Checkpoint") -> "Checkpoint":
        with config_error("--decode-inversion"):
            return super().fitted(model).with_autoencoder(self.vae_tile, self.decode_inversion)


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(Options):
    """Options of the commands that can read a subset of a run's latents."""

    GROUP: ClassVar[str] = "input"

    ids: str | None = None
    """A file with the ids of the images to use, one per line; a path or an fsspec URI (default: all)."""
    where: str | None = None
    """A condition on the columns of the latents to use, such as 'label == 3 and mse < 1e-6' (default: all)."""

    def selection(self, latents: "Folder", shard: str) -> "Selection":
        """The subset of the latents of a run; the schema is read from its shard `shard`. Raises ConfigError."""
        from palindrome.pipeline.runs.kinds import LATENTS  # few commands need pyarrow.compute
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
    """Options of the commands that use a cluster's Jobs API."""

    GROUP: ClassVar[str] = "cluster"

    address: str | None = None
    """The URL of the cluster's dashboard (default: $RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)."""

    def cluster(self) -> "Cluster":
        """A client of the cluster's Jobs API. Raises ConfigError if the cluster can't be used."""
        from palindrome.infra.submission import Cluster, SubmissionError, address_of  # imports Ray

        with config_error("--address", SubmissionError):
            return Cluster(address_of(self.address))


@dataclass(frozen=True, kw_only=True)
class PictureOptions(Options):
    """Options of the commands that read images: how an image becomes the model's input."""

    GROUP: ClassVar[str] = "input"

    fit: Literal["crop", "pad"] = "crop"
    """How images are made square: cropped to the largest centred square, or padded with the background."""
    resample: Literal["lanczos", "bicubic", "bilinear", "box", "area", "openai"] = "lanczos"
    """The filter that resizes images to the model's size."""
    background: tuple[Annotated[int, Range(0, 255)], ...] = (255, 255, 255)
    """The colour on which transparent pixels are composited and with which images are padded: red, green and blue, 0 to
    255 each."""
    max_pixels: Annotated[int, Range(1)] = 100_000_000
    """Images with more pixels are rejected."""
    truncated: Literal["reject", "keep"] = "reject"
    """What becomes of files that lack a part of the picture: rejected, or kept as the decoder fills them in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.background) != 3:
            raise ConfigError(f"--background: must be red, green and blue; got {' '.join(map(str, self.background))}")

    def preprocess(self, shape: tuple[int, int, int]) -> "Preprocess":
        """The preprocessing for a model of images of shape [C, H, W]."""
        from palindrome.pipeline.images.decode import Preprocess  # imports Pillow, which few commands need

        channels, size, _ = shape
        red, green, blue = self.background
        background = (red, green, blue)
        return Preprocess(size, channels, self.max_pixels, background, self.resample, self.fit, self.truncated)


class ModelOfImages(Protocol):
    """A config with LatentOptions, PictureOptions, ConditionOptions and a model."""

    @property
    def model(self) -> str: ...
    @property
    def allow_pickle(self) -> bool: ...
    def fitted(self, model: "Checkpoint") -> "Checkpoint": ...
    def preprocess(self, shape: tuple[int, int, int]) -> "Preprocess": ...
    def conditioned(self, model: "Checkpoint") -> "Checkpoint": ...


def open_model(config: ModelOfImages) -> tuple[str, "Checkpoint", "Preprocess"]:
    """Where the model is, the model as the flags want it, and how images are made ready for it. Raises ConfigError."""
    from palindrome.pipeline.runs.models import load_model  # imports torch

    with config_error("--model"):
        where, model = load_model(config.model, config.allow_pickle)
    model = config.fitted(model)
    with config_error("--model"):
        how = config.preprocess(model.image_shape)
    return where, config.conditioned(model), how
