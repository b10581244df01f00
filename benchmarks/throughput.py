"""Images/s of `palindrome encode`, start-up included, against a bare loop of the same model over decoded tensors.

python -m benchmarks.throughput [--images FILE] [--limit 512] [--steps 20] [--corrections 3]

One after the other in one run; the loop has every CPU, no Ray, no files, and its images in memory before it starts.
Prints one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from model import checkpoint
from model.inversion import invert_exactly
from pipeline.decode import Preprocess
from pipeline.ladders import resolve
from pipeline.metrics import to_model
from pipeline.read import first_images
from pipeline.sources import open_collection
from pipeline.storage import absolute

ROOT = Path(__file__).parent.parent
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints/cifar10-32"))
    parser.add_argument("--images", default=str(ROOT / "samples/cifar10-test-256.parquet"))
    parser.add_argument("--limit", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--corrections", type=int, default=3)
    args = parser.parse_args()
    loop = bare(args)
    with tempfile.TemporaryDirectory() as out:
        encode = command(args, out)
    print(json.dumps({"loop": loop, "encode": encode, "ratio": encode / loop}, indent=2))


def bare(args: argparse.Namespace) -> float:
    """Images/s of the loop."""
    model = checkpoint.load(args.model)
    how = Preprocess(model.config.sample_size, model.config.in_channels)
    x = to_model(first_images(open_collection(absolute(args.images)), how, args.limit))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, levels = model.network(device), resolve("logsnr", args.steps, model.schedule)
    started = time.monotonic()
    for batch in x.split(BATCH):
        latents, *_ = invert_exactly(network, batch.to(device), levels, model.schedule, corrections=args.corrections)
        latents.cpu()
    return len(x) / (time.monotonic() - started)


def command(args: argparse.Namespace, out: str) -> float:
    """Images/s of the command, from its start to its end."""
    flags = {"images": args.images, "model": args.model, "out": out, "limit": args.limit, "steps": args.steps}
    flags |= {"corrections": args.corrections, "batch-size": BATCH}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "jobs", "encode", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    return float(json.loads(Path(out, "summary.json").read_text())["latents"]) / seconds


if __name__ == "__main__":
    main()
