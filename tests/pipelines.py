"""Pipelines of latent diffusion as people have them, but tiny and random: of diffusers' own modules, saved by it. The
tokenizer is CLIP's, with its whole vocabulary."""

import gzip
import json
from importlib.util import find_spec
from pathlib import Path

import diffusers
import tokenizers
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

SIZE = 32  # pixels of an image; of a state there are half as many across
HEADS, WIDTH = 2, 32
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(folder):
    """OpenAI's vocabulary, which open_clip_torch ships, in transformers' files; read back as people read it."""
    [package] = find_spec("open_clip").submodule_search_locations
    with gzip.open(Path(package, "bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(m.split()) for m in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return transformers.CLIPTokenizer.from_pretrained(folder)


def t5_tokenizer():
    """Of letters alone."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    unigram.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.T5TokenizerFast(tokenizer_object=unigram, model_max_length=512, extra_ids=0, **special)


def clip(projected=False, width=WIDTH):
    config = transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        projection_dim=width,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config).eval()


def t5(width=WIDTH):
    shape = {"d_model": width, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": HEADS}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=104, **shape)).eval()


def vae(channels=4, **more):
    """Its scaling factor gives states unit variance, as those of trained ones do."""
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=SIZE,
        **more,
    ).eval()


def conditional_unet(**more):
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        norm_num_groups=8,
        layers_per_block=1,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=HEADS,
        **{"cross_attention_dim": WIDTH, **more},
    ).eval()


def ddim(**more):
    """Stable Diffusion's."""
    return diffusers.DDIMScheduler(
        **{
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            **more,
        }
    )


def stable_diffusion(tokens, **scheduler):
    return diffusers.StableDiffusionPipeline(
        vae=vae(scaling_factor=3.2),
        text_encoder=clip(),
        tokenizer=tokens,
        unet=conditional_unet(),
        scheduler=ddim(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(tokens):
    told = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "cross_attention_dim": 2 * WIDTH}
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(scaling_factor=3.2),
        scheduler=ddim(),
        text_encoder=clip(),
        tokenizer=tokens,
        text_encoder_2=clip(True),
        tokenizer_2=tokens,
        unet=conditional_unet(**told, projection_class_embeddings_input_dim=6 * 8 + WIDTH),
    )


def ldm(_):
    vqvae = diffusers.VQModel(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=64,
        norm_num_groups=8,
        scaling_factor=3.3,
    ).eval()
    unet = diffusers.UNet2DModel(
        sample_size=SIZE // 2,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        layers_per_block=1,
    ).eval()
    # A random network's Jacobian is larger than that of a trained one: it would magnify float32's rounding.
    unet.conv_out.weight.data.mul_(0.3)
    return diffusers.LDMPipeline(vqvae, unet, ddim(beta_start=0.0015, beta_end=0.0195, steps_offset=0))


def dit(_):
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=SIZE // 2,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.2)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    return diffusers.DiTPipeline(transformer, vae(scaling_factor=4.3), scheduler, id2label={0: "tench", 1: "goldfish"})


def stable_diffusion_3(tokens):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=3 * WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        out_channels=16,
        pos_embed_max_size=16,
    ).eval()
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae(16, scaling_factor=4.3, shift_factor=0.0609),
        text_encoder=clip(True),
        tokenizer=tokens,
        text_encoder_2=clip(True),
        tokenizer_2=tokens,
        text_encoder_3=t5(3 * WIDTH),
        tokenizer_3=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(tokens, guidance_embeds=False):
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    ).eval()
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 3.0, **dynamic} if guidance_embeds else {})),
        vae=vae(4, scaling_factor=3.6, shift_factor=0.1159),
        transformer=transformer,
        text_encoder=clip(),
        tokenizer=tokens,
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )


def saved(folder, name, **how):
    """The pipeline that the function `name` makes, with seeded weights, and the folder that diffusers writes."""
    torch.manual_seed(0)
    pipeline = globals()[name](clip_tokenizer(folder.with_name("tokenizer")), **how)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline
