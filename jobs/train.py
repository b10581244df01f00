"""palindrome train: the DDPM objective on an image collection, through Ray Train."""

import io
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import ray.train
import ray.train.torch
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from torch import Tensor

from palindrome.infra.cluster import ClusterError, connect
from palindrome.jobs.arguments import ConfigError, Range, config_error
from palindrome.jobs.config import CollectionOptions, Config, PictureOptions, Planned
from palindrome.model import checkpoint
from palindrome.model.checkpoint import Checkpoint
from palindrome.model.ddim import sample, sample_noise
from palindrome.model.ema import EMA
from palindrome.model.loss import DiffusionLoss
from palindrome.model.schedule import NoiseSchedule, ladder
from palindrome.model.unet import UNet, UNetConfig
from palindrome.pipeline.base.errors import RunError
from palindrome.pipeline.base.log import note, say
from palindrome.pipeline.base.text import size
from palindrome.pipeline.images.metrics import to_pixels
from palindrome.pipeline.images.pixels import grid, png
from palindrome.pipeline.images.read import read_batches
from palindrome.pipeline.images.records import Reject
from palindrome.pipeline.images.sources import Collection, open_collection
from palindrome.pipeline.runs.manifest import claim
from palindrome.pipeline.runs.plan import Totals, plan_totals, read_plan, write_plan
from palindrome.pipeline.storage.folder import Folder, absolute, options_for


def _unet(size: int, channels: tuple[int, ...], attention: int, **settings: Any) -> UNetConfig:
    """The DDPM U-Net (Ho et al., appendix B) with attention where the feature map is `attention` pixels wide."""
    at = [size >> i == attention for i in range(len(channels))]
    return UNetConfig(
        sample_size=size,
        block_out_channels=channels,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in at),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(at)),
        **{"attention_head_dim": None, "norm_eps": 1e-6, "freq_shift": 1, "flip_sin_to_cos": False, **settings},
    )


PRESETS = {
    "cifar10-128": _unet(32, (128, 256, 256, 256), 16, dropout=0.1),  # the DDIM paper's CIFAR-10 model
    "cifar10-64": _unet(32, (64, 128, 128, 128), 16),
    # Small enough to train on two CPU cores. Groups of 4 channels as in cifar10-128: a group of one would lose each
    # channel's mean, and with it the colour of the noise.
    "cifar10-32": _unet(32, (32, 64, 64, 64), 16, layers_per_block=1, norm_num_groups=8),
    "celebahq-256": _unet(256, (128, 128, 256, 256, 512, 512), 16),
    "celebahq-128": _unet(128, (128, 128, 256, 256, 512), 16),
    "tiny": _unet(16, (8, 16), 8, layers_per_block=1, norm_num_groups=4),
}

