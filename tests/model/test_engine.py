"""The network as jobs evaluate it, against diffusers' UNet2DModel on the same weights."""

import dataclasses
from shutil import which

import pytest
import torch
from diffusers import UNet2DModel

from palindrome.model.condition import Condition
from palindrome.model.engine import KEPT, Engine
from palindrome.model.execution import PRECISIONS, Execution
from palindrome.model.families.unet2d import UNet2D
from palindrome.model.process import VP
from palindrome.model.unet import UNet, UNetConfig

CONFIG = {
    "sample_size": 64,  # feature maps of more and of fewer than 1024 pixels
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "norm_num_groups": 8,
}
EPSILON = {"float32": 1.2e-7, "tf32": 1.2e-7, "bfloat16": 7.8e-3, "float16": 9.8e-4}  # on a CPU


@pytest.fixture(scope="module")
def theirs(randomize):
    return randomize(UNet2DModel(**CONFIG), 0).eval()


@pytest.fixture(scope="module")
def checkpoint(theirs):
    return UNet2D(UNetConfig(**CONFIG), theirs.state_dict(), VP())


OF_CLASSES = {
    **CONFIG,
    "resnet_time_scale_shift": "scale_shift",
    "num_class_embeds": 5,
    "attn_norm_num_groups": 8,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "upsample_type": "resnet",
}
FOURIER = {**CONFIG, "time_embedding_type": "fourier"}
CLASSES = torch.tensor([4, 0, 4])


def conditional(randomize, **change):
    theirs = randomize(UNet2DModel(**{**OF_CLASSES, **change}), 0).eval()
    return UNet2D(UNetConfig(**{**OF_CLASSES, **change}), theirs.state_dict(), VP()), theirs


@pytest.fixture(scope="module")
def x():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def off(found, expected):
    """Root mean square of the difference, in deviations."""
    return ((found - expected).square().mean().sqrt() / expected.std()).item()


@torch.no_grad()
@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_precision_gives_what_diffusers_gives_to_its_rounding(checkpoint, theirs, x, precision):
    engine = checkpoint.denoiser("cpu", Execution(precision))
    for timestep in (0, 500, 999):
        found = engine(x, timestep)
        assert found.dtype == torch.float32 and found.shape == x.shape
        error = off(found, theirs(x, timestep).sample)
        assert error < 20 * EPSILON[precision]
        assert error > EPSILON[precision] / 10 or precision in ("float32", "tf32")  # and it is no float32 in disguise


@torch.no_grad()
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("change", [{}, {"resnet_time_scale_shift": "default"}], ids=["scale_shift", "default"])
def test_of_classes_too(randomize, x, precision, change):
    checkpoint, theirs = conditional(randomize, **change)
    engine = checkpoint.denoiser("cpu", Execution(precision))
    for classes in (CLASSES, torch.tensor([1, 1, 1]), torch.tensor([2])):
        batch = x[: len(classes)]
        found = engine(batch, 500, Condition({"class": classes}))
        assert off(found, theirs(batch, 500, classes).sample) < 20 * EPSILON[precision]


@torch.no_grad()
@pytest.mark.parametrize("precision", PRECISIONS)
def test_fourier_embeddings_too(randomize, x, precision):
    theirs = randomize(UNet2DModel(**FOURIER), 0).eval()
    engine = UNet2D(UNetConfig(**FOURIER), theirs.state_dict(), VP()).denoiser("cpu", Execution(precision))
    for timestep in (1, 999):
        error = off(engine(x, timestep), theirs(x, timestep).sample)
        assert error < 20 * EPSILON[precision]
    # what the output is divided by is not rounded: 999 is no bfloat16, and 1000 would be off by 1e-3
    assert engine._biases(999)[-1] == 999


@torch.no_grad()
def test_classes_are_embedded_once_a_step(randomize, x):
    checkpoint, _ = conditional(randomize)
    network = checkpoint.network()
    times = []
    network.class_embedding.register_forward_hook(lambda *_: times.append(1))
    engine, condition = Engine(network, Execution()), Condition({"class": CLASSES.clone()})
    first = engine(x, 7, condition)
    assert torch.equal(engine(x, 7, condition), first) and len(times) == 1
    later = engine(x, 8, condition)
    assert not torch.equal(later, first) and len(times) == 2
    condition.values["class"].fill_(2)
    changed = engine(x, 7, condition)
    assert not torch.equal(changed, first) and len(times) == 3
    for step in range(3 * KEPT):
        engine(x[:1], step, Condition({"class": torch.tensor([step % 5])}))
    assert len(engine._recent) == KEPT, "what is kept is bounded"


