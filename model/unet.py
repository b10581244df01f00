"""The DDPM U-Net (Ho et al., appendix B). Parameter names and config keys are those of diffusers' UNet2DModel."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOWN_BLOCKS = {"DownBlock2D": False, "AttnDownBlock2D": True}  # name -> has attention
UP_BLOCKS = {"UpBlock2D": False, "AttnUpBlock2D": True}

# Keys of diffusers' config that this network knows in one setting only.
_FIXED = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "attn_norm_num_groups": (None,),
    "resnet_time_scale_shift": ("default",),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}


@dataclass(frozen=True)
class UNetConfig:
    """The part of diffusers' `UNet2DModel` config that varies here; defaults are diffusers'.

    `sample_size` is the image's height and width in pixels and must be divisible by 2 ** (number of blocks - 1).
    `attention_head_dim` is the width of one head in channels; None is one head. `downsample_padding` 0 pads only at
    the right and the bottom. Raises ValueError, naming the key, for what the network can't be built from.
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

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups", "attention_head_dim"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value > 0) and not (name == "attention_head_dim" and value is None):
                raise ValueError(f"{name} is {value!r}, not a whole number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it lies between 0 and 1")
        blocks = self.block_out_channels
        if not blocks or not len(blocks) == len(self.down_block_types) == len(self.up_block_types):
            raise ValueError("block_out_channels, down_block_types and up_block_types differ in length")
        for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            for kind in getattr(self, name):
                if kind not in known:
                    raise ValueError(f"{name} names {kind!r}; known: {', '.join(known)}")
        for channels in blocks:
            if channels < 1 or channels % self.norm_num_groups or channels % (self.attention_head_dim or 1):
                raise ValueError(
                    f"block_out_channels has {channels}, not divisible by norm_num_groups {self.norm_num_groups}"
                    f" and attention_head_dim {self.attention_head_dim}"
                )
        if self.sample_size < 1 or self.sample_size % 2 ** (len(blocks) - 1):
            raise ValueError(f"sample_size {self.sample_size} is not divisible by {2 ** (len(blocks) - 1)}")
        if self.downsample_padding not in (0, 1):
            raise ValueError(f"downsample_padding is {self.downsample_padding}; 0 and 1 are known")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """From the content of diffusers' `unet/config.json`."""
        if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
            raise ValueError(f"_class_name is {config['_class_name']!r}, not 'UNet2DModel'")
        for key, known in _FIXED.items():
            if config.get(key, known[0]) not in known:
                raise ValueError(f"{key} is {config[key]!r}; only {known[0]!r} is supported")
        known_keys = {f.name for f in dataclasses.fields(cls)}
        unknown = [k for k in config if k not in known_keys and k not in _FIXED and not k.startswith("_")]
        if unknown := [k for k in unknown if k != "num_train_timesteps"]:
            raise ValueError(f"unknown key {unknown[0]!r}")
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known_keys
        }
        if isinstance(size := values.get("sample_size"), tuple):
            if len(size) != 2 or size[0] != size[1]:
                raise ValueError(f"sample_size is {list(size)}; only square images are supported")
            values["sample_size"] = size[0]
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The content of `unet/config.json`, which diffusers opens."""
        fixed = {key: known[0] for key, known in _FIXED.items()}
        return {"_class_name": "UNet2DModel", **fixed, **dataclasses.asdict(self)}


class UNet(nn.Module):
    """epsilon_theta(x, t), or v or x0, whatever it was trained to predict.

    `forward(x, t)`: x float [B, in_channels, H, W]; t an int, a 0-d tensor (one level for the whole batch, embedded
    once) or an int tensor [B]. Returns float [B, out_channels, H, W].
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = c = config
        channels = c.block_out_channels
        embedding = 4 * channels[0]
        self.conv_in = nn.Conv2d(c.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(channels[0], embedding)
        last = len(channels) - 1
        self.down_blocks = nn.ModuleList(
            DownBlock(c, channels[max(i - 1, 0)], channels[i], embedding, DOWN_BLOCKS[kind], downsample=i < last)
            for i, kind in enumerate(c.down_block_types)
        )
        self.mid_block = MidBlock(c, channels[-1], embedding)
        up = channels[::-1]
        self.up_blocks = nn.ModuleList(
            UpBlock(c, up[max(i - 1, 0)], up[min(i + 1, last)], up[i], embedding, UP_BLOCKS[kind], upsample=i < last)
            for i, kind in enumerate(c.up_block_types)
        )
        self.conv_norm_out = GroupNorm(c.norm_num_groups, channels[0], c.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], c.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | int) -> Tensor:
        return self.evaluate(x, self.biases(torch.as_tensor(t, device=x.device).reshape(-1)))

    def biases(self, t: Tensor) -> list[Tensor]:
        """All that the network is told of timesteps t, int [n]: of each residual block in their order, what is added
        behind its first convolution, [n, C]."""
        c = self.config
        emb = sinusoid(t, c.block_out_channels[0], c.flip_sin_to_cos, c.freq_shift)
        emb = F.silu(self.time_embedding(emb.to(self.time_embedding.linear_1.weight.dtype)))
        blocks = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [resnet.bias(emb) for block in blocks for resnet in block.resnets]

    def evaluate(self, x: Tensor, biases: list[Tensor]) -> Tensor:
        """The output for x, with what `biases` made of one timestep for the whole batch, or of one for each sample."""
        told = iter(biases)
        h = self.conv_in(x)
        skips = [h]
        for block in self.down_blocks:
            h = block(h, told, skips)
        h = self.mid_block(h, told)
        for block in self.up_blocks:
            h = block(h, told, skips)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def lower(self, dtype: torch.dtype) -> Self:
        """Has `evaluate` take and compute in a lower precision. `biases` stays as it is: it costs little, and a
        timestep's sines would lose most."""
        for name, module in self.named_modules():
            if not (list(module.children()) or "time_emb" in name):
                module.to(dtype)
        return self


