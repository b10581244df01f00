"""EDM's networks against what EDM's own code computed (tests/fixtures/edm/README.md)."""

import gzip
import io
import json
import pickle
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from palindrome.model import families
from palindrome.model.condition import ClassOf, Condition
from palindrome.model.ddim import apply, evaluate, sample
from palindrome.model.edm_unet import NO_CLASS, EDMUNet
from palindrome.model.execution import Execution
from palindrome.model.families.base import CheckpointError
from palindrome.model.families.edm import CONVERT, _parsed
from palindrome.model.inversion import invert_exactly

FIXTURES = Path(__file__).parents[2] / "fixtures"
MADE = runpy.run_path(str(FIXTURES / "make_edm_fixtures.py"))
CASES = json.loads((FIXTURES / "edm" / "cases.json").read_text())
OUTPUTS = safetensors.torch.load_file(FIXTURES / "edm" / "tensors.safetensors")
LEVELS = (-1, *range(0, 1000, 111))  # the steps of a sample of theirs
CLASSES = [{"label": number} for number in MADE["LABELS"]]


def write(folder, case, change=None, files=("config.json", "model.safetensors"), **config):
    """A case's config, without the keys that are None, and its weights."""
    both = {**case["config"], **config}
    tensors = MADE["weights_for"](case["shapes"], case["seed"], case["config"])
    if change:
        change(tensors)
    folder.mkdir(exist_ok=True)
    (folder / files[0]).write_text(json.dumps({key: value for key, value in both.items() if value is not None}))
    if files[1].endswith(".pt"):
        torch.save(tensors, folder / files[1])
    else:
        safetensors.torch.save_file(tensors, folder / files[1])
    return str(folder)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def outputs(case):
    name = next(name for name, other in CASES.items() if other is case)
    return {key.partition(": ")[2]: value for key, value in OUTPUTS.items() if key.startswith(f"{name}: ")}


@pytest.fixture
def loaded(case, tmp_path):
    loaded = families.load(write(tmp_path, case))
    return loaded.with_classes(ClassOf("label")) if loaded.class_conditional else loaded


def noise(case):
    return MADE["noise_for"](case["seed"], case["config"])


def denoised(loaded, x, step, condition):
    """D of x / alpha, which has the noise level of the step."""
    reading = loaded.process.reading(LEVELS[1 + step])
    return apply(reading.x0, x, evaluate(loaded.denoiser(), x, reading, condition))


def close(ours, theirs, tolerance):
    torch.testing.assert_close(ours / theirs.std(), theirs / theirs.std(), rtol=0, atol=tolerance)


@torch.no_grad()
def test_denoised_equals_theirs(case, outputs, loaded):
    condition = loaded.condition(CLASSES)
    for step in MADE["DENOISED"]:
        theirs = outputs[f"denoised {step}"]
        close(denoised(loaded, noise(case), step, condition), theirs, 1e-5)
        assert theirs.std() > 0.1
        if condition is not None:
            assert (theirs - outputs[f"without {step}"]).abs().max() > 0.001 * theirs.std()


def test_noise_levels_are_theirs(case, loaded):
    levels = [loaded.process.marginal(level) for level in LEVELS[1:]]
    assert [at.sigma / at.alpha for at in levels] == pytest.approx(case["sigmas"], rel=1e-5)  # theirs of VP are float32
    size, channels = case["config"]["img_resolution"], case["config"]["img_channels"]
    assert loaded.image_shape == loaded.latent_shape == (channels, size, size)


@torch.no_grad()
@pytest.mark.parametrize("weight", [0, 2.5])
def test_guidance_drops_the_label_to_zeros(case, outputs, loaded, weight):
    """D is an affine function of F: they combine alike. At weight 0, D is that of no class."""
    if not loaded.class_conditional:
        with pytest.raises(ValueError, match="not class-conditional"):
            loaded.with_guidance(weight)
        return
    guided = loaded.with_guidance(weight)
    assert guided.told()["guidance"] == {"weight": weight, "null_class": NO_CLASS}
    assert loaded.with_guidance(**guided.told()["guidance"]).guidance == guided.guidance
    condition = guided.condition(CLASSES)
    for step in MADE["DENOISED"]:
        with_it, without = outputs[f"denoised {step}"], outputs[f"without {step}"]
        close(denoised(loaded, noise(case), step, condition), without + weight * (with_it - without), 3e-5)


