"""The networks of EDM (Karras et al., arXiv 2206.00364): DDPM++ and NCSN++ (SongUNet), and ADM (DhariwalUNet).

Parameter names and config keys are those of training/networks.py in NVlabs/edm.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palindrome.model.unet import GroupNorm, check_told, double, folded, halve, sinusoid

NO_CLASS = -1
"""A class's number that stands for none: the label whose entries are all 0."""

_SONG = {
    "model_channels": 128,
    "channel_mult": (1, 2, 2, 2),
    "channel_mult_emb": 4,
    "num_blocks": 4,
    "attn_resolutions": (16,),
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": (1, 1),
}
_DHARIWAL = {
    "model_channels": 192,
    "channel_mult": (1, 2, 3, 4),
    "channel_mult_emb": 4,
    "num_blocks": 3,
    "attn_resolutions": (32, 16, 8),
}
DEFAULTS: dict[str, dict[str, Any]] = {"SongUNet": _SONG, "DhariwalUNet": _DHARIWAL}
"""By `model_type`, the keys that are of it alone, or have a default of their own."""

_KNOWN: dict[str, tuple[Any, ...]] = {
    "model_type": tuple(DEFAULTS),
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
    "resample_filter": ((1, 1), (1, 3, 3, 1)),
}


@dataclass(frozen=True)
class EDMUNetConfig:
    """What the constructors of EDM's networks vary, of what matters once they are trained.

    `img_resolution` is the height and width in pixels and must be divisible by 2 ** (len(channel_mult) - 1).
    `label_dim` is the number of classes, 0 for a network that is told none. `augment_dim` is that of the labels of
    augmentation, which only training gives: the weights for them are there and not used. The fields from
    `embedding_type` on are SongUNet's alone.

    Raises ValueError, naming the key, for what the network can't be built from.
    """

    model_type: str
    img_resolution: int
    img_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    channel_mult_emb: int
    num_blocks: int
    attn_resolutions: tuple[int, ...]
    label_dim: int = 0
    augment_dim: int = 0
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: tuple[int, ...] = (1, 1)

    def __post_init__(self) -> None:
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {_shown(getattr(self, name))}; known: {', '.join(map(_shown, known))}")
        for name in (
            *("img_resolution", "img_channels", "model_channels", "channel_mult_emb", "channel_mult_noise"),
            *("num_blocks", "channel_mult"),
        ):
            if not _counts(getattr(self, name), 1):
                raise ValueError(f"{name} is {_shown(getattr(self, name))}: whole numbers above 0 are needed")
        for name in ("label_dim", "augment_dim", "attn_resolutions"):
            if not _counts(getattr(self, name), 0):
                raise ValueError(f"{name} is {_shown(getattr(self, name))}: whole numbers of at least 0 are needed")
        if not self.channel_mult:
            raise ValueError("channel_mult is empty")
        if self.img_resolution % 2 ** (len(self.channel_mult) - 1):
            raise ValueError(
                f"img_resolution {self.img_resolution} is not divisible by {2 ** (len(self.channel_mult) - 1)}"
            )
        if self.noise_channels % 2 or self.noise_channels < 4:
            raise ValueError(f"model_channels is {self.model_channels}: it must be even, and at least 4")

    @property
    def song(self) -> bool:
        return self.model_type == "SongUNet"

    @property
    def noise_channels(self) -> int:
        """The width of the sines of the noise level."""
        return self.model_channels * self.channel_mult_noise

    @property
    def embedding(self) -> int:
        """The width of what each block is told."""
        return self.model_channels * self.channel_mult_emb

    def heads(self, channels: int) -> int:
        """The number of heads of an attention over `channels`: 0 below 64 of DhariwalUNet's, which has none there."""
        return 1 if self.song else channels // 64

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """From the keys of `model_type` in NVlabs/edm, with its defaults for those that are missing. Raises ValueError
        naming a key that is missing, is not known, or has a value that is not supported."""
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
        if missing := [key for key in ("model_type", "img_resolution", "img_channels") if key not in values]:
            raise ValueError(f"{missing[0]} is missing")
        kind = config["model_type"]
        if kind not in _KNOWN["model_type"]:
            raise ValueError(f"model_type is {kind!r}; known: {', '.join(DEFAULTS)}")
        known = DEFAULTS[kind].keys() | {"model_type", "img_resolution", "img_channels", "label_dim", "augment_dim"}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"{unknown[0]!r} is no key of {kind}'s that is known")
        return cls(**{**DEFAULTS[kind], **values})

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON's types; it goes into the digests of checkpoints."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}


