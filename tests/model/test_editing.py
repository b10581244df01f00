"""Editing beside an image's own path: against diffusers' scheduler in a loop of its own, and what holds for all."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from palindrome.model.condition import Condition
from palindrome.model.ddim import sample
from palindrome.model.editing import along, edit, stay, towards
from palindrome.model.inversion import invert_exactly
from palindrome.model.ladder import ladder
from palindrome.model.process import CLEAN, EDM, VP, Flow, SongVE, SongVP

PROCESSES = [
    *(VP(prediction_type=kind) for kind in ("epsilon", "v_prediction", "sample")),
    VP(set_alpha_to_one=False),
    *(EDM(), Flow(shift=3.0), SongVP(), SongVE()),
]
SHAPE = (3, 3, 8, 8)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Told:
    """A network that mixes neighbours, depends on the level, and on a number for each image; it counts how often it is
    asked."""

    def __init__(self, seed=0):
        self.weights, self.asked = drawn(3, 3, 3, 3, seed=seed) / 4, 0

    def __call__(self, x, told, condition=None):
        self.asked += 1
        mixed = torch.nn.functional.conv2d(x, self.weights, padding=1).tanh() + 0.1 * math.sin(told)
        return mixed if condition is None else mixed + 0.3 * condition.values["number"][:, None, None, None]


def numbers(*values):
    return Condition({"number": torch.tensor(values, dtype=torch.float32)})


def masks(seed=0, count=SHAPE[0]):
    """Of the left half, the right one and random pixels."""
    found = drawn(count, 1, 8, 8, seed=seed) > 0
    found[::3, ..., :4], found[::3, ..., 4:] = True, False
    return found


@pytest.mark.parametrize("moved", ["towards", "along"])
def test_it_is_the_loop_over_the_scheduler_of_diffusers(moved):
    """Ten steps, the first three under the condition of the images, blended after each."""
    scheduler = DDIMScheduler(1000, beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    network, known, source, other = Told(), masks(), numbers(0, 1, 2), numbers(2, 2, -1)
    x, target = drawn(*SHAPE), drawn(*SHAPE[1:], seed=7)
    own = edited = x
    if moved == "towards":
        cosine = (x.flatten(1) @ target.flatten()) / x.flatten(1).norm(dim=1) / target.norm()
        theta = cosine.double().arccos()[:, None, None, None]
        edited = ((0.4 * theta).sin() * target + (0.6 * theta).sin() * x) / theta.sin()
        edited = known * own + ~known * edited.float()
    for number, t in enumerate(scheduler.timesteps.tolist()):
        told = source if number < 3 else other
        own = scheduler.step(network(own, t, source), t, own).prev_sample
        edited = scheduler.step(network(edited, t, told), t, edited).prev_sample
        if moved == "along" and t == 600:  # so that it arrives at 500
            edited = edited - 1.5 * target
        edited = known * own + ~known * edited
    move = towards(target, 0.4, 900) if moved == "towards" else along(target, -1.5, 500)
    how = {"source": source, "condition": other, "kept": 0.3, "known": known}
    found, [changed] = edit(network, x, ladder("linear", 10), VP(), [move], **how)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(changed, edited, rtol=1e-4, atol=1e-4)
    assert (changed - found).abs().max() > 0.1


@settings(max_examples=60)
@given(
    process=st.sampled_from(PROCESSES),
    levels=st.lists(st.integers(0, 998), min_size=1, max_size=5, unique=True).map(sorted),
    strength=st.floats(0, 1),
    at=st.integers(0, 5),
    kept=st.floats(0, 1),
    told=st.booleans(),
    seed=st.integers(0, 99),
)
def test_where_the_image_is_known_an_edit_is_its_own_path(process, levels, strength, at, kept, told, seed):
    """To the bit, whatever the network, process, ladder and edit; and that path is what the sampler walks."""
    levels, network, x = (CLEAN, *levels), Told(seed), drawn(*SHAPE, seed=seed)
    source = numbers(1, 2, 3) if told else None
    condition = numbers(3, 0, -1) if told else None
    target, known = drawn(*SHAPE[1:], seed=seed + 1), masks(seed)
    moves = [towards(target, strength, levels[-1]), along(target, 3 * strength - 1, levels[at % len(levels)]), stay]
    how = {"source": source, "condition": condition, "kept": kept}
    own, edits = edit(network, x, levels, process, moves, known=known, **how)
    assert torch.equal(own, sample(network, x, levels, process, condition=source))
    for edited in edits:
        assert edited.isfinite().all() and torch.equal(edited[known.expand(SHAPE)], own[known.expand(SHAPE)])


def test_an_exact_inverse_comes_back_where_it_is_known():
    """As the text of the module has it: without a pixel of the image."""

    def network(x, told):
        return 0.05 * torch.nn.functional.conv2d(x, drawn(3, 3, 3, 3, seed=3), padding=1).tanh()

    image, levels, known = drawn(*SHAPE).clamp(-1, 1), ladder("linear", 8), masks()
    exact, *_ = invert_exactly(network, image, levels, VP(), corrections=20)
    paper, *_ = invert_exactly(network, image, levels, VP(), corrections=0)
    left = []
    for x in (exact, paper):
        _, [edited] = edit(network, x, levels, VP(), [towards(drawn(*SHAPE[1:], seed=5), 0.8, levels[-1])], known=known)
        left.append((edited - image)[known.expand(SHAPE)].abs().max())
        assert (edited - image)[~known.expand(SHAPE)].abs().max() > 0.3
    assert left[0] < 1e-5 < 100 * left[0] < left[1]


def test_strength_0_changes_no_bit_and_1_is_the_other_image():
    levels, network, x = ladder("linear", 6), Told(), drawn(*SHAPE)
    other = drawn(*SHAPE[1:], seed=4)
    moves = [towards(other, 0, levels[-1]), along(other, 0, levels[3]), towards(other, 1, levels[-1])]
    own, [towards_0, along_0, towards_1] = edit(network, x, levels, VP(), moves)
    assert torch.equal(towards_0, own) and torch.equal(along_0, own)
    assert torch.equal(towards_1, sample(network, other.expand(SHAPE).clone(), levels, VP()))


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_a_part_of_the_steps_is_taken_as_encoded(kept):
    levels, network, x, source, other = ladder("linear", 6), Told(), drawn(*SHAPE), numbers(0, 1, 2), numbers(5, 5, 5)
    _, [edited] = edit(network, x, levels, VP(), [stay], source=source, condition=other, kept=kept)
    first = round(6 * kept)
    half = sample(network, x, levels[6 - first :], VP(), condition=source)
    assert torch.equal(edited, sample(network, half, levels[: 7 - first], VP(), condition=other))


def test_what_is_still_the_own_path_is_evaluated_once():
    levels, x = ladder("linear", 6), drawn(*SHAPE)
    one, other = numbers(0, 1, 2), numbers(5, 5, 5)
    d = drawn(*SHAPE[1:], seed=1)
    for moves, how, evaluations in (
        ([stay, stay], {}, 6),
        ([along(d, 1, levels[2])], {}, 6 + 2),
        ([along(d, 1, CLEAN)], {}, 6),
        ([along(d, 1, levels[-1]), along(d, 2, levels[-1])], {}, 6 + 2 * 6),
        ([stay], {"source": one, "condition": other, "kept": 0.5}, 6 + 3),
    ):
        network = Told()
        edit(network, x, levels, VP(), moves, **how)
        assert network.asked == evaluations


def test_there_is_no_way_to_the_opposite():
    x = drawn(*SHAPE)
    with pytest.raises(ValueError, match="opposite"):
        edit(Told(), x, (CLEAN, 5), VP(), [towards(-x[1], 0.5, 5)])


def test_half_precision_latents_are_decoded_in_float32():
    own, [edited] = edit(Told(), drawn(*SHAPE).half(), (CLEAN, 5, 300), VP(), [along(drawn(*SHAPE[1:]), 1, 300)])
    assert own.dtype == edited.dtype == torch.float32
