"""The U-Net against diffusers' UNet2DModel on the same weights."""

import dataclasses
import inspect

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from hypothesis import given, settings
from hypothesis import strategies as st

from palindrome.model.unet import UNet, UNetConfig, sinusoid

CIFAR = {
    "sample_size": 32,
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
}


@st.composite
def configs(draw):
    blocks = draw(st.integers(1, 3))

    def each(*values):
        return tuple(draw(st.sampled_from(values)) for _ in range(blocks))

    return {
        "sample_size": 2**blocks * draw(st.integers(1, 3)),
        "in_channels": draw(st.integers(1, 4)),
        "out_channels": draw(st.integers(1, 4)),
        "block_out_channels": each(8, 16, 24),
        "down_block_types": each("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": each("UpBlock2D", "AttnUpBlock2D"),
        "layers_per_block": draw(st.integers(1, 3)),
        "attention_head_dim": draw(st.sampled_from((None, 8))),
        "norm_num_groups": draw(st.sampled_from((1, 2, 4, 8))),
        "norm_eps": draw(st.sampled_from((1e-5, 1e-6, 1e-2))),
        "freq_shift": draw(st.integers(0, 1)),
        "flip_sin_to_cos": draw(st.booleans()),
        "downsample_padding": draw(st.integers(0, 1)),
    }


def pair(randomize, config, seed=0):
    theirs = randomize(UNet2DModel(**config), seed)
    ours = UNet(UNetConfig(**config)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def images(config, batch, seed=1):
    size = config["sample_size"]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, config.get("in_channels", 3), size, size, generator=generator)


@torch.no_grad()
def assert_equal_outputs(ours, theirs, x, classes=None, timesteps=(0, 731)):
    """Within 1e-5 for one timestep and for one a sample, of outputs that are large and depend on the timestep."""
    outputs = []
    for t in (*timesteps, torch.arange(1, len(x) + 1) * 487 % 1000):
        outputs.append(ours(x, t, classes))
        expected = theirs(x, t, classes).sample
        torch.testing.assert_close(outputs[-1], expected, rtol=0, atol=1e-5 * min(1, expected.std()))
    assert outputs[0].std() > 0.1
    assert (outputs[0] - outputs[1]).abs().max() > 0.02


@settings(max_examples=30, deadline=None, derandomize=True)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_outputs_equal_diffusers(randomize, config, seed):
    assert_equal_outputs(*pair(randomize, config, seed), images(config, 2, seed))


RESNETS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
ATTENTION = {
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
}
SETTINGS = {
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale and shift, norm in the middle": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
    "norm in the middle": {"attn_norm_num_groups": 2},
    "resnet blocks": RESNETS,
    "resnets beside attention": {**ATTENTION, "downsample_type": "resnet", "upsample_type": "resnet"},
    "resnet down alone": {**ATTENTION, "downsample_type": "resnet"},
    "fourier": {"time_embedding_type": "fourier"},
    "learned": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "width of the embedding": {"time_embedding_dim": 24},
    "centred": {"center_input_sample": True},
    "factor in the middle": {"mid_block_scale_factor": 2**0.5},
    "no attention in the middle": {"add_attention": False},
    "no middle": {"mid_block_type": None},
    "classes": {"num_class_embeds": 5},
    "classes as timesteps": {"class_embed_type": "timestep"},
    "classes as they are": {"class_embed_type": "identity"},
    "classes as Fourier features": {"class_embed_type": "timestep", "time_embedding_type": "fourier"},
    # as in the consistency models of ImageNet
    "together": {
        **RESNETS,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "num_class_embeds": 5,
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 4,
        "time_embedding_dim": 40,
        "mid_block_scale_factor": 1.5,
        "center_input_sample": True,
        "layers_per_block": 2,
        "norm_eps": 1e-2,
    },
}


def classes_for(config, batch, seed=2):
    generator = torch.Generator().manual_seed(seed)
    if config.get("class_embed_type") == "identity":
        width = config.get("time_embedding_dim") or 4 * config["block_out_channels"][0]
        return torch.randn(batch, width, generator=generator)
    if config.get("class_embed_type") == "timestep" or config.get("num_class_embeds"):
        return torch.arange(1, batch + 1)
    return None


def timesteps_for(config):
    """diffusers divides by the timestep where embeddings are Fourier's, of its logarithm."""
    return (1, 731) if config.get("time_embedding_type") == "fourier" else (0, 731)


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_setting_gives_what_diffusers_gives(randomize, small, setting):
    config = {**small, **SETTINGS[setting]}
    classes = classes_for(config, 3)
    ours, theirs = pair(randomize, config)
    assert_equal_outputs(ours, theirs, images(config, 3), classes, timesteps_for(config))
    if classes is not None:
        apart = ours(images(config, 1).expand(3, -1, -1, -1), timesteps_for(config)[0], classes)
        assert (apart[0] - apart[1]).abs().max() > 0.02, "classes make a difference"


@st.composite
def settings_of_all(draw):
    config = draw(configs())
    blocks = len(config["block_out_channels"])

    def each(*values):
        return tuple(draw(st.sampled_from(values)) for _ in range(blocks))

    groups = config["norm_num_groups"]
    config |= {
        "down_block_types": each("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": each("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": draw(st.sampled_from(("conv", "resnet"))),
        "upsample_type": draw(st.sampled_from(("conv", "resnet"))),
        "resnet_time_scale_shift": draw(st.sampled_from(("default", "scale_shift"))),
        "attn_norm_num_groups": draw(st.sampled_from((None, 1, groups))),
        "time_embedding_type": draw(st.sampled_from(("positional", "fourier", "learned"))),
        "num_train_timesteps": 1000,
        "time_embedding_dim": draw(st.sampled_from((None, 20))),
        "mid_block_type": draw(st.sampled_from(("UNetMidBlock2D", None))),
        "mid_block_scale_factor": draw(st.sampled_from((1, 2**0.5))),
        "add_attention": draw(st.booleans()),
        "center_input_sample": draw(st.booleans()),
        "class_embed_type": draw(st.sampled_from((None, "timestep", "identity"))),
        "num_class_embeds": draw(st.sampled_from((None, 7))),
    }
    return config


@settings(max_examples=40, deadline=None, derandomize=True)
@given(config=settings_of_all(), seed=st.integers(0, 2**31))
def test_settings_together_give_what_diffusers_gives(randomize, config, seed):
    ours, theirs = pair(randomize, config, seed)
    x, classes = images(config, 2, seed), classes_for(config, 2, seed)
    for t in (1, 731, torch.tensor([3, 800])):
        with torch.no_grad():
            expected = theirs(x, t, classes).sample
            torch.testing.assert_close(ours(x, t, classes), expected, rtol=0, atol=1e-5 * min(1, expected.std()))
    read = UNetConfig.from_dict(theirs.config)
    assert read.to_dict() == UNetConfig.from_dict(UNet2DModel.from_config(read.to_dict()).config).to_dict()


def test_classes_have_to_be_told_where_there_are_any(randomize, small):
    conditional, _ = pair(randomize, {**small, "num_class_embeds": 5})
    with pytest.raises(ValueError, match="class-conditional: it has to be told the class"):
        conditional(images(small, 2), 7)
    unconditional, _ = pair(randomize, small)
    with pytest.raises(ValueError, match="not class-conditional"):
        unconditional(images(small, 2), 7, torch.tensor([0, 1]))


def test_learned_embeddings_know_no_fractions(randomize, small):
    network, _ = pair(randomize, {**small, **SETTINGS["learned"]})
    x = images(small, 1)
    assert torch.equal(network(x, torch.tensor(7.0)), network(x, 7))
    with pytest.raises(ValueError, match="a fraction"):
        network(x, torch.tensor(7.5))


@torch.no_grad()
def test_what_is_not_diffusers_has_its_meaning(randomize, small):
    """Heads by number, the width of the sines, and scaled timesteps, each where diffusers can express it too."""
    wide, theirs = pair(randomize, {**small, **ATTENTION, "block_out_channels": (16, 16), "attention_head_dim": 4})
    x = images(small, 2)
    by_number = dataclasses.replace(wide.config, attention_head_dim=None, num_attention_heads=4)
    up_apart = dataclasses.replace(by_number, num_attention_heads=2, num_attention_heads_up=4)
    for config in (by_number, up_apart):
        network = UNet(config).eval()
        network.load_state_dict(theirs.state_dict())
        equal = torch.allclose(network(x, 7), theirs(x, 7).sample, rtol=0, atol=1e-5)
        assert equal == (config is by_number)
        assert [block.attentions[0].heads for block in (*network.up_blocks, network.mid_block)][:2] == [4, 4]
    scaled = UNet(dataclasses.replace(wide.config, timestep_scale=0.25)).eval()
    scaled.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(scaled(x, 1001), wide(x, torch.tensor(250.25)), rtol=0, atol=1e-6)
    assert UNet(dataclasses.replace(wide.config, time_proj_dim=6)).time_embedding.linear_1.in_features == 6
    assert scaled.config.beyond_diffusers == ["timestep_scale"] and not wide.config.beyond_diffusers
    assert {"timestep_scale", *wide.config.to_dict()} == {*scaled.config.to_dict()}
    with pytest.raises(ValueError, match="timestep_scale"):
        UNetConfig.from_dict(scaled.config.to_dict())


def test_gradients_with_classes_equal_diffusers(randomize, small):
    networks = pair(randomize, {**small, **SETTINGS["together"], "down_block_types": small["down_block_types"]})
    x, t, classes = images(small, 2), torch.tensor([3, 700]), torch.tensor([4, 0])
    gradients = []
    for network in networks:
        output = network.train()(x, t, classes)
        (output if torch.is_tensor(output) else output.sample).square().mean().backward()
        gradients.append({k: v.grad for k, v in network.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [(64, 128, 128, 128), (128, 256, 256, 256)])
def test_cifar_presets_equal_diffusers(randomize, channels):
    config = {**CIFAR, "block_out_channels": channels}
    assert_equal_outputs(*pair(randomize, config), images(config, 1))


def test_gradients_equal_diffusers_with_dropout(randomize, small):
    networks = pair(randomize, {**small, "dropout": 0.3})
    x, t = images(small, 2), torch.tensor([3, 700])
    gradients = []
    for network in networks:
        for module in network.modules():
            if isinstance(module, torch.nn.Dropout):  # the same values drop only in the same memory layout
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        torch.manual_seed(0)
        output = network.train()(x, t)
        (output if torch.is_tensor(output) else output.sample).square().mean().backward()
        gradients.append({k: v.grad for k, v in network.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_timesteps_per_sample_and_for_the_batch_agree(randomize, small):
    shifted, _ = pair(randomize, {**small, "resnet_time_scale_shift": "scale_shift"})
    ours, _ = pair(randomize, small)
    x, t = images(small, 3), (0, 421, 999)
    for network in (shifted, ours):
        each = network(x, torch.tensor(t))
        for i in range(3):
            torch.testing.assert_close(each[i], network(x, t[i])[i], rtol=0, atol=1e-5)
    assert torch.equal(ours(x, 421), ours(x, torch.tensor(421)))
    torch.testing.assert_close(ours(x, 421), ours(x, torch.tensor([421, 421, 421])), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dim", [2, 7, 32])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 0.5])
def test_timestep_embedding_equals_diffusers(dim, flip, shift):
    t = torch.tensor([0, 1, 500, 999])
    theirs = get_timestep_embedding(t, dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    torch.testing.assert_close(sinusoid(t, dim, flip, shift), theirs, rtol=0, atol=1e-6)


def test_defaults_are_diffusers():
    parameters = inspect.signature(UNet2DModel.__init__).parameters
    defaults = {k: p.default for k, p in parameters.items() if k not in ("self", "sample_size")}
    assert UNetConfig.from_dict(defaults) == UNetConfig.from_dict({}) == UNetConfig()


def test_digests_of_earlier_versions_hold():
    """What `to_dict` gave for the settings of versions before, which are in the digests of their runs."""
    assert UNetConfig.from_dict({"num_train_timesteps": 1000, "mid_block_scale_factor": 1.0}).to_dict() == {
        "_class_name": "UNet2DModel",
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "mid_block_type": "UNetMidBlock2D",
        "mid_block_scale_factor": 1,
        "downsample_type": "conv",
        "upsample_type": "conv",
        "act_fn": "silu",
        "attn_norm_num_groups": None,
        "resnet_time_scale_shift": "default",
        "add_attention": True,
        "class_embed_type": None,
        "num_class_embeds": None,
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 2,
        "block_out_channels": (224, 448, 672, 896),
        "attention_head_dim": 8,
        "norm_num_groups": 32,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "norm_eps": 1e-5,
        "dropout": 0.0,
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "downsample_padding": 1,
    }
    factor = UNetConfig.from_dict({"mid_block_scale_factor": 1.0}).to_dict()["mid_block_scale_factor"]
    assert isinstance(factor, int), "1.0 is written otherwise"


@settings(max_examples=10, deadline=None, derandomize=True)
@given(config=configs())
def test_config_round_trips_through_diffusers(config):
    ours = UNetConfig(**config)
    theirs = UNet2DModel.from_config(ours.to_dict())
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {
        k: v.shape for k, v in UNet(ours).state_dict().items()
    }
    assert UNetConfig.from_dict(theirs.config) == ours


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"block_out_channels": (8,)}, "block_out_channels"),
        ({"block_out_channels": (), "down_block_types": (), "up_block_types": ()}, "block_out_channels"),
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, "SkipDownBlock2D"),
        ({"up_block_types": ("DownBlock2D", "UpBlock2D")}, "up_block_types"),
        ({"norm_num_groups": 3}, "norm_num_groups"),
        ({"norm_num_groups": 0}, "norm_num_groups"),
        ({"attention_head_dim": 5}, "attention_head_dim"),
        ({"sample_size": 9}, "sample_size"),
        ({"sample_size": 0}, "sample_size"),
        ({"downsample_padding": 2}, "downsample_padding"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"num_attention_heads_up": 3}, "num_attention_heads_up"),
        ({"attn_norm_num_groups": 5}, "attn_norm_num_groups"),
        ({"time_embedding_type": "learned"}, "num_train_timesteps"),
        ({"num_class_embeds": 0}, "num_class_embeds"),
        ({"timestep_scale": 0.0}, "timestep_scale"),
    ],
)
def test_impossible_config_is_refused(small, change, named):
    UNetConfig(**small)
    with pytest.raises(ValueError, match=named):
        UNetConfig(**{**small, **change})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "UNet2DConditionModel"),
        ("act_fn", "gelu"),
        ("class_embed_type", "projection"),
        ("cross_attention_dim", 768),
        ("downsample_type", "fir"),
        ("mid_block_scale_factor", 0),
        ("mid_block_type", "UNetMidBlock2DCrossAttn"),
        ("num_attention_heads", 4),
        ("norm_num_groups", None),
        ("resnet_time_scale_shift", "spatial"),
        ("time_embedding_type", "random"),
        ("upsample_type", None),
    ],
)
def test_setting_of_another_network_is_refused(small, key, value):
    UNetConfig.from_dict({**small, "_class_name": "UNet2DModel", "act_fn": "swish"})
    with pytest.raises(ValueError, match=key):
        UNetConfig.from_dict({**small, key: value})
