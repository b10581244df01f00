"""Inversion in a latent space, with a trained autoencoder: errors apart, and what guidance costs, beside other ways.

python -m benchmarks.latent --taesd FOLDER --train IMAGES.parquet --photos FOLDER [--seconds 600] [--json FILE]

TAESD's autoencoder for FLUX.2 (https://github.com/madebyollin/taesd, MIT; FOLDER has taesd.py and taef2_*.pth) makes
the states, of 32 channels. A small U-Net of ten classes and none is trained on those of `--train`, whose images are
enlarged to 64 x 64 pixels, for `--seconds`. Then:

- refinement: `--decode-inversion K` on photographs of 256 pixels: the autoencoder's error, and the time an image in
  decodings of one. It needs no network: `--seconds 0` measures nothing else.
- errors: photographs at 64 and 256 pixels, without guidance, by the default setting and by the paper's inversion.
- guidance: at W = 1, 3 and 7.5, the error in the latent space against evaluations (with guidance an evaluation is of
  two samples), by ours, by the paper's inversion, by a fixed point with damping 0.5 as AIDI has it (Pan et al.,
  arXiv 2309.04907), and by one whose last iterates are averaged, as ReNoise has it (Garibi et al., arXiv 2403.14602).
  All decode by plain DDIM, under the same guidance. Both are the formulas without those papers' further parts.
"""

import argparse
import copy
import json
import runpy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from palindrome.model.autoencoder import Autoencoder
from palindrome.model.condition import ClassOf, Condition
from palindrome.model.ddim import Network, coefficients, evaluate, invert, sample
from palindrome.model.families.latent.vae import Vae
from palindrome.model.families.unet2d import UNet2D
from palindrome.model.inversion import invert_exactly
from palindrome.model.ladder import logsnr_ladder
from palindrome.model.process import VP, Process
from palindrome.model.unet import UNet, UNetConfig
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.metrics import round_trip_error, state_error, to_model
from palindrome.pipeline.images.read import first_images
from palindrome.pipeline.images.sources import open_collection
from palindrome.pipeline.storage.folder import absolute

CLASSES, CHANNELS, FACTOR, SIZE = 10, 32, 8, 64
STEPS, BATCH = 20, 32


class Taesd:
    """TAESD's modules as diffusers' autoencoders are called: images in [-1, 1], states of about unit variance."""

    def __init__(self, folder: str) -> None:
        made = runpy.run_path(f"{folder}/taesd.py")
        parts = {name: made[name.capitalize()](CHANNELS, use_midblock_gn=True) for name in ("encoder", "decoder")}
        for name, part in parts.items():
            part.load_state_dict(torch.load(f"{folder}/taef2_{name}.pth", weights_only=True))
            part.eval().requires_grad_(False)
        self._parts = SimpleNamespace(**parts)

    def encode(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latents=self._parts.encoder((images + 1) / 2))

    def decode(self, states: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self._parts.decoder(states) * 2 - 1)


@dataclass(frozen=True)
class LatentUNet(UNet2D):
    """A U-Net of ours on the states of an autoencoder."""

    vae: Vae

    def autoencoder(self, device: torch.device | str = "cpu") -> Autoencoder:
        return self.vae


