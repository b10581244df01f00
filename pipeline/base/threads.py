"""Work on many items at once, in threads, for what waits for a store."""

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
    """The results in order, few of them waiting: `items` is read as they are taken, at most two a thread ahead, and
    no more of them than have the size `most` together."""
    waiting: deque[tuple[float, Future[R]]] = deque()
    held = 0.0
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                while waiting and (len(waiting) >= 2 * threads or held + size(item) > most):
                    weight, future = waiting.popleft()
                    held -= weight
                    yield future.result()
                waiting.append((size(item), pool.submit(function, item)))
                held += size(item)
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
