"""Errors between images. Pixels are in [0, 1] here, as in the DDIM paper's Table 2; tensors in [-1, 1] are rescaled."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_model(pixels: np.ndarray) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W] in [-1, 1]."""
    writable = np.require(pixels, requirements="W")  # else torch warns; decoders hand out read-only views
    return torch.from_numpy(writable).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_pixels(x: Tensor) -> np.ndarray:
    """float [B, C, H, W], clipped to [-1, 1] and rounded -> uint8 [B, H, W, C]."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def round_trip_error(x: Tensor, decoded: Tensor) -> np.ndarray:
    """Mean squared error per channel value of each image, float64 [B]: neither clipped nor rounded."""
    squared = (x.double() - decoded.double()).square() / 4  # [-1, 1] is twice as wide as [0, 1]
    return squared.flatten(1).mean(1).cpu().numpy()


def state_error(x: Tensor, other: Tensor) -> np.ndarray:
    """Mean squared difference of each state, float64 [B], in the states' own units."""
    return (x.double() - other.double()).square().flatten(1).mean(1).cpu().numpy()


def errors_apart(x: Tensor, decoded: Tensor, state: Tensor, own: tuple[Tensor, Tensor]) -> dict[str, np.ndarray]:
    """The errors of images x decoded through an autoencoder, float64 [B] each, as pipeline.runs.schemas.APART names
    them. `state` is what was decoded, `own` the images' own states and what the autoencoder makes of them."""
    z, round_trip = own
    return {
        "latent_mse": state_error(z, state),
        "vae_mse": round_trip_error(x, round_trip),
        "mse_from_vae": round_trip_error(round_trip, decoded),
    }


def moments(latents: Tensor) -> dict[str, np.ndarray]:
    """Of each latent, float [B, C, H, W], as float64 [B]: mean, std, kurtosis, and the correlation of neighbours in a
    row or a column. Those of x_T ~ N(0, I) are 0, 1, 3 and 0."""
    x = latents.double()
    mean, std = x.flatten(1).mean(1), x.flatten(1).std(1, correction=0)
    z = (x - mean[:, None, None, None]) / std[:, None, None, None]
    across, down = (z[..., 1:] * z[..., :-1]).flatten(1).mean(1), (z[..., 1:, :] * z[..., :-1, :]).flatten(1).mean(1)
    found = {"mean": mean, "std": std, "kurtosis": z.pow(4).flatten(1).mean(1), "correlation": (across + down) / 2}
    return {name: values.cpu().numpy() for name, values in found.items()}


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB, the peak being 1; inf for no error, NaN for one that is no number."""
    return math.inf if mse == 0 else -10 * math.log10(mse) if mse > 0 else math.nan


SSIM_WINDOW = 11  # pixels across


def ssim(pixels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Mean structural similarity of uint8 pictures [B, H, W, C] of at least SSIM_WINDOW pixels, float64 [B], with the
    window of Wang et al. 2004 ("Image quality assessment", section III): Gaussian, of deviation 1.5. Needs
    scikit-image."""
    from skimage.metrics import structural_similarity

    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
    pairs = zip(pixels, others, strict=True)
    return np.array([structural_similarity(a, b, data_range=255, **how) for a, b in pairs], np.float64)


def finite(x: Tensor) -> np.ndarray:
    """Which of x [B, ...] have finite values alone, bool [B]."""
    return x.isfinite().flatten(1).all(1).cpu().numpy()


def check_finite(images: Tensor, ids: Sequence[str]) -> None:
    """Raises ValueError naming the first of images [B, C, H, W] that has no pixels, as its values are not finite."""
    good = finite(images)
    if not good.all():
        raise ValueError(f"{ids[int(good.argmin())]}: the image has values that are not finite")


def statistics(mse: np.ndarray) -> dict[str, float]:
    """Figures of the finite errors in float [N], NaN where there are none. `psnr` averages those that are not exact:
    one exact image among thousands would make the mean infinite and say nothing of the others."""
    errors = mse[np.isfinite(mse)]
    if not len(errors):
        return dict.fromkeys(("mean", "median", "p99", "max", "psnr"), math.nan)
    mean, median, p99, top = errors.mean(), np.median(errors), np.percentile(errors, 99), errors.max()
    psnr = -10 * np.log10(errors[errors > 0]).mean() if top > 0 else math.inf
    return {"mean": float(mean), "median": float(median), "p99": float(p99), "max": float(top), "psnr": float(psnr)}
