"""Prefetching of batches. Whole shards are processed in tests/jobs."""

import threading

import pytest

from palindrome.pipeline.runtime.reader import _prefetched


def test_the_next_batch_is_read_while_one_is_processed():
    reading = [threading.Event() for _ in range(4)]

    def batches():
        for i, event in enumerate(reading):
            event.set()
            yield i

    found = []
    for i in _prefetched(batches()):
        found.append(i)
        assert all(event.wait(10) for event in reading[: i + 2])  # the caller has not asked for it yet
        assert not any(event.is_set() for event in reading[i + 3 :])
    assert found == [0, 1, 2, 3]


def test_a_read_error_is_raised_after_the_batches_before_it():
    def batches():
        yield 1
        raise OSError("the disk is gone")

    coming = _prefetched(batches())
    assert next(coming) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(coming)


def test_stopping_early_leaves_no_thread_behind():
    before = threading.active_count()
    coming = _prefetched(iter(range(100)))
    assert next(coming) == 0
    coming.close()
    assert threading.active_count() == before
