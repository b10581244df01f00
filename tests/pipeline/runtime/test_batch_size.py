"""The batch size that a trial chooses: the smallest that is fast."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palindrome.model.execution import FLOAT32
from palindrome.pipeline.runtime.batch_size import (
    FAST_ENOUGH,
    MIN_SECONDS_FOR_TRIAL,
    SIZES,
    smallest_fast_enough,
    try_batch_sizes,
)
from palindrome.pipeline.runtime.executor import OnRay
from palindrome.pipeline.runtime.scheduler import Resources

LONG = 1e12  # evaluations: a run for which every trial pays


def device(fixed, each):
    """The speed by batch size of a device that needs `fixed` seconds per batch and `each` per image."""
    return lambda size: size / (fixed + each * size)


@given(st.floats(1e-6, 1), st.floats(1e-6, 1))
def test_it_is_the_smallest_that_is_about_as_fast_as_the_fastest_measured(fixed, each):
    speed = device(fixed, each)
    size, tried = smallest_fast_enough(speed, list(SIZES), LONG)
    assert list(tried) == list(SIZES[: len(tried)])
    assert tried == {s: speed(s) for s in tried}
    assert tried[size] >= FAST_ENOUGH * max(tried.values())
    assert all(of < FAST_ENOUGH * max(tried.values()) for s, of in tried.items() if s < size)
    if len(tried) < len(SIZES):  # and what was left out would have gained little
        assert speed(SIZES[len(tried)]) < 1.06 * max(tried.values())


@pytest.mark.parametrize(
    ("fixed", "each", "size"),
    [
        (1e-9, 1e-3, 64),  # busy with one batch: a CPU, or a large model
        (5e-3, 1e-5, 1024),  # an H100 with 5 ms of launch overhead per batch
        (1e-3, 1e-4, 128),
    ],
)
def test_overhead_per_batch_makes_batches_larger(fixed, each, size):
    assert smallest_fast_enough(device(fixed, each), list(SIZES), LONG)[0] == size


def test_a_size_that_does_not_fit_is_not_chosen():
    """Its batch is split into halves (runtime/device.py), which are as fast as before."""
    speed = device(5e-3, 1e-5)
    size, tried = smallest_fast_enough(lambda s: speed(min(s, 128)), list(SIZES), LONG)
    assert (size, list(tried)) == (128, [64, 128, 256])


def test_a_short_run_tries_fewer_sizes():
    speed = device(5e-3, 1e-5)
    assert list(smallest_fast_enough(speed, list(SIZES), MIN_SECONDS_FOR_TRIAL * speed(64) * 0.9)[1]) == [64]
    assert list(smallest_fast_enough(speed, list(SIZES), MIN_SECONDS_FOR_TRIAL * speed(64) * 1.1)[1]) == [64, 128]


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(("most", "sizes"), [(150, [64, 128]), (5, [64])])
def test_it_is_measured_on_the_cluster_with_no_more_than_a_shard_has(tiny, most, sizes):
    size, tried = try_batch_sizes(tiny, FLOAT32, LONG, most, Resources(1, 0, 1, False), OnRay())
    assert size in sizes
    assert list(tried) == sizes[: len(tried)] and all(speed > 0 for speed in tried.values())
