"""What lasts as long as its process: the garbage collector need not look for it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_gc() -> Iterator[None]:
    """For imports and all that is kept to the end. Python's collector goes over everything there is again and again
    while it grows, which takes a quarter of the time to import torch; and again at the end of the process. Within this
    it rests, and what is there afterwards it never looks at."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
