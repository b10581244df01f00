"""How well watermarks are found: by kind and by what was done to the images, and how often where there is none.

python -m benchmarks.watermark [--model DIR] [--images FILE.parquet] [--count 40] [--keys 20] [--released TREE_RING]

Generates COUNT images (20 steps) with a watermark of each kind, KEYS keys in turn, does to the 8-bit images what is
listed in DONE, and scores them with all keys (20 evaluations). `found` is the share of images with p at most 0.01,
`key` that with the right key, `p` the median. `without` has the share with p and with the paper's p-value at most 0.01,
each under a single one of the keys, of images generated without a watermark and of the images of FILE. With a clone of
YuxinWenRick/tree-ring-watermark, `noise` has the share of 4,000 draws of noise with its own p-value at most 0.01, and
with ours, by pattern. Prints one JSON object.
"""

import argparse
import ast
import contextlib
import copy
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import scipy
import torch
from PIL import Image, ImageFilter

from palindrome.jobs.__main__ import main as palindrome
from palindrome.model.watermarks import TreeRing
from palindrome.pipeline.runs.watermarks import read_keys

ROOT = Path(__file__).parents[1]
KINDS = {
    "tree-ring rand": ["--method", "tree-ring"],
    "tree-ring ring": ["--method", "tree-ring", "--pattern", "ring"],
    "tree-ring ring, all channels": ["--method", "tree-ring", "--pattern", "ring", "--channels", "0", "1", "2"],
    "gaussian-shading": ["--method", "gaussian-shading"],
}
LEVEL = 0.01


def jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return change


def noisy(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    added = np.random.RandomState(0).normal(0, 0.05 * 255, values.shape)
    return Image.fromarray((values + added).round().clip(0, 255).astype(np.uint8))


def cropped(image: Image.Image) -> Image.Image:
    """An eighth less of the side, and resized."""
    off = image.width // 16
    inside = image.crop((off, off, image.width - off, image.height - off))
    return inside.resize(image.size, Image.Resampling.BICUBIC)


DONE: dict[str, Callable[[Image.Image], Image.Image]] = {
    "nothing": lambda image: image,
    "JPEG 90": jpeg(90),
    "JPEG 50": jpeg(50),
    "crop": cropped,
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "noise": noisy,
    "rotation": lambda image: image.rotate(10, Image.Resampling.BICUBIC),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints/cifar10-32"))
    parser.add_argument("--images", default=str(ROOT / "samples/cifar10-test-256.parquet"))
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--keys", type=int, default=20)
    parser.add_argument("--released")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {kind: watermarked(folder / str(i), kind, args) for i, kind in enumerate(KINDS)}
        without = {"generated": rejected(folder / "plain", generated(folder / "plain", args), args)}
        without["images"] = rejected(folder / "images", Path(args.images), args)
    noise = {"noise": on_noise(Path(args.released))} if args.released else {}
    print(json.dumps({"with": found, "without": without, **noise}, indent=2))


def run(*command: Any) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert palindrome([str(word) for word in command]) == 0, command


def keys(folder: Path, kind: str, args: argparse.Namespace) -> Path:
    file = folder / f"{kind}.json"
    run("watermark", "--model", args.model, *KINDS[kind], "--count", args.keys, "--seed", 0, "--out", file)
    return file


def generated(folder: Path, args: argparse.Namespace, *flags: Any) -> Path:
    """The folder of the images of a run."""
    how = ["--steps", 20, "--ladder", "logsnr", "--count", args.count, "--inline"]
    run("generate", "--model", args.model, "--out", folder / "run", *how, *flags)
    return folder / "run/images"


def scored(images: Path, out: Path, method: str, file: Path, args: argparse.Namespace, *flags: Any) -> pl.DataFrame:
    how = ["--model", args.model, "--method", method, "--keys", file, "--inline", *flags]
    run("score", "--images", images, "--out", out, *how)
    table = pl.read_parquet(out / "scores/*.parquet").sort("image_id")
    prefix = f"{method.replace('-', '_')}_"
    return table.rename({name: name.removeprefix(prefix) for name in table.columns if name.startswith(prefix)})


def watermarked(folder: Path, kind: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By what is done to the images."""
    folder.mkdir()
    file, method = keys(folder, kind, args), KINDS[kind][1]
    rows = pl.read_parquet(generated(folder, args, "--watermark", file) / "*.parquet").sort("index")
    found = {}
    for i, (name, change) in enumerate(DONE.items()):
        images = folder / str(i)
        images.mkdir()
        for row in rows.iter_rows(named=True):
            change(Image.open(io.BytesIO(row["image"]["bytes"]))).save(images / f"{row['image_id']}.png")
        table = scored(images, folder / f"{i}-scores", method, file, args)
        found[name] = {
            "found": round(float((table["p"] <= LEVEL).mean()), 3),  # type: ignore[arg-type]
            "key": round(float((table["key"] == rows["watermark"]).mean()), 3),  # type: ignore[arg-type]
            "p": float(f"{table['p'].median():.1e}"),
        }
    return found


def rejected(folder: Path, images: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of images without a watermark, by kind: how often p and the paper's are at most LEVEL, over single keys."""
    folder.mkdir(exist_ok=True)
    files = {kind: keys(folder, kind, args) for kind in KINDS}
    kind, file = next(iter(files.items()))
    scored(images, folder / "scores", KINDS[kind][1], file, args, "--latents")
    tables = [pq.read_table(path, columns=["tree_ring_latent"]) for path in (folder / "scores/scores").iterdir()]
    latents = [torch.tensor(table["tree_ring_latent"].combine_chunks().to_numpy_ndarray()) for table in tables]
    shares = {}
    for kind, file in files.items():
        read = read_keys(str(file))
        each = [read.watermark.find(torch.cat(latents), secret) for secret in read.secrets.values()]
        both = {name: torch.cat([found[name] for found in each]) for name in ("p", "noise_p") if name in each[0]}
        shares[kind] = {name: round((p <= LEVEL).double().mean().item(), 4) for name, p in both.items()}
    return shares


def on_noise(repository: Path) -> dict[str, dict[str, float]]:
    """By pattern: 4,000 draws of x_T for Stable Diffusion, and a key in channel 0."""
    functions = ("circle_mask", "get_watermarking_mask", "get_watermarking_pattern", "get_p_value")
    tree = ast.parse((repository / "optim_utils.py").read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in functions]
    scope: dict[str, Any] = {"torch": torch, "np": np, "scipy": scipy, "copy": copy}
    scope["set_random_seed"] = torch.manual_seed
    exec(compile(ast.Module(found, []), "optim_utils.py", "exec"), scope)
    x = torch.randn(4000, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    shares = {}
    for pattern in ("rand", "ring"):
        how = SimpleNamespace(w_mask_shape="circle", w_channel=0, w_radius=10, w_pattern=pattern, w_seed=0)
        mask = scope["get_watermarking_mask"](x[:1], how, "cpu")
        theirs = scope["get_watermarking_pattern"](None, how, "cpu", (1, 4, 64, 64))
        released = [scope["get_p_value"](each[None], each[None], mask, theirs, how)[0] for each in x]
        ours = TreeRing((4, 64, 64), channels=(0,), pattern=pattern).find(x, b"key")
        each = {"released": np.array(released), "p": ours["p"].numpy(), "noise_p": ours["noise_p"].numpy()}
        shares[pattern] = {name: round(float((p <= LEVEL).mean()), 4) for name, p in each.items()}
    return shares


if __name__ == "__main__":
    main()
