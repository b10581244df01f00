"""The DDPM U-Net (Ho et al., appendix B). Parameter names and config keys are those of diffusers' UNet2DModel."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOWN_BLOCKS = {"DownBlock2D": False, "AttnDownBlock2D": True, "ResnetDownsampleBlock2D": False}  # name -> has attention
UP_BLOCKS = {"UpBlock2D": False, "AttnUpBlock2D": True, "ResnetUpsampleBlock2D": False}
KNOWN: dict[str, tuple[str | None, ...]] = {
    "time_embedding_type": ("positional", "fourier", "learned"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
}

# Keys of diffusers' config that this network knows in one setting only.
_FIXED = {"act_fn": ("silu", "swish")}
DIFFUSERS, OWN = "UNet2DModel", "PalindromeUNet"  # the values of _class_name
# Settings that diffusers' UNet2DModel has not: OpenAI's networks need them (model/families/openai.py).
_OURS = ("num_attention_heads", "num_attention_heads_up", "time_proj_dim", "timestep_scale")


@dataclass(frozen=True)
class UNetConfig:
    """The part of diffusers' `UNet2DModel` config that varies here; defaults are diffusers'.

    `sample_size` is the image's height and width in pixels and must be divisible by 2 ** (number of blocks - 1).
    `attention_head_dim` is the width of one head in channels; None is one head. `downsample_padding` 0 pads only at
    the right and the bottom. `time_embedding_dim` None is four times the first block's channels. `downsample_type` and
    `upsample_type` are of blocks with attention. Without `attn_norm_num_groups`, the attention in the middle has
    `norm_num_groups`, and no norm at all with `scale_shift`. `num_train_timesteps` is for `learned` embeddings alone.

    Four settings are not diffusers'. `num_attention_heads` is the number of heads in each attention, whatever its
    width, and `num_attention_heads_up` that of the up blocks; `time_proj_dim` is the width of the timestep's sines,
    None the first block's channels; `timestep_scale` multiplies the timestep first.

    Raises ValueError, naming the key, for what the network can't be built from.
    """

    sample_size: int = 32
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    layers_per_block: int = 2
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    dropout: float = 0.0
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    downsample_padding: int = 1
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    mid_block_type: str | None = "UNetMidBlock2D"
    mid_block_scale_factor: float = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    attn_norm_num_groups: int | None = None
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None
    num_attention_heads: int | None = None
    num_attention_heads_up: int | None = None
    time_proj_dim: int | None = None
    timestep_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups"):
            _check_count(name, getattr(self, name))
        for name in (
            *("attention_head_dim", "time_embedding_dim", "attn_norm_num_groups", "num_class_embeds"),
            *("num_train_timesteps", "num_attention_heads", "num_attention_heads_up", "time_proj_dim"),
        ):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        for name, known in KNOWN.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; known: {', '.join(map(str, known))}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it lies between 0 and 1")
        for name in ("mid_block_scale_factor", "timestep_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not a number above 0")
        if self.time_embedding_type == "learned" and self.num_train_timesteps is None:
            raise ValueError("time_embedding_type 'learned' needs num_train_timesteps")
        self._check_blocks()

    def _check_blocks(self) -> None:
        blocks = self.block_out_channels
        if not blocks or not len(blocks) == len(self.down_block_types) == len(self.up_block_types):
            raise ValueError("block_out_channels, down_block_types and up_block_types differ in length")
        for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            for kind in getattr(self, name):
                if kind not in known:
                    raise ValueError(f"{name} names {kind!r}; known: {', '.join(known)}")
        for channels in blocks:
            if channels < 1 or channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels has {channels}, not divisible by norm_num_groups {self.norm_num_groups}"
                )
        with_attention = [
            *(
                (channels, False)
                for channels, kind in zip(blocks, self.down_block_types, strict=True)
                if DOWN_BLOCKS[kind]
            ),
            *(
                (channels, True)
                for channels, kind in zip(blocks[::-1], self.up_block_types, strict=True)
                if UP_BLOCKS[kind]
            ),
        ]
        if self.mid_block_type and self.add_attention:
            with_attention.append((blocks[-1], False))
            if blocks[-1] % (self.attn_norm_num_groups or 1):
                raise ValueError(f"attn_norm_num_groups {self.attn_norm_num_groups} does not divide {blocks[-1]}")
        for channels, up in with_attention:
            for name in ("attention_head_dim", "num_attention_heads", "num_attention_heads_up"):
                if channels % (getattr(self, name) or 1) and (up or not name.endswith("_up")):
                    raise ValueError(
                        f"block_out_channels has {channels}, not divisible by {name} {getattr(self, name)}"
                    )
        if self.sample_size < 1 or self.sample_size % 2 ** (len(blocks) - 1):
            raise ValueError(f"sample_size {self.sample_size} is not divisible by {2 ** (len(blocks) - 1)}")
        if self.downsample_padding not in (0, 1):
            raise ValueError(f"downsample_padding is {self.downsample_padding}; 0 and 1 are known")

    @property
    def class_conditional(self) -> bool:
        """Whether the network is told a class."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    @property
    def beyond_diffusers(self) -> list[str]:
        """The settings that diffusers' UNet2DModel has not, where they are not at their defaults."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return [name for name in _OURS if getattr(self, name) != defaults[name]]

    def heads(self, channels: int, up: bool) -> int:
        """The number of heads of an attention over `channels`, in an up block or elsewhere."""
        count = (self.num_attention_heads_up if up else None) or self.num_attention_heads
        return count or channels // (self.attention_head_dim or channels)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """From the content of diffusers' `unet/config.json`, or of ours for a network `beyond_diffusers`."""
        if (name := config.get("_class_name", DIFFUSERS)) not in (DIFFUSERS, OWN):
            raise ValueError(f"_class_name is {name!r}, not {DIFFUSERS!r}")
        for key, known in _FIXED.items():
            if config.get(key, known[0]) not in known:
                raise ValueError(f"{key} is {config[key]!r}; only {known[0]!r} is supported")
        known_keys = {f.name for f in dataclasses.fields(cls)} - set(() if name == OWN else _OURS)
        unknown = [k for k in config if k not in known_keys and k not in _FIXED and not k.startswith("_")]
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}")
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known_keys
        }
        if values.get("time_embedding_type") != "learned":  # without effect
            values.pop("num_train_timesteps", None)
        if isinstance(size := values.get("sample_size"), tuple):
            if len(size) != 2 or size[0] != size[1]:
                raise ValueError(f"sample_size is {list(size)}; only square images are supported")
            values["sample_size"] = size[0]
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The content of `unet/config.json`, which diffusers opens where nothing is `beyond_diffusers`.

        It goes into the digests of checkpoints: what versions before did not write is left out at its default."""
        fixed = {key: known[0] for key, known in _FIXED.items()}
        found = {"_class_name": DIFFUSERS, **fixed, **dataclasses.asdict(self)}
        if self.mid_block_scale_factor == 1:
            found["mid_block_scale_factor"] = 1  # and not 1.0
        left_out = set(_OURS) - set(self.beyond_diffusers)
        if self.num_train_timesteps is None:
            left_out.add("num_train_timesteps")
        return {key: value for key, value in found.items() if key not in left_out}


def _check_count(name: str, value: Any) -> None:
    if not (isinstance(value, int) and value > 0):
        raise ValueError(f"{name} is {value!r}, not a whole number above 0")


class UNet(nn.Module):
    """epsilon_theta(x, t), or v or x0, whatever it was trained to predict; epsilon_theta(x, t, c) of a class.

    `forward(x, t, classes)`: x float [B, in_channels, H, W]; t an int, a 0-d tensor (one level for the whole batch,
    embedded once) or an int tensor [B]; classes, of a class-conditional network alone, int [B], or for the class
    embedding `identity` float [B, E]. Returns float [B, out_channels, H, W].
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = c = config
        channels = c.block_out_channels
        embedding = c.time_embedding_dim or 4 * channels[0]
        width = c.time_proj_dim or channels[0]
        self.conv_in = nn.Conv2d(c.in_channels, channels[0], 3, padding=1)
        if c.time_embedding_type == "fourier":
            self.time_proj: nn.Module = Fourier(width)
        elif c.time_embedding_type == "learned":
            self.time_proj = nn.Embedding(c.num_train_timesteps or 0, width)
        self.time_width = width
        if c.time_embedding_type == "fourier":
            width *= 2
        self.time_embedding = TimeEmbedding(width, embedding)
        if c.class_embed_type == "timestep":
            self.class_embedding: nn.Module = TimeEmbedding(width, embedding)
        elif c.class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif c.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(c.num_class_embeds, embedding)
        last = len(channels) - 1
        self.down_blocks = nn.ModuleList(
            DownBlock(c, channels[max(i - 1, 0)], channels[i], embedding, kind, downsample=i < last)
            for i, kind in enumerate(c.down_block_types)
        )
        self.mid_block = MidBlock(c, channels[-1], embedding) if c.mid_block_type else None
        up = channels[::-1]
        self.up_blocks = nn.ModuleList(
            UpBlock(c, up[max(i - 1, 0)], up[min(i + 1, last)], up[i], embedding, kind, upsample=i < last)
            for i, kind in enumerate(c.up_block_types)
        )
        self.conv_norm_out = GroupNorm(c.norm_num_groups, channels[0], c.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], c.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | int, classes: Tensor | None = None) -> Tensor:
        return self.evaluate(x, self.biases(torch.as_tensor(t, device=x.device).reshape(-1), classes))

    def biases(self, t: Tensor, classes: Tensor | None = None, dtype: torch.dtype | None = None) -> list[Tensor]:
        """All that the network is told of timesteps t, int or float [n], and of classes: of each residual block in
        their order, what is added behind its first convolution, [n, C], or the weight and the bias of its second norm,
        [n, 2 C]. Either of t and classes may be 1 for all of the other. They are in `dtype` where it is given; what
        Fourier embeddings divide the output by, [n, 1, 1, 1] at the end, stays in float32.

        Raises ValueError where a class-conditional network is given no classes, or another network is.
        """
        c = self.config
        check_told(classes, c.class_conditional)
        if c.timestep_scale != 1:
            t = t * c.timestep_scale
        weights = self.time_embedding.linear_1.weight.dtype
        emb = self.time_embedding(self._projected(t).to(weights))
        if classes is not None:
            if c.class_embed_type == "timestep":
                classes = self._projected(classes)
            if classes.is_floating_point():
                classes = classes.to(weights)
            emb = emb + self.class_embedding(classes)
        emb = F.silu(emb)
        found = [module.bias(emb) for module in self.modules() if isinstance(module, ResnetBlock)]
        if dtype is not None:
            found = [bias.to(dtype) for bias in found]
        if c.time_embedding_type == "fourier":
            found.append(t.float()[:, None, None, None])
        return found

    def _projected(self, t: Tensor) -> Tensor:
        """[n] -> float [n, D], in front of `time_embedding`."""
        c = self.config
        if c.time_embedding_type == "positional":
            return sinusoid(t, self.time_width, c.flip_sin_to_cos, c.freq_shift)
        if c.time_embedding_type == "learned" and t.is_floating_point():
            if not torch.equal(t, t.round()):
                raise ValueError("the network has learned embeddings of whole timesteps, and is told a fraction")
            t = t.long()
        projected: Tensor = self.time_proj(t)
        return projected

    def evaluate(self, x: Tensor, biases: list[Tensor]) -> Tensor:
        """The output for x, with what `biases` made of one timestep for the whole batch, or of one for each sample."""
        told = iter(biases)
        h = self.conv_in(2 * x - 1 if self.config.center_input_sample else x)
        skips = [h]
        for block in self.down_blocks:
            h = block(h, told, skips)
        if self.mid_block is not None:
            h = self.mid_block(h, told)
        for block in self.up_blocks:
            h = block(h, told, skips)
        output: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return output / next(told) if self.config.time_embedding_type == "fourier" else output

    def lower(self, dtype: torch.dtype) -> Self:
        """Has `evaluate` take and compute in a lower precision. `biases` stays as it is: it costs little, and a
        timestep's sines would lose most."""
        for name, module in self.named_modules():
            if not (list(module.children()) or "time_emb" in name or "time_proj" in name or "class_emb" in name):
                module.to(dtype)
        return self


