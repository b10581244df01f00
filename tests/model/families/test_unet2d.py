"""Checkpoint folders that diffusers opens, diffusers' that we open, and broken ones."""

import dataclasses
import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from palindrome.model.condition import ClassOf
from palindrome.model.ddim import sample
from palindrome.model.families.base import CheckpointError
from palindrome.model.families.unet2d import CONFIG, INDEX, SCHEDULER, WEIGHTS, UNet2D, load, save
from palindrome.model.inversion import invert_exactly
from palindrome.model.ladder import ladder
from palindrome.model.process import VP
from palindrome.model.unet import UNet, UNetConfig

SCHEDULE = VP(100, "scaled_linear", 1e-3, 0.06)
SCHEDULER_KWARGS = {
    "num_train_timesteps": 100,
    "beta_schedule": "scaled_linear",
    "beta_start": 1e-3,
    "beta_end": 0.06,
    "clip_sample": False,
}
VARIANT, PARTS = {"variant": "fp16"}, {"max_shard_size": "100KB"}
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def checkpoint(randomize, small):
    config = UNetConfig(**small)
    return UNet2D(
        config, randomize(UNet(config)).state_dict(), dataclasses.replace(SCHEDULE, prediction_type="v_prediction")
    )


@pytest.fixture
def folder(checkpoint, tmp_path):
    save(checkpoint, str(tmp_path / "checkpoint"))
    return tmp_path / "checkpoint"


@torch.no_grad()
def assert_equal_outputs(ours, theirs):
    for t in (0, 70):
        torch.testing.assert_close(ours(X, t), theirs(X, t).sample, rtol=0, atol=1e-5)
    assert ours(X, 0).std() > 0.1


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(path, change):
    weights = safetensors.torch.load_file(path)
    change(weights)
    safetensors.torch.save_file(weights, path)


def test_what_is_saved_loads_the_same(checkpoint, folder):
    loaded = load(str(folder))
    assert (loaded.config, loaded.process) == (checkpoint.config, checkpoint.process)
    assert loaded.process.prediction_type == "v_prediction"
    torch.testing.assert_close(dict(loaded.weights), dict(checkpoint.weights), rtol=0, atol=0)
    assert loaded.digest == checkpoint.digest
    assert {str(p.relative_to(folder)) for p in folder.rglob("*.*")} == {WEIGHTS, CONFIG, SCHEDULER, INDEX}


def test_diffusers_opens_ours(checkpoint, folder):
    pipeline = DDIMPipeline.from_pretrained(folder)
    for unet in (pipeline.unet, UNet2DModel.from_pretrained(folder, subfolder="unet")):
        assert_equal_outputs(checkpoint.network(), unet)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    np.testing.assert_allclose(pipeline.scheduler.alphas_cumprod, SCHEDULE.alphas_cumprod, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_diffusers_pipeline_generates_the_same_images(checkpoint, tmp_path, prediction_type):
    process = dataclasses.replace(SCHEDULE, prediction_type=prediction_type)
    checkpoint = dataclasses.replace(checkpoint, process=process)
    save(checkpoint, str(tmp_path))
    pipeline = DDIMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        batch_size=2, num_inference_steps=10, generator=torch.Generator().manual_seed(3), output_type="np"
    ).images
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    levels = ladder("linear", 10, 100)
    ours = sample(checkpoint.network(), noise, levels, process)
    ours = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert theirs.std() > 0.1


@pytest.mark.parametrize(("pipeline", "scheduler"), [(DDIMPipeline, DDIMScheduler), (DDPMPipeline, DDPMScheduler)])
def test_we_open_what_diffusers_saved(randomize, small, tmp_path, pipeline, scheduler):
    unet = randomize(UNet2DModel(**small))
    pipeline(unet, scheduler(**SCHEDULER_KWARGS, prediction_type="sample")).save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert_equal_outputs(loaded.network(), unet)
    assert loaded.process == dataclasses.replace(SCHEDULE, prediction_type="sample")
    assert (
        loaded.digest
        == UNet2D(
            UNetConfig(**small), unet.state_dict(), dataclasses.replace(SCHEDULE, prediction_type="sample")
        ).digest
    )


