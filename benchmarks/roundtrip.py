"""Round-trip error against the number of steps, plain or corrected inversion, beside the DDIM paper's Table 2.

python -m benchmarks.roundtrip [--steps 10 20 50 100] [--ladders linear logsnr] [--corrections 0 2 3] [--json FILE]

One process, no Ray. Decoding is always plain DDIM on the same ladder.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import checkpoint
from model.ddim import sample
from model.inversion import invert_exactly
from model.schedule import Ladder
from model.unet import UNet
from pipeline.decode import Preprocess
from pipeline.ladders import resolve
from pipeline.metrics import round_trip_error, statistics, to_model, to_pixels
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
    parser.add_argument("--ladders", nargs="+", default=["linear", "quadratic"], help="kinds, or files of calibrate")
    parser.add_argument("--corrections", type=int, nargs="+", default=[0], help="0 is the paper's inversion")
    parser.add_argument("--tolerance", type=float, default=0.0, help="as encode's; corrections are the most a step")
    parser.add_argument("--dtype", choices=["float32", "float16"], nargs="+", default=["float32"], help="as stored")
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
    print(
        "| S | ladder | corrections | stored | NFE up + down | MSE mean | median | p99 | 8-bit values identical", end=""
    )
    print(" | images identical | images/s up | paper, Table 2 |")
    print("| --- " * 12 + "|")
    results = []
    for kind in args.ladders:
        for steps in args.steps:
            for corrections in args.corrections:
                levels = resolve(kind, None if kind.endswith(".json") else steps, model.schedule)
                for row in _measure(model, network, batches, levels, corrections, args.tolerance, args.dtype):
                    results.append({"ladder": Path(kind).stem, **row})
                    print(_line(results[-1]), flush=True)
    if args.json:
        figures = {"model_digest": model.digest, "images": len(pixels), "device": device, "rows": results}
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


def _measure(
    model: checkpoint.Checkpoint,
    network: UNet,
    batches: list[np.ndarray],
    levels: Ladder,
    corrections: int,
    tolerance: float,
    dtypes: list[str],
) -> Iterator[dict[str, Any]]:
    """A row for each dtype that the latents are stored in."""
    device, steps = network.conv_in.weight.device, len(levels) - 1
    settings = {"levels": levels, "schedule": model.schedule, "prediction_type": model.prediction_type}
    inputs = [to_model(batch).to(device) for batch in batches]
    started = time.perf_counter()
    inverted = [invert_exactly(network, x, corrections=corrections, tolerance=tolerance, **settings) for x in inputs]
    nfe = float(torch.cat([spent for *_, spent in inverted]).float().mean())
    seconds = time.perf_counter() - started
    for dtype in dtypes:
        errors, same = [], []
        for batch, x, (latents, *_) in zip(batches, inputs, inverted, strict=True):
            decoded = sample(network, latents.to(getattr(torch, dtype)), **settings)
            errors.append(round_trip_error(x, decoded))
            same.append((to_pixels(decoded) == batch).reshape(len(batch), -1))
        identical = np.concatenate(same)
        figures = statistics(np.concatenate(errors))
        yield {
            "steps": steps,
            "corrections": corrections,
            "dtype": dtype,
            "nfe": [nfe, steps],
            "mse": figures["mean"],
            "median": figures["median"],
            "p99": figures["p99"],
            "values_identical": float(identical.mean()),
            "images_identical": float(identical.all(1).mean()),
            "images_per_second": len(identical) / seconds,
            "paper": None if corrections else TABLE_2.get(steps),
        }


def _line(row: dict[str, Any]) -> str:
    cells = [row["steps"], row["ladder"], row["corrections"], row["dtype"], f"{row['nfe'][0]:.4g} + {row['nfe'][1]}"]
    cells += [f"{row[name]:.2e}" for name in ("mse", "median", "p99")]
    cells += [f"{row['values_identical']:.2%}", f"{row['images_identical']:.1%}", f"{row['images_per_second']:.2f}"]
    return f"| {' | '.join(map(str, cells))} | {row['paper'] or ''} |"


def _pixels(uri: str, how: Preprocess, limit: int) -> np.ndarray:
    """uint8 [N, H, W, C]."""
    collection = open_collection(uri)
    pieces = pack(list_pieces(collection, limit), limit, limit)
    shards = [Shard.of(collection.kind, group) for group in pieces]
    return np.stack([i.pixels for s in shards for b in read_batches(collection, s, how, 64) for i in b.images])


if __name__ == "__main__":
    main()
