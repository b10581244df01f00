"""Conditions and guidance: what a batch's network is told, and how two predictions become one."""

import dataclasses
from math import sqrt

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from palindrome.model.condition import ClassOf, Condition, Guidance
from palindrome.model.ddim import invert, sample
from palindrome.model.families.unet2d import UNet2D, load, save
from palindrome.model.inversion import invert_exactly
from palindrome.model.ladder import ladder, logsnr_ladder
from palindrome.model.process import VP
from palindrome.model.unet import UNetConfig

SCHEDULE = VP()
CLASSES = [0, 3, 1, 4, 2]
NULL = 5
SHAPE = (len(CLASSES), 3, 8, 8)


def normal(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def theirs(randomize, small):
    """diffusers' network of five classes, and of none."""
    return randomize(UNet2DModel(**small, num_class_embeds=6))


@pytest.fixture(scope="module")
def checkpoint(theirs, small):
    config = UNetConfig(**small, num_class_embeds=6)
    return UNet2D(config, theirs.state_dict(), VP(), classes=ClassOf(column="label"), null_class=NULL)


def told(checkpoint, weight):
    """Its network, and the condition of CLASSES."""
    guided = checkpoint.with_guidance(weight)
    return guided.denoiser(), guided.condition([{"label": number} for number in CLASSES])


@pytest.mark.parametrize("weight", [0.0, 1.0, 1.5, 7.5])
@torch.no_grad()
def test_guided_samples_equal_a_loop_over_diffusers(theirs, checkpoint, weight):
    network, condition = told(checkpoint, weight)
    levels = ladder("linear", 10)
    ours = sample(network, normal(), levels, SCHEDULE, condition=condition)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    x = normal()
    for t in scheduler.timesteps:
        conditional = theirs(x, t, class_labels=torch.tensor(CLASSES)).sample
        unconditional = theirs(x, t, class_labels=torch.full((len(CLASSES),), NULL)).sample
        x = scheduler.step(unconditional + weight * (conditional - unconditional), t, x).prev_sample
    assert (ours - x).abs().max() < 1e-4 * x.std()


def test_without_guidance_an_evaluation_is_of_one_batch(checkpoint):
    sizes = []
    for weight in (1.0, 3.0):
        network, condition = told(checkpoint, weight)

        def counting(x, *inputs, network=network):
            sizes.append(len(x))
            return network(x, *inputs)

        invert(counting, normal(), ladder("linear", 2), SCHEDULE, condition=condition)
    assert sizes == [5, 5, 10, 10]


def of_two(x, t, told):
    """The optimal epsilon for N(+-0.5, 0.3^2) of the classes 1 and -1, and of both together for class 0."""
    a = SCHEDULE.alpha_bar(t)
    variance = a * 0.3**2 + 1 - a
    means = sqrt(a) * torch.tensor([-0.5, 0.5], dtype=x.dtype)
    weights = torch.softmax(-((x[..., None] - means) ** 2) / (2 * variance), -1)
    classes = told.values["class"][:, None, None, None]
    mean = torch.where(classes == 0, (weights * means).sum(-1), sqrt(a) * 0.5 * classes)
    return sqrt(1 - a) * (x - mean) / variance


def guided(weight, classes):
    classes = torch.tensor(classes)
    return Condition({"class": classes}, {"class": torch.zeros_like(classes)}, weight)


def images_of_two(classes):
    return 0.5 * torch.tensor(classes).view(-1, 1, 1, 1) + 0.3 * normal(1)[:4].double()


@pytest.mark.parametrize(("weight", "steps"), [(1.5, 20), (3.0, 20), (7.5, 60)])
def test_guided_inversion_is_exact(weight, steps):
    """In float64, of an epsilon that is known, where steps are short enough: kappa below 1 / W in all but the first."""
    levels, classes = logsnr_ladder(SCHEDULE, steps, 800), [1, -1, 1, -1]
    x0, how = images_of_two(classes), {"condition": guided(weight, classes)}
    latents, residual, _ = invert_exactly(of_two, x0, levels, SCHEDULE, corrections=30, **how)
    error = (sample(of_two, latents, levels, SCHEDULE, **how) - x0).abs().flatten(1).max(1).values
    assert residual.max() < 1e-10
    assert error.max() < 1e-8
    other = sample(of_two, latents, levels, SCHEDULE, condition=guided(1.0, classes))
    assert (other - x0).abs().max() > 0.1


def test_what_guidance_does_not_let_solve_is_said():
    """Of steps that are too long for the weight the residual is as large as the error."""
    levels, classes = logsnr_ladder(SCHEDULE, 20, 800), [1, -1, 1, -1]
    x0, how = images_of_two(classes), {"condition": guided(7.5, classes)}
    latents, residual, _ = invert_exactly(of_two, x0, levels, SCHEDULE, corrections=10, **how)
    error = (sample(of_two, latents, levels, SCHEDULE, **how) - x0).square().flatten(1).mean(1).sqrt()
    assert (error > 1e-3).all() and (residual > error / 100).all()


def test_a_tolerance_allows_for_guidance():
    """No image leaves a step before its residual is as small as was asked."""
    levels, classes = logsnr_ladder(SCHEDULE, 60, 800), [1, -1, 1, -1]
    x0, how = images_of_two(classes), {"condition": guided(3.0, classes), "tolerance": 1e-6}
    latents, *_ = invert_exactly(of_two, x0, levels, SCHEDULE, corrections=50, **how)
    how.pop("tolerance")
    error = (sample(of_two, latents, levels, SCHEDULE, **how) - x0).square().flatten(1).mean(1).sqrt()
    assert (error < 1e-4).all()


def test_samples_that_leave_the_batch_take_their_conditions_along():
    """With a tolerance each gets what it gets alone."""
    levels, classes = ladder("linear", 20), [1, -1, 1, -1]
    x0 = (
        0.5 * torch.tensor(classes).view(-1, 1, 1, 1)
        + torch.tensor([0.01, 0.3, 1.0, 2.0]).view(-1, 1, 1, 1) * normal(2)[:4].double()
    )
    how = {"corrections": 30, "tolerance": 1e-6}
    together, _, spent = invert_exactly(of_two, x0, levels, SCHEDULE, condition=guided(2.0, classes), **how)
    assert len(set(spent.tolist())) > 1
    for i, number in enumerate(classes):
        alone, *_ = invert_exactly(of_two, x0[i : i + 1], levels, SCHEDULE, condition=guided(2.0, [number]), **how)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)


def test_the_null_class_is_in_the_folder_and_diffusers_opens_it(checkpoint, tmp_path):
    save(checkpoint, str(tmp_path))
    found = load(str(tmp_path))
    assert found.null_class == NULL and found.digest == checkpoint.digest
    assert found.with_guidance(3).guidance == Guidance(3, NULL)
    assert found.with_guidance(3, null_class=2).guidance == Guidance(3, 2)
    assert found.with_guidance(3).with_guidance(1).guidance is None
    theirs = UNet2DModel.from_pretrained(str(tmp_path), subfolder="unet")
    assert theirs.config.num_class_embeds == 6


def test_guidance_needs_a_null_class_that_the_network_knows(checkpoint, small):
    unsaid = dataclasses.replace(checkpoint, null_class=None)
    with pytest.raises(ValueError, match="the class that stands for none"):
        unsaid.with_guidance(3)
    with pytest.raises(ValueError, match="6, not a number below 6"):
        unsaid.with_guidance(3, 6)
    with pytest.raises(ValueError, match="the weight is -1"):
        checkpoint.with_guidance(-1)
    with pytest.raises(ValueError, match="not class-conditional"):
        UNet2D(UNetConfig(**small), {}, VP()).with_guidance(3)