def test_trained_betas_pass_both_ways(checkpoint, tmp_path):
    betas = tuple(np.linspace(0.01, 0.3, 7).tolist())
    checkpoint = checkpoint.with_process(VP(7, trained_betas=betas))
    save(checkpoint, str(tmp_path / "a"))
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "a")
    np.testing.assert_allclose(pipeline.scheduler.alphas_cumprod, np.cumprod(1 - np.array(betas)), rtol=1e-5)
    pipeline.save_pretrained(tmp_path / "b")
    assert load(str(tmp_path / "b")).process == checkpoint.process


def test_digest_survives_being_saved_by_diffusers(checkpoint, folder, tmp_path):
    DDIMPipeline.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / CONFIG).read_text() != (folder / CONFIG).read_text()
    assert load(str(tmp_path / "theirs")).digest == checkpoint.digest
    assert len(checkpoint.digest) == 64


def test_digest_depends_on_everything_that_decides_the_outputs(checkpoint):
    name = "mid_block.attentions.0.to_q.weight"
    nudged = {k: v.clone() for k, v in checkpoint.weights.items()}
    nudged[name].view(-1)[7] = torch.nextafter(nudged[name].view(-1)[7], torch.tensor(9.0))
    swapped = {**checkpoint.weights, name: checkpoint.weights[name.replace("to_q", "to_k")]}
    renamed = {k.replace("to_q", "to_query"): v for k, v in checkpoint.weights.items()}  # sorted the same
    reshaped = {**checkpoint.weights, name: checkpoint.weights[name][None]}
    half = {k: v.half() for k, v in checkpoint.weights.items()}
    same_bits = {k: v.view(torch.bfloat16) for k, v in half.items()}
    variants = [
        checkpoint,
        *(dataclasses.replace(checkpoint, weights=w) for w in (nudged, swapped, renamed, reshaped, half, same_bits)),
        *(checkpoint.with_process(dataclasses.replace(SCHEDULE, prediction_type=p)) for p in ("epsilon", "sample")),
        *(
            checkpoint.with_process(dataclasses.replace(checkpoint.process, **change))
            for change in (
                {"num_train_timesteps": 101},
                {"beta_schedule": "linear"},
                {"beta_start": 1.1e-3},
                {"beta_end": 0.061},
                {"trained_betas": (0.01,) * 100},
            )
        ),
        *(
            dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, **change))
            for change in ({"freq_shift": 1}, {"norm_eps": 1e-6}, {"attention_head_dim": None})
        ),
    ]
    assert len({v.digest for v in variants}) == len(variants)
    backwards = dict(reversed(checkpoint.weights.items()))
    assert dataclasses.replace(checkpoint, weights=backwards).digest == checkpoint.digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_kept_and_run_in_float32(checkpoint, tmp_path, dtype):
    half = dataclasses.replace(checkpoint, weights={k: v.to(dtype) for k, v in checkpoint.weights.items()})
    save(half, str(tmp_path / "a"))
    loaded = load(str(tmp_path / "a"))
    assert {v.dtype for v in loaded.weights.values()} == {dtype}
    assert loaded.digest == half.digest
    network = loaded.network()
    assert not network.training
    assert {(p.dtype, p.requires_grad) for p in network.parameters()} == {(torch.float32, False)}
    assert_equal_outputs(network, UNet2DModel.from_pretrained(tmp_path / "a", subfolder="unet"))
    DDIMPipeline.from_pretrained(tmp_path / "a", torch_dtype=dtype).save_pretrained(tmp_path / "b")
    assert load(str(tmp_path / "b")).digest == half.digest


