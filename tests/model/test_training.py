"""The training loop without Ray: its learning rate, its steps, and the state from which it resumes."""

import io
from dataclasses import replace
from itertools import repeat

import pytest
import torch

from palindrome.model.presets import PRESETS
from palindrome.model.process import VP
from palindrome.model.training import Hyperparameters, Training

DEFAULTS = {"lr": 1e-3, "lr_warmup": 0, "lr_decay": "none", "weight_decay": 0.0, "ema": 0.9999, "grad_clip": 1.0}
BATCH = torch.randint(256, (4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), None


def how(steps=3, **settings):
    given = {**DEFAULTS, "flip": True, "prediction": "epsilon", "seed": 0, **settings}
    return Hyperparameters(steps=steps, **given)


def training(settings, state=None, classes=None):
    unet = replace(PRESETS["tiny"], num_class_embeds=classes)
    return Training(unet, VP(), settings, torch.device("cpu"), state=state)


def test_the_learning_rate_rises_and_falls():
    cosine = how(steps=12, lr=2.0, lr_warmup=4, lr_decay="cosine")
    assert [cosine.learning_rate(step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert cosine.learning_rate(4) == 2.0 and cosine.learning_rate(8) == pytest.approx(1.0)
    assert cosine.learning_rate(12) == pytest.approx(0.0)
    assert {how(lr=2.0).learning_rate(step) for step in (0, 1, 10**6)} == {2.0}


def test_it_goes_on_from_its_state():
    first = training(how(steps=3))
    assert list(first.steps(repeat(BATCH))) == [1, 2, 3]
    assert 0 < first.recent_loss() < 10
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = training(how(steps=5), torch.load(file, weights_only=True))
    assert second.step == 3 and second.history == first.history
    assert second.checkpoint(torch.float32).digest == first.checkpoint(torch.float32).digest
    assert list(second.steps(repeat(BATCH))) == [4, 5]
    second.state()
    assert [saved["step"] for saved in second.history] == [3, 5]
    assert second.history[1]["seconds"] > second.history[0]["seconds"]
    assert second.checkpoint(torch.float32).digest != first.checkpoint(torch.float32).digest


def test_a_finished_training_takes_no_step():
    finished = training(how(steps=1))
    list(finished.steps(repeat(BATCH)))
    assert list(training(how(steps=1), finished.state()).steps(repeat(BATCH))) == []


def test_the_seed_gives_the_weights():
    def weights(seed):
        trained = training(how(steps=2, seed=seed))
        list(trained.steps(repeat(BATCH)))
        return trained.checkpoint(torch.float32).digest

    assert weights(1) == weights(1) != weights(2)


def test_the_checkpoint_is_the_average_in_the_dtype_asked_for():
    trained = training(how(steps=2))
    list(trained.steps(repeat(BATCH)))
    found, average = trained.checkpoint(torch.float16), trained.average.module.state_dict()
    assert found.weights.keys() == trained.network.state_dict().keys()
    assert all(torch.equal(value, average[name].half()) for name, value in found.weights.items())


def test_samples_are_the_same_every_time():
    trained = training(how())
    first = trained.samples(2)
    assert first.shape == (2, 3, 16, 16) and not torch.equal(first[0], first[1])
    assert torch.equal(first, trained.samples(2))


def of_classes(*classes):
    return BATCH[0], torch.tensor(classes)


def test_the_classes_that_are_told_are_trained():
    """Of four classes only two occur, and no image is told as of none."""
    trained = training(how(flip=False), classes=4)
    before = trained.network.class_embedding.weight.clone()
    list(trained.steps(repeat(of_classes(0, 2, 2, 0))))
    changed = (trained.network.class_embedding.weight != before).any(dim=1)
    assert changed.tolist() == [True, False, True, False]
    assert trained.checkpoint(torch.float32).null_class is None


def test_some_are_told_as_of_no_class():
    """By a half of 400 images the null class is trained, by all of 40 no other."""
    told = []

    def spied(dropout, steps):
        trained = training(how(steps=steps, class_dropout=dropout), classes=4)
        forward, told[:] = trained.network.forward, []
        trained.network.forward = lambda x, t, classes: told.append(classes) or forward(x, t, classes)
        list(trained.steps(repeat(of_classes(0, 1, 2, 1))))
        return trained, torch.stack(told)

    trained, told_by_half = spied(0.5, steps=100)
    assert trained.checkpoint(torch.float32).null_class == 3
    none = told_by_half == 3
    assert 140 < none.sum() < 260  # 200, six deviations
    assert ((told_by_half == torch.tensor([0, 1, 2, 1])) | none).all()
    assert (spied(1.0, steps=10)[1] == 3).all()


def test_samples_of_classes_are_of_one_after_the_other():
    """Not of the null class."""
    trained = training(how(class_dropout=0.1), classes=3)
    with torch.no_grad():
        trained.average.module.class_embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
    told, module = set(), trained.average.module
    forward = module.forward
    module.forward = lambda x, t, classes: told.add(tuple(classes.tolist())) or forward(x, t, classes)
    assert trained.samples(4).isfinite().all()
    assert told == {(0, 1, 0, 1)}
