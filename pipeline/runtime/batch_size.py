"""The default batch size on a GPU: the smallest that keeps it busy, found by a trial."""

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
MAX_BATCH_BYTES = 512 << 20  # of a batch as float32; a worker holds several batches in memory
FAST_ENOUGH = 0.95  # fraction of the highest speed; the rest is not worth a larger batch's memory
MIN_SECONDS_FOR_TRIAL = 60.0  # shortest run, in seconds at the current size, for which trying the next size pays


def try_batch_sizes(
    checkpoint: Checkpoint,
    execution: Execution,
    evaluations: float,
    most: float,
    resources: Resources,
    executor: Executor,
) -> tuple[int, dict[int, float]]:
    """The batch size for a run with `evaluations` network evaluations per device, at most `most` images or SIZES[0];
    and the measured network evaluations per second, of one image each, by batch size."""
    size, speeds = executor.call(resources, _trial, checkpoint, execution, evaluations, most, resources.threads)
    return int(size), dict(speeds)


def _trial(
    checkpoint: Checkpoint, execution: Execution, evaluations: float, most: float, threads: int | None
) -> tuple[int, dict[int, float]]:
    model = Model(checkpoint, threads, execution=execution)
    tune_process(model)
    limit = min(most, MAX_BATCH_BYTES / (4 * prod(checkpoint.latent_shape)))
    sizes = [size for size in SIZES if size <= limit] or [SIZES[0]]
    # A batch that does not fit into the device's memory is split into halves, and is as fast as they are.
    return smallest_fast_enough(partial(evaluations_per_second, model), sizes, evaluations)


def smallest_fast_enough(
    speed: Callable[[int], float], sizes: list[int], evaluations: float
) -> tuple[int, dict[int, float]]:
    """The smallest of the ascending sizes that reaches FAST_ENOUGH, and the speeds measured. Stops at the first size
    that gains nothing over the one before it, or when the run is too short for another trial to pay."""
    speeds: dict[int, float] = {}
    before = 0.0
    for size in sizes:
        speeds[size] = speed(size)
        if FAST_ENOUGH * speeds[size] <= before or evaluations < MIN_SECONDS_FOR_TRIAL * speeds[size]:
            break
        before = speeds[size]
    return next(size for size in sizes if speeds[size] >= FAST_ENOUGH * max(speeds.values())), speeds