def test_a_condition_is_given_where_it_belongs(randomize, checkpoint, x):
    with pytest.raises(ValueError, match="class-conditional: it has to be told the class"):
        conditional(randomize)[0].denoiser()(x, 7)
    with pytest.raises(ValueError, match="not class-conditional"):
        checkpoint.denoiser()(x, 7, Condition({"class": CLASSES}))


@torch.no_grad()
def test_low_precision_knows_the_timestep_in_full(checkpoint, x):
    """Neighbours among 1000 timesteps are told apart: bfloat16 has no 999."""
    engine = checkpoint.denoiser("cpu", Execution("bfloat16"))
    assert not torch.equal(engine(x, 998), engine(x, 999))
    exact = checkpoint.network().biases(torch.tensor([999]))
    kept = checkpoint.network().lower(torch.bfloat16).biases(torch.tensor([999]))
    for a, b in zip(exact, kept, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_a_timestep_is_embedded_once(checkpoint, x):
    network = checkpoint.network()
    times = []
    network.time_embedding.register_forward_hook(lambda *_: times.append(1))
    engine = Engine(network, Execution())
    first = engine(x, 7)
    assert torch.equal(engine(x, 7), first) and torch.equal(engine(x[:1], 7), engine(x[:1], 7))
    assert len(times) == 1
    assert not torch.equal(engine(x, 8), first)
    assert len(times) == 2


@torch.no_grad()
def test_the_state_is_left_alone(checkpoint, x):
    before = x.clone()
    checkpoint.denoiser("cpu", Execution("bfloat16"))(x, 500)
    assert torch.equal(x, before)


@torch.no_grad()
@pytest.mark.skipif(not any(map(which, ("c++", "g++", "clang++"))), reason="no C++ compiler on this machine")
def test_compiled_it_takes_batches_of_every_size_with_one_set_of_kernels(
    tiny,
):
    plain, compiled = tiny.denoiser(), tiny.denoiser("cpu", Execution(compiled=True))
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch._dynamo.utils.counters.clear()
    for batch, timestep in ((x, 3), (x[:2], 3), (x[:1], 500), (x[:4], 999)):
        found = compiled(batch, timestep)
        assert found.shape == batch.shape
        torch.testing.assert_close(found, plain(batch, timestep), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
@pytest.mark.skipif(not any(map(which, ("c++", "g++", "clang++"))), reason="no C++ compiler on this machine")
def test_compiled_it_takes_classes_with_one_set_of_kernels(randomize, small):
    one_block = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    shifted = {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 5}
    config = UNetConfig(**{**small, **one_block, **shifted})
    checkpoint = UNet2D(config, randomize(UNet(config)).state_dict(), VP())
    plain, compiled = checkpoint.denoiser(), checkpoint.denoiser("cpu", Execution(compiled=True))
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch._dynamo.utils.counters.clear()
    for batch, timestep in ((x, 3), (x[:2], 3), (x[:1], 500), (x[:4], 999)):
        condition = Condition({"class": torch.arange(len(batch))})
        found = compiled(batch, timestep, condition)
        torch.testing.assert_close(found, plain(batch, timestep, condition), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_without_a_compiler_it_says_so(tiny, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match=r"C\+\+ compiler"):
        tiny.denoiser("cpu", Execution(compiled=True))


def test_another_precision_is_refused():
    with pytest.raises(ValueError, match="precision is 'float8'; known: float32, tf32, bfloat16, float16"):
        Execution("float8")


def test_tf32_is_for_who_asks(tiny):
    """torch lets convolutions use it unless told otherwise."""
    tiny.denoiser("cpu", Execution("tf32"))
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
    tiny.denoiser("cpu", Execution("float32"))
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("change", [{}, {"num_class_embeds": 5}, {"time_embedding_type": "fourier"}], ids=str)
def test_a_lowered_network_keeps_its_embedding(tiny, change):
    network = UNet(dataclasses.replace(tiny.config, **change)).lower(torch.bfloat16)
    kept = {"time_embedding", "time_emb_proj", "class_embedding", "time_proj"}
    for name, parameter in network.named_parameters():
        assert parameter.dtype == (torch.float32 if kept & set(name.split(".")) else torch.bfloat16), name
