"""Error against wall time: round trips with the network in float32, bfloat16 and float16.

python -m benchmarks.precision [--model DIR] [--images FILE] [--limit 64] [--steps 10 20] [--corrections 0 3]
                               [--precisions float32 bfloat16] [--ladder logsnr]

Images are encoded by palindrome's inversion and decoded by DDIM, in one process. Each row is for one precision, number
of steps and number of corrections: seconds per image for both, `faster` relative to the first precision, and the mean
squared error (pixels in [0, 1]) with the latents decoded in the same precision, `error`, and in float32. Without a GPU
float16 is left out unless given, as torch has no fast float16 for CPUs. Prints one JSON object.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palindrome.model import families
from palindrome.model.execution import PRECISIONS, Execution
from palindrome.model.ladder import Ladder
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.metrics import round_trip_error, to_model
from palindrome.pipeline.images.read import first_images
from palindrome.pipeline.images.sources import open_collection
from palindrome.pipeline.runs.ladders import KINDS, resolve
from palindrome.pipeline.runtime.device import Model, tune_process
from palindrome.pipeline.storage.folder import absolute

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--model", default=str(ROOT / "checkpoints/cifar10-32"))
    parser.add_argument("--images", default=str(ROOT / "samples/cifar10-test-256.parquet"))
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--corrections", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--ladder", choices=KINDS, default="logsnr")
    precisions = PRECISIONS if gpu else ("float32", "bfloat16")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(precisions))
    args = parser.parse_args()
    loaded = families.load(absolute(args.model))
    channels, size, _ = loaded.image_shape
    how = Preprocess(size, channels)
    x = to_model(first_images(open_collection(absolute(args.images)), how, args.limit))
    rows = []
    for steps in args.steps:
        levels = resolve(args.ladder, steps, loaded.process)
        for corrections in args.corrections:
            found = [round_trip(loaded, precision, x, levels, corrections) for precision in args.precisions]
            for row in found:
                row["faster"] = found[0]["seconds_an_image"] / row["seconds_an_image"]
            rows += [{"steps": steps, "corrections": corrections, **row} for row in found]
    device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    about = {"device": device, "model": Path(args.model).name, "ladder": args.ladder, "images": len(x)}
    print(json.dumps({**about, "rows": rows}, indent=2))


def round_trip(
    loaded: families.Checkpoint, precision: str, x: Tensor, levels: Ladder, corrections: int
) -> dict[str, Any]:
    model = Model(loaded, execution=Execution(precision))
    tune_process(model)  # as actors do
    model.decode(x, levels[:2])  # warm-up: allocates memory and selects kernels
    started = time.monotonic()
    latents = model.encode(x, levels, corrections)[0]
    decoded = model.decode(latents, levels)
    seconds = time.monotonic() - started
    by_float32 = Model(loaded).decode(latents, levels)
    return {
        "precision": precision,
        "seconds_an_image": seconds / len(x),
        "error": float(round_trip_error(x, decoded).mean()),
        "error_decoded_by_float32": float(round_trip_error(x, by_float32).mean()),
    }


if __name__ == "__main__":
    main()
