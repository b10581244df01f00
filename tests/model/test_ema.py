"""The moving average against its recurrence in float64."""

import io
from copy import deepcopy

import pytest
import torch
from torch import nn

from palindrome.model.ema import EMA


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.GroupNorm(1, 7))


def weights(ema):
    return ema.module.state_dict()


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
        ema.update_parameters(net)
        d = min(decay, (1 + n) / (10 + n))
        expected = {k: d * v + (1 - d) * net.state_dict()[k].double() for k, v in expected.items()}
    assert weights(ema).keys() == net.state_dict().keys()
    for k, v in expected.items():
        torch.testing.assert_close(weights(ema)[k].double(), v, rtol=0, atol=1e-6)


def test_average_does_not_follow_the_network_unasked():
    net = network()
    ema, before = EMA(net, 0.9), {k: v.clone() for k, v in net.state_dict().items()}
    train(net, torch.Generator().manual_seed(1))
    assert all(torch.equal(weights(ema)[k], v) for k, v in before.items())
    ema.update_parameters(net)
    assert not any(torch.equal(weights(ema)[k], v) for k, v in before.items())


def test_average_loads_into_the_network():
    net = network()
    ema = EMA(net, 0.9)
    train(net, torch.Generator().manual_seed(1))
    ema.update_parameters(net)
    other = network(seed=3)
    other.load_state_dict(weights(ema))
    torch.testing.assert_close(other.state_dict(), weights(ema), rtol=0, atol=0)


def test_average_of_a_bfloat16_network_is_float32():
    net = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(net.weight, 1.0)
    ema = EMA(net, 0.999)
    ema.n_averaged.fill_(100_000)
    nn.init.constant_(net.weight, 0.0)
    ema.update_parameters(net)
    assert weights(ema)["weight"].item() == pytest.approx(0.999, abs=1e-6)  # 1.0 in bfloat16


def test_resumed_average_equals_an_uninterrupted_one():
    net, generator = network(), torch.Generator().manual_seed(1)
    whole = EMA(net, 0.99)
    for _ in range(5):
        train(net, generator)
        whole.update_parameters(net)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = EMA(network(seed=3), 0.99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(5):
        train(net, generator)
        whole.update_parameters(net)
        resumed.update_parameters(net)
    assert resumed.n_averaged == whole.n_averaged == 11  # one more than the updates
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_a_state_of_versions_without_averaged_model_goes_on_to_the_same_weights():
    """They kept `updates` and `shadow.NAME`, and moved the shadow by lerp."""
    net, generator = network(), torch.Generator().manual_seed(1)
    shadow = {k: v.clone() for k, v in network(seed=3).state_dict().items()}
    file = io.BytesIO()
    torch.save({"updates": 5, **{f"shadow.{k}": v for k, v in shadow.items()}}, file)
    file.seek(0)
    resumed = EMA(net, 0.99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(weights(resumed)[k], v) for k, v in shadow.items())
    for n in range(6, 11):
        train(net, generator)
        resumed.update_parameters(net)
        for k, v in net.state_dict().items():
            shadow[k].lerp_(v, 1 - min(0.99, (1 + n) / (10 + n)))
    torch.testing.assert_close(weights(resumed), shadow, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", ["module.0.weight", "shadow.0.weight"])
def test_a_state_without_one_of_the_weights_is_refused(wrong):
    ema = EMA(network(), 0.99)
    state = deepcopy(ema.state_dict())
    if wrong.startswith("shadow"):
        state = {"updates": 0, **{k.replace("module.", "shadow."): v for k, v in state.items() if k != "n_averaged"}}
    del state[wrong]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        ema.load_state_dict(state)
