"""palindrome train: the DDPM objective on an image collection, through Ray Train."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal

import ray.train
import ray.train.torch
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem

from palindrome.infra.cluster import ClusterError, connect
from palindrome.jobs.arguments import ConfigError, Range, config_error
from palindrome.jobs.config import CollectionOptions, Config, PictureOptions, Planned, column_error
from palindrome.jobs.holding import hold_run
from palindrome.model.presets import PRESETS
from palindrome.model.process import VP
from palindrome.model.training import Hyperparameters
from palindrome.model.unet import UNet, UNetConfig
from palindrome.pipeline.base.errors import RunError
from palindrome.pipeline.base.log import note, say
from palindrome.pipeline.base.text import duration, size
from palindrome.pipeline.images.read import read_batches
from palindrome.pipeline.images.records import Reject
from palindrome.pipeline.images.sources import open_collection
from palindrome.pipeline.runs.plan import Totals, plan_totals, read_plan, write_plan
from palindrome.pipeline.storage.folder import Folder, absolute
from palindrome.pipeline.tasks.train import PROGRESS, RECORD, Train, train

STATES_KEPT = 2  # the last saved states; a run resumes from the last one
DECODED_BY_DRY_RUN = 32  # images
MAX_FAILURES = 3  # worker deaths after which training restarts from its last saved state


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CollectionOptions, PictureOptions, Config):
    """Train a diffusion model on an image collection; OUT becomes a checkpoint folder that diffusers can open too."""

    GROUP: ClassVar[str] = "training"
    EXAMPLES: ClassVar[str] = """
    palindrome train --images photos/ --preset tiny --train-steps 1000 --out checkpoints/photos
    palindrome train --images s3://bucket/photos --preset celebahq-128 --workers 4 --out s3://bucket/checkpoint
    """

    MUTABLE: ClassVar[frozenset[str]] = frozenset(
        {"train_steps", "workers", "sample_every", "save_every", "precision", "save_dtype"}
    )

    preset: Literal["cifar10-128", "cifar10-64", "cifar10-32", "celebahq-256", "celebahq-128", "tiny"]
    """The architecture, named by data set and base channels."""
    train_steps: Annotated[int, Range(1)] = 800_000
    """Optimiser steps. Repeating the command with more continues a finished training."""
    batch_size: Annotated[int, Range(1)] = 128
    """Images per optimiser step, over all workers."""
    lr: Annotated[float, Range(0)] = 2e-4
    """Learning rate of AdamW."""
    lr_warmup: Annotated[int, Range(0)] = 5000
    """Steps of linear warm-up of the learning rate from 0."""
    lr_decay: Literal["none", "cosine"] = "none"
    """Decay of the learning rate to 0, from the warm-up to the last step."""
    weight_decay: Annotated[float, Range(0)] = 0.0
    """Weight decay of AdamW."""
    ema: Annotated[float, Range(0, 1)] = 0.9999
    """Decay of the exponential moving average of the weights, which is saved and used for samples."""
    grad_clip: Annotated[float, Range(0)] = 1.0
    """Maximum norm of the gradient."""
    flip: bool = True
    """Mirror half of the images at random."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """The noise schedule over 1,000 timesteps."""
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the network predicts."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """The network's precision; auto is bfloat16 if the hardware supports it. Weights are float32."""
    class_column: str | None = None
    """Train a class-conditional model: the column with the number of each image's class."""
    num_classes: Annotated[int, Range(1)] | None = None
    """How many classes --class-column has, numbered from 0."""
    class_dropout: Annotated[float, Range(0, 1)] = 0.1
    """The fraction of images told as of no class, so that the model can be guided (--guidance); it gets one class more
    for that, the last. 0 trains no such class."""
    save_dtype: Literal["float32", "float16"] = "float32"
    """The dtype of the weights in the checkpoint folder."""
    limit: Annotated[int, Range(1)] | None = None
    """The number of images to use, from the first one on (default: all)."""
    workers: Annotated[int, Range(1)] = 1
    """The number of training processes, one per GPU if the cluster has GPUs."""
    sample_every: Annotated[int, Range(1)] = 5000
    """Steps between sample grids (samples/*.png)."""
    save_every: Annotated[int, Range(1)] = 1000
    """Steps between saved states, from which a run resumes."""
    seed: int = 0
    """The seed of initial weights, data order, noise and sample grids."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_column is not None and self.num_classes is None:
            raise ConfigError("--num-classes: is needed with --class-column")
        if self.num_classes is not None and self.class_column is None:
            raise ConfigError("--num-classes: goes with --class-column")

    def unet(self) -> UNetConfig:
        """The network to train."""
        preset = PRESETS[self.preset]
        if self.num_classes is None:
            return preset
        return replace(preset, num_class_embeds=self.num_classes + (self.class_dropout > 0))

    def hyperparameters(self) -> Hyperparameters:
        same = {f.name: getattr(self, f.name) for f in fields(Hyperparameters) if f.name != "steps"}
        return Hyperparameters(steps=self.train_steps, **same)


def run(config: TrainConfig) -> int:
    """Trains up to `train_steps`, from the last saved state if there is one, and returns the exit code."""
    with config_error("--images"), column_error(class_column=config.class_column):
        keep = () if config.class_column is None else (config.class_column,)
        collection = open_collection(absolute(config.images), keep=keep, **config.reading())
    with config_error("--batch-size"):
        if config.batch_size % config.workers:
            raise ConfigError(f"--batch-size: {config.batch_size} is not divisible by --workers {config.workers}")
    out = Folder(absolute(config.out))
    hold_run(
        out, "train", config, config.settings(images=absolute(config.images)), config.MUTABLE, {}, config.defaults()
    )
    with config_error("--out"):
        trained = json.loads(out.read(RECORD))["steps"] if out.exists(RECORD) else 0
        if trained >= config.train_steps:
            print(f"{config.out} is trained already: {trained} steps")
            return 0
    with config_error("--images"):
        totals = plan_totals(out) or write_plan(out, collection, 512, config.limit)
    unet = config.unet()
    task = Train(
        out=out,
        collection=collection,
        preprocess=config.preprocess((unet.in_channels, unet.sample_size, unet.sample_size)),
        unet=unet,
        process=VP(beta_schedule=config.beta_schedule, prediction_type=config.prediction),
        how=config.hyperparameters(),
        batch_size=config.batch_size,
        workers=config.workers,
        precision=config.precision,
        save_dtype=config.save_dtype,
        sample_every=config.sample_every,
        save_every=config.save_every,
        class_column=config.class_column,
        num_classes=config.num_classes,
    )
    print(f"training {config.preset} on {totals.images} images for {config.train_steps} steps", flush=True)
    if config.dry_run:
        _print_cost(config, task, totals)
        raise Planned
    with config_error("--address", ClusterError), connect(config.address):
        gpus = ray.cluster_resources().get("GPU", 0)
        if gpus:
            resources: dict[str, float] = {"CPU": 1, "GPU": 1}
        else:
            resources = {"CPU": max(1, int(ray.cluster_resources()["CPU"]) // config.workers)}
        trainer = ray.train.torch.TorchTrainer(
            train,
            train_loop_config={"train": task},
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.workers, use_gpu=bool(gpus), resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                name="train",
                storage_path=out.uri if out.is_local else out.path(),
                storage_filesystem=None if out.is_local else PyFileSystem(FSSpecHandler(out.fs)),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=STATES_KEPT),
                failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            ),
        )
        try:
            with _progress(out):
                trainer.fit()
        except ray.train.TrainingFailedError as e:
            raise RunError(str(e).strip().splitlines()[-1].strip()) from e
    record = json.loads(out.read(RECORD))
    note(summary={**record, "loss": record["loss"][-1]["loss"]})
    print(f"checkpoint in {config.out}")
    return 0


def _print_cost(config: TrainConfig, task: Train, totals: Totals) -> None:
    """Prints what there is to compute and to write. Raises ConfigError if none of the first images can be decoded."""
    decoded = 0
    rejects: list[Reject] = []
    for batch in read_batches(task.collection, next(read_plan(task.out)), task.preprocess, DECODED_BY_DRY_RUN):
        decoded, rejects = decoded + len(batch.images), rejects + batch.rejects
        if decoded:
            break
    example = f"{rejects[0].source} is {rejects[0].reason}" if rejects else ""
    if not decoded:
        raise ConfigError(f"--images: none of the first {len(rejects)} can be decoded: {example}")
    print(
        f"{decoded} of the first {decoded + len(rejects)} images can be decoded" + (f"; {example}" if example else "")
    )
    with torch.device("meta"):  # shapes without values
        values = sum(value.numel() for value in UNet(task.unet).state_dict().values())
    saved = _saved_steps(task.out)
    left = config.train_steps - saved
    images = left * config.batch_size
    print(
        f"{values:,} parameters; "
        + (f"{saved:,} of {config.train_steps:,} steps are saved; " if saved else "")
        + f"{left:,} steps of {config.batch_size:,} images, {images:,} images forward and backward,"
        f" {images / totals.images:,.1f} epochs"
    )
    state = 4 * values * torch.float32.itemsize  # the network, its moving average, and AdamW's two moments
    weights = values * getattr(torch, config.save_dtype).itemsize
    print(
        f"to write: a checkpoint of {size(weights)}, and every {config.save_every:,} steps a state of {size(state)},"
        f" of which the last {STATES_KEPT} are kept"
    )


def _saved_steps(out: Folder) -> int:
    """The step of the last saved state, from Ray Train's own file; 0 if there is none."""
    try:
        snapshot = json.loads(out.read("train/checkpoint_manager_snapshot.json"))
        return int(snapshot["latest_checkpoint_result"]["metrics"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


@contextmanager
def _progress(out: Folder) -> Iterator[None]:
    """Logs the progress that rank 0 writes to the run folder, one line per change."""
    done = threading.Event()

    def read() -> dict[str, Any] | None:
        try:
            return dict(json.loads(out.read(PROGRESS)))
        except (OSError, ValueError):
            return None

    def follow(before: dict[str, Any] | None) -> None:
        while not done.wait(1):
            now = read()
            if now is not None and now != before:
                text = (
                    f"step {now['step']}/{now['steps']}  loss {now['loss']:.4f}"
                    f"  {now['images_per_second']:.0f} images/s  ETA {duration(now['eta'])}"
                )
                figures = {k: v for k, v in now.items() if k != "eta"} | {"eta_seconds": now["eta"]}
                say(text, "progress", job="train", **figures)
            before = now

    thread = threading.Thread(target=follow, args=(read(),), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
