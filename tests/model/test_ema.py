"""The moving average against its recurrence in float64."""

import io

import pytest
import torch
from torch import nn

from palindrome.model.ema import EMA


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.GroupNorm(1, 7))


def train(net, generator):
    with torch.no_grad():
        for value in net.parameters():
            value += 0.3 * torch.randn(value.shape, generator=generator)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_average_follows_the_recurrence(decay):
    net, generator = network(), torch.Generator().manual_seed(1)
    ema = EMA(net, decay)
    expected = {k: v.double() for k, v in net.state_dict().items()}
    for n in range(1, 41):
        train(net, generator)
        ema.update(net)
        d = min(decay, (1 + n) / (10 + n))
        expected = {k: d * v + (1 - d) * net.state_dict()[k].double() for k, v in expected.items()}
    assert ema.shadow.keys() == net.state_dict().keys()
    for k, v in expected.items():
        torch.testing.assert_close(ema.shadow[k].double(), v, rtol=0, atol=1e-6)


def test_average_does_not_follow_the_network_unasked():
    net = network()
    ema, before = EMA(net, 0.9), {k: v.clone() for k, v in net.state_dict().items()}
    train(net, torch.Generator().manual_seed(1))
    assert all(torch.equal(ema.shadow[k], v) for k, v in before.items())
    ema.update(net)
    assert not any(torch.equal(ema.shadow[k], v) for k, v in before.items())


def test_average_loads_into_the_network():
    net = network()
    ema = EMA(net, 0.9)
    train(net, torch.Generator().manual_seed(1))
    ema.update(net)
    other = network(seed=3)
    other.load_state_dict(ema.shadow)
    torch.testing.assert_close(other.state_dict(), ema.shadow, rtol=0, atol=0)


def test_average_of_a_bfloat16_network_is_float32():
    net = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(net.weight, 1.0)
    ema = EMA(net, 0.999)
    ema.updates = 100_000
    nn.init.constant_(net.weight, 0.0)
    ema.update(net)
    assert ema.shadow["weight"].item() == pytest.approx(0.999, abs=1e-6)  # 1.0 in bfloat16


def test_resumed_average_equals_an_uninterrupted_one():
    net, generator = network(), torch.Generator().manual_seed(1)
    whole = EMA(net, 0.99)
    for _ in range(5):
        train(net, generator)
        whole.update(net)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = EMA(network(seed=3), 0.99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(5):
        train(net, generator)
        whole.update(net)
        resumed.update(net)
    assert resumed.updates == whole.updates == 10
    torch.testing.assert_close(resumed.shadow, whole.shadow, rtol=0, atol=0)
