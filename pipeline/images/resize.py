"""uint8 images of any size -> what a network of features takes. The filter decides the numbers: FID of one and the same
images changes by several points with it (Parmar, Zhang, Zhu 2022, "On Aliased Resizing", arXiv 2104.11222)."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PIL
from torch import Tensor

from palindrome.pipeline.base.threads import in_threads

CLEAN, PYTORCH, TENSORFLOW = "clean", "legacy_pytorch", "legacy_tensorflow"
MODES = (CLEAN, PYTORCH, TENSORFLOW)
RANGES = {CLEAN: (-1.0, 127 / 128), PYTORCH: (-1.0, 1.0), TENSORFLOW: (-1.0, 127 / 128)}  # (x - 128) / 128, 2 x - 1
THREADS = 4


def resized(images: Sequence[np.ndarray], size: int, mode: str, scale: tuple[float, float]) -> Tensor:
    """uint8 [H, W, C] each, C being 3, or 1 for gray -> float32 [B, 3, size, size]; 0 becomes the first and 255 the
    second number of `scale`.

    `clean`: Pillow's bicubic filter, which averages where it shrinks, on floats, clipped to 0 to 255, not rounded, as
    clean-fid does it. `legacy_pytorch`: bilinear between the four nearest pixels, also where it shrinks, of pixels in
    [0, 1], as pytorch-fid does it. `legacy_tensorflow`: the same with the corners of TensorFlow 1, as the authors' code
    and torch-fidelity do it.
    """
    return torch.stack(list(in_threads(lambda image: _resized(image, size, mode, scale), images, THREADS)))


def _resized(image: np.ndarray, size: int, mode: str, scale: tuple[float, float]) -> Tensor:
    low, high = scale
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    if mode == CLEAN:
        channels = [PIL.fromarray(np.ascontiguousarray(image[:, :, i], np.float32)) for i in range(3)]
        filtered = [np.asarray(channel.resize((size, size), PIL.Resampling.BICUBIC)) for channel in channels]
        return torch.from_numpy(np.stack(filtered).clip(0, 255)) * ((high - low) / 255) + low
    x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), np.float32))[None]
    if mode == PYTORCH:
        x = F.interpolate(x / 255, (size, size), mode="bilinear", align_corners=False)
        return x[0] * (high - low) + low
    return _bilinear(_bilinear(x, size, 3), size, 2)[0] * ((high - low) / 255) + low


def _bilinear(x: Tensor, size: int, axis: int) -> Tensor:
    """As tf.image.resize_bilinear of TensorFlow 1 without align_corners, along one axis: the place of a new pixel is
    its number times the ratio of the sizes."""
    count = x.shape[axis]
    # The ratio in float32, as TensorFlow's kernel has it.
    at = torch.arange(size, dtype=torch.float32) * torch.tensor(count / size, dtype=torch.float32)
    below = at.long()
    above = (below + 1).clamp(max=count - 1)
    lower, upper = x.index_select(axis, below), x.index_select(axis, above)
    weight = (at - below.float()).reshape([-1 if i == axis else 1 for i in range(x.dim())])
    return lower + (upper - lower) * weight
