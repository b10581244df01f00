"""Which precision a trial finds, on the bundled checkpoint and real images."""

from pathlib import Path

import numpy as np
import pytest
import torch

from palindrome.model.execution import Execution
from palindrome.model.families import unet2d
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.metrics import round_trip_error, to_model
from palindrome.pipeline.images.read import first_images
from palindrome.pipeline.images.sources import open_collection
from palindrome.pipeline.runs.inversion import Inversion
from palindrome.pipeline.runs.ladders import resolve
from palindrome.pipeline.runtime import precision
from palindrome.pipeline.runtime import speed as calibration
from palindrome.pipeline.runtime.device import Model
from palindrome.pipeline.runtime.precision import _trial

BUNDLED = Path(__file__).parents[3] / "checkpoints/cifar10-32"


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def any_speed(monkeypatch):
    """Only the errors are tested: speed depends on the machine and its load."""
    monkeypatch.setattr(precision, "MIN_SPEEDUP", 0.0)
    monkeypatch.setattr(calibration, "TRIAL_SECONDS", 0.01)


@pytest.fixture(scope="module")
def bundled():
    return unet2d.load(str(BUNDLED))


@pytest.fixture(scope="module")
def pixels(sample, bundled):
    channels, size, _ = bundled.image_shape
    how = Preprocess(size, channels)
    return first_images(open_collection(str(sample)), how, 8)


def trial(bundled, pixels, corrections, steps=5):
    how = Inversion(resolve("logsnr", steps, bundled.process), corrections)
    return _trial(bundled, pixels, how, 2, None), how


def test_bfloat16_is_chosen_when_plain_inversion_has_the_larger_error(bundled, pixels):
    pixels = pixels[:4]
    found, how = trial(bundled, pixels, corrections=0)
    assert found["precision"] == "bfloat16"
    exact, low = found["tried"]["float32"], found["tried"]["bfloat16"]
    assert exact["images"] == low["images"] == len(pixels)
    assert low["round_trip"] <= 1.1 * exact["round_trip"] and low["decoded_by_float32"] <= 1.1 * exact["round_trip"]
    x = to_model(pixels)  # and the figures are those of such round trips
    up, down = (Model(bundled, execution=Execution(p)) for p in ("bfloat16", "float32"))
    latents = up.encode(x, how.levels)[0]
    assert np.isclose(round_trip_error(x, up.decode(latents, how.levels)).mean(), low["round_trip"], rtol=1e-3)
    assert np.isclose(
        round_trip_error(x, down.decode(latents, how.levels)).mean(), low["decoded_by_float32"], rtol=1e-3
    )


def test_bfloat16_is_ruled_out_on_a_few_images_when_inversion_is_exact(bundled, pixels):
    found, _ = trial(bundled, pixels, corrections=3, steps=12)
    assert found["precision"] == "float32"
    assert found["tried"]["bfloat16"]["images"] == found["tried"]["float32"]["images"] == 4
    assert found["tried"]["bfloat16"]["round_trip"] > 10 * found["tried"]["float32"]["round_trip"]


def test_a_precision_that_overflows_is_ruled_out(bundled, pixels, monkeypatch):
    """NaN is neither above nor below the limit."""
    error = precision.round_trip_error
    calls = []

    def overflows(x, y):
        calls.append(1)
        return error(x, y) * (np.nan if len(calls) > 2 else 1)  # float32's two come first

    monkeypatch.setattr(precision, "round_trip_error", overflows)
    found, _ = trial(bundled, pixels[:2], corrections=0)
    assert found["precision"] == "float32" and found["tried"]["bfloat16"]["round_trip"] is None
    assert found["tried"]["float32"]["round_trip"] > 0


def test_errors_are_not_measured_for_a_precision_that_is_not_faster(bundled, pixels, monkeypatch):
    monkeypatch.setattr(precision, "MIN_SPEEDUP", 1e9)
    found, _ = trial(bundled, pixels, corrections=0)
    assert found["precision"] == "float32"
    assert set(found["tried"]["bfloat16"]) == {"per_second"} and found["tried"]["bfloat16"]["per_second"] > 0
