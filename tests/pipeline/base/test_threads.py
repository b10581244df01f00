"""Work in threads: in order, bounded, and ended by whoever takes the results."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palindrome.pipeline.base.threads import in_threads, read_ahead


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(0, 12), max_size=40),
    threads=st.integers(1, 4),
    most=st.integers(1, 20),
    slow=st.sets(st.integers(0, 40)),
)
def test_results_in_order_and_few_of_them_waiting(sizes, threads, most, slow):
    """Neither more than two a thread, nor more than their sizes allow, but for one that is too large by itself."""
    lock, taken, given_back = threading.Lock(), [], []
    running = most_running = 0

    def work(i):
        nonlocal running, most_running
        with lock:
            running += 1
            most_running = max(most_running, running)
        if i in slow:
            time.sleep(0.001)
        with lock:
            running -= 1
        return i

    def items():
        for i, size in enumerate(sizes):
            waiting = [sizes[k] for k in taken[len(given_back) :]]
            assert len(waiting) <= 2 * threads
            assert sum(waiting) <= most or len([size for size in waiting if size]) == 1
            taken.append(i)
            yield i

    for result in in_threads(work, items(), threads, lambda i: sizes[i], most):
        given_back.append(result)
    assert given_back == list(range(len(sizes)))
    assert most_running <= threads


def test_work_goes_at_once():
    barrier = threading.Barrier(8, timeout=20)
    assert list(in_threads(lambda i: (barrier.wait(), i)[1], range(16), threads=8)) == list(range(16))


def test_an_error_comes_where_its_result_would_and_ends_the_work():
    started = []

    def work(i):
        started.append(i)
        if i == 5:
            raise PermissionError("five")
        return i

    threads, found = threading.active_count(), []
    with pytest.raises(PermissionError, match="five"):
        for result in in_threads(work, range(1000), threads=2):
            found.append(result)
    assert found == [0, 1, 2, 3, 4]
    assert len(started) <= 10
    assert threading.active_count() <= threads


def test_an_error_of_the_items_is_raised():
    def items():
        yield 1
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        list(in_threads(lambda i: i, items()))


def test_who_stops_taking_ends_the_work():
    started, threads = [], threading.active_count()
    results = in_threads(lambda i: started.append(i), iter(range(10**9)), threads=3)
    next(results), next(results)
    results.close()
    assert len(started) <= 8
    assert threading.active_count() <= threads


def test_nothing_is_begun_before_it_is_asked_for():
    in_threads(lambda i: 1 / 0, iter([1]))
    assert list(in_threads(lambda i: i, [])) == []


def test_the_next_item_is_read_while_one_is_processed():
    reading = [threading.Event() for _ in range(4)]

    def items():
        for i, event in enumerate(reading):
            event.set()
            yield i

    found = []
    for i in read_ahead(items()):
        found.append(i)
        assert all(event.wait(10) for event in reading[: i + 2])  # the caller has not asked for it yet
        assert not any(event.is_set() for event in reading[i + 3 :])
    assert found == [0, 1, 2, 3]


def test_an_error_is_raised_after_the_items_before_it():
    def items():
        yield 1
        raise OSError("the disk is gone")

    coming = read_ahead(items())
    assert next(coming) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(coming)


def test_a_reader_that_is_stopped_leaves_no_thread_behind():
    before = threading.active_count()
    coming = read_ahead(iter(range(100)))
    assert next(coming) == 0
    coming.close()
    assert threading.active_count() == before
