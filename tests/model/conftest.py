"""Networks with weights that make a comparison mean something: outputs of order one that depend on the timestep."""

from math import sqrt

import pytest
import torch

from palindrome.model.process import VP


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On these sizes more threads gain nothing, and on a busy machine they wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def randomize():
    """(network, seed) -> the same network in evaluation mode with random weights, none of them near zero."""

    def randomize(network, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in network.named_parameters():
                draw = torch.randn(value.shape, generator=generator)
                if value.dim() > 1:
                    value.copy_(draw / value[0].numel() ** 0.5)
                else:  # a bias, or the scale of a group norm
                    value.copy_(0.3 * draw + float(name.endswith("weight")))
        return network.eval()

    return randomize


@pytest.fixture(scope="session")
def small():
    """The arguments of a network of two blocks on 8x8 images, for UNetConfig and for diffusers' UNet2DModel alike."""
    return {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }


@pytest.fixture(scope="session")
def mixture():
    """mixture(x, timestep), on the linear schedule."""
    schedule = VP()

    def mixture(x, t):
        """The optimal epsilon for data of two narrow Gaussians at -0.6 and 0.6, each channel value on its own."""
        a = schedule.alpha_bar(t)
        variance = a * 0.2**2 + 1 - a
        means = sqrt(a) * torch.tensor([-0.6, 0.6], dtype=x.dtype)
        weights = torch.softmax(-((x[..., None] - means) ** 2) / (2 * variance), -1)
        return sqrt(1 - a) * (x - (weights * means).sum(-1)) / variance

    return mixture
