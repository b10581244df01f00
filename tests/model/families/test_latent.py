"""Latent diffusion, compared with diffusers' own pipelines: of each kind a tiny, random one that it has saved."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from palindrome.model import families
from palindrome.model.condition import ClassOf, TextOf
from palindrome.model.ddim import sample
from palindrome.model.diffusers_folder import CheckpointError
from palindrome.model.execution import Execution
from palindrome.model.families.latent import parts
from palindrome.model.inversion import invert_exactly
from palindrome.model.process import Flow

OF_TEXTS = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux")
EVERY = (*OF_TEXTS, "ldm", "dit")
PROMPTS = ["a photo of a cat", "un château au bord de l'eau, 水彩画"]
SIZE, STEPS = 32, 8


@pytest.fixture
def opened(request, pipelines):
    """diffusers' pipeline of a name, and ours of the folder that it wrote, of images of 32 pixels."""
    folder, theirs = pipelines(request.param)
    return theirs, families.load(folder).with_size(SIZE)


every = pytest.mark.parametrize("opened", EVERY, indirect=True)
of_texts = pytest.mark.parametrize("opened", OF_TEXTS, indirect=True)


def noise(model, count=2, seed=0):
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def pictures(count=2):
    """Smooth ones in [-1, 1], as photographs are."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, SIZE, mode="bicubic").clamp(-1, 1)


def told(model, prompts=PROMPTS, weight=1.0, negative=None):
    """The model, told of one row for each prompt, and the rows; a model without texts is told classes."""
    if model.text_conditional:
        model, rows = model.with_texts(TextOf("caption")), [{"caption": text} for text in prompts]
    elif model.class_conditional:
        model, rows = model.with_classes(ClassOf("label")), [{"label": 207}, {"label": 3}]
    else:
        return model, [{}, {}]
    return model if weight == 1 else model.with_guidance(weight, negative_prompt=negative), rows


def call(theirs, x, steps, prompts=PROMPTS, weight=1.0, negative=None):
    """Pixels in [0, 1] of the pipeline's own loop from the latents x."""
    if isinstance(theirs, diffusers.LDMPipeline | diffusers.DiTPipeline):
        # They draw their noise themselves: from a generator that gives x.
        import diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond as of_ldm
        import diffusers.pipelines.dit.pipeline_dit as of_dit

        module = of_ldm if isinstance(theirs, diffusers.LDMPipeline) else of_dit
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "randn_tensor", lambda *_, **__: x.clone())
            if module is of_ldm:
                found = theirs(batch_size=len(x), num_inference_steps=steps, output_type="np").images
            else:
                found = theirs([207, 3], weight, num_inference_steps=steps, output_type="np").images
        return torch.from_numpy(found).permute(0, 3, 1, 2)
    how = {"num_inference_steps": steps, "output_type": "pt", "height": SIZE, "width": SIZE}
    how["guidance_scale"] = weight
    if isinstance(theirs, diffusers.FluxPipeline):
        x = theirs._pack_latents(x, *x.shape)
        if weight != 1 and not theirs.transformer.config.guidance_embeds:
            how |= {"true_cfg_scale": weight, "negative_prompt": [negative or ""] * len(prompts)}
    elif negative is not None:
        how["negative_prompt"] = [negative] * len(prompts)
    if isinstance(theirs, diffusers.StableDiffusionXLPipeline):
        how |= {"original_size": (SIZE, SIZE), "target_size": (SIZE, SIZE)}
    return theirs(prompt=list(prompts), latents=x.clone(), **how).images


def decode(model, rows, x, steps=STEPS):
    """Pixels in [0, 1] of our own."""
    state = sample(model.denoiser(), x, model.own_ladder(steps), model.process, condition=model.condition(rows))
    return (model.autoencoder().to_images(state) / 2 + 0.5).clamp(0, 1)


