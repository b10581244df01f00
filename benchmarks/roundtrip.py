"""Round-trip error of the paper's plain inversion against the number of steps, beside the DDIM paper's Table 2.

python -m benchmarks.roundtrip [--steps 10 20 50 100] [--ladders linear quadratic] [--json FILE]

One process, no Ray: every image is encoded with S evaluations and decoded with S more; latents stay float32.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import checkpoint
from model.ddim import invert, sample
from model.schedule import LADDERS, ladder
from pipeline.decode import Preprocess
from pipeline.metrics import round_trip_error, to_model, to_pixels
from pipeline.plan import pack
from pipeline.read import read_batches
from pipeline.records import Shard
from pipeline.sources import list_pieces, open_collection

ROOT = Path(__file__).parent.parent
TABLE_2 = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints/cifar10-32"))
    parser.add_argument("--images", default=str(ROOT / "samples/cifar10-test-256.parquet"))
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50, 100])
    parser.add_argument("--ladders", nargs="+", choices=LADDERS, default=list(LADDERS))
    parser.add_argument("--limit", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", help="write the figures to this file too")
    args = parser.parse_args()

    model = checkpoint.load(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = model.network(device)
    pixels = _pixels(args.images, Preprocess(model.config.sample_size, model.config.in_channels), args.limit)
    batches = np.array_split(pixels, -(-len(pixels) // args.batch_size))
    print(f"{len(pixels)} images, {device}, model {model.digest[:12]}\n")
    print("| S | ladder | MSE mean | median | p99 | 8-bit identical | latent std | images/s | paper, Table 2 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    results: list[dict[str, Any]] = []
    for kind in args.ladders:
        for steps in args.steps:
            levels = ladder(kind, steps, model.schedule.num_train_timesteps)
            walk = {"levels": levels, "schedule": model.schedule, "prediction_type": model.prediction_type}
            errors, identical, stds, started = [], [], [], time.perf_counter()
            for batch in batches:
                x = to_model(batch).to(device)
                latents = invert(network, x, **walk)
                decoded = sample(network, latents, **walk)
                errors.append(round_trip_error(x, decoded))
                identical.append((to_pixels(decoded) == batch).mean(axis=(1, 2, 3)))
                stds.append(float(latents.std()))
            mse, rate = np.concatenate(errors), len(pixels) / (time.perf_counter() - started)
            row = {"steps": steps, "ladder": kind, "mse": float(mse.mean()), "median": float(np.median(mse))}
            row |= {"p99": float(np.quantile(mse, 0.99)), "identical": float(np.concatenate(identical).mean())}
            row |= {"latent_std": float(np.mean(stds)), "images_per_second": rate, "paper": TABLE_2.get(steps)}
            results.append(row)
            paper = row["paper"] if row["paper"] is not None else ""
            print(
                f"| {steps} | {kind} | {row['mse']:.2e} | {row['median']:.2e} | {row['p99']:.2e} |"
                f" {row['identical']:.1%} | {row['latent_std']:.3f} | {rate:.1f} | {paper} |",
                flush=True,
            )
    if args.json:
        figures = {"model_digest": model.digest, "images": len(pixels), "device": device, "rows": results}
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


def _pixels(uri: str, how: Preprocess, limit: int) -> np.ndarray:
    """uint8 [N, H, W, C]."""
    collection = open_collection(uri)
    pieces = pack(list_pieces(collection, limit), limit, limit)
    shards = [Shard.of(collection.kind, group) for group in pieces]
    return np.stack([i.pixels for s in shards for b in read_batches(collection, s, how, 64) for i in b.images])


if __name__ == "__main__":
    main()