def test_attention_names_of_old_diffusers_load(checkpoint, folder):
    def age(weights):
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            for name in [k for k in weights if f".{new}." in k]:
                weights[name.replace(new, old)] = weights.pop(name)

    rewrite(folder / WEIGHTS, age)
    names = safetensors.torch.load_file(folder / WEIGHTS).keys()
    assert "mid_block.attentions.0.proj_attn.bias" in names and not any(".to_" in k for k in names)
    loaded = load(str(folder))
    assert loaded.digest == checkpoint.digest
    assert_equal_outputs(loaded.network(), UNet2DModel.from_pretrained(folder, subfolder="unet"))


def test_keys_that_old_configs_lack_take_diffusers_defaults(folder):
    (folder / SCHEDULER).write_text('{"_class_name": "DDPMScheduler", "num_train_timesteps": 500}')
    loaded = load(str(folder))
    theirs = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    np.testing.assert_allclose(loaded.process.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5)
    assert loaded.process.prediction_type == theirs.config.prediction_type


def test_any_fsspec_uri_holds_a_checkpoint(checkpoint):
    save(checkpoint, "memory://here/checkpoint")
    try:
        assert load("memory://here/checkpoint").digest == checkpoint.digest
    finally:
        fsspec.filesystem("memory").rm("/here", recursive=True)


def test_saving_again_replaces(checkpoint, folder):
    other = dataclasses.replace(checkpoint, weights={k: v + 1 for k, v in checkpoint.weights.items()})
    save(other, str(folder))
    assert load(str(folder)).digest == other.digest != checkpoint.digest


def fails(folder, *named):
    """Loading raises CheckpointError, and its message has all of `named`."""
    with pytest.raises(CheckpointError) as error:
        load(str(folder))
    for text in (str(folder), *named):
        assert text in str(error.value)


def test_missing_folder_is_named(tmp_path):
    fails(tmp_path / "nowhere")
    (tmp_path / "file").write_text("no folder")
    fails(tmp_path / "file")


@pytest.mark.parametrize("name", [CONFIG, SCHEDULER, WEIGHTS])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    fails(folder, name)
    (folder / name).mkdir()
    fails(folder, name)


@pytest.mark.parametrize("name", [CONFIG, SCHEDULER])
@pytest.mark.parametrize("content", [b"", b'{"sample_size": 8,', b"\xff\xfe\x00", b"[1, 2]", b"null"])
def test_bad_json_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    fails(folder, name, "JSON")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ({"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}, "CrossAttnDownBlock2D"),
        ({"up_block_types": ["SkipUpBlock2D", "UpBlock2D"]}, "SkipUpBlock2D"),
        ({"act_fn": "relu"}, "act_fn"),
        ({"norm_num_groups": 5}, "norm_num_groups"),
        ({"norm_num_groups": 0}, "norm_num_groups"),
        ({"block_out_channels": 8}, ""),
        ({"sample_size": None}, ""),
        ({"in_channels": "three"}, ""),
        ({"layers_per_block": None}, ""),
        ({"dropout": 2.0}, ""),
    ],
)
def test_config_of_another_network_is_named(folder, change, named):
    edit(folder / CONFIG, **change)
    fails(folder, CONFIG, named)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}, "rescale_betas_zero_snr"),
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"beta_end": 2.0}, "beta"),
        ({"beta_end": "high"}, ""),
        ({"num_train_timesteps": None}, ""),
        ({"trained_betas": [0.1]}, "trained_betas"),
    ],
)
def test_schedule_that_cannot_be_inverted_is_named(folder, change, named):
    edit(folder / SCHEDULER, **change)
    fails(folder, SCHEDULER, named)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated_weights_are_named(folder, keep):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    fails(folder, WEIGHTS)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("conv_in.weight", lambda v: v[:, :2].contiguous()),
        ("mid_block.attentions.0.to_q.weight", lambda v: v[:, :, None, None].contiguous()),
        ("time_embedding.linear_1.bias", lambda v: v[:-1].clone()),
    ],
)
def test_parameter_of_another_shape_is_named(folder, name, change):
    rewrite(folder / WEIGHTS, lambda weights: weights.update({name: change(weights[name])}))
    fails(folder, WEIGHTS, name)


