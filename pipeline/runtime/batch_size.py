"""How many images go onto a device at once where nobody says: as few as keep it busy, found by trial."""

from collections.abc import Callable
from functools import partial
from math import prod

from palindrome.model.execution import Execution
from palindrome.model.families import Checkpoint
from palindrome.pipeline.runtime.device import Model, tune_process
from palindrome.pipeline.runtime.executor import Executor
from palindrome.pipeline.runtime.scheduler import Resources
from palindrome.pipeline.runtime.speed import evaluations_per_second

SIZES = (64, 128, 256, 512, 1024)
MOST_BYTES = 512 << 20  # of a batch as float32, of which a worker holds several in its memory
ENOUGH = 0.95  # of the fastest: what a larger batch brings beyond that is not worth its memory
MIN_SECONDS_FOR_TRIAL = 60.0  # that a run must have left for a trial of the next size to pay


def try_batch_sizes(
    checkpoint: Checkpoint,
    execution: Execution,
    evaluations: float,
    most: float,
    resources: Resources,
    executor: Executor,
) -> tuple[int, dict[int, float]]:
    """The batch size for a run of so many network evaluations on each device, no larger than `most` images where the
    smallest of SIZES is not; and by size the evaluations a second, of an image each, that the trial measured."""
    size, tried = executor.call(resources, _trial, checkpoint, execution, evaluations, most, resources.threads)
    return int(size), dict(tried)


def _trial(
    checkpoint: Checkpoint, execution: Execution, evaluations: float, most: float, threads: int | None
) -> tuple[int, dict[int, float]]:
    model = Model(checkpoint, threads, execution=execution)
    tune_process(model)
    fits = min(most, MOST_BYTES / (4 * prod(checkpoint.latent_shape)))
    sizes = [size for size in SIZES if size <= fits] or [SIZES[0]]
    # One that has no room is as fast as the halves that it is cut into.
    return smallest(partial(evaluations_per_second, model), sizes, evaluations)


def smallest(speed: Callable[[int], float], sizes: list[int], evaluations: float) -> tuple[int, dict[int, float]]:
    """Of growing sizes the first that is about as fast as the fastest, and what was measured: up to the first size that
    is no faster than the one before it, or that leaves the run too short for another to pay."""
    tried: dict[int, float] = {}
    before = 0.0
    for size in sizes:
        tried[size] = speed(size)
        if ENOUGH * tried[size] <= before or evaluations < MIN_SECONDS_FOR_TRIAL * tried[size]:
            break
        before = tried[size]
    return next(size for size in sizes if tried[size] >= ENOUGH * max(tried.values())), tried