def check_told(classes: Tensor | None, class_conditional: bool) -> None:
    """Raises ValueError where a class-conditional network is given no classes, or another network is."""
    if class_conditional and classes is None:
        raise ValueError("the network is class-conditional: it has to be told the class of each image")
    if classes is not None and not class_conditional:
        raise ValueError("the network is not class-conditional, and can't be told classes")


def folded(told: Tensor, conv: nn.Conv2d, norm: "GroupNorm", scale_shift: bool) -> Tensor:
    """What a residual block is told, [n, C], with the bias of the convolution that it is added behind; or [n, 2 C], the
    scale and the shift of norm(h) (1 + scale) + shift, as the weight and the bias of that norm."""
    if not scale_shift:
        assert conv.bias is not None
        return told + conv.bias
    scale, shift = told.chunk(2, dim=1)
    return torch.cat([(1 + scale) * norm.weight, (1 + scale) * norm.bias + shift], dim=1)


def sinusoid(t: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoidal timestep embedding (Vaswani et al., section 3.5): t [B] -> float32 [B, dim]."""
    half = dim // 2
    exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t[:, None].float() * exponent.exp()[None]
    sin, cos = angles.sin(), angles.cos()
    return F.pad(torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=1), (0, dim % 2))


class Fourier(nn.Module):
    """Gaussian Fourier features of the logarithm of a noise level (Song et al., arXiv 2011.13456, appendix C):
    t [n] above 0 -> float32 [n, 2 dim], sines first. The frequencies are drawn once, and not trained."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(16 * torch.randn(dim), requires_grad=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.log()[:, None] * self.weight * 2 * math.pi
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimeEmbedding(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, t: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(t)))


class GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor, told: Tensor | None = None) -> Tensor:
        """`told`, [n, 2 C], has weights and biases for the whole batch or for each sample in place of the norm's."""
        weight: Tensor | None = self.weight if told is None else None
        bias: Tensor | None = self.bias if told is None else None
        if told is not None and len(told) == 1:  # then it costs the norm nothing
            weight, bias = told[0].chunk(2)
        # On CPUs torch's bfloat16 kernel for small feature maps is several times slower than float32's.
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[2:].numel() < 1024:
            weight, bias = (None if v is None else v.float() for v in (weight, bias))
            h = F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)
        else:
            h = F.group_norm(x, self.num_groups, weight, bias, self.eps)
        if told is not None and len(told) > 1:
            factors, shifts = told[:, :, None, None].chunk(2, dim=1)
            h = torch.addcmul(shifts, h, factors)
        return h


def halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ResnetBlock(nn.Module):
    """`resample`, `halve` or `double`, is applied in front of the first convolution, and to what goes past it; the sum
    of both is divided by `divisor`."""

    def __init__(
        self,
        c: UNetConfig,
        inp: int,
        out: int,
        embedding: int,
        resample: Callable[[Tensor], Tensor] | None = None,
        divisor: float = 1,
    ) -> None:
        super().__init__()
        self.scale_shift = c.resnet_time_scale_shift == "scale_shift"
        self.resample, self.divisor = resample, divisor
        self.norm1 = GroupNorm(c.norm_num_groups, inp, c.norm_eps)
        self.conv1 = nn.Conv2d(inp, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, 2 * out if self.scale_shift else out)
        self.norm2 = GroupNorm(c.norm_num_groups, out, c.norm_eps)
        self.dropout = nn.Dropout(c.dropout)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inp, out, 1) if inp != out else None

    def bias(self, emb: Tensor) -> Tensor:
        """For the activated time embedding [n, E]: the bias of the first convolution, [n, C]; or with scale and shift,
        norm(h) (1 + scale) + shift, the weight and the bias of the second norm, [n, 2 C]."""
        return folded(self.time_emb_proj(emb), self.conv1, self.norm2, self.scale_shift)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        if self.scale_shift:
            h = self.norm2(self.conv1(h), bias)
        elif len(bias) == 1:  # one timestep for all: then it costs the convolution nothing
            h = self.norm2(F.conv2d(h, self.conv1.weight, bias[0], padding=1))
        else:
            h = self.norm2(F.conv2d(h, self.conv1.weight, padding=1) + bias[:, :, None, None])
        h = self.conv2(self.dropout(F.silu(h)))
        h = h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return h if self.divisor == 1 else h / self.divisor


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, residual; the sum is divided by `divisor`."""

    def __init__(self, c: UNetConfig, channels: int, heads: int, groups: int | None, divisor: float = 1) -> None:
        super().__init__()
        self.heads, self.divisor = heads, divisor
        self.group_norm = GroupNorm(groups, channels, c.norm_eps) if groups else None
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list, for diffusers' name `to_out.0`

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        normed = x if self.group_norm is None else self.group_norm(x)
        tokens = normed.flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = (
            proj(tokens).view(B, H * W, self.heads, -1).transpose(1, 2) for proj in (self.to_q, self.to_k, self.to_v)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H * W, C)
        h = x + self.to_out[0](out).transpose(1, 2).reshape(B, C, H, W)
        return h if self.divisor == 1 else h / self.divisor


class Downsample(nn.Module):
    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.pad = padding == 0
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad else x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(double(x))


def resampled(resampler: nn.Module, h: Tensor, told: Iterator[Tensor]) -> Tensor:
    """By a convolution, or by a residual block, which is told of the timestep."""
    output: Tensor = resampler(h, next(told)) if isinstance(resampler, ResnetBlock) else resampler(h)
    return output


class DownBlock(nn.Module):
    def __init__(self, c: UNetConfig, inp: int, out: int, embedding: int, kind: str, downsample: bool) -> None:
        super().__init__()
        n, attention = c.layers_per_block, DOWN_BLOCKS[kind]
        if attention:
            heads = c.heads(out, up=False)
            self.attentions = nn.ModuleList(Attention(c, out, heads, c.norm_num_groups) for _ in range(n))
        self.resnets = nn.ModuleList(ResnetBlock(c, inp if i == 0 else out, out, embedding) for i in range(n))
        if downsample:
            by_resnet = kind == "ResnetDownsampleBlock2D" or (attention and c.downsample_type == "resnet")
            self.downsamplers = nn.ModuleList(
                [ResnetBlock(c, out, out, embedding, halve) if by_resnet else Downsample(out, c.downsample_padding)]
            )
        self.attention, self.downsample = attention, downsample

    def forward(self, h: Tensor, told: Iterator[Tensor], skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, next(told))
            if self.attention:
                h = self.attentions[i](h)
            skips.append(h)
        if self.downsample:
            h = resampled(self.downsamplers[0], h, told)
            skips.append(h)
        return h


class MidBlock(nn.Module):
    def __init__(self, c: UNetConfig, channels: int, embedding: int) -> None:
        super().__init__()
        divisor, groups = c.mid_block_scale_factor, c.attn_norm_num_groups
        if groups is None and c.resnet_time_scale_shift == "default":
            groups = c.norm_num_groups
        if c.add_attention:
            attention = Attention(c, channels, c.heads(channels, up=False), groups, divisor)
            self.attentions = nn.ModuleList([attention])
        self.resnets = nn.ModuleList(ResnetBlock(c, channels, channels, embedding, None, divisor) for _ in range(2))
        self.attention = c.add_attention

    def forward(self, h: Tensor, told: Iterator[Tensor]) -> Tensor:
        h = self.resnets[0](h, next(told))
        if self.attention:
            h = self.attentions[0](h)
        output: Tensor = self.resnets[1](h, next(told))
        return output


class UpBlock(nn.Module):
    """`inp` channels come from below, and the skips bring `out` channels each, the last one `skip_last`."""

    def __init__(
        self, c: UNetConfig, inp: int, skip_last: int, out: int, embedding: int, kind: str, upsample: bool
    ) -> None:
        super().__init__()
        n, attention = c.layers_per_block + 1, UP_BLOCKS[kind]
        if attention:
            heads = c.heads(out, up=True)
            self.attentions = nn.ModuleList(Attention(c, out, heads, c.norm_num_groups) for _ in range(n))
        self.resnets = nn.ModuleList(
            ResnetBlock(c, (inp if i == 0 else out) + (skip_last if i == n - 1 else out), out, embedding)
            for i in range(n)
        )
        if upsample:
            by_resnet = kind == "ResnetUpsampleBlock2D" or (attention and c.upsample_type == "resnet")
            self.upsamplers = nn.ModuleList(
                [ResnetBlock(c, out, out, embedding, double) if by_resnet else Upsample(out)]
            )
        self.attention, self.upsample = attention, upsample

    def forward(self, h: Tensor, told: Iterator[Tensor], skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, skips.pop()], dim=1), next(told))
            if self.attention:
                h = self.attentions[i](h)
        return resampled(self.upsamplers[0], h, told) if self.upsample else h