def test_missing_parameter_is_named(folder):
    rewrite(folder / WEIGHTS, lambda weights: weights.pop("conv_out.bias"))
    fails(folder, WEIGHTS, "conv_out.bias")


def test_extra_parameter_is_named(folder):
    rewrite(folder / WEIGHTS, lambda weights: weights.update({"class_embedding.weight": torch.zeros(3)}))
    fails(folder, WEIGHTS, "class_embedding.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder, value):
    rewrite(folder / WEIGHTS, lambda weights: weights["conv_out.bias"].fill_(value))
    fails(folder, WEIGHTS, "conv_out.bias", "not finite")


def test_pickle_is_loaded_only_if_allowed_and_as_tensors_alone(folder, checkpoint):
    pickled = folder / WEIGHTS.replace(".safetensors", ".bin")
    torch.save(dict(checkpoint.weights), pickled)
    assert load(str(folder)).digest == checkpoint.digest  # beside safetensors it is ignored
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    fails(folder, pickled.name, "pickle", "--allow-pickle")
    assert load(str(folder), allow_pickle=True).digest == checkpoint.digest
    torch.save({**checkpoint.weights, "conv_out.bias": Path("a function call in a pickle")}, pickled)
    with pytest.raises(CheckpointError, match=f"{pickled.name} is no file of weights"):
        load(str(folder), allow_pickle=True)
    (folder / WEIGHTS).write_bytes(whole)
    shutil.copy(pickled, folder / WEIGHTS)
    fails(folder, WEIGHTS)


def test_a_flat_folder_as_google_has_them(checkpoint, folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in (WEIGHTS, CONFIG, SCHEDULER, INDEX):
        shutil.move(folder / name, flat / name.rpartition("/")[2])
    assert load(str(flat)).digest == checkpoint.digest
    (flat / "scheduler_config.json").unlink()
    fails(flat, "scheduler_config.json")


@pytest.mark.parametrize("how", [VARIANT, PARTS, {**VARIANT, **PARTS}])
@pytest.mark.parametrize("safe", [True, False])
def test_variants_and_parts_as_diffusers_writes_them(checkpoint, folder, how, safe):
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", safe_serialization=safe, **how)
    names = {path.name for path in (folder / "unet").iterdir()}
    assert "diffusion_pytorch_model.safetensors" not in names and ("max_shard_size" not in how or len(names) > 3)
    assert load(str(folder), allow_pickle=not safe).digest == checkpoint.digest
    for path in (folder / "unet").glob("*.fp16*"):
        shutil.copy(path, path.with_name(path.name.replace("fp16", "non_ema")))
        fails(folder, "non_ema") if safe and path.name.endswith(".fp16.safetensors") else None


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_compiled_and_distributed_models_are_passed_over(checkpoint, folder, prefix):
    def wrap(weights):
        for name in list(weights):
            weights[prefix + name] = weights.pop(name)

    rewrite(folder / WEIGHTS, wrap)
    assert load(str(folder)).digest == checkpoint.digest


def test_a_git_lfs_pointer_is_named(folder):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 143014\n"
    for name in (WEIGHTS, CONFIG):
        (folder / name).write_bytes(pointer)
        fails(folder, name, "Git LFS pointer")


def test_of_a_network_that_predicts_the_variance_the_mean_is_used(randomize, small, tmp_path):
    unet = randomize(UNet2DModel(**{**small, "out_channels": 6}))
    DDPMPipeline(unet, DDPMScheduler(variance_type="learned_range")).save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    ours = loaded.denoiser()(X, 70)
    torch.testing.assert_close(ours, unet(X, 70).sample[:, :3].detach(), rtol=0, atol=1e-5)
    assert loaded.image_shape == (3, 8, 8)
    save(loaded, str(tmp_path / "again"))
    assert load(str(tmp_path / "again")).digest == loaded.digest


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 4), (6, 3), (3, 4), (2, 2)])
def test_other_channels_are_named(randomize, small, tmp_path, inputs, outputs):
    unet = UNet2DModel(**{**small, "in_channels": inputs, "out_channels": outputs})
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    fails(tmp_path, CONFIG, f"{inputs} in_channels and {outputs} out_channels")


