"""The U-Net against diffusers' UNet2DModel on the same weights."""

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
def assert_equal_outputs(ours, theirs, x):
    """Within 1e-5 for one timestep and for one a sample, of outputs that are large and depend on the timestep."""
    outputs = []
    for t in (0, 731, torch.arange(len(x)) * 487 % 1000):
        outputs.append(ours(x, t))
        torch.testing.assert_close(outputs[-1], theirs(x, t).sample, rtol=0, atol=1e-5)
    assert outputs[0].std() > 0.1
    assert (outputs[0] - outputs[1]).abs().max() > 0.02


@settings(max_examples=30, deadline=None, derandomize=True)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_outputs_equal_diffusers(randomize, config, seed):
    assert_equal_outputs(*pair(randomize, config, seed), images(config, 2, seed))


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
    ours, _ = pair(randomize, small)
    x, t = images(small, 3), (0, 421, 999)
    each = ours(x, torch.tensor(t))
    for i in range(3):
        torch.testing.assert_close(each[i], ours(x, t[i])[i], rtol=0, atol=1e-5)
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
        ("add_attention", False),
        ("attn_norm_num_groups", 8),
        ("center_input_sample", True),
        ("class_embed_type", "timestep"),
        ("cross_attention_dim", 768),
        ("downsample_type", "resnet"),
        ("mid_block_scale_factor", 2**0.5),
        ("mid_block_type", None),
        ("num_class_embeds", 10),
        ("resnet_time_scale_shift", "scale_shift"),
        ("time_embedding_dim", 64),
        ("time_embedding_type", "fourier"),
        ("upsample_type", "resnet"),
    ],
)
def test_setting_of_another_network_is_refused(small, key, value):
    UNetConfig.from_dict({**small, "_class_name": "UNet2DModel", "act_fn": "swish"})
    with pytest.raises(ValueError, match=key):
        UNetConfig.from_dict({**small, key: value})