def test_their_samples_are_ours(case, outputs, loaded):
    x = noise(case) * loaded.process.marginal(LEVELS[-1]).sigma
    ours = sample(loaded.denoiser(), x, LEVELS, loaded.process, condition=loaded.condition(CLASSES))
    close(ours, outputs["sample"], 1e-4)


def test_a_sample_of_theirs_is_inverted_exactly(case, outputs, loaded):
    network, along = loaded.denoiser(), {"condition": loaded.condition(CLASSES)}
    image = outputs["sample"]
    x, *_ = invert_exactly(network, image, LEVELS, loaded.process, corrections=40, tolerance=1e-6, **along)
    close(sample(network, x, LEVELS, loaded.process, **along), image, 3e-5)
    close(x, noise(case) * loaded.process.marginal(LEVELS[-1]).sigma, 0.05)  # images forget where they come from


@torch.no_grad()
def test_a_class_for_all_is_one_for_each(loaded):
    if not loaded.class_conditional:
        assert loaded.condition(CLASSES) is None
        with pytest.raises(ValueError, match="not class-conditional"):
            loaded.network()(torch.zeros(1, *loaded.latent_shape), torch.zeros(1), torch.tensor([0]))
        with pytest.raises(ValueError, match="not class-conditional"):
            loaded.with_classes(ClassOf(value=0))
        return
    x, network = torch.randn(2, *loaded.latent_shape, generator=torch.Generator().manual_seed(0)), loaded.denoiser()
    of_each = network(x, -0.5, Condition({"class": torch.tensor([6, NO_CLASS])}))
    for i, number in enumerate((6, NO_CLASS)):
        for_all = network(x, -0.5, Condition({"class": torch.tensor([number])}))
        torch.testing.assert_close(for_all[i], of_each[i], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="has to be told the class"):
        network(x, -0.5)
    for number in (7, NO_CLASS, "6"):
        assert f"the class is {number!r}, not a number below 7" in loaded.refusal({"label": number})
    assert "no class" in loaded.refusal({"label": None})
    for number in (7, -2):
        with pytest.raises(ValueError, match=f"stands for none: the class is {number}"):
            loaded.with_guidance(2, number)


@torch.no_grad()
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_gives_theirs_to_its_rounding(case, outputs, loaded, precision):
    network, condition = loaded.denoiser(execution=Execution(precision)), loaded.condition(CLASSES)
    step = MADE["DENOISED"][1]
    reading = loaded.process.reading(LEVELS[1 + step])
    ours = apply(reading.x0, noise(case), evaluate(network, noise(case), reading, condition))
    theirs = outputs[f"denoised {step}"]
    off = (ours - theirs).square().mean().sqrt() / theirs.std()
    rounding = {"bfloat16": 7.8e-3, "float16": 9.8e-4}[precision]
    assert rounding / 30 < off < 20 * rounding  # and it is no float32 in disguise


@pytest.mark.parametrize("name", json.loads(gzip.decompress((FIXTURES / "edm" / "published.json.gz").read_bytes())))
def test_published_networks_have_our_parameters(name):
    """Without weights: by the names and shapes of their state dicts."""
    made = json.loads(gzip.decompress((FIXTURES / "edm" / "published.json.gz").read_bytes()))[name]
    config, process = _parsed(made["config"])
    with torch.device("meta"):
        network = EDMUNet(config)
    assert {f"model.{key}": list(value.shape) for key, value in network.state_dict().items()} == made["shapes"]
    assert (process.sigma_min, process.sigma_max, process.sigma_data) == (0.002, 80, 0.5)


def test_every_kind_of_file_is_the_same_model(tmp_path):
    case = CASES["adm_classes"]
    digest = families.load(write(tmp_path / "folder", case)).digest
    write(tmp_path, case, files=("x.json", "x.safetensors"))
    assert families.load(str(tmp_path / "x.safetensors")).digest == digest
    write(tmp_path, case, files=("y.json", "y.pt"), dropout=0.5, use_fp16=True)  # without effect
    assert families.load(str(tmp_path / "y.pt"), allow_pickle=True).digest == digest
    fails(str(tmp_path / "y.pt"), "--allow-pickle")
    bare = write(tmp_path / "bare", case, lambda t: [t.update({k[len("model.") :]: t.pop(k)}) for k in list(t)])
    assert families.load(bare).digest == digest
    others = (
        write(tmp_path / "data", case, sigma_data=0.4),
        write(tmp_path / "range", case, sigma_max=70),
        write(tmp_path / "vp", case, class_name="VPPrecond"),
        write(tmp_path / "weights", case, lambda t: t["model.out_conv.bias"].add_(1)),
    )
    assert len({digest, *(families.load(other).digest for other in others)}) == 5


