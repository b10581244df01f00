"""The network as jobs evaluate it, against diffusers' UNet2DModel on the same weights."""

from shutil import which

import pytest
import torch
from diffusers import UNet2DModel

from palindrome.model.engine import Engine
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


def test_a_lowered_network_keeps_its_embedding(tiny):
    network = UNet(tiny.config).lower(torch.bfloat16)
    dtypes = {name: p.dtype for name, p in network.named_parameters()}
    assert {d for name, d in dtypes.items() if "time_emb" in name} == {torch.float32}
    assert {d for name, d in dtypes.items() if "time_emb" not in name} == {torch.bfloat16}
