"""How many images a device is given at once: no more than make it fast."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palindrome.model.execution import FLOAT32
from palindrome.pipeline.runtime.batch_size import ENOUGH, MIN_SECONDS_FOR_TRIAL, SIZES, smallest, try_batch_sizes
from palindrome.pipeline.runtime.executor import OnRay
from palindrome.pipeline.runtime.scheduler import Resources

LONG = 1e12  # evaluations: a run for which every trial pays


def device(fixed, each):
    """A device that takes so many seconds a batch, and so many more an image: its speed by batch size."""
    return lambda size: size / (fixed + each * size)


@given(st.floats(1e-6, 1), st.floats(1e-6, 1))
def test_it_is_the_first_that_is_about_as_fast_as_the_fastest_measured(fixed, each):
    speed = device(fixed, each)
    size, tried = smallest(speed, list(SIZES), LONG)
    assert list(tried) == list(SIZES[: len(tried)])
    assert tried == {s: speed(s) for s in tried}
    assert tried[size] >= ENOUGH * max(tried.values())
    assert all(of < ENOUGH * max(tried.values()) for s, of in tried.items() if s < size)
    if len(tried) < len(SIZES):  # and what was left out would have gained little
        assert speed(SIZES[len(tried)]) < 1.06 * max(tried.values())


@pytest.mark.parametrize(
    ("fixed", "each", "size"),
    [
        (1e-9, 1e-3, 64),  # busy with one batch: a CPU, or a large model
        (5e-3, 1e-5, 1024),  # as an H100 would be that takes 5 ms to be told what to do
        (1e-3, 1e-4, 128),
    ],
)
def test_what_takes_long_to_be_told_gets_more_at_once(fixed, each, size):
    assert smallest(device(fixed, each), list(SIZES), LONG)[0] == size


def test_one_that_does_not_fit_is_not_taken():
    """Its batch is cut into halves (runtime/device.py), which are as fast as they were."""
    speed = device(5e-3, 1e-5)
    size, tried = smallest(lambda s: speed(min(s, 128)), list(SIZES), LONG)
    assert (size, list(tried)) == (128, [64, 128, 256])


def test_a_short_run_is_not_held_up():
    speed = device(5e-3, 1e-5)
    assert list(smallest(speed, list(SIZES), MIN_SECONDS_FOR_TRIAL * speed(64) * 0.9)[1]) == [64]
    assert list(smallest(speed, list(SIZES), MIN_SECONDS_FOR_TRIAL * speed(64) * 1.1)[1]) == [64, 128]


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(("most", "sizes"), [(150, [64, 128]), (5, [64])])
def test_it_is_measured_on_the_cluster_with_no_more_than_a_shard_has(tiny, most, sizes):
    size, tried = try_batch_sizes(tiny, FLOAT32, LONG, most, Resources(1, 0, 1, False), OnRay())
    assert size in sizes
    assert list(tried) == sizes[: len(tried)] and all(speed > 0 for speed in tried.values())