@every
def test_the_autoencoder_is_diffusers(opened):
    theirs, model = opened
    vae = getattr(theirs, "vae", None) or theirs.vqvae
    images = pictures()
    with torch.no_grad():
        code = vae.encode(images)
        code = code.latent_dist.mode() if hasattr(code, "latent_dist") else code.latents
        z = (code - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor
        image = vae.decode(code).sample
    ours = model.autoencoder()
    torch.testing.assert_close(ours.to_state(images), z, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.to_images(z), image, rtol=0, atol=1e-5)
    assert z.shape[1:] == model.latent_shape


@every
def test_a_state_refined_decodes_closer_to_its_image(opened):
    _, model = opened
    x, refined = pictures(), model.with_autoencoder(refinements=20)
    plain, closer = model.autoencoder(), refined.autoencoder()
    before, after = ((vae.to_images(vae.to_state(x)) - x).square().flatten(1).mean(1) for vae in (plain, closer))
    assert (after <= before).all()
    if not isinstance(plain.module, diffusers.VQModel):  # whose codes move by jumps
        assert (after < 0.95 * before).all()
    alone = (plain.to_images(closer.to_state(x[1:])) - x[1:]).square().mean()
    assert float(alone) == pytest.approx(float(after[1]), rel=0.05), "each on its own, but for rounding"
    again = model.as_described(refined.describe())
    assert again.refinements == 20 and again.describe() == refined.describe()


def test_an_autoencoder_on_tiles(pipelines):
    """As diffusers': of an image of several tiles it gives another state, of a small one the same."""
    theirs, model = pipelines("stable_diffusion")[1], families.load(pipelines("stable_diffusion")[0])
    tiled, whole = model.with_autoencoder(tiled=True).autoencoder(), model.autoencoder()
    large = torch.nn.functional.interpolate(pictures(1), 96, mode="bicubic").clamp(-1, 1)
    vae = diffusers.AutoencoderKL.from_config(theirs.vae.config)
    vae.load_state_dict(theirs.vae.state_dict())
    vae.enable_tiling()
    with torch.no_grad():
        expected = vae.encode(large).latent_dist.mode() * theirs.vae.config.scaling_factor
    torch.testing.assert_close(tiled.to_state(large), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(tiled.to_state(large), whole.to_state(large), rtol=0, atol=1e-3)
    torch.testing.assert_close(tiled.to_state(pictures()), whole.to_state(pictures()), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="VQModel does not work on tiles"):
        families.load(pipelines("ldm")[0]).with_autoencoder(tiled=True)


@of_texts
def test_texts_are_encoded_as_the_pipeline_does(opened):
    theirs, model = opened
    model, rows = told(model)
    if isinstance(theirs, diffusers.StableDiffusionPipeline):
        found = theirs.encode_prompt(PROMPTS, "cpu", 1, False)[:1]
    elif isinstance(theirs, diffusers.StableDiffusionXLPipeline):
        found = theirs.encode_prompt(PROMPTS, do_classifier_free_guidance=False)[::2]
    elif isinstance(theirs, diffusers.StableDiffusion3Pipeline):
        found = theirs.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)[::2]
    else:
        found = theirs.encode_prompt(PROMPTS)[:2]
    ours = model.condition(rows).values
    for name, value in zip(("text", "pooled"), found, strict=False):
        value = value.detach()
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5 * max(1.0, float(value.abs().max())))


@pytest.mark.parametrize(
    ("opened", "weight", "negative"),
    [
        *((name, 1.0, None) for name in EVERY),
        *((name, 7.5, None) for name in EVERY if name != "ldm"),
        *((name, 7.5, "blurry, low quality") for name in OF_TEXTS),
    ],
    indirect=["opened"],
)
def test_decoding_is_the_pipelines_own_call(opened, weight, negative):
    """From one latent, on the scheduler's own ladder: guidance, a negative prompt, SDXL's conditions, shifts."""
    theirs, model = opened
    x = noise(model)
    expected = call(theirs, x, STEPS, weight=weight, negative=negative)
    ours = decode(*told(model, weight=weight, negative=negative), x)
    assert expected.std() > 0.01, "else a picture of one colour is compared with another"
    torch.testing.assert_close(ours, expected.to(ours), rtol=0, atol=1e-3)


