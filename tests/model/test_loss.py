"""The training loss against diffusers' forward process and velocity, and against networks with a known error."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from palindrome.model.loss import DiffusionLoss
from palindrome.model.process import PREDICTION_TYPES, VP

SCHEDULE = VP(100, beta_start=1e-3, beta_end=0.08)
X0 = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def network(x, t):
    return torch.sin(2 * x + t[:, None, None, None] / 30)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_equals_a_hand_written_one(prediction_type):
    scheduler = DDPMScheduler(100, beta_start=1e-3, beta_end=0.08)
    generator = seeded()
    t = torch.randint(100, (6,), generator=generator)
    epsilon = torch.randn(X0.shape, generator=generator)
    noisy = scheduler.add_noise(X0, epsilon, t)
    velocity = scheduler.get_velocity(X0, epsilon, t)
    target = {"epsilon": epsilon, "v_prediction": velocity, "sample": X0}[prediction_type]
    expected = sum((network(noisy, t) - target).flatten().double() ** 2) / X0.numel()
    loss = DiffusionLoss(replace(SCHEDULE, prediction_type=prediction_type))(network, X0, seeded())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.shape == () and loss.dtype == torch.float32


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_only_the_true_target_has_no_loss(prediction_type):
    alpha_bar = torch.from_numpy(SCHEDULE.alphas_cumprod)

    def perfect(x, t):
        a = alpha_bar[t][:, None, None, None]
        epsilon = (x - a.sqrt() * X0) / (1 - a).sqrt()
        return {"epsilon": epsilon, "v_prediction": a.sqrt() * epsilon - (1 - a).sqrt() * X0, "sample": X0}[
            prediction_type
        ]

    loss = DiffusionLoss(replace(SCHEDULE, prediction_type=prediction_type))
    assert loss(perfect, X0, seeded()) < 1e-9
    assert loss(lambda x, t: perfect(x, t) + 0.1, X0, seeded()).item() == pytest.approx(0.01, rel=1e-3)


def test_every_timestep_is_drawn_equally_often():
    told = []

    def listening(x, t):
        told.append(t)
        return x

    DiffusionLoss(VP(10))(listening, torch.zeros(20_000, 1, 1, 1), seeded())
    counts = torch.bincount(torch.cat(told), minlength=10)
    assert counts.shape == (10,)
    assert (counts - 2000).abs().max() < 5 * (20_000 * 0.1 * 0.9) ** 0.5  # five standard deviations


def test_gradient_reaches_the_network():
    scale = torch.zeros((), requires_grad=True)
    DiffusionLoss(replace(SCHEDULE, prediction_type="sample"))(lambda x, t: scale * X0, X0, seeded()).backward()
    assert scale.grad.item() == pytest.approx(-2 * X0.square().mean().item(), rel=1e-5)


def test_loss_of_a_bfloat16_network_is_float32():
    loss = DiffusionLoss(SCHEDULE)
    half = loss(lambda x, t: network(x, t).bfloat16(), X0, seeded())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(loss(network, X0, seeded()).item(), rel=1e-2)
