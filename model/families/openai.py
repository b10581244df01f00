"""OpenAI's pixel models: the state dicts of improved-diffusion (Nichol & Dhariwal, arXiv 2102.09672) and of
guided-diffusion (Dhariwal & Nichol, arXiv 2105.05233), files that end in .pt.

Their UNetModel is diffusers' UNet2DModel under other names. The architecture is found from the tensors. What these
can't say are flags of their scripts: from a JSON object in a file beside the weights, `x.json` for `x.pt`, or by the
name of a file that OpenAI published.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from palindrome.model.diffusers_folder import WRAPPERS, CheckpointError, DiffusersFolder
from palindrome.model.families.base import check_weights
from palindrome.model.families.unet2d import UNet2D, pixel_config
from palindrome.model.process import VP
from palindrome.model.unet import UNet, UNetConfig

ENDINGS = (".pt", ".pth")
GROUPS = 32  # of every norm
# Flags that tensors can't say, and those of them that have one default in both repositories.
NEEDED = (
    *("image_size", "num_heads or num_head_channels", "use_new_attention_order"),
    *("diffusion_steps", "noise_schedule", "rescale_timesteps"),
)
DEFAULTS = {"num_heads_upsample": -1, "num_head_channels": -1, "predict_xstart": False, "dropout": 0.0}
# Flags that the tensors say too: they must agree.
VISIBLE = (*("num_channels", "num_res_blocks", "learn_sigma", "class_cond", "use_scale_shift_norm", "resblock_updown"),)
# Flags of training, of sampling, of precision, and what is found from the tensors.
WITHOUT_EFFECT = {
    *("use_kl", "rescale_learned_sigmas", "sigma_small", "timestep_respacing", "use_checkpoint", "use_fp16"),
    *("attention_resolutions", "channel_mult"),
}

# guided-diffusion's README, "Sampling from pre-trained models", and the defaults of its script_util.py.
_GUIDED = {
    "learn_sigma": True,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "rescale_timesteps": False,
    "num_channels": 256,
    "num_res_blocks": 2,
    "num_head_channels": 64,
    "use_new_attention_order": False,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
_LSUN = {**_GUIDED, "image_size": 256, "class_cond": False}
# improved-diffusion's README, "Models and Hyperparameters", and the defaults of its script_util.py.
_IMPROVED = {
    "learn_sigma": True,
    "diffusion_steps": 4000,
    "noise_schedule": "cosine",
    "rescale_timesteps": True,
    "num_channels": 128,
    "num_res_blocks": 3,
    "num_heads": 4,
    "use_new_attention_order": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "class_cond": False,
}
_LSUN_IMPROVED = {
    **_IMPROVED,
    "image_size": 256,
    "num_res_blocks": 2,
    "num_heads": 1,
    "use_scale_shift_norm": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "rescale_timesteps": False,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "64x64_diffusion": {
        **_GUIDED,
        "image_size": 64,
        "class_cond": True,
        "noise_schedule": "cosine",
        "num_channels": 192,
        "num_res_blocks": 3,
        "use_new_attention_order": True,
    },
    "128x128_diffusion": {
        **{k: v for k, v in _GUIDED.items() if k != "num_head_channels"},
        "image_size": 128,
        "class_cond": True,
        "num_heads": 4,
    },
    "256x256_diffusion": {**_GUIDED, "image_size": 256, "class_cond": True},
    "256x256_diffusion_uncond": {**_GUIDED, "image_size": 256, "class_cond": False},
    "512x512_diffusion": {**_GUIDED, "image_size": 512, "class_cond": True},
    "lsun_bedroom": _LSUN,
    "lsun_cat": _LSUN,
    "lsun_horse": _LSUN,
    "lsun_horse_nodropout": _LSUN,
    "imagenet64_uncond_100M_1500K": {**_IMPROVED, "image_size": 64},
    "imagenet64_uncond_vlb_100M_1500K": {**_IMPROVED, "image_size": 64},
    "imagenet64_cond_270M_250K": {
        **_IMPROVED,
        "image_size": 64,
        "class_cond": True,
        "num_channels": 192,
        "rescale_timesteps": False,
    },
    "cifar10_uncond_50M_500K": {**_IMPROVED, "image_size": 32},
    "cifar10_uncond_vlb_50M_500K": {**_IMPROVED, "image_size": 32},
    "lsun_uncond_100M_1200K_bs128": _LSUN_IMPROVED,
    "lsun_uncond_100M_2400K_bs64": _LSUN_IMPROVED,
}

_OF_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


@dataclass(frozen=True)
class _Architecture:
    """Of a state dict: `channels` of each level, from the full resolution down, `layers` residual blocks in each on the
    way down, and whether it has `attention`; `resnets` where residual blocks resample."""

    width: int  # of a timestep's sines
    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    layers: int
    resnets: bool
    scale_shift: bool
    in_channels: int
    out_channels: int
    embedding: int
    classes: int | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "_Architecture":
        """Raises ValueError where the blocks don't form levels, KeyError naming a tensor that is missing."""
        if not any(name.startswith("output_blocks.") for name in tensors):
            raise ValueError("it has no output_blocks: it is no diffusion model's U-Net (of OpenAI's, a classifier?)")
        indices = {int(found[1]) for name in tensors if (found := re.match(r"output_blocks\.(\d+)\.", name))}
        # The last block of each level but the full resolution's upsamples, by a convolution or by a residual block.
        upsampling = re.compile(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.0)\.weight")
        ups = {int(found[1]): found[2] for name in tensors if (found := upsampling.fullmatch(name))}
        per_level = min(ups, default=max(indices)) + 1
        levels = len(ups) + 1
        inputs = {name.split(".")[1] for name in tensors if name.startswith("input_blocks.")}
        well_formed = sorted(ups) == [per_level * (i + 1) - 1 for i in range(levels - 1)]
        if not well_formed or not len(indices) == len(inputs) == per_level * levels:
            raise ValueError(
                "its blocks form no levels: only networks that resample by convolutions (conv_resample) or by residual"
                " blocks (resblock_updown) are supported"
            )
        firsts = [f"input_blocks.{1 + level * per_level}" for level in range(levels)]
        channels = tuple(len(tensors[f"{first}.0.out_layers.3.bias"]) for first in firsts)
        label = tensors.get("label_emb.weight")
        return cls(
            width=tensors["time_embed.0.weight"].shape[1],
            channels=channels,
            attention=tuple(f"{first}.1.qkv.weight" in tensors for first in firsts),
            layers=per_level - 1,
            resnets="in_layers.0" in ups.values(),
            scale_shift=len(tensors["middle_block.0.emb_layers.1.bias"]) == 2 * channels[-1],
            in_channels=tensors["input_blocks.0.0.weight"].shape[1],
            out_channels=len(tensors["out.2.bias"]),
            embedding=len(tensors["time_embed.2.bias"]),
            classes=None if label is None else len(label),
        )

    def visible(self) -> dict[str, Any]:
        """The flags of `VISIBLE`."""
        found = (
            *(self.width, self.layers, self.out_channels == 2 * self.in_channels, self.classes is not None),
            *(self.scale_shift, self.resnets),
        )
        return dict(zip(VISIBLE, found, strict=True))

    def config(self, flags: Mapping[str, Any]) -> UNetConfig:
        """Raises ValueError as UNetConfig does."""
        down, up = (
            ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if self.resnets else ("DownBlock2D", "UpBlock2D")
        )
        resampling = "resnet" if self.resnets else "conv"
        return UNetConfig(
            sample_size=flags["image_size"],
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            block_out_channels=self.channels,
            down_block_types=tuple("AttnDownBlock2D" if has else down for has in self.attention),
            up_block_types=tuple("AttnUpBlock2D" if has else up for has in self.attention[::-1]),
            layers_per_block=self.layers,
            norm_num_groups=GROUPS,
            attn_norm_num_groups=GROUPS if self.scale_shift else None,
            norm_eps=1e-5,
            dropout=flags["dropout"],
            downsample_type=resampling,
            upsample_type=resampling,
            resnet_time_scale_shift="scale_shift" if self.scale_shift else "default",
            time_embedding_dim=None if self.embedding == 4 * self.channels[0] else self.embedding,
            time_proj_dim=None if self.width == self.channels[0] else self.width,
            num_class_embeds=self.classes,
            timestep_scale=1000 / flags["diffusion_steps"] if flags["rescale_timesteps"] else 1.0,
            **self._heads(flags),
        )

    def _heads(self, flags: Mapping[str, Any]) -> dict[str, Any]:
        """In diffusers' terms, the width of a head, wherever they can say it."""
        if flags["num_head_channels"] != -1:
            return {"attention_head_dim": flags["num_head_channels"]}
        heads, upwards = flags["num_heads"], flags["num_heads_upsample"]
        widths = {c for c, has in zip(self.channels, self.attention, strict=True) if has} | {self.channels[-1]}
        if upwards not in (-1, heads):
            return {"attention_head_dim": None, "num_attention_heads": heads, "num_attention_heads_up": upwards}
        if heads == 1:
            return {"attention_head_dim": None}
        if len(widths) == 1 and not self.channels[-1] % heads:
            return {"attention_head_dim": self.channels[-1] // heads}
        return {"attention_head_dim": None, "num_attention_heads": heads}

    def modules(self) -> Iterator[tuple[str, str, str]]:
        """Their name, ours, and what it is, of each module that has parameters of its own or is a block."""
        yield "time_embed.0", "time_embedding.linear_1", "leaf"
        yield "time_embed.2", "time_embedding.linear_2", "leaf"
        yield "input_blocks.0.0", "conv_in", "leaf"
        last, per_level = len(self.channels) - 1, self.layers + 1
        for level, attention in enumerate(self.attention):
            for i in range(self.layers):
                theirs, ours = f"input_blocks.{1 + level * per_level + i}", f"down_blocks.{level}"
                yield f"{theirs}.0", f"{ours}.resnets.{i}", "resnet"
                if attention:
                    yield f"{theirs}.1", f"{ours}.attentions.{i}", "attention"
            if level < last:
                theirs, ours = f"input_blocks.{(level + 1) * per_level}.0", f"down_blocks.{level}.downsamplers.0"
                yield (theirs, ours, "resnet") if self.resnets else (f"{theirs}.op", f"{ours}.conv", "leaf")
        yield "middle_block.0", "mid_block.resnets.0", "resnet"
        yield "middle_block.1", "mid_block.attentions.0", "attention"
        yield "middle_block.2", "mid_block.resnets.1", "resnet"
        for block, attention in enumerate(self.attention[::-1]):
            for i in range(per_level):
                theirs, ours = f"output_blocks.{block * per_level + i}", f"up_blocks.{block}"
                yield f"{theirs}.0", f"{ours}.resnets.{i}", "resnet"
                if attention:
                    yield f"{theirs}.1", f"{ours}.attentions.{i}", "attention up"
                if i == self.layers and block < last:
                    theirs, ours = f"{theirs}.{1 + attention}", f"{ours}.upsamplers.0"
                    yield (theirs, ours, "resnet") if self.resnets else (f"{theirs}.conv", f"{ours}.conv", "leaf")
        yield "out.0", "conv_norm_out", "leaf"
        yield "out.2", "conv_out", "leaf"


def load(uri: str, storage_options: Mapping[str, Any] | None = None, allow_pickle: bool = False) -> UNet2D:
    """Reads a state dict, a pickle, with `allow_pickle` only and as tensors alone. Raises CheckpointError for what is
    missing or of another architecture, and where flags are missing, which it names."""
    parent, _, name = uri.rpartition("/")
    folder = DiffusersFolder(parent or ".", storage_options)
    stem = name.rpartition(".")[0]
    if not folder.exists(name):
        raise CheckpointError(f"{uri} does not exist")
    if not allow_pickle:
        raise CheckpointError(
            f"{uri} is a pickle, which can run code when loaded: give --allow-pickle if you trust it, and torch reads"
            " nothing but tensors from it"
        )
    flags = dict(PUBLISHED.get(stem, {}))
    if folder.exists(f"{stem}.json"):
        flags |= folder.read_json(f"{stem}.json")
    flags = _complete(flags, uri, f"{stem}.json")
    tensors = {WRAPPERS.sub("", key): value for key, value in folder.pickled(name).items()}
    try:
        architecture = _Architecture.of(tensors)
        for key, value in architecture.visible().items():
            if key in flags and flags[key] != value:
                raise ValueError(f"{key} is {flags[key]!r} by its flags, and {value!r} by its tensors")
        config = pixel_config(architecture.config(flags))
        weights = _renamed(tensors, architecture, config, flags["use_new_attention_order"])
    except KeyError as e:
        raise CheckpointError(f"{uri}: {e.args[0]} is missing, which OpenAI's U-Nets have") from e
    except (ValueError, TypeError) as e:
        raise CheckpointError(f"{uri}: {e}") from e
    check_weights(lambda: UNet(config), weights, uri)
    try:
        return UNet2D(config, weights, _process(flags))
    except (ValueError, TypeError) as e:
        raise CheckpointError(f"{uri}: {e}") from e


def _complete(flags: dict[str, Any], uri: str, beside: str) -> dict[str, Any]:
    """The flags with their defaults. Raises CheckpointError naming those that are missing or not known."""
    flags = {key: value for key, value in flags.items() if value is not None}
    missing = [key for key in NEEDED if all(flags.get(name, -1) == -1 for name in key.split(" or "))]
    if missing:
        raise CheckpointError(
            f"{uri}: tensors do not say all of a model. Put {beside} beside it, a JSON object with the flags of its"
            f" training: {', '.join(missing)}"
        )
    known = {name for key in NEEDED for name in key.split(" or ")} | DEFAULTS.keys() | {*VISIBLE} | WITHOUT_EFFECT
    if unknown := sorted(flags.keys() - known):
        raise CheckpointError(f"{uri}: {beside} has {unknown[0]!r}, which is no flag of OpenAI's that is supported")
    flags = {**DEFAULTS, **flags}
    for key in ("image_size", "diffusion_steps", "num_heads", "num_heads_upsample", "num_head_channels"):
        if type(value := flags.get(key, -1)) is not int or (value < 1 and value != -1):
            raise CheckpointError(f"{uri}: {beside}: {key} is {value!r}, not a whole number above 0")
    for key in ("use_new_attention_order", "rescale_timesteps", "predict_xstart"):
        if type(flags[key]) is not bool:
            raise CheckpointError(f"{uri}: {beside}: {key} is {flags[key]!r}, not true or false")
    return flags


def _process(flags: Mapping[str, Any]) -> VP:
    """Their `linear` schedule has the same range of alpha-bar for every number of steps, about that of Ho et al."""
    steps, schedule = flags["diffusion_steps"], flags["noise_schedule"]
    prediction_type = "sample" if flags["predict_xstart"] else "epsilon"
    if schedule == "cosine":
        return VP(steps, "squaredcos_cap_v2", prediction_type=prediction_type)
    if schedule != "linear":
        raise ValueError(f"noise_schedule is {schedule!r}; known: linear, cosine")
    scale = 1000 / steps
    return VP(steps, "linear", scale * 0.0001, scale * 0.02, prediction_type=prediction_type)


def _renamed(
    tensors: Mapping[str, Tensor], architecture: _Architecture, config: UNetConfig, split_first: bool
) -> dict[str, Tensor]:
    """Under our names. Raises KeyError naming a tensor that is missing, ValueError one that is too many."""
    left, weights = dict(tensors), {}

    def move(theirs: str, ours: str) -> None:
        for part in ("weight", "bias"):
            weights[f"{ours}.{part}"] = left.pop(f"{theirs}.{part}")

    for theirs, ours, kind in architecture.modules():
        if kind == "leaf":
            move(theirs, ours)
        elif kind == "resnet":
            for part, renamed in _OF_RESNET.items():
                if part != "skip_connection" or f"{theirs}.{part}.weight" in left:
                    move(f"{theirs}.{part}", f"{ours}.{renamed}")
        else:
            move(f"{theirs}.norm", f"{ours}.group_norm")
            move(f"{theirs}.proj_out", f"{ours}.to_out.0")
            for part in ("weight", "bias"):
                qkv = left.pop(f"{theirs}.qkv.{part}").flatten(1 if part == "weight" else 0)
                heads = 1 if split_first else config.heads(len(qkv) // 3, up=kind.endswith("up"))
                for name, value in zip("qkv", split(qkv, heads), strict=True):
                    weights[f"{ours}.to_{name}.{part}"] = value
            weights[f"{ours}.to_out.0.weight"] = weights[f"{ours}.to_out.0.weight"].flatten(1)
    if architecture.classes is not None:
        weights["class_embedding.weight"] = left.pop("label_emb.weight")
    if left:
        raise ValueError(f"{min(left)} is no part of a U-Net of OpenAI's with these levels")
    return weights


def split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The weight or bias, [3 C, ...], of one convolution -> those of q, k and v, [C, ...] each. In the legacy order
    each head's rows of q, k and v follow one another; in the new one, as for a single head, all of q comes first."""
    q, k, v = qkv.unflatten(0, (heads, 3, -1)).unbind(1)
    return q.flatten(0, 1).contiguous(), k.flatten(0, 1).contiguous(), v.flatten(0, 1).contiguous()
