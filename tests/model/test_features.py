"""Networks of features: TorchScript, and Inception by torch-fidelity."""

import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from palindrome.model import features
from palindrome.model.families import CheckpointError
from palindrome.model.features import BLOCK, INCEPTION, KNOWN


def saved(network, path):
    torch.jit.save(torch.jit.script(network), path)
    return str(path)


@pytest.fixture(scope="module")
def network(scripted):
    return features.load("tiny", str(scripted), 32)


def test_a_network_says_what_it_makes(network):
    found = network.record()
    assert (found["name"], found["size"], found["dimensions"], found["classes"]) == ("tiny", 32, 24, 10)
    assert network.image_shape == (3, 32, 32)


def test_it_makes_what_the_script_does(network, scripted):
    x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = torch.jit.load(scripted)(x)
    for found, wanted in zip(network.denoiser()(x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_an_image_s_features_do_not_depend_on_the_batch(network):
    x = torch.rand(2 * BLOCK + 3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    compute = network.denoiser()
    whole, _ = compute(x)
    for rows in (slice(0, 1), slice(5, 9), slice(BLOCK - 1, BLOCK + 1), slice(BLOCK, None)):
        assert torch.equal(compute(x[rows])[0], whole[rows])


def test_it_is_sent_to_workers(network):
    again = pickle.loads(pickle.dumps(network))
    x = torch.zeros(1, 3, 32, 32)
    assert again.digest == network.digest and torch.equal(again.denoiser()(x)[0], network.denoiser()(x)[0])


class Alone(torch.nn.Module):
    def forward(self, x: torch.Tensor):
        return x.mean([2, 3])


class Maps(torch.nn.Module):
    def forward(self, x: torch.Tensor):
        return x


class Three(torch.nn.Module):
    def forward(self, x: torch.Tensor):
        return x[:, 0, 0], x[:, 1, 0], x[:, 2, 0]


class Narrow(torch.nn.Module):
    def forward(self, x: torch.Tensor):
        return x.reshape(len(x), 12)


def test_features_alone_have_no_classes(tmp_path):
    found = features.load("mean", saved(Alone(), tmp_path / "a.pt"), 8)
    assert (found.dimensions, found.classes) == (3, 0)


@pytest.mark.parametrize(
    ("network", "words"),
    [(Maps(), "makes .* and not features"), (Three(), "neither features nor"), (Narrow(), "can't be evaluated")],
)
def test_another_output_is_refused(tmp_path, network, words):
    with pytest.raises(CheckpointError, match=words):
        features.load("mine", saved(network, tmp_path / "x.pt"), 8)


def test_what_is_no_script_is_refused_and_no_pickle_is_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "opened").touch, ()

    (tmp_path / "trap.pt").write_bytes(pickle.dumps(Trap()))
    torch.save({"a": torch.zeros(1), "b": Trap()}, tmp_path / "trap.pth")
    for name, file, words in [
        ("mine", "trap.pt", "no TorchScript file"),
        ("mine", "trap.pth", "no TorchScript file"),
        (INCEPTION, "trap.pth", "no file that is known to hold the Inception of 2015: its sha256 is [0-9a-f]{64}"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            features.load(name, str(tmp_path / file), None)
    assert not (tmp_path / "opened").exists()


def test_inception_takes_one_size(scripted, monkeypatch):
    monkeypatch.setitem(KNOWN, features.load("tiny", str(scripted), 32).digest, "TorchScript")
    with pytest.raises(CheckpointError, match="299 pixels"):
        features.load(INCEPTION, str(scripted), 32)


@pytest.fixture(scope="module")
def inception(torch_fidelity, tmp_path_factory):
    """torch-fidelity's network with drawn weights, and the two kinds of file with them."""
    from unittest import mock

    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Extractor

    layers = ["2048", "logits_unbiased"]
    with mock.patch("torch.load"), mock.patch.object(Extractor, "load_state_dict"):
        network = Extractor("inception", layers, "none")
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if value.dim() > 1:
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
        elif name.endswith(("bn.bias", "running_mean")):
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    folder = tmp_path_factory.mktemp("inception")
    safetensors.torch.save_file(network.state_dict(), folder / "inception.safetensors")
    torch.save(network.state_dict(), folder / "inception.pth")
    return network, folder


def test_inception_is_torch_fidelity_s(inception):
    from palindrome.pipeline.images.resize import RANGES, TENSORFLOW, resized

    theirs, folder = inception
    mine = features.load(INCEPTION, str(folder / "inception.safetensors"), None)
    assert (mine.size, mine.dimensions, mine.classes) == (299, 2048, 1008)
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 32, 3), np.uint8)
    expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    found = mine._network().eval()(resized(list(images), 299, TENSORFLOW, RANGES[TENSORFLOW]))
    for mine_, wanted in zip(found, expected, strict=True):
        assert float((mine_ - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_a_known_pickle_is_opened_by_its_hash_alone(inception, monkeypatch):
    _, folder = inception
    path = str(folder / "inception.pth")
    with pytest.raises(CheckpointError, match="no file that is known"):
        features.load(INCEPTION, path, None)
    digest = features.FeatureNetwork(name="", content=(folder / "inception.pth").read_bytes(), size=299).digest
    monkeypatch.setitem(KNOWN, digest, "state dict")
    same = features._weights((folder / "inception.pth").read_bytes())
    assert torch.equal(same["fc.weight"], inception[0].state_dict()["fc.weight"])


def test_weights_of_another_network_are_refused(torch_fidelity, tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"not those of inception-2015: .*Missing key"):
        features.load(INCEPTION, str(tmp_path / "a.safetensors"), None)


def test_the_hash_of_pytorch_fid_s_file_begins_as_its_name_says(torch_fidelity):
    from pytorch_fid.inception import FID_WEIGHTS_URL

    begin = FID_WEIGHTS_URL.rpartition("-")[2].removesuffix(".pth")
    assert any(digest.startswith(begin) for digest in KNOWN)