def _counts(value: Any, least: int) -> bool:
    values = value if isinstance(value, tuple) else (value,)
    return all(type(count) is int and count >= least for count in values)


def _shown(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


class EDMUNet(nn.Module):
    """F of D(z; s) = c_skip z + c_out F(c_in z; c_noise) (Karras et al., eq. 7).

    `forward(x, t, classes)`: x float [B, img_channels, H, W], c_in z; t float [1] or [B], c_noise; classes, of a
    class-conditional network alone, int [B], `NO_CLASS` for none. Returns float [B, img_channels, H, W].
    """

    def __init__(self, config: EDMUNetConfig) -> None:
        super().__init__()
        self.config = c = config
        noise, embedding = c.noise_channels, c.embedding
        if c.embedding_type == "fourier":
            self.map_noise = Frequencies(noise)
        if c.label_dim:
            self.map_label = nn.Linear(c.label_dim, noise if c.song else embedding, bias=c.song)
        if c.augment_dim:  # no image here is augmented
            self.map_augment = nn.Linear(c.augment_dim, noise, bias=False)
        self.map_layer0 = nn.Linear(noise, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        out, skips = self._encoder()
        out = self._decoder(out, skips)
        if not c.song:
            self.out_norm = norm(out, c)
            self.out_conv = Conv(out, c.img_channels, 3, c)

    def _encoder(self) -> tuple[int, list[int]]:
        """The channels of its output, and of its skips."""
        c = self.config
        out = c.model_channels if c.song else c.model_channels * c.channel_mult[0]
        aux, skips = c.img_channels, [out]
        for level, multiple in enumerate(c.channel_mult):
            size = c.img_resolution >> level
            at = f"{size}x{size}"
            if level == 0:
                self.enc[f"{at}_conv"] = Conv(c.img_channels, out, 3, c)
            else:
                self.enc[f"{at}_down"] = Block(out, out, c, how="down")
                skips.append(out)
                if c.encoder_type == "skip":
                    self.enc[f"{at}_aux_down"] = Resample(c, "down")
                    self.enc[f"{at}_aux_skip"] = Conv(aux, out, 1, c)
                elif c.encoder_type == "residual":
                    self.enc[f"{at}_aux_residual"] = ConvThenDown(aux, out, c)
                    aux = out
            for i in range(c.num_blocks):
                before, out = out, c.model_channels * multiple
                self.enc[f"{at}_block{i}"] = Block(before, out, c, attention=size in c.attn_resolutions)
                skips.append(out)
        return out, skips

    def _decoder(self, out: int, skips: list[int]) -> int:
        """The channels of its output, in front of DhariwalUNet's last convolution."""
        c, last = self.config, len(self.config.channel_mult) - 1
        for level, multiple in reversed(list(enumerate(c.channel_mult))):
            size = c.img_resolution >> level
            at = f"{size}x{size}"
            if level == last:
                self.dec[f"{at}_in0"] = Block(out, out, c, attention=True)
                self.dec[f"{at}_in1"] = Block(out, out, c)
            else:
                self.dec[f"{at}_up"] = Block(out, out, c, how="up")
            for i in range(c.num_blocks + 1):
                before, out = out + skips.pop(), c.model_channels * multiple
                attention = size in c.attn_resolutions and (i == c.num_blocks or not c.song)
                self.dec[f"{at}_block{i}"] = Block(before, out, c, attention=attention)
            if c.song and (c.decoder_type == "skip" or level == 0):
                if c.decoder_type == "skip" and level < last:
                    self.dec[f"{at}_aux_up"] = Resample(c, "up")
                self.dec[f"{at}_aux_norm"] = norm(out, c)
                self.dec[f"{at}_aux_conv"] = Conv(out, c.img_channels, 3, c)
        return out

    def forward(self, x: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        return self.evaluate(x, self.biases(t, classes))

    def biases(self, t: Tensor, classes: Tensor | None = None, dtype: torch.dtype | None = None) -> list[Tensor]:
        """All that the network is told of noise levels t, float [n], and of classes: of each block in their order, what
        is added behind its first convolution, [n, C], or DhariwalUNet's weight and bias of the second norm, [n, 2 C].
        Either of t and classes may be 1 for all of the other. They are in `dtype` where it is given.

        Raises ValueError where a class-conditional network is given no classes, or another network is.
        """
        c = self.config
        check_told(classes, bool(c.label_dim))
        weights = self.map_layer0.weight.dtype
        if c.embedding_type == "fourier":
            emb = self.map_noise(t).to(weights)
        else:
            emb = sinusoid(t, c.noise_channels, flip_sin_to_cos=not c.song, freq_shift=int(c.song)).to(weights)
        label = None
        if classes is not None:  # NO_CLASS equals none of the numbers
            one_hot = classes[:, None] == torch.arange(c.label_dim, device=classes.device)
            label = self.map_label(one_hot.to(weights) * (math.sqrt(c.label_dim) if c.song else 1))
        if label is not None and c.song:
            emb = emb + label
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if label is not None and not c.song:
            emb = emb + label
        emb = F.silu(emb)
        return [module.bias(emb).to(dtype) for module in self.modules() if isinstance(module, Block)]

    def evaluate(self, x: Tensor, biases: list[Tensor]) -> Tensor:
        """The output for x, with what `biases` made of one noise level for the whole batch, or of one for each sample.

        The modules' names say what they do, as in EDM's code."""
        told, skips, aux = iter(biases), list[Tensor](), x
        h = x
        for name, module in self.enc.items():
            kind = name.partition("_")[2]
            if kind == "aux_down":
                aux = module(aux)
            elif kind == "aux_skip":
                h = skips[-1] = h + module(aux)
            elif kind == "aux_residual":
                h = skips[-1] = aux = module(aux).add_(h).mul_(math.sqrt(0.5))
            else:
                h = module(h, next(told)) if isinstance(module, Block) else module(h)
                skips.append(h)
        image: Tensor | None = None  # the sum over resolutions, with `decoder_type` skip
        normed = h
        for name, module in self.dec.items():
            kind = name.partition("_")[2]
            if kind == "aux_up":
                image = module(image)
            elif kind == "aux_norm":
                normed = module(h)
            elif kind == "aux_conv":
                of_this = module(F.silu(normed))
                image = of_this if image is None else of_this.add_(image)
            else:
                if kind.startswith("block"):
                    h = torch.cat([h, skips.pop()], dim=1)
                h = module(h, next(told))
        if image is None:
            image = self.out_conv(F.silu(self.out_norm(h)))
        return image

    def lower(self, dtype: torch.dtype) -> Self:
        """Has `evaluate` take and compute in a lower precision. `biases` stays as it is: it costs little, and a noise
        level's sines would lose most."""
        for name, module in self.named_modules():
            if not (list(module.children()) or name.startswith("map_") or name.endswith("affine")):
                module.to(dtype)
        return self


class Frequencies(nn.Module):
    """Gaussian Fourier features of a noise level: t [n] -> float32 [n, dim], sines first."""

    freqs: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(dim // 2))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].float() * (2 * math.pi * self.freqs)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def norm(channels: int, c: EDMUNetConfig) -> GroupNorm:
    """Raises ValueError where the channels are not divisible by the number of groups."""
    groups = min(32, channels // 4)
    if not groups or channels % groups:
        raise ValueError(
            f"model_channels {c.model_channels} and channel_mult {list(c.channel_mult)} make a norm of {channels}"
            f" channels, which {groups} groups do not divide"
        )
    return GroupNorm(groups, channels, eps=1e-6 if c.song else 1e-5)


def filter_of(c: EDMUNetConfig) -> Tensor:
    """`resample_filter` in two dimensions, [1, 1, k, k], with the sum 1."""
    one = torch.tensor(c.resample_filter, dtype=torch.float32)
    return one.outer(one)[None, None] / one.sum().square()


def resample(x: Tensor, taps: Tensor, how: str, padded: bool = False) -> Tensor:
    """[B, C, H, W] -> [B, C, H / 2, W / 2] for `down`, [B, C, 2 H, 2 W] for `up`: by a convolution of each channel with
    `taps`, [1, 1, k, k], or its transpose, and zeros around x, which may be there already (`padded`)."""
    if taps.shape[-1] == 2:  # the mean of four pixels, and four times the same one
        return double(x) if how == "up" else halve(x)
    padding = 0 if padded else _padding(taps)
    of_each = taps.expand(x.shape[1], -1, -1, -1)
    if how == "up":
        return F.conv_transpose2d(x, 4 * of_each, stride=2, padding=padding, groups=x.shape[1])
    return F.conv2d(x, of_each, stride=2, padding=padding, groups=x.shape[1])


def _padding(taps: Tensor) -> int:
    return (taps.shape[-1] - 1) // 2


class Resample(nn.Module):
    resample_filter: Tensor

    def __init__(self, c: EDMUNetConfig, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("resample_filter", filter_of(c))

    def forward(self, x: Tensor) -> Tensor:
        return resample(x, self.resample_filter, self.how)


class Conv(nn.Conv2d):
    """A convolution that keeps the size, of what is resampled first where `how` is `up` or `down`."""

    resample_filter: Tensor  # None without `how`

    def __init__(self, inp: int, out: int, kernel: int, c: EDMUNetConfig, how: str | None = None) -> None:
        super().__init__(inp, out, kernel, padding=kernel // 2)
        self.how = how
        self.register_buffer("resample_filter", filter_of(c) if how else None)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`bias`, [1, C] for the whole batch or [B, C], takes the place of its own."""
        if self.how:
            x = resample(x, self.resample_filter, self.how)
        if bias is not None and len(bias) > 1:
            return F.conv2d(x, self.weight, padding=self.padding).add_(bias[:, :, None, None])
        return F.conv2d(x, self.weight, self.bias if bias is None else bias[0], padding=self.padding)


class ConvThenDown(nn.Conv2d):
    """NCSN++'s residual path: a convolution of 3x3 pixels, padded by what the filter needs around it too."""

    resample_filter: Tensor

    def __init__(self, inp: int, out: int, c: EDMUNetConfig) -> None:
        super().__init__(inp, out, 3, padding=1 + _padding(filter_of(c)))
        self.register_buffer("resample_filter", filter_of(c))

    def forward(self, x: Tensor) -> Tensor:
        # The filter's sum is 1: it leaves the bias as it is.
        return resample(super().forward(x), self.resample_filter, "down", padded=True)


class Block(nn.Module):
    """A residual block, with self-attention where it has any: UNetBlock in EDM's code. `how`, `up` or `down`, says how
    it resamples in front of its first convolution, and what goes past it."""

    def __init__(self, inp: int, out: int, c: EDMUNetConfig, how: str | None = None, attention: bool = False) -> None:
        super().__init__()
        self.scale_shift, self.factor = not c.song, math.sqrt(0.5) if c.song else 1.0
        self.heads = c.heads(out) if attention else 0
        if out % (self.heads or 1):
            raise ValueError(f"model_channels {c.model_channels}: {self.heads} heads do not divide {out} channels")
        self.norm0 = norm(inp, c)
        self.conv0 = Conv(inp, out, 3, c, how)
        self.affine = nn.Linear(c.embedding, 2 * out if self.scale_shift else out)
        self.norm1 = norm(out, c)
        self.conv1 = Conv(out, out, 3, c)
        self.skip: nn.Module | None = None
        if inp != out or (how and c.song):
            self.skip = Conv(inp, out, 1, c, how)
        elif how:
            self.skip = Resample(c, how)
        if self.heads:
            self.norm2 = norm(out, c)
            self.qkv = Conv(out, 3 * out, 1, c)
            self.proj = Conv(out, out, 1, c)

    def bias(self, emb: Tensor) -> Tensor:
        """For the activated embedding [n, E]: the bias of the first convolution, [n, C]; or of DhariwalUNet's, norm(h)
        (1 + scale) + shift, the weight and the bias of the second norm, [n, 2 C]."""
        return folded(self.affine(emb), self.conv0, self.norm1, self.scale_shift)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        h = F.silu(self.norm0(x))
        h = self.norm1(self.conv0(h), told) if self.scale_shift else self.norm1(self.conv0(h, told))
        h = self.conv1(F.silu(h)).add_(x if self.skip is None else self.skip(x))
        if self.factor != 1:
            h = h.mul_(self.factor)
        return self._attended(h) if self.heads else h

    def _attended(self, h: Tensor) -> Tensor:
        size = h.shape[2:]
        qkv = self.qkv(self.norm2(h)).flatten(2).unflatten(1, (self.heads, -1, 3))  # [B, heads, D, 3, HW]
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()  # kernels for attention want D last
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, HW, C]
        h = self.proj(attended.transpose(1, 2).unflatten(2, size)).add_(h)
        return h.mul_(self.factor) if self.factor != 1 else h
