"""OpenAI's checkpoints against what OpenAI's own code computed (tests/fixtures/openai/README.md)."""

import dataclasses
import gzip
import json
import runpy
from pathlib import Path

import pytest
import safetensors.torch
import torch

from palindrome.model import families
from palindrome.model.condition import Condition
from palindrome.model.ddim import invert, sample
from palindrome.model.families.base import CheckpointError
from palindrome.model.families.openai import PUBLISHED, VISIBLE, _Architecture, _renamed, split
from palindrome.model.families.unet2d import load as load_folder
from palindrome.model.families.unet2d import save
from palindrome.model.unet import UNet

FIXTURES = Path(__file__).parents[2] / "fixtures"
MADE = runpy.run_path(str(FIXTURES / "make_openai_fixtures.py"))
CASES = json.loads((FIXTURES / "openai" / "cases.json").read_text())
OUTPUTS = safetensors.torch.load_file(FIXTURES / "openai" / "tensors.safetensors")
CLASSES = Condition({"class": torch.tensor([3, 6])})
NEEDED = (
    "image_size",
    "num_heads",
    "use_new_attention_order",
    "diffusion_steps",
    "noise_schedule",
    "rescale_timesteps",
)


def write(folder, case, change=None, name="model.pt", **flags):
    """A case's state dict as a file of pickled tensors, and its flags beside it."""
    tensors = MADE["weights_for"](case["shapes"], case["seed"])
    if change:
        change(tensors)
    torch.save(tensors, folder / name)
    both = {"use_new_attention_order": False, **case["flags"], **flags}  # improved-diffusion has one order, the legacy
    path = folder / f"{name.rpartition('.')[0]}.json"
    path.write_text(json.dumps({key: value for key, value in both.items() if value is not None}))
    return str(folder / name)


def load(path):
    return families.load(path, allow_pickle=True)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def outputs(case):
    name = next(name for name, other in CASES.items() if other is case)
    return {key.partition(": ")[2]: value for key, value in OUTPUTS.items() if key.startswith(f"{name}: ")}


@pytest.fixture
def loaded(case, tmp_path):
    return load(write(tmp_path, case))


@pytest.fixture
def told(case):
    return CLASSES if case["flags"]["class_cond"] else None


@torch.no_grad()
def test_outputs_equal_theirs(case, outputs, loaded, told):
    x = MADE["noise_for"](case["seed"])
    found = {int(name.split()[1]): value for name, value in outputs.items() if name.startswith("output")}
    assert len(found) == 2 and loaded.config.sample_size == MADE["SIZE"]
    network, denoiser = loaded.network(), loaded.denoiser()
    for timestep, theirs in found.items():
        theirs = theirs[:, :3]  # the mean; the rest is of the variance
        ours = denoiser(x, timestep) if told is None else denoiser(x, timestep, told)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        by_forward = network(x, timestep, None if told is None else told.values["class"])
        torch.testing.assert_close(by_forward, theirs, rtol=0, atol=1e-5)
        assert theirs.std() > 0.1
    low, high = (outputs[f"output {timestep}"] for timestep in sorted(found))
    assert (low - high).abs().max() > 0.02


def test_their_ddim_samples_are_ours(case, outputs, loaded, told):
    """`ddim_sample_loop` ends at alpha-bar 1, as `sample` does at -1."""
    x = MADE["noise_for"](case["seed"])
    ours = sample(loaded.denoiser(), x, [-1, *case["timesteps"]], loaded.process, condition=told)
    theirs = outputs["sample"]
    torch.testing.assert_close(ours / theirs.std(), theirs / theirs.std(), rtol=0, atol=1e-4)


def test_their_reverse_ddim_is_ours(case, outputs, loaded, told):
    """`ddim_reverse_sample` takes the image to be at the first timestep already, where `set_alpha_to_one` false has the
    clean end, and tells the network the timestep it leaves: `source`."""
    x = MADE["noise_for"](case["seed"]).tanh()
    process = dataclasses.replace(loaded.process, set_alpha_to_one=False)
    assert case["timesteps"][0] == 0
    ours = invert(loaded.denoiser(), x, [-1, *case["timesteps"]], process, condition=told, told="source")
    theirs = outputs["reverse"]
    torch.testing.assert_close(ours / theirs.std(), theirs / theirs.std(), rtol=0, atol=1e-4)