def fails(path, *named, **how):
    with pytest.raises(CheckpointError) as error:
        families.load(path, **how)
    for text in (path, *named):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("name", "config", "named"),
    [
        ("skip", {"class_name": None}, "class_name is missing"),
        ("skip", {"class_name": "iDDPMPrecond"}, "'iDDPMPrecond'; known: EDMPrecond, VPPrecond, VEPrecond"),
        ("skip", {"img_resolution": None}, "img_resolution is missing"),
        ("skip", {"img_channels": None}, "img_channels is missing"),
        ("skip", {"img_channels": 4}, "img_channels is 4"),
        ("skip", {"img_resolution": 6}, "img_resolution 6 is not divisible by 4"),
        ("skip", {"img_resolution": "8"}, "img_resolution is '8'"),
        ("skip", {"model_type": "UNet"}, "model_type is 'UNet'; known: SongUNet, DhariwalUNet"),
        ("skip", {"model_type": ["SongUNet"]}, "model_type"),
        ("skip", {"embedding_type": "learned"}, "embedding_type is 'learned'; known: 'positional', 'fourier'"),
        ("skip", {"encoder_type": "dense"}, "encoder_type is 'dense'"),
        ("skip", {"decoder_type": "residual"}, "decoder_type is 'residual'"),
        ("skip", {"resample_filter": [1, 2, 1]}, "resample_filter is [1, 2, 1]; known: [1, 1], [1, 3, 3, 1]"),
        ("skip", {"channel_mult": []}, "channel_mult is empty"),
        ("skip", {"channel_mult": [1, 2.5, 1]}, "channel_mult is [1, 2.5, 1]"),
        ("skip", {"num_blocks": 0}, "num_blocks is 0"),
        ("skip", {"label_dim": -1}, "label_dim is -1"),
        ("skip", {"label_dim": 0}, "map_label.bias is (32,), and the config asks for nothing"),
        ("skip", {"augment_dim": 9}, "map_augment.weight is nothing"),
        ("skip", {"resample_filter": [1, 1]}, "resample_filter is (1, 1, 4, 4), and the config asks for (1, 1, 2, 2)"),
        ("skip", {"model_channels": 15, "channel_mult_noise": 1}, "model_channels is 15"),
        ("skip", {"model_channels": 18}, "model_channels 18"),  # no groups for its norms
        ("skip", {"sigma_data": 0}, "sigma_data is 0"),
        ("skip", {"sigma_data": "0.5"}, "sigma_data is '0.5'"),
        ("skip", {"sigma_min": 90}, "sigma_min < sigma_max"),
        ("skip", {"sigma_min": float("nan")}, "sigma_min is nan"),
        ("skip", {"beta_d": 19.9}, "'beta_d'"),
        ("skip", {"num_heads": 4}, "'num_heads'"),
        ("adm", {"encoder_type": "standard"}, "'encoder_type' is no key of DhariwalUNet's"),
        ("adm", {"model_channels": 224, "channel_mult": [1]}, "3 heads do not divide 224"),
        ("vp", {"M": 100.5}, "M is 100.5"),
        ("vp", {"beta_d": 0}, "beta_d 0"),
        ("vp", {"sigma_data": 0.5}, "'sigma_data'"),
    ],
)
def test_configs_that_do_not_fit_are_named(tmp_path, name, config, named):
    fails(write(tmp_path, CASES[name], **config), named)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.out_conv.bias"), "out_conv.bias is nothing, and the config asks for (3,)"),
        (lambda t: t.update(more=torch.zeros(1)), "more is (1,), and the config asks for nothing"),
        (lambda t: t.update({"model.out_conv.bias": torch.zeros(6)}), "out_conv.bias is (6,)"),
        (lambda t: t["model.out_conv.bias"].fill_(float("nan")), "out_conv.bias holds values that are not finite"),
        (lambda t: t["model.dec.8x8_up.skip.resample_filter"].mul_(2), "dec.8x8_up.skip.resample_filter is not"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, named):
    fails(write(tmp_path, CASES["adm"], change), "model.safetensors", named)


