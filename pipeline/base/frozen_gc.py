"""Excluding long-lived objects from garbage collection."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_gc() -> Iterator[None]:
    """For imports and other objects that live as long as the process. The collector would traverse all objects again
    and again as their number grows, which takes a quarter of the time to import torch, and once more at exit. Within
    the `with` it is off; afterwards it ignores all objects that exist by then."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