def test_sample_size_as_a_list(checkpoint, folder):
    edit(folder / CONFIG, sample_size=[8, 8])
    assert load(str(folder)).digest == checkpoint.digest
    edit(folder / CONFIG, sample_size=[8, 16])
    fails(folder, CONFIG, "sample_size is [8, 16]")


@pytest.mark.parametrize(
    "name",
    [
        "LDMPipeline",
        "StableDiffusionPipeline",
        "ScoreSdeVePipeline",
        "KarrasVePipeline",
        "ConsistencyModelPipeline",
        "MyPipeline",
        None,
    ],
)
def test_a_pipeline_that_is_not_one_on_pixels_is_named(folder, name):
    edit(folder / INDEX, _class_name=name)
    fails(folder, INDEX, repr(name))


@pytest.mark.parametrize("part", ["vqvae", "vae", "text_encoder"])
def test_a_part_that_a_pixel_model_has_not_is_named(folder, part):
    edit(folder / INDEX, **{part: ["diffusers", "AutoencoderKL"]})
    fails(folder, INDEX, part)
    edit(folder / INDEX, **{part: [None, None]})  # an optional part that is not there
    load(str(folder))
    if part != "text_encoder":
        (folder / INDEX).unlink()
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")
        fails(folder, part, "latent diffusion")


@pytest.mark.parametrize("clean_end", [True, False])
def test_the_clean_end_is_where_the_scheduler_has_it(checkpoint, folder, clean_end):
    edit(folder / SCHEDULER, set_alpha_to_one=clean_end)
    loaded, pipeline = load(str(folder)), DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(2, num_inference_steps=10, generator=torch.Generator().manual_seed(3), output_type="np").images
    along = {"levels": ladder("linear", 10, 100), "process": loaded.process}
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    ours = sample(loaded.denoiser(), noise, **along)
    np.testing.assert_allclose((ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), theirs, rtol=0, atol=1e-4)
    assert loaded.digest == checkpoint.digest, "it is of the path, not of the model"
    assert ("set_alpha_to_one" in loaded.describe()) == (not clean_end)
    latents, residual, _ = invert_exactly(loaded.denoiser(), X, **along, corrections=30)
    assert residual.max() < 1e-4
    torch.testing.assert_close(sample(loaded.denoiser(), latents, **along), X, rtol=0, atol=1e-3)
    before = loaded.as_described({k: v for k, v in loaded.describe().items() if k != "set_alpha_to_one"})
    assert before.process.alpha_bar(-1) == 1.0, "runs of earlier versions took it to be 1"
    save(loaded, str(folder / "again"))
    assert load(str(folder / "again")).process == loaded.process