def sinusoid(t: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoidal timestep embedding (Vaswani et al., section 3.5): t [B] -> float32 [B, dim]."""
    half = dim // 2
    exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t[:, None].float() * exponent.exp()[None]
    sin, cos = angles.sin(), angles.cos()
    return F.pad(torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=1), (0, dim % 2))


class TimeEmbedding(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, t: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(t)))


class GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        # On CPUs torch's bfloat16 kernel for small feature maps is several times slower than float32's.
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[2:].numel() < 1024:
            weight, bias = self.weight.float(), self.bias.float()
            return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)
        return super().forward(x)


class ResnetBlock(nn.Module):
    def __init__(self, c: UNetConfig, inp: int, out: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(c.norm_num_groups, inp, c.norm_eps)
        self.conv1 = nn.Conv2d(inp, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, out)
        self.norm2 = GroupNorm(c.norm_num_groups, out, c.norm_eps)
        self.dropout = nn.Dropout(c.dropout)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inp, out, 1) if inp != out else None

    def bias(self, emb: Tensor) -> Tensor:
        """[n, C] for the activated time embedding [n, E]."""
        return self.time_emb_proj(emb) + self.conv1.bias

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        if len(bias) == 1:  # one timestep for all: then it costs the convolution nothing
            h = F.conv2d(h, self.conv1.weight, bias[0], padding=1)
        else:
            h = F.conv2d(h, self.conv1.weight, padding=1) + bias[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, residual."""

    def __init__(self, c: UNetConfig, channels: int) -> None:
        super().__init__()
        self.heads = channels // (c.attention_head_dim or channels)
        self.group_norm = GroupNorm(c.norm_num_groups, channels, c.norm_eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list, for diffusers' name `to_out.0`

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = (
            proj(tokens).view(B, H * W, self.heads, -1).transpose(1, 2) for proj in (self.to_q, self.to_k, self.to_v)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H * W, C)
        return x + self.to_out[0](out).transpose(1, 2).reshape(B, C, H, W)


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
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    def __init__(self, c: UNetConfig, inp: int, out: int, embedding: int, attention: bool, downsample: bool) -> None:
        super().__init__()
        n = c.layers_per_block
        if attention:
            self.attentions = nn.ModuleList(Attention(c, out) for _ in range(n))
        self.resnets = nn.ModuleList(ResnetBlock(c, inp if i == 0 else out, out, embedding) for i in range(n))
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample(out, c.downsample_padding)])
        self.attention, self.downsample = attention, downsample

    def forward(self, h: Tensor, told: Iterator[Tensor], skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, next(told))
            if self.attention:
                h = self.attentions[i](h)
            skips.append(h)
        if self.downsample:
            h = self.downsamplers[0](h)
            skips.append(h)
        return h


class MidBlock(nn.Module):
    def __init__(self, c: UNetConfig, channels: int, embedding: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(c, channels)])
        self.resnets = nn.ModuleList(ResnetBlock(c, channels, channels, embedding) for _ in range(2))

    def forward(self, h: Tensor, told: Iterator[Tensor]) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](h, next(told))), next(told))


class UpBlock(nn.Module):
    """`inp` channels come from below, and the skips bring `out` channels each, the last one `skip_last`."""

    def __init__(
        self, c: UNetConfig, inp: int, skip_last: int, out: int, embedding: int, attention: bool, upsample: bool
    ) -> None:
        super().__init__()
        n = c.layers_per_block + 1
        if attention:
            self.attentions = nn.ModuleList(Attention(c, out) for _ in range(n))
        self.resnets = nn.ModuleList(
            ResnetBlock(c, (inp if i == 0 else out) + (skip_last if i == n - 1 else out), out, embedding)
            for i in range(n)
        )
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(out)])
        self.attention, self.upsample = attention, upsample

    def forward(self, h: Tensor, told: Iterator[Tensor], skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, skips.pop()], dim=1), next(told))
            if self.attention:
                h = self.attentions[i](h)
        return self.upsamplers[0](h) if self.upsample else h