@torch.no_grad()
def test_folders_are_opened_by_us_and_those_that_diffusers_can_express_by_it(case, loaded, told, tmp_path):
    beyond = loaded.config.beyond_diffusers
    expected = {
        "all_resolutions": ["num_attention_heads"],
        "heads_upsample": ["num_attention_heads", "num_attention_heads_up"],
        "half_width": ["time_proj_dim"],
        "rescaled": ["timestep_scale"],
        "improved": ["timestep_scale"],
        "improved_plain": ["num_attention_heads", "num_attention_heads_up"],
    }
    name = next(name for name, other in CASES.items() if other is case)
    assert beyond == expected.get(name, [])
    save(loaded, str(tmp_path / "folder"))
    again = load_folder(str(tmp_path / "folder"))
    assert again.digest == loaded.digest and again.config == loaded.config
    from diffusers import DDIMPipeline, UNet2DModel

    if beyond:  # diffusers must not open it, and pass over what it does not know
        for opened in (UNet2DModel, DDIMPipeline):
            with pytest.raises((OSError, ValueError, AttributeError)):
                opened.from_pretrained(tmp_path / "folder", **({"subfolder": "unet"} if opened is UNet2DModel else {}))
        return
    theirs = UNet2DModel.from_pretrained(tmp_path / "folder", subfolder="unet")
    x = MADE["noise_for"](case["seed"])
    classes = None if told is None else told.values["class"]
    ours = loaded.network()(x, 50, classes)
    torch.testing.assert_close(theirs(x, 50, classes).sample[:, :3], ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", json.loads(gzip.decompress((FIXTURES / "openai" / "published.json.gz").read_bytes())))
def test_published_models_are_recognised(name):
    """Without weights: from the names and shapes of their state dicts."""
    shapes = json.loads(gzip.decompress((FIXTURES / "openai" / "published.json.gz").read_bytes()))[name]
    flags = {"num_heads_upsample": -1, "num_head_channels": -1, "dropout": 0.0, **PUBLISHED[name]}
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    architecture = _Architecture.of(tensors)
    assert architecture.visible() == {key: flags[key] for key in VISIBLE}
    config = architecture.config(flags)
    weights = _renamed(tensors, architecture, config, flags["use_new_attention_order"])
    with torch.device("meta"):
        network = UNet(config)
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in weights.items()}
    assert config.num_class_embeds == (1000 if flags["class_cond"] else None)
    assert config.out_channels == 6 and config.sample_size == flags["image_size"]
    assert config.beyond_diffusers == {
        "128x128_diffusion": ["num_attention_heads"],
        "512x512_diffusion": ["time_proj_dim"],
        "imagenet64_uncond_100M_1500K": ["num_attention_heads", "timestep_scale"],
        "imagenet64_cond_270M_250K": ["num_attention_heads"],
        "cifar10_uncond_50M_500K": ["timestep_scale"],
    }.get(name, [])


def test_a_published_name_needs_no_flags(tmp_path):
    """The name stands for the flags, and what it says is compared with the tensors."""
    path = write(tmp_path, CASES["improved"], name="cifar10_uncond_50M_500K.pt")
    (tmp_path / "cifar10_uncond_50M_500K.json").unlink()
    fails(path, "num_channels is 128 by its flags, and 32 by its tensors")
    (tmp_path / "cifar10_uncond_50M_500K.json").write_text('{"num_channels": 32, "num_res_blocks": 1}')
    loaded = load(path)
    assert (loaded.process.num_train_timesteps, loaded.process.beta_schedule) == (4000, "squaredcos_cap_v2")
    assert (loaded.config.sample_size, loaded.config.timestep_scale) == (32, 0.25)