BUFFER_BYTES = 2**30  # of images to draw the next batch from, a worker
PROGRESS, RECORD = "progress.json", "training.json"
STATES_KEPT = 2  # of those that a run resumes from
LOOKED_AT = 32  # images that a dry run decodes
FAILURES = 3  # deaths of workers after which a training goes on from its last saved state


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CollectionOptions, PictureOptions, Config):
    """Train a diffusion model on an image collection; OUT becomes a checkpoint folder that diffusers opens too."""

    GROUP: ClassVar[str] = "training"
    EXAMPLES: ClassVar[str] = """
    palindrome train --images photos/ --preset tiny --train-steps 1000 --out checkpoints/photos
    palindrome train --images s3://bucket/photos --preset celebahq-128 --workers 4 --out s3://bucket/checkpoint
    """

    MUTABLE: ClassVar[frozenset[str]] = frozenset(
        {"train_steps", "workers", "sample_every", "save_every", "precision", "save_dtype"}
    )

    preset: Literal["cifar10-128", "cifar10-64", "cifar10-32", "celebahq-256", "celebahq-128", "tiny"]
    """The architecture: data set and base channels."""
    train_steps: Annotated[int, Range(1)] = 800_000
    """Optimiser steps. A finished training given more goes on."""
    batch_size: Annotated[int, Range(1)] = 128
    """Images a step, over all workers together."""
    lr: Annotated[float, Range(0)] = 2e-4
    """Learning rate of AdamW."""
    lr_warmup: Annotated[int, Range(0)] = 5000
    """Steps in which the learning rate rises from 0."""
    lr_decay: Literal["none", "cosine"] = "none"
    """How it falls to 0 from there to the last step."""
    weight_decay: Annotated[float, Range(0)] = 0.0
    """Weight decay of AdamW."""
    ema: Annotated[float, Range(0, 1)] = 0.9999
    """Decay of the average of the weights that is saved and sampled from."""
    grad_clip: Annotated[float, Range(0)] = 1.0
    """Largest norm of a step's gradient."""
    flip: bool = True
    """Mirror half of the images, at random."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """The noise schedule over 1,000 timesteps."""
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the network predicts."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """The network's arithmetic; auto is bfloat16 where the hardware has it. Weights stay float32."""
    save_dtype: Literal["float32", "float16"] = "float32"
    """The dtype of the weights in the checkpoint folder."""
    limit: Annotated[int, Range(1)] | None = None
    """Use only the first so many images."""
    workers: Annotated[int, Range(1)] = 1
    """Training processes, one a GPU where the cluster has GPUs."""
    sample_every: Annotated[int, Range(1)] = 5000
    """Steps between sample grids (samples/*.png)."""
    save_every: Annotated[int, Range(1)] = 1000
    """Steps between saved states, from which a run resumes."""
    seed: int = 0
    """Seeds initial weights, data order, noise and the sample grids."""


