"""Decodes the latents of an encode run by diffusers only, its UNet2DModel and DDIMScheduler.step, at the run's levels.

palindrome encode --images FILE.parquet --model DIR --out RUN --measure
python -m benchmarks.diffusers_decode --latents RUN --images FILE.parquet --model DIR

Prints the resulting round-trip error and the one that encode stored.
"""

import argparse
import io
import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", required=True, help="a run of encode --measure")
    parser.add_argument("--images", default=str(ROOT / "samples/cifar10-test-256.parquet"), help="one Parquet file")
    parser.add_argument("--model", default=str(ROOT / "checkpoints/cifar10-32"))
    args = parser.parse_args()
    pictures = pq.read_table(args.images)["img"].to_pylist()
    unet = UNet2DModel.from_pretrained(args.model, subfolder="unet").eval()
    stored, found, same = [], [], []
    for path in sorted(Path(args.latents, "latents").glob("*.parquet")):
        about = json.loads(pq.read_schema(path).metadata[b"palindrome"])
        for batch in pq.ParquetFile(path).iter_batches(64):
            x = torch.from_numpy(batch.column("latent").to_numpy_ndarray().astype(np.float32))
            decoded = decode(unet, DDIMScheduler.from_pretrained(args.model, subfolder="scheduler"), x, about["levels"])
            rows = [int(name.rpartition("#")[2]) for name in batch.column("image_id").to_pylist()]
            originals = np.stack([np.asarray(Image.open(io.BytesIO(pictures[row]["bytes"]))) for row in rows])
            pixels = (decoded / 2 + 0.5).permute(0, 2, 3, 1).double().numpy()
            stored += batch.column("mse").to_pylist()
            found += ((pixels - originals / 255) ** 2).mean((1, 2, 3)).tolist()
            same += ((pixels.clip(0, 1) * 255).round() == originals).all((1, 2, 3)).tolist()
    print(f"{len(found)} images, {len(about['levels']) - 1} steps of diffusers' DDIMScheduler")
    print(f"mean squared error: {np.mean(found):.4g} by diffusers, {np.mean(stored):.4g} as encode stored it")
    print(f"images identical to the bit: {sum(same)}")


@torch.no_grad()
def decode(unet: UNet2DModel, scheduler: DDIMScheduler, x: Tensor, levels: list[int]) -> Tensor:
    """x_T -> image. The scheduler computes the next level as timestep - num_train_timesteps // num_inference_steps, so
    each step sets num_inference_steps to the fraction for which that is the ladder's next level."""
    scheduler.register_to_config(clip_sample=False, set_alpha_to_one=True)
    scheduler.final_alpha_cumprod = torch.tensor(1.0)
    for low, high in reversed(list(pairwise(levels))):
        scheduler.num_inference_steps = Fraction(scheduler.config.num_train_timesteps, high - low)
        x = scheduler.step(unet(x, high).sample, high, x, eta=0.0).prev_sample
    return x


if __name__ == "__main__":
    main()