def test_the_order_of_qkv():
    """Rows are numbered head by head, and within one by q, k and v."""
    legacy = torch.arange(12)
    assert [part.tolist() for part in split(legacy, 2)] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert [part.tolist() for part in split(legacy, 1)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert split(torch.zeros(12, 4), 2)[0].shape == (4, 4)


def fails(path, *named, allow_pickle=True):
    with pytest.raises(CheckpointError) as error:
        families.load(path, allow_pickle=allow_pickle)
    for text in (path, *named):
        assert text in str(error.value)


@pytest.mark.parametrize("key", NEEDED)
def test_missing_flags_are_named(tmp_path, key):
    both = {"num_head_channels": None} if key == "num_heads" else {}  # of which one is enough
    fails(write(tmp_path, CASES["legacy"], **{key: None}, **both), "model.json", key)


def test_without_flags_all_are_named(tmp_path):
    path = write(tmp_path, CASES["legacy"])
    (tmp_path / "model.json").unlink()
    fails(path, "model.json", *NEEDED)
    (tmp_path / "model.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        load(path)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"noise_schedule": "sigmoid"}, "noise_schedule is 'sigmoid'; known: linear, cosine"),
        ({"num_heads": 5}, "num_attention_heads 5"),
        ({"num_head_channels": 24}, "attention_head_dim 24"),
        ({"image_size": 15}, "sample_size 15"),
        ({"image_size": "large"}, "image_size is 'large'"),
        ({"diffusion_steps": 0}, "diffusion_steps is 0, not a whole number above 0"),
        ({"num_heads": -1}, "num_heads or num_head_channels"),
        ({"num_heads": 2.0}, "num_heads is 2.0"),
        ({"rescale_timesteps": "False"}, "rescale_timesteps is 'False', not true or false"),
        ({"diffusion_steps": 10}, "beta"),
        ({"class_cond": True}, "class_cond is True by its flags, and False by its tensors"),
        ({"resblock_updown": True}, "resblock_updown is True"),
        ({"learn_sigma": True}, "learn_sigma is True"),
        ({"use_scale_shift_norm": True}, "use_scale_shift_norm is True"),
        ({"num_attention_blocks": 2}, "'num_attention_blocks'"),
    ],
)
def test_flags_that_do_not_fit_are_named(tmp_path, flags, named):
    fails(write(tmp_path, CASES["legacy"], **flags), named)


def put(name, shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop("out.2.bias"), "out.2.bias is missing"),
        (lambda tensors: tensors.pop("input_blocks.1.0.in_layers.2.weight"), "input_blocks.1.0.in_layers.2.weight"),
        (lambda tensors: tensors.pop("time_embed.0.weight"), "time_embed.0.weight is missing"),
        (put("input_blocks.1.1.qkv.bias", 96), "input_blocks.1.1.qkv.bias is no part"),
        (put("out.2.weight", (3, 32, 1, 1)), "conv_out.weight is (3, 32, 1, 1)"),
        (put("input_blocks.0.0.weight", (32, 6, 3, 3)), "6 in_channels"),  # a model that upsamples
        (lambda tensors: tensors["out.2.bias"].fill_(float("nan")), "not finite"),
        (lambda tensors: [tensors.pop(k) for k in list(tensors) if k.startswith("output_blocks")], "output_blocks"),
        (lambda tensors: [tensors.pop(k) for k in list(tensors) if ".conv." in k or ".op." in k], "conv_resample"),
        (lambda tensors: tensors.clear(), "output_blocks"),
    ],
)
def test_other_networks_are_named(tmp_path, change, named):
    fails(write(tmp_path, CASES["legacy"], change), named)


def test_attention_in_some_layers_of_a_level_is_named(tmp_path):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith("input_blocks.2.1.")]:
            tensors.pop(name)

    fails(write(tmp_path, CASES["all_resolutions"], drop), "input_blocks.2.1")


def test_a_pickle_is_loaded_only_if_allowed_and_as_tensors_alone(tmp_path):
    path = write(tmp_path, CASES["legacy"])
    fails(path, "--allow-pickle", allow_pickle=False)
    digest = load(path).digest
    assert load(write(tmp_path, CASES["legacy"], name="again.pth")).digest == digest
    wrapped = write(tmp_path, CASES["legacy"], lambda t: [t.update({f"module.{k}": t.pop(k)}) for k in list(t)])
    assert load(wrapped).digest == digest
    torch.save({"out.2.bias": Path("a function call in a pickle")}, path)
    fails(path, "model.pt is no file of weights")
    (tmp_path / "model.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    fails(path, "Git LFS pointer")
    (tmp_path / "model.pt").write_bytes(b"")
    fails(path, "model.pt is no file of weights")
    (tmp_path / "model.pt").unlink()
    fails(path, "does not exist")