def train(vae: Vae, images: str, seconds: float) -> tuple[LatentUNet, dict[str, Any]]:
    """A model of the classes in the column `label`, 10 for none, and how it was trained."""
    how = Preprocess(SIZE)
    collection = open_collection(absolute(images), keep=("label",))
    pixels = first_images(collection, how, 10**6)
    labels = torch.tensor(pq.read_table(images, columns=["label"])["label"].to_pylist())
    states = torch.cat([vae.to_state(to_model(part)) for part in np.array_split(pixels, len(pixels) // BATCH)])
    config = UNetConfig(
        sample_size=SIZE // FACTOR,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(64, 128),
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        layers_per_block=2,
        num_class_embeds=CLASSES + 1,
    )
    process, generator = VP(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = UNet(config)
    averaged = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), 4e-4)
    alphas_cumprod = torch.tensor(process.alphas_cumprod, dtype=torch.float32)
    started, steps, losses = time.monotonic(), 0, []
    while time.monotonic() - started < seconds:
        rows = torch.randint(len(states), (BATCH,), generator=generator)
        t = torch.randint(1000, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *states.shape[1:], generator=generator)
        told = torch.where(torch.rand(BATCH, generator=generator) < 0.1, CLASSES, labels[rows])
        a = alphas_cumprod[t][:, None, None, None]
        x = a.sqrt() * states[rows] + (1 - a).sqrt() * noise
        loss = (network.evaluate(x, network.biases(t, told, None)) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        steps += 1
        decay = min(0.999, (1 + steps) / (10 + steps))
        with torch.no_grad():
            for mean, value in zip(averaged.parameters(), network.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        losses.append(loss.item())
    about = {"images": len(pixels), "steps": steps, "seconds": round(seconds), "loss": float(np.mean(losses[-100:]))}
    about |= {"state_variance": float(states.var())}
    return LatentUNet(config, averaged.state_dict(), process, null_class=CLASSES, vae=vae), about


Inverted = tuple[Tensor, float]  # the latents, and the evaluations of one sample that one took


def ours(network: Network, z: Tensor, levels: Any, process: Process, condition: Condition | None, k: int) -> Inverted:
    x, _, spent = invert_exactly(network, z, levels, process, condition=condition, corrections=k)
    return x, float(spent.float().mean())


def paper(network: Network, z: Tensor, levels: Any, process: Process, condition: Condition | None, _: int) -> Inverted:
    return invert(network, z, levels, process, condition=condition), len(levels) - 1


def damped(network: Network, z: Tensor, levels: Any, process: Process, condition: Condition | None, k: int) -> Inverted:
    return _fixed_point(network, z, levels, process, condition, k, lambda before, y: (before[-1] + y) / 2)


def averaged(
    network: Network, z: Tensor, levels: Any, process: Process, condition: Condition | None, k: int
) -> Inverted:
    return _fixed_point(network, z, levels, process, condition, k, lambda _, y: y, average=True)


def _fixed_point(
    network: Network,
    z: Tensor,
    levels: Any,
    process: Process,
    condition: Condition | None,
    k: int,
    move: Callable[[list[Tensor], Tensor], Tensor],
    average: bool = False,
) -> Inverted:
    """`k` iterations a step, from the state below; the last one's iterate, or the mean of all but the first."""
    x = z
    for low, high in pairwise(levels):
        (scale, gain), reading = coefficients(process.marginal(low), process.marginal(high)), process.reading(high)
        iterates = [x]
        for _ in range(k):
            of_state, of_output = reading.epsilon
            y = iterates[-1]
            epsilon = of_state * y + of_output * evaluate(network, y, reading, condition)
            iterates.append(move(iterates, scale * x + gain * epsilon))
        x = torch.stack(iterates[min(2, k) :]).mean(0) if average else iterates[-1]
    return x, k * (len(levels) - 1)


METHODS = {"ours": ours, "paper": paper, "damped (AIDI-like)": damped, "averaged (ReNoise-like)": averaged}


def refinement(vae: Vae, photos: str, count: int = 16) -> list[dict[str, float]]:
    """A row for each number of steps."""
    x, found = to_model(first_images(open_collection(absolute(photos)), Preprocess(256), count)), []
    state = vae.to_state(x)
    started = time.monotonic()
    vae.to_images(state)
    decoding = time.monotonic() - started
    for steps in (0, 10, 30, 100):
        refined = replace(vae, refinements=steps)
        started = time.monotonic()
        state = refined.to_state(x)
        taken = (time.monotonic() - started) / decoding
        found.append(
            {"K": steps, "vae_mse": float(round_trip_error(x, vae.to_images(state)).mean()), "decodings": taken}
        )
        print(found[-1], flush=True)
    return found


def errors(model: LatentUNet, photos: str, size: int) -> dict[str, Any]:
    """Means over the photographs, by method, without guidance, told that they are of no class."""
    pixels = first_images(open_collection(absolute(photos)), Preprocess(size), 64)
    x, told = to_model(pixels), model.with_classes(ClassOf(value=CLASSES))
    network, vae, levels = told.denoiser(), model.vae, logsnr_ladder(model.process, STEPS)
    found: dict[str, Any] = {"images": len(x), "steps": STEPS}
    for name, k in (("ours", 3), ("paper", 0)):
        rows: dict[str, list[np.ndarray]] = {}
        for part in x.split(16):
            z, condition = vae.to_state(part), told.condition([{}] * len(part))
            latents, spent = METHODS[name](network, z, levels, model.process, condition, k)
            state = sample(network, latents, levels, model.process, condition=condition)
            floor, decoded = vae.to_images(z), vae.to_images(state)
            for column, values in {
                "latent_mse": state_error(z, state),
                "vae_mse": round_trip_error(part, floor),
                "mse_from_vae": round_trip_error(floor, decoded),
                "mse": round_trip_error(part, decoded),
            }.items():
                rows.setdefault(column, []).append(values)
        found[name] = {column: float(np.concatenate(values).mean()) for column, values in rows.items()}
        found[name]["nfe"] = spent
    return found


def guidance(model: LatentUNet, images: str, steps: int, count: int = 32) -> list[dict[str, Any]]:
    """A row for each weight, method and number of iterations: test images under their own classes."""
    pixels = first_images(open_collection(absolute(images)), Preprocess(SIZE), count)
    labels = pq.read_table(images, columns=["label"])["label"].to_pylist()[:count]
    z, levels = model.vae.to_state(to_model(pixels)), logsnr_ladder(model.process, steps)
    network, rows = model.denoiser(), [{"label": label} for label in labels]
    found = []
    for weight in (1.0, 3.0, 7.5):
        condition = model.with_classes(ClassOf("label")).with_guidance(weight).condition(rows)
        for name, method in METHODS.items():
            for k in (0,) if name == "paper" else (1, 3, 5, 10):
                latents, spent = method(network, z, levels, model.process, condition, k)
                state = sample(network, latents, levels, model.process, condition=condition)
                error = state_error(z, state)
                row = {"W": weight, "method": name, "k": k, "steps": steps, "nfe": spent}
                found.append({**row, "mean": float(error.mean()), "median": float(np.median(error))})
                print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--taesd", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--test", default=str(Path(__file__).parent.parent / "samples/cifar10-test-256.parquet"))
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--json")
    args = parser.parse_args()
    vae = Vae(Taesd(args.taesd), 1.0, 0.0, FACTOR)
    content: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    content["refinement"] = refinement(vae, args.photos)
    if args.seconds:
        model, content["training"] = train(vae, args.train, args.seconds)
        print(content["training"], flush=True)
        content["errors"] = {str(size): errors(model, args.photos, size) for size in (64, 256)}
        print(content["errors"], flush=True)
        content["guidance"] = [row for steps in (20, 50) for row in guidance(model, args.test, steps)]
    if args.json:
        Path(args.json).write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
