"""The pipelines: of what parts each is, how its texts are encoded, and one evaluation of its network."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from palindrome.model.condition import Condition, TextEncoder
from palindrome.model.diffusers_folder import DiffusersFolder
from palindrome.model.families.base import OfClasses, OfTexts, refusal_of_number
from palindrome.model.families.latent.base import Latent
from palindrome.model.families.latent.texts import PromptEncoder

CLIP, CLIP_PROJECTED, T5 = ("CLIPTextModel",), ("CLIPTextModelWithProjection",), ("T5EncoderModel",)
CLIP_TOKENS, T5_TOKENS = ("CLIPTokenizer", "CLIPTokenizerFast"), ("T5Tokenizer", "T5TokenizerFast")
# Keys of a U-Net that is told more than texts, and what stands for none of it.
TOLD_OTHERWISE = {"class_embed_type": None, "encoder_hid_dim_type": None, "time_cond_proj_dim": None}


def shift_of(scheduler: Mapping[str, Any], tokens: int, most: float) -> float:
    """The mu by which a flow's times are shifted for images of so many tokens: linear in them (Esser et al.,
    section 5.3.2). `most` is that of a config without `max_shift`."""
    at, least = scheduler.get("base_image_seq_len", 256), scheduler.get("base_shift", 0.5)
    slope = (scheduler.get("max_shift", most) - least) / (scheduler.get("max_image_seq_len", 4096) - at)
    return float(least + slope * (tokens - at))


@dataclass(frozen=True, kw_only=True)
class LatentOfTexts(Latent, OfTexts):
    """A pipeline with text encoders."""

    WITHOUT: ClassVar[Mapping[str, Any]] = {}
    """Further arguments of diffusers' class, by which it does without what texts do not need."""

    def text_encoder(self, device: torch.device | str = "cpu") -> TextEncoder:
        return PromptEncoder(self, device)

    @abstractmethod
    def encode(self, pipeline: Any, texts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
        """Tensors [B, ...] by name, as the pipeline itself encodes texts."""

    def longest(self, pipeline: Any) -> tuple[Any, int]:
        """The tokenizer that takes the longest texts, and how many tokens it takes."""
        return pipeline.tokenizer, pipeline.tokenizer.model_max_length

    def encode_none(self, encoded: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Those of no text; `encoded` are those of the empty text."""
        return encoded


@dataclass(frozen=True, kw_only=True)
class StableDiffusion(LatentOfTexts):
    """Stable Diffusion 1 and 2."""

    PIPELINE: ClassVar = "StableDiffusionPipeline"
    NETWORK: ClassVar = ("unet", "UNet2DConditionModel")
    TEXTS: ClassVar = {"text_encoder": CLIP, "tokenizer": CLIP_TOKENS}
    WITHOUT: ClassVar = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def check(self) -> None:
        super().check()
        self.only("unet", addition_embed_type=None, **TOLD_OTHERWISE)

    def encode(self, pipeline: Any, texts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
        return {"text": pipeline.encode_prompt(list(texts), device, 1, False)[0]}

    def evaluate(self, network: nn.Module, x: Tensor, t: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        return network(x, t, encoder_hidden_states=values["text"], return_dict=False)[0]


@dataclass(frozen=True, kw_only=True)
class StableDiffusionXL(LatentOfTexts):
    """The network is also told the pooled text, and of sizes and crops that an image is one of its own size."""

    PIPELINE: ClassVar = "StableDiffusionXLPipeline"
    NETWORK: ClassVar = ("unet", "UNet2DConditionModel")
    TEXTS: ClassVar = {
        "text_encoder": CLIP,
        "tokenizer": CLIP_TOKENS,
        "text_encoder_2": CLIP_PROJECTED,
        "tokenizer_2": CLIP_TOKENS,
    }
    SETTINGS: ClassVar = ("force_zeros_for_empty_prompt",)

    def check(self) -> None:
        super().check()
        self.only("unet", addition_embed_type="text_time", **TOLD_OTHERWISE)

    def encode(self, pipeline: Any, texts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
        text, _, pooled, _ = pipeline.encode_prompt(list(texts), device=device, do_classifier_free_guidance=False)
        return {"text": text, "pooled": pooled}

    def encode_none(self, encoded: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not self.settings.get("force_zeros_for_empty_prompt", True):
            return encoded
        return {name: torch.zeros_like(value) for name, value in encoded.items()}

    def evaluate(self, network: nn.Module, x: Tensor, t: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        sizes = x.new_tensor([self.size, self.size, 0, 0, self.size, self.size]).expand(len(x), -1)
        added = {"text_embeds": values["pooled"], "time_ids": sizes}
        text = values["text"]
        return network(x, t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]


@dataclass(frozen=True, kw_only=True)
class Ldm(Latent):
    """Unconditional latent diffusion, on codes of a VQ autoencoder (Rombach et al., arXiv 2112.10752)."""

    PIPELINE: ClassVar = "LDMPipeline"
    NETWORK: ClassVar = ("unet", "UNet2DModel")
    AUTOENCODER: ClassVar = "vqvae"
    AUTOENCODERS: ClassVar = ("VQModel", "AutoencoderKL")

    def check(self) -> None:
        super().check()
        self.only("unet", class_embed_type=None, num_class_embeds=None)

    def evaluate(self, network: nn.Module, x: Tensor, t: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        return network(x, t, return_dict=False)[0]


@dataclass(frozen=True, kw_only=True)
class DiT(Latent, OfClasses):
    """A transformer of classes (Peebles & Xie, arXiv 2212.09748). Its second half of outputs, the variance, is of no
    use to DDIM."""

    PIPELINE: ClassVar = "DiTPipeline"
    NETWORK: ClassVar = ("transformer", "DiTTransformer2DModel")

    @classmethod
    def load(cls, folder: DiffusersFolder, allow_pickle: bool) -> Self:
        model = super().load(folder, allow_pickle)
        return replace(model, null_class=model.config["num_embeds_ada_norm"])

    @property
    def class_conditional(self) -> bool:
        return True

    def refusal_of(self, value: Any) -> str:
        return refusal_of_number(value, self.config["num_embeds_ada_norm"])

    def with_size(self, size: int) -> Self:
        if size != self.own_size:  # whose positions it knows
            raise ValueError(f"the model is one of {self.own_size} pixels, not of {size}")
        return super().with_size(size)

    def evaluate(self, network: nn.Module, x: Tensor, t: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        return network(x, timestep=t, class_labels=values["class"], return_dict=False)[0][:, : x.shape[1]]


@dataclass(frozen=True, kw_only=True)
class StableDiffusion3(LatentOfTexts):
    """Flow matching with two CLIP encoders and T5, which may be left out (Esser et al., arXiv 2403.03206)."""

    PIPELINE: ClassVar = "StableDiffusion3Pipeline"
    NETWORK: ClassVar = ("transformer", "SD3Transformer2DModel")
    TEXTS: ClassVar = {
        "text_encoder": CLIP_PROJECTED,
        "tokenizer": CLIP_TOKENS,
        "text_encoder_2": CLIP_PROJECTED,
        "tokenizer_2": CLIP_TOKENS,
        "text_encoder_3": T5,
        "tokenizer_3": T5_TOKENS,
    }
    OPTIONAL: ClassVar = ("text_encoder_3", "tokenizer_3")

    @property
    def multiple(self) -> int:
        return super().multiple * int(self.config["patch_size"])

    def with_size(self, size: int) -> Self:
        model = super().with_size(size)
        most = int(self.config["pos_embed_max_size"]) * self.multiple
        if size > most:
            raise ValueError(f"the model's images have at most {most} pixels, not {size}")
        return model

    def longest(self, pipeline: Any) -> tuple[Any, int]:
        return super().longest(pipeline) if pipeline.tokenizer_3 is None else (pipeline.tokenizer_3, 256)

    def spacing(self, steps: int) -> dict[str, Any]:
        dynamic = self.scheduler.get("use_dynamic_shifting")
        return {"mu": shift_of(self.scheduler, (self.size // self.multiple) ** 2, 1.16)} if dynamic else {}

    def encode(self, pipeline: Any, texts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
        prompts = list(texts)
        text, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}

    def evaluate(self, network: nn.Module, x: Tensor, t: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        told = {"encoder_hidden_states": values["text"], "pooled_projections": values["pooled"]}
        return network(hidden_states=x, timestep=t, **told, return_dict=False)[0]


@dataclass(frozen=True, kw_only=True)
class Flux(LatentOfTexts):
    """Flow matching on patches of 2 x 2 states. Where the network was distilled to be told the weight of its guidance
    (`guidance_embeds`), that is what --guidance says, and one evaluation does."""

    PIPELINE: ClassVar = "FluxPipeline"
    NETWORK: ClassVar = ("transformer", "FluxTransformer2DModel")
    TEXTS: ClassVar = {
        "text_encoder": CLIP,
        "tokenizer": CLIP_TOKENS,
        "text_encoder_2": T5,
        "tokenizer_2": T5_TOKENS,
    }

    def check(self) -> None:
        self.only("transformer", in_channels=4 * self.channels)

    @property
    def own_size(self) -> int:
        return 128 * super().multiple  # as in diffusers' pipeline: the config has none

    @property
    def multiple(self) -> int:
        return 2 * super().multiple

    def longest(self, pipeline: Any) -> tuple[Any, int]:
        return pipeline.tokenizer_2, 512

    def spacing(self, steps: int) -> dict[str, Any]:
        mu = shift_of(self.scheduler, (self.size // self.multiple) ** 2, 1.15)
        return {"sigmas": np.linspace(1, 1 / steps, steps), "mu": mu}

    def with_guidance(self, weight: float, null_class: int | None = None, negative_prompt: str | None = None) -> Self:
        if self.config["guidance_embeds"] and negative_prompt is not None:
            raise ValueError("the network is told the weight of its guidance, away from no text")
        return super().with_guidance(weight, null_class, negative_prompt)

    def condition(self, rows: Sequence[Mapping[str, Any]], encoder: TextEncoder | None = None) -> Condition | None:
        if not self.config["guidance_embeds"]:
            return super().condition(rows, encoder)
        weight = 1.0 if self.guidance is None else self.guidance.weight
        texts = self.of_texts(rows, encoder or self.text_encoder())
        return Condition({**texts, "guidance": torch.full((len(rows),), weight)})

    def encode(self, pipeline: Any, texts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
        text, pooled, _ = pipeline.encode_prompt(list(texts), device=device)
        return {"text": text, "pooled": pooled}

    def evaluate(self, network: nn.Module, x: Tensor, t: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        B, C, H, W = x.shape
        patches = x.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, H * W // 4, 4 * C)
        down, across = (torch.arange(n // 2, device=x.device, dtype=x.dtype) for n in (H, W))
        rows, columns = torch.meshgrid(down, across, indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3)
        out = network(
            hidden_states=patches,
            timestep=t / 1000,
            guidance=values.get("guidance"),
            pooled_projections=values["pooled"],
            encoder_hidden_states=values["text"],
            txt_ids=x.new_zeros(values["text"].shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]
        return out.view(B, H // 2, W // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)