def run(config: TrainConfig) -> int:
    """Trains to `train_steps`, resuming from the last saved state, and returns the exit code."""
    with config_error("--images"):
        collection = open_collection(absolute(config.images), **config.reading())
    with config_error("--batch-size"):
        if config.batch_size % config.workers:
            raise ConfigError(f"--batch-size: {config.batch_size} is not divisible by --workers {config.workers}")
    out = Folder(absolute(config.out))
    with config_error("--out"):
        claim(out, "train", config.settings(images=absolute(config.images)), config.MUTABLE, {}, config.defaults())
        trained = json.loads(out.read(RECORD))["steps"] if out.exists(RECORD) else 0
        if trained >= config.train_steps:
            print(f"{config.out} is trained already: {trained} steps")
            return 0
    with config_error("--images"):
        totals = plan_totals(out) or write_plan(out, collection, 512, config.limit)
    print(f"training {config.preset} on {totals.images} images for {config.train_steps} steps", flush=True)
    if config.dry_run:
        _say_cost(config, collection, out, totals)
        raise Planned
    with config_error("--address", ClusterError), connect(config.address):
        gpus = ray.cluster_resources().get("GPU", 0)
        if gpus:
            resources: dict[str, float] = {"CPU": 1, "GPU": 1}
        else:
            resources = {"CPU": max(1, int(ray.cluster_resources()["CPU"]) // config.workers)}
        trainer = ray.train.torch.TorchTrainer(
            _train,
            train_loop_config={"config": config, "collection": collection, "out": out},
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.workers, use_gpu=bool(gpus), resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                name="train",
                storage_path=out.uri if out.is_local else out.path(),
                storage_filesystem=None if out.is_local else PyFileSystem(FSSpecHandler(out.fs)),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=STATES_KEPT),
                failure_config=ray.train.FailureConfig(max_failures=FAILURES),
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


def _say_cost(config: TrainConfig, collection: Collection, out: Folder, totals: Totals) -> None:
    """What there is to compute and to write. Raises ConfigError where no image can be decoded, of the first ones."""
    unet, looked = PRESETS[config.preset], 0
    rejects: list[Reject] = []
    how = config.preprocess(unet.sample_size, unet.in_channels)
    for batch in read_batches(collection, next(read_plan(out)), how, LOOKED_AT):
        looked, rejects = looked + len(batch.images), rejects + batch.rejects
        if looked:
            break
    bad = f"{rejects[0].source} is {rejects[0].reason}" if rejects else ""
    if not looked:
        raise ConfigError(f"--images: not one of the first {len(rejects)} can be decoded: {bad}")
    print(f"of the first {looked + len(rejects)} images {looked} can be decoded" + (f"; {bad}" if bad else ""))
    with torch.device("meta"):  # shapes without values
        values = sum(value.numel() for value in UNet(unet).state_dict().values())
    reached = _reached(out)
    left = config.train_steps - reached
    images = left * config.batch_size
    print(
        f"{values:,} parameters; "
        + (f"{reached:,} of {config.train_steps:,} steps are saved; " if reached else "")
        + f"{left:,} steps of {config.batch_size:,} images, {images:,} images through the network and back,"
        f" {images / totals.images:,.1f} epochs"
    )
    saved = 4 * values * torch.float32.itemsize  # the network, its average, and AdamW's two moments
    weights = values * getattr(torch, config.save_dtype).itemsize
    print(
        f"to write: a checkpoint of {size(weights)}, and every {config.save_every:,} steps a state of {size(saved)},"
        f" of which the last {STATES_KEPT} stay"
    )


def _reached(out: Folder) -> int:
    """Steps of the last saved state, as Ray Train's own file has it; 0 where it says none."""
    try:
        snapshot = json.loads(out.read("train/checkpoint_manager_snapshot.json"))
        return int(snapshot["latest_checkpoint_result"]["metrics"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


@contextmanager
def _progress(out: Folder) -> Iterator[None]:
    """Prints what rank 0 writes to the run folder, a line for each change."""
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
                eta = time.strftime("%H:%M:%S", time.gmtime(now["eta"]))
                text = (
                    f"step {now['step']}/{now['steps']}  loss {now['loss']:.4f}"
                    f"  {now['images_per_second']:.0f} images/s  ETA {eta}"
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


def _train(job: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    config: TrainConfig = job["config"]
    context = ray.train.get_context()
    rank, out = context.get_world_rank(), job["out"]
    device = ray.train.torch.get_device()
    bfloat16 = _bfloat16(device) if config.precision == "auto" else config.precision == "bfloat16"
    if device.type == "cpu":
        # Ray reserves the CPUs but tells torch of one.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
    torch.manual_seed(config.seed)

    schedule = NoiseSchedule(beta_schedule=config.beta_schedule)
    network = UNet(PRESETS[config.preset]).to(device)
    average = EMA(network, config.ema)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    step, seconds, history = 0, 0.0, []
    if (saved := ray.train.get_checkpoint()) is not None:
        with saved.as_directory() as folder:
            state = torch.load(os.path.join(folder, "state.pt"), map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, history = state["step"], state["seconds"], state["history"]
    trained = torch.nn.parallel.DistributedDataParallel(network) if config.workers > 1 else network
    loss_of = DiffusionLoss(schedule, config.prediction, device)
    generator = torch.Generator(device).manual_seed(hash((config.seed, rank, step)) % 2**63)
    batches = _batches(config, job["collection"], out, rank, seed=hash((config.seed, step)) % 2**63)

    started, losses = time.monotonic() - seconds, []
    printed, printed_at = step, time.monotonic()
    while step < config.train_steps:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _lr_factor(config, step)
        x0 = next(batches).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        if config.flip:
            mirrored = torch.rand(len(x0), device=device, generator=generator) < 0.5
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
        with torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext():
            loss = loss_of(trained, x0, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip or math.inf)
        optimizer.step()
        average.update(network)
        losses.append(loss.detach())
        step += 1
        last = step == config.train_steps
        if rank == 0 and (last or time.monotonic() - printed_at > 10):
            rate = (step - printed) / (time.monotonic() - printed_at)
            mean = float(torch.stack(losses[-100:]).mean())
            progress = {"step": step, "steps": config.train_steps, "loss": mean}
            progress |= {"images_per_second": rate * config.batch_size, "eta": (config.train_steps - step) / rate}
            out.put(PROGRESS, json.dumps(progress).encode())
            printed, printed_at = step, time.monotonic()
        if rank == 0 and (last or step % config.sample_every == 0):
            picture = _samples(network, average, schedule, config, device)
            out.put(f"samples/step-{step:07d}.png", picture)
        if last or step % config.save_every == 0:
            seconds = time.monotonic() - started
            history.append({"step": step, "loss": float(torch.stack(losses).mean()), "seconds": seconds})
            losses.clear()
            state = {"step": step, "seconds": seconds, "history": history, "network": network.state_dict()}
            state |= {"average": average.state_dict(), "optimizer": optimizer.state_dict()}
            _report(state if rank == 0 else None, history[-1])
    if rank == 0:
        record = {"steps": step, "images": step * config.batch_size, "seconds": seconds, "loss": history}
        record |= {"device": device.type, "precision": "bfloat16" if bfloat16 else "float32"}
        dtype = getattr(torch, config.save_dtype)
        weights = {k: v.to(dtype) for k, v in average.shadow.items()}
        trained_model = Checkpoint(network.config, weights, schedule, config.prediction)
        checkpoint.save(trained_model, out.uri, options_for(out.uri, out.storage_options))
        out.put(RECORD, (json.dumps(record, indent=2) + "\n").encode())  # last: it says that the rest is there


def _batches(config: TrainConfig, collection: Collection, out: Folder, rank: int, seed: int) -> Iterator[Tensor]:
    """This rank's images for ever, uint8 [B, H, W, C]: its part of the shards in a new random order each epoch,
    through a shuffle buffer. Rejects are left out."""
    unet = PRESETS[config.preset]
    how = config.preprocess(unet.sample_size, unet.in_channels)
    size = config.batch_size // config.workers
    buffer: list[np.ndarray] = []
    room = max(size, min(8192, BUFFER_BYTES // (unet.in_channels * unet.sample_size**2)))
    shards = list(read_plan(out))
    draw = np.random.default_rng([seed, rank])
    seen = 0
    for epoch in count():
        order = np.random.default_rng([seed, epoch]).permutation(len(shards))  # the same for every rank
        ours = order[rank % len(shards) :: config.workers]
        for place, at in enumerate([*ours, *order]):
            if place >= len(ours) and seen:  # others' shards are read only where ours hold nothing but rejects
                break
            for batch in read_batches(collection, shards[at], how, size):
                buffer.extend(image.pixels for image in batch.images)
                seen += len(batch.images)
                while len(buffer) >= room:
                    yield _draw(buffer, size, draw)
        while len(buffer) >= size:
            yield _draw(buffer, size, draw)
        if not seen:
            raise RuntimeError(f"no image of {config.images} could be decoded")


def _draw(buffer: list[np.ndarray], size: int, order: np.random.Generator) -> Tensor:
    drawn = []
    for _ in range(size):
        at = int(order.integers(len(buffer)))
        buffer[at], buffer[-1] = buffer[-1], buffer[at]
        drawn.append(buffer.pop())
    return torch.from_numpy(np.stack(drawn))


def _lr_factor(config: TrainConfig, step: int) -> float:
    if step < config.lr_warmup:
        return (step + 1) / config.lr_warmup
    if config.lr_decay == "none":
        return 1.0
    done = (step - config.lr_warmup) / max(1, config.train_steps - config.lr_warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def _bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _samples(network: UNet, average: EMA, schedule: NoiseSchedule, config: TrainConfig, device: torch.device) -> bytes:
    """A PNG of 16 samples of the averaged weights, DDIM with 50 steps, from the same noise every time."""
    twin = UNet(network.config).to(device).eval()
    twin.load_state_dict(average.shadow)
    c = network.config
    shape = (c.in_channels, c.sample_size, c.sample_size)
    x = torch.cat([sample_noise(config.seed, i, shape) for i in range(16)]).to(device)
    levels = ladder("linear", 50, schedule.num_train_timesteps)
    x = sample(twin, x, levels, schedule, prediction_type=config.prediction)
    return png(grid(list(to_pixels(x)), columns=4))


def _report(state: dict[str, Any] | None, metrics: dict[str, Any]) -> None:
    """Every rank reports; rank 0 brings the state."""
    if state is None:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        content = io.BytesIO()
        torch.save(state, content)
        with open(os.path.join(folder, "state.pt"), "wb") as f:
            f.write(content.getvalue())
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
