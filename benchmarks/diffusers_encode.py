"""Encodes images by diffusers only: its UNet2DModel and DDIMInverseScheduler, batch by batch.

python -m benchmarks.diffusers_encode --images FILE.parquet --model DIR --out FOLDER [--ray-data]

The baseline of benchmarks.encode. Reads images of the model's size from a Parquet file's column `img` and writes
latents to float32 Parquet; with --ray-data, Ray Data reads, maps the batches over one actor that holds the model, and
writes.
"""

import argparse
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import DDIMInverseScheduler, UNet2DModel
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--ray-data", action="store_true")
    args = parser.parse_args()
    if args.ray_data:
        with_ray_data(args)
        return
    encoder = Encoder(args.model, args.steps)
    pictures = pq.read_table(args.images, columns=["img"])["img"].to_pylist()[: args.limit]
    latents = [encoder({"img": pictures[i : i + args.batch]})["latent"] for i in range(0, len(pictures), args.batch)]
    table = pa.table({"latent": pa.FixedShapeTensorArray.from_numpy_ndarray(np.concatenate(latents))})
    Path(args.out).mkdir(parents=True, exist_ok=True)
    pq.write_table(table, Path(args.out, "latents.parquet"))


class Encoder:
    """Rows of encoded images -> latents, float32 [B, C, H, W]."""

    def __init__(self, model: str, steps: int) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.unet = UNet2DModel.from_pretrained(model, subfolder="unet", torch_dtype=torch.float32).to(self.device)
        self.unet.eval()
        self.scheduler = DDIMInverseScheduler.from_pretrained(model, subfolder="scheduler")
        self.scheduler.set_timesteps(steps)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(p["bytes"])).convert("RGB")) for p in batch["img"]])
        x = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
        return {"latent": x.contiguous().cpu().numpy()}


def with_ray_data(args: argparse.Namespace) -> None:
    import ray

    import palindrome.infra.cluster  # noqa: F401, configures Ray before it starts

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().execution_options.preserve_order = True  # benchmarks.encode relies on it
    data = ray.data.read_parquet(args.images, columns=["img"]).limit(args.limit)
    gpus = {"num_gpus": 1} if torch.cuda.is_available() else {"num_cpus": 1}
    options: dict[str, Any] = {"batch_size": args.batch, "concurrency": 1, **gpus}
    data.map_batches(Encoder, fn_constructor_args=(args.model, args.steps), **options).write_parquet(args.out)


if __name__ == "__main__":
    main()
