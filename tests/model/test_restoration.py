"""DDNM against its authors' code, Pillow, and NumPy's pseudo-inverses; and what holds for all operators, processes."""

import runpy
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from palindrome.model.ddim import sample
from palindrome.model.ladder import ladder
from palindrome.model.process import CLEAN, EDM, VP, Flow, SongVE, SongVP
from palindrome.model.restoration import Gray, Masked, Pooled, Separable, restore

FIXTURES = Path(__file__).parents[1] / "fixtures"
MADE = runpy.run_path(str(FIXTURES / "make_restore_fixtures.py"))
PROCESSES = [
    *(VP(prediction_type=kind) for kind in ("epsilon", "v_prediction", "sample")),
    VP(set_alpha_to_one=False),
    VP(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    *(EDM(), Flow(shift=3.0), SongVP(), SongVE()),
]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noises(*shape, seed=1):
    return (drawn(*shape, seed=1000 * seed + i) for i in count())


def operators(known, size):
    return {
        "inpaint": Masked(known),
        "average": Pooled(4),
        "bicubic": Separable.bicubic(4, size, size),
        "gray": Gray(),
    }


KINDS = tuple(operators(torch.ones(1, 1, 8, 8, dtype=torch.bool), 8))


def halves(count, size, seed=0):
    """Masks of the left half, the right one and random pixels, in turn."""
    found = drawn(count, 1, size, size, seed=seed) > 0
    found[::3, ..., : size // 2], found[::3, ..., size // 2 :] = True, False
    return found


@pytest.mark.parametrize(("task", "close"), [("inpaint", 1e-5), ("upscale", 1e-5), ("colorize", 1e-3)])
def test_it_restores_what_the_authors_code_restores(task, close):
    """Their colours are mixed by 0.3333, 0.3334 and 0.3333, so of those the fourth digit is another."""
    found = load_file(FIXTURES / "restore.safetensors")
    known = MADE["known"]().expand(MADE["COUNT"], 1, -1, -1)
    operator = {"inpaint": Masked(known), "upscale": Pooled(MADE["FACTOR"]), "colorize": Gray()}[task]
    y = operator.observe(MADE["images"]())
    how = {"noise": MADE["noise"](), "eta": MADE["ETA"]}
    restored = restore(MADE["network"], y, operator, ladder("linear", MADE["STEPS"]), VP(), **how)
    torch.testing.assert_close(operator.invert(y), found[f"{task}: alone"], rtol=0, atol=close)
    torch.testing.assert_close(restored, found[f"{task}: restored"], rtol=0, atol=close)


@pytest.mark.parametrize("kind", KINDS)
def test_the_inverse_is_the_pseudo_inverse(kind):
    operator = operators(halves(1, 8), 8)[kind]
    each = torch.eye(3 * 8 * 8).reshape(-1, 3, 8, 8)  # images of a single value: the columns of A
    of_each = Masked(operator.known.expand(len(each), -1, -1, -1)) if kind == "inpaint" else operator
    A = of_each.observe(each).flatten(1).T.double().numpy()
    y = drawn(2, 3, 8, 8, seed=5)
    y = torch.cat([operator.observe(image) for image in y.split(1)])
    expected = np.linalg.pinv(A) @ y.flatten(1).T.double().numpy()
    found = torch.cat([operator.invert(one) for one in y.split(1)]).flatten(1).T
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_bicubic_is_pillows():
    image = drawn(1, 1, 32, 24)
    expected = Image.fromarray(image[0, 0].numpy()).resize((6, 8), Image.Resampling.BICUBIC)
    found = Separable.bicubic(4, 32, 24).observe(image)[0, 0]
    np.testing.assert_allclose(found.numpy(), np.asarray(expected), atol=1e-5)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    process=st.sampled_from(PROCESSES),
    levels=st.lists(st.integers(0, 998), min_size=1, max_size=5, unique=True).map(sorted),
    eta=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_the_result_has_the_observation_whatever_the_network_says(kind, process, levels, eta, seed):
    weights = drawn(3, 3, 3, 3, seed=seed) / 4

    def network(x, told):
        return torch.nn.functional.conv2d(x, weights, padding=1).tanh() + 0.1

    operator = operators(halves(2, 8, seed), 8)[kind]
    y = operator.observe(drawn(2, 3, 8, 8, seed=seed + 1).clamp(-1, 1))
    found = restore(network, y, operator, (CLEAN, *levels), process, noise=noises(2, 3, 8, 8), eta=eta)
    assert found.isfinite().all()
    if kind == "inpaint":
        assert torch.equal(operator.observe(found), y)
    else:
        far = (operator.observe(found) - y).abs().max() / found.abs().max().clamp(min=1)
        assert far < 2e-6  # of the float32 that x has


@pytest.mark.parametrize("process", [p for p in PROCESSES if p != VP(set_alpha_to_one=False)], ids=repr)
def test_with_nothing_known_and_no_new_noise_it_is_ddim(process):
    def network(x, told):
        return torch.sin(2 * x)

    nothing = Masked(torch.zeros(2, 1, 8, 8, dtype=torch.bool))
    levels, y = (CLEAN, 20, 300, 700), torch.zeros(2, 3, 8, 8)
    found = restore(network, y, nothing, levels, process, noise=noises(2, 3, 8, 8), eta=0.0)
    expected = sample(network, next(noises(2, 3, 8, 8)), levels, process)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_each_image_has_its_own_mask_in_a_part_of_the_batch():
    masked, rows = Masked(halves(5, 8)), torch.tensor([3, 1])
    x = drawn(5, 3, 8, 8)
    assert torch.equal(masked.of(rows, "cpu").observe(x[rows]), masked.observe(x)[rows])


@given(st.integers(0, 99), st.sampled_from([(2, 2), (4, 2), (8, 8)]))
def test_a_state_is_known_where_all_of_its_pixels_are(seed, shape):
    known = halves(2, 8, seed) | (drawn(2, 1, 8, 8, seed=seed + 1) > -0.5)
    height, width = shape
    blocks = known.numpy().reshape(2, 1, height, 8 // height, width, 8 // width)
    assert np.array_equal(Masked(known).shrunk(height, width).known.numpy(), blocks.all((3, 5)))


def test_what_can_not_be_is_refused():
    known, y = halves(1, 8), torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="does not divide into 3 x 3"):
        Masked(known).shrunk(3, 3)
    with pytest.raises(ValueError, match="8 pixels are no multiple of 3"):
        Separable.bicubic(3, 8, 8)
    with pytest.raises(ValueError, match=r"eta is 1\.5"):
        restore(lambda x, _: x, y, Masked(known), (CLEAN, 5), VP(), noise=noises(1, 3, 8, 8), eta=1.5)