@every
def test_the_pipelines_own_decoding_gives_the_vae_round_trip_back(opened):
    """What the inversion is to be: exact in the latent space at guidance 1."""
    theirs, model = opened
    # Of the VP process short ones: a random network is not the gradient of anything.
    steps, corrections = (20, 5) if isinstance(model.process, Flow) else (50, 8)
    model, rows = told(model)
    vae, levels, condition = model.autoencoder(), model.own_ladder(steps), model.condition(rows)
    z = vae.to_state(pictures())
    assert 0.5 < z.square().mean() < 2, "errors below are of states of unit variance"
    network, along = model.denoiser(), {"levels": levels, "process": model.process, "condition": condition}
    top, residual, _ = invert_exactly(network, z, corrections=corrections, **along)
    assert float((sample(network, top, **along) - z).square().mean()) <= 1e-6, residual
    round_trip = (vae.to_images(z) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(call(theirs, top, steps).to(round_trip), round_trip, rtol=0, atol=1e-3)


def test_a_distilled_flux_is_told_its_guidance(pipelines):
    """On the shifted times that its pipeline chooses for the size."""
    folder, theirs = pipelines("flux", guidance_embeds=True)
    model = families.load(folder).with_size(SIZE)
    x = noise(model)
    expected = call(theirs, x, STEPS, weight=3.5)
    torch.testing.assert_close(decode(*told(model, weight=3.5), x), expected, rtol=0, atol=1e-3)
    assert not torch.allclose(decode(*told(model), x), expected, rtol=0, atol=1e-2), "W = 1 is another image"
    with pytest.raises(ValueError, match="is told the weight of its guidance"):
        model.with_guidance(3.5, negative_prompt="blurry")


@pytest.mark.parametrize(
    ("scheduler", "more"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("HeunDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    ],
)
def test_its_own_ladder_is_the_schedulers(pipelines, tmp_path, scheduler, more):
    folder, theirs = pipelines("stable_diffusion")
    shutil.copytree(folder, tmp_path / "model")
    if more.get("rescale_betas_zero_snr"):
        more = {**more, "prediction_type": "v_prediction"}
    found = getattr(diffusers, scheduler).from_config(theirs.scheduler.config, **more)
    found.save_pretrained(tmp_path / "model" / "scheduler")
    found.set_timesteps(10)
    ladder = families.load(str(tmp_path / "model")).own_ladder(10)
    assert ladder[0] == -1
    assert ladder[1:] == pytest.approx(sorted(set(found.timesteps.tolist())))


def changed(folder, tmp_path, part, **keys):
    """A copy of the model with other keys in one config; None removes one."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    config = json.loads((copy / part).read_text()) | keys
    (copy / part).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return str(copy)


@pytest.mark.parametrize(
    ("part", "keys", "why"),
    [
        ("model_index.json", {"unet": ["diffusers", "UNet2DModel"]}, "unet is 'UNet2DModel' of diffusers"),
        ("model_index.json", {"unet": None}, "unet is None"),
        ("model_index.json", {"text_encoder": ["theirs", "OwnEncoder"]}, "text_encoder is 'OwnEncoder' of theirs"),
        (
            "model_index.json",
            {"text_encoder": ["theirs", "CLIPTextModel"]},
            "text_encoder is 'CLIPTextModel' of theirs",
        ),
        ("model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]}, "has a controlnet"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "cond_proj.weight is nothing"),
        ("unet/config.json", {"in_channels": 9}, r"conv_in.weight is \(16, 4, 3, 3\), and the config asks for \(16, 9"),
        ("unet/config.json", {"cross_attention_dim": 48}, "attn2.to_k.weight is"),
        ("vae/config.json", {"latent_channels": 8}, "vae/diffusion_pytorch_model.safetensors: .* is"),
        (
            "text_encoder/config.json",
            {"num_hidden_layers": 4},
            "text_encoder/model.safetensors: .*layers.3.* is nothing",
        ),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "vae: latents_mean is "),
        ("unet/config.json", {"sample_size": [64, 48]}, "int"),
        ("unet/config.json", {"use_their_attention": True}, "unet/config.json: unknown key 'use_their_attention'"),
        ("unet/config.json", {"sample_size": None}, "lacks 'sample_size'"),
        ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "is for a consistency model"),
    ],
)
def test_what_is_not_known_is_refused_by_name(pipelines, tmp_path, part, keys, why):
    folder, _ = pipelines("stable_diffusion")
    with pytest.raises(CheckpointError, match=why):
        families.load(changed(folder, tmp_path, part, **keys))


def test_an_unknown_pipeline_is_refused(pipelines, tmp_path):
    folder, _ = pipelines("stable_diffusion")
    copy = changed(folder, tmp_path, "model_index.json", _class_name="StableDiffusionInstructPix2PixPipeline")
    with pytest.raises(CheckpointError, match="'StableDiffusionInstructPix2PixPipeline'"):
        families.load(copy)


def test_weights_that_are_not_finite_are_refused(pipelines, tmp_path):
    folder, _ = pipelines("stable_diffusion")
    copy = changed(folder, tmp_path, "model_index.json")
    file = Path(copy, "text_encoder", "model.safetensors")
    weights = load_file(file)
    name = sorted(weights)[5]
    weights[name][0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"text_encoder/model.safetensors: .*{name} holds values"):
        families.load(copy)


def test_files_of_earlier_versions_are_the_same_model(pipelines, tmp_path):
    """CLIP's names before transformers 5, with positions; attention's before diffusers 0.18."""
    folder, _ = pipelines("stable_diffusion")
    copy = changed(folder, tmp_path, "model_index.json", _diffusers_version="0.6.0")
    file = Path(copy, "text_encoder", "model.safetensors")
    weights = {f"text_model.{name}": value for name, value in load_file(file).items()}
    save_file({**weights, "text_model.embeddings.position_ids": torch.arange(77)[None]}, file, {"format": "pt"})
    file = Path(copy, "vae", "diffusion_pytorch_model.safetensors")
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = load_file(file)
    for new, before in old.items():
        renamed = {name.replace(new, before): value for name, value in renamed.items()}
    assert any(".query." in name for name in renamed)
    save_file(renamed, file, {"format": "pt"})
    assert families.load(copy).digest == families.load(folder).digest


@pytest.mark.parametrize(
    ("name", "size"), [("stable_diffusion", 33), ("stable_diffusion_3", 34), ("flux", 34), ("dit", 64)]
)
def test_a_size_that_it_can_not_have(pipelines, name, size):
    model = families.load(pipelines(name)[0])
    with pytest.raises(ValueError, match="pixels, not"):
        model.with_size(size)


@pytest.mark.parametrize("opened", EVERY, indirect=True)
def test_in_bfloat16_the_network_alone_is_rounded(opened):
    _, model = opened
    model, rows = told(model)
    x, condition = noise(model), model.condition(rows)
    exact, rounded = (
        model.denoiser()(x, 500.0, condition),
        model.denoiser("cpu", Execution("bfloat16"))(x, 500.0, condition),
    )
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1 * float(exact.std()))
    assert not torch.equal(rounded, exact)


def test_without_the_libraries_it_says_what_to_install(pipelines, monkeypatch):
    folder, _ = pipelines("ldm")
    monkeypatch.setattr(parts, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"diffusers and transformers: pip install 'palindrome\[latent\]'"):
        families.load(folder)


def test_levels_of_a_flow_are_found_by_their_time():
    flow = Flow(shift=3.0)
    for t in (0.003, 0.25, 0.9, 1.0):
        alpha, sigma = flow.marginal(flow.level_of(t))
        assert sigma / (alpha + sigma) == pytest.approx(t, rel=1e-9)