def test_files_that_are_missing_are_named(tmp_path):
    path = write(tmp_path / "model", CASES["adm"])
    (tmp_path / "model/model.safetensors").unlink()
    fails(path, "model.safetensors does not exist")
    (tmp_path / "model/config.json").write_text("[]")
    fails(path, "config.json is not a JSON object")
    fails(str(tmp_path / "none.safetensors"), "does not exist")
    write(tmp_path, CASES["adm"], files=("x.json", "x.safetensors"))
    (tmp_path / "x.json").unlink()
    fails(str(tmp_path / "x.safetensors"), "Put x.json beside it")


def test_a_pickle_of_nvidias_is_refused_with_how_to_convert_it(tmp_path):
    path = str(tmp_path / "edm-cifar10-32x32-uncond-vp.pkl")
    for how in ({}, {"allow_pickle": True}):
        fails(path, "runs the code", CONVERT, **how)
    case = CASES["adm"]
    write(tmp_path, case, files=("x.json", "x.pt"))
    # What a pickle of theirs begins with: a call of a function of theirs, which nothing here may make.
    (tmp_path / "x.pt").write_bytes(b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\nq\x00.")
    fails(str(tmp_path / "x.pt"), "x.pt holds code", CONVERT, allow_pickle=True)
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        families.load(str(tmp_path / "x.pt"), allow_pickle=True)
    assert CONVERT not in str(error.value)


class EDMPrecond(torch.nn.Module):
    """As much of a network of theirs as the script in docs/models.md uses."""

    def __init__(self, tensors, init_kwargs):
        super().__init__()
        self.tensors, self.init_kwargs = tensors, init_kwargs

    def state_dict(self):
        return self.tensors


def test_the_documented_script_writes_what_is_read(tmp_path, monkeypatch):
    case = CASES["ddpmpp"]
    config = {key: value for key, value in case["config"].items() if key != "class_name"}
    net = EDMPrecond(MADE["weights_for"](case["shapes"], case["seed"], config), config)
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"ema": net}))
    dnnlib = SimpleNamespace(util=SimpleNamespace(open_url=lambda path: io.BytesIO(Path(path).read_bytes())))
    monkeypatch.setitem(sys.modules, "dnnlib", dnnlib)
    monkeypatch.setattr(sys, "argv", ["convert.py", str(tmp_path / "net.pkl"), str(tmp_path / "made/model")])
    document = (Path(__file__).parents[3] / "docs/models.md").read_text()
    exec(re.search(r"```python\n(import json, pathlib.*?)```", document, re.DOTALL)[1], {})
    made = families.load(str(tmp_path / "made/model"))
    assert made.digest == families.load(write(tmp_path / "model", case)).digest


def test_commands_take_it(palindrome, pictures, tmp_path):
    """Guided, along the noise levels of a sample of theirs: every image comes back."""
    model, run, out = write(tmp_path / "model", CASES["adm_classes"]), tmp_path / "run", tmp_path / "out"
    flags = ["--images", pictures, "--limit", 3, "--model", model, "--out", run, "--corrections", 20]
    flags += ["--ladder", ",".join(map(str, LEVELS[1:])), "--guidance", 1.5]
    said = palindrome("encode", *flags)
    assert said.code == 2 and "--class" in said.err
    said = palindrome("encode", *flags, "--class", 3, "--measure")
    assert said.code == 0, said.err
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["guidance"] == {"weight": 1.5, "null_class": NO_CLASS}
    assert manifest["model_digest"] == families.load(model).digest
    assert palindrome("verify", run, "--deep", 3).code == 0
    said = palindrome("reconstruct", "--latents", run, "--out", out)
    assert said.code == 0, said.err
    found = [row for file in (out / "reconstructions").iterdir() for row in pq.read_table(file).to_pylist()]
    assert len(found) == 3
    assert max(row["mse"] for row in found) < 1e-6 and all(row["identical"] for row in found)
