"""The U-Nets of known data sets, by name: what `palindrome train --preset` builds."""

from typing import Any

from palindrome.model.unet import UNetConfig


def _unet(size: int, channels: tuple[int, ...], attention: int, **settings: Any) -> UNetConfig:
    """The DDPM U-Net (Ho et al., appendix B) with attention where the feature map is `attention` pixels wide."""
    at = [size >> i == attention for i in range(len(channels))]
    return UNetConfig(
        sample_size=size,
        block_out_channels=channels,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in at),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(at)),
        **{"attention_head_dim": None, "norm_eps": 1e-6, "freq_shift": 1, "flip_sin_to_cos": False, **settings},
    )


PRESETS = {
    "cifar10-128": _unet(32, (128, 256, 256, 256), 16, dropout=0.1),  # the DDIM paper's CIFAR-10 model
    "cifar10-64": _unet(32, (64, 128, 128, 128), 16),
    # Small enough to train on two CPU cores. Groups of 4 channels as in cifar10-128: a group of one would lose each
    # channel's mean, and with it the colour of the noise.
    "cifar10-32": _unet(32, (32, 64, 64, 64), 16, layers_per_block=1, norm_num_groups=8),
    "celebahq-256": _unet(256, (128, 128, 256, 256, 512, 512), 16),
    "celebahq-128": _unet(128, (128, 128, 256, 256, 512), 16),
    "tiny": _unet(16, (8, 16), 8, layers_per_block=1, norm_num_groups=4),
}
