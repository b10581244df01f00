"""A bounded, ordered map in threads, for I/O, and an iterator that a thread reads ahead of its caller."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = 16
T = TypeVar("T")
R = TypeVar("R")


def in_threads(
    function: Callable[[T], R],
    items: Iterable[T],
    threads: int = THREADS,
    size: Callable[[T], float] = lambda item: 0,
    most: float = 1,
) -> Iterator[R]:
    """Yields `function(item)` in order. `items` is read lazily: at most two items per thread are in flight, and at most
    a total size of `most`."""
    in_flight: deque[tuple[float, Future[R]]] = deque()
    total = 0.0
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                while in_flight and (len(in_flight) >= 2 * threads or total + size(item) > most):
                    weight, future = in_flight.popleft()
                    total -= weight
                    yield future.result()
                in_flight.append((size(item), pool.submit(function, item)))
                total += size(item)
            while in_flight:
                yield in_flight.popleft()[1].result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def read_ahead(items: Iterator[R]) -> Iterator[R]:
    """The items, each of which is read in a thread while the caller works on the one before it."""
    end = object()
    with ThreadPoolExecutor(1, "reader") as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item  # type: ignore[misc]
