"""CPU seconds an image of `palindrome score`, against the released scripts of SecMI and DiffPath, on one thread.

python -m benchmarks.score SECMI DIFFPATH [--images FILE.parquet] [--model DIR] [--limit 64] [--rounds 3]

SECMI and DIFFPATH are clones of jinhaoduan/SecMI and clear-nus/diffpath, whose functions are run as in
tests/fixtures/make_score_fixtures.py, with diffusers' UNet2DModel of the same checkpoint as their network. Theirs is
given the pixels; ours is the whole command, from files to Parquet, report included, but for imports. The contenders
alternate, and the best of each one's rounds counts. `difference` is the largest one between the statistics of the two,
relative to the largest of theirs: float32 on both sides. Prints one JSON object.
"""

import argparse
import contextlib
import io
import json
import os
import runpy
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from palindrome.jobs.__main__ import main as palindrome
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.metrics import to_model
from palindrome.pipeline.images.read import first_images
from palindrome.pipeline.images.sources import open_collection

ROOT = Path(__file__).parents[1]
COLUMNS = {"secmi": ("secmi: statistic", "secmi_t_error"), "diffpath": ("diffpath: deps_dt_sq", "diffpath_deps_dt_sq")}


class Epsilon(nn.Module):
    """diffusers' network, with a variance of nothing where the diffusion expects one."""

    def __init__(self, model: str, variance: bool) -> None:
        super().__init__()
        self.unet, self.variance = UNet2DModel.from_pretrained(model, subfolder="unet").eval(), variance

    def forward(self, x: Tensor, t: Tensor, **_: Any) -> Tensor:
        epsilon: Tensor = self.unet(x, t).sample
        return torch.cat([epsilon, torch.zeros_like(epsilon)], 1) if self.variance else epsilon


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("secmi")
    parser.add_argument("diffpath")
    parser.add_argument("--images", default=str(ROOT / "samples/cifar10-test-256.parquet"))
    parser.add_argument("--model", default=str(ROOT / "checkpoints/cifar10-32"))
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    made = runpy.run_path(str(ROOT / "tests/fixtures/make_score_fixtures.py"))
    x = to_model(first_images(open_collection(args.images), Preprocess(32), args.limit))
    found = {}
    for method, repository in {"secmi": args.secmi, "diffpath": args.diffpath}.items():
        network, where = Epsilon(args.model, method == "diffpath"), Path(repository).resolve()
        best = {"theirs": np.inf, "ours": np.inf}
        for _ in range(args.rounds):
            with temporary() as folder:
                rest = (folder, network, x) if method == "diffpath" else (network, x)
                seconds, theirs = timed(lambda: made[method](where, *rest))  # noqa: B023
                best["theirs"] = min(best["theirs"], seconds)
            with temporary() as folder:
                what = ["--images", args.images, "--model", args.model, "--limit", str(args.limit)]
                command = ["score", *what, "--method", method, "--out", str(folder / "run"), "--inline"]
                seconds, code = timed(lambda: palindrome(command))  # noqa: B023
                assert code == 0
                best["ours"] = min(best["ours"], seconds)
                rows = pq.read_table(folder / "run/scores", columns=["image_id", COLUMNS[method][1]]).to_pylist()
        rows.sort(key=lambda row: int(row["image_id"].rpartition("#")[2]))
        ours = np.array([row[COLUMNS[method][1]] for row in rows])
        expected = theirs[COLUMNS[method][0]].double().numpy()
        each = {name: round(seconds / args.limit, 4) for name, seconds in best.items()}
        difference = float(np.abs(ours - expected).max() / np.abs(expected).max())
        found[method] = {**each, "times": round(each["theirs"] / each["ours"], 2), "difference": difference}
    print(json.dumps({"images": args.limit, "cpu_seconds_an_image": found}, indent=2))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        result = call()
    return time.process_time() - started, result


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """A folder; the working directory is the one before, whatever a script changes."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


if __name__ == "__main__":
    main()