OF_CLASSES = {
    "num_class_embeds": 5,
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 4,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "upsample_type": "resnet",
}


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"time_embedding_type": "learned", "num_train_timesteps": 100}], ids=repr)
def test_a_network_of_classes_passes_both_ways(randomize, small, tmp_path, change):
    unet = randomize(UNet2DModel(**{**small, **OF_CLASSES, **change}))
    DDPMPipeline(unet, DDPMScheduler(**SCHEDULER_KWARGS)).save_pretrained(tmp_path / "theirs")
    loaded = load(str(tmp_path / "theirs"))
    save(loaded, str(tmp_path / "ours"))
    again = UNet2DModel.from_pretrained(tmp_path / "ours", subfolder="unet")
    classes = torch.tensor([4, 1])
    expected = unet(X, 70, classes).sample
    assert torch.equal(again(X, 70, classes).sample, expected)
    condition = loaded.with_classes(ClassOf("label")).condition([{"label": 4}, {"label": 1}])
    torch.testing.assert_close(loaded.denoiser()(X, 70, condition), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(loaded.network()(X, 70, classes), expected, rtol=0, atol=1e-5)
    assert load(str(tmp_path / "ours")).digest == loaded.digest
    along = {"levels": ladder("linear", 5, 100), "process": loaded.process, "condition": condition}
    latents, residual, _ = invert_exactly(loaded.denoiser(), X, **along, corrections=20)
    assert residual.max() < 1e-4
    torch.testing.assert_close(sample(loaded.denoiser(), latents, **along), X, rtol=0, atol=1e-3)


def test_the_class_is_that_of_a_column_or_one_for_all(randomize, small, checkpoint):
    config = UNetConfig(**small, num_class_embeds=5)
    of_classes = UNet2D(config, randomize(UNet(config)).state_dict(), VP())
    labelled, fine, second = (of_classes.with_classes(c) for c in (ClassOf("label"), ClassOf("fine"), ClassOf(value=2)))
    told = labelled.condition([{"label": 3, "fine": 0}, {"label": 0, "fine": 4}]).values["class"]
    assert torch.equal(told, torch.tensor([3, 0])) and told.dtype == torch.int64
    assert torch.equal(fine.condition([{"label": 3, "fine": 2}]).values["class"], torch.tensor([2]))
    assert torch.equal(second.condition([{"label": 3}, {}]).values["class"], torch.tensor([2, 2]))
    assert fine.digest == of_classes.digest, "the column is of the collection, not of the model"
    assert labelled.condition([]).values["class"].shape == (0,)
    assert checkpoint.condition([{"label": 3}]) is None
    for told, row in ((of_classes, {"label": 1}), (labelled, {}), (labelled, {"label": None}), (labelled, {"fine": 1})):
        assert "has no class" in told.refusal(row)
        with pytest.raises(ValueError, match="has no class"):
            told.condition([row])
    for value in (5, -1, 1.5, "3"):
        with pytest.raises(ValueError, match=f"the class is {value!r}, not a number below 5"):
            labelled.condition([{"label": 1}, {"label": value}])
    with pytest.raises(ValueError, match="the class is 5, not a number below 5"):
        of_classes.with_classes(ClassOf(value=5))
    with pytest.raises(ValueError, match="not class-conditional"):
        checkpoint.with_classes(ClassOf(value=0))
    embedded = UNet2D(UNetConfig(**small, class_embed_type="identity"), {}, VP(), classes=ClassOf("label"))
    assert torch.equal(embedded.condition([{"label": [0.5, 1.0]}]).values["class"], torch.tensor([[0.5, 1.0]]))
    as_timestep = UNet2D(UNetConfig(**small, class_embed_type="timestep"), {}, VP(), classes=ClassOf("label"))
    assert torch.equal(as_timestep.condition([{"label": 1000}]).values["class"], torch.tensor([1000]))


def test_what_diffusers_can_not_express_has_a_folder_that_it_does_not_open(checkpoint, tmp_path):
    scaled = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, timestep_scale=0.25))
    assert scaled.digest != checkpoint.digest
    save(scaled, str(tmp_path))
    found = load(str(tmp_path))
    assert found.config == scaled.config and found.digest == scaled.digest
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    renamed = json.loads((tmp_path / CONFIG).read_text()) | {"_class_name": "UNet2DModel"}
    (tmp_path / CONFIG).write_text(json.dumps(renamed))
    with pytest.raises(CheckpointError, match="unknown key 'timestep_scale'"):
        load(str(tmp_path))
