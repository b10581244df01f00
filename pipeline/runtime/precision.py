"""The default precision of a run: the fastest whose round-trip error is as low as float32's, found by a trial."""

from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palindrome.model.execution import FLOAT32, Execution
from palindrome.model.families import Checkpoint
from palindrome.pipeline.images.metrics import round_trip_error, to_model
from palindrome.pipeline.runs.inversion import Inversion
from palindrome.pipeline.runtime.device import Model, tune_process
from palindrome.pipeline.runtime.executor import Executor
from palindrome.pipeline.runtime.scheduler import Resources
from palindrome.pipeline.runtime.speed import evaluations_per_second

CANDIDATES = {"cuda": ("tf32", "bfloat16", "float16"), "cpu": ("bfloat16",)}  # torch has no fast float16 for CPUs
MIN_IMAGES_FOR_TRIAL = 1000  # of a run, for a trial to pay
TRIAL_IMAGES, FIRST_IMAGES = 16, 4  # the first few already rule out what is far off
MIN_SPEEDUP, MAX_ERROR_RATIO = 1.1, 1.1  # of a candidate, relative to float32


def try_precisions(
    checkpoint: Checkpoint,
    pixels: np.ndarray,
    how: Inversion,
    resources: Resources,
    batch_size: int,
    executor: Executor,
) -> dict[str, Any]:
    """Tries the candidates on pixels, uint8 [N, H, W, C]. Returns `precision`, the fastest that is as good as float32,
    and `tried`, by precision: the network evaluations per second, `per_second`; if those are enough, also the number of
    `images` and the mean errors of the `round_trip` and of decoding in float32, `decoded_by_float32`, since others may
    decode the latents so. An error that is not finite is None."""
    return dict(executor.call(resources, _trial, checkpoint, pixels, how, batch_size, resources.threads))


def _trial(
    checkpoint: Checkpoint, pixels: np.ndarray, how: Inversion, batch_size: int, threads: int | None
) -> dict[str, Any]:
    def model_in(precision: str) -> Model:  # a new one for each use: TF32 is a setting of the whole process
        model = Model(checkpoint, threads, execution=Execution(precision))
        tune_process(model)
        return model

    def errors(precision: str, x: Tensor) -> dict[str, Any]:
        model = model_in(precision)
        condition = model.condition_of_all(len(x), checkpoint.with_any_condition())
        latents = model.encode(x, how.levels, how.corrections, how.tolerance, condition)[0]
        stored = latents.to(getattr(torch, how.dtype)).float()
        decoders = {"round_trip": precision, "decoded_by_float32": FLOAT32.precision}
        decoded = {name: model_in(decoder).decode(stored, how.levels, condition) for name, decoder in decoders.items()}
        wanted = model.attainable(x)
        return {"images": len(x), **{name: float(round_trip_error(wanted, y).mean()) for name, y in decoded.items()}}

    baseline = FLOAT32.precision
    x, device = to_model(pixels), model_in(baseline).device.type
    tried: dict[str, dict[str, Any]] = {
        precision: {"per_second": evaluations_per_second(model_in(precision), batch_size)}
        for precision in (baseline, *CANDIDATES[device])
    }
    min_speed = MIN_SPEEDUP * tried[baseline]["per_second"]
    for precision in sorted(CANDIDATES[device], key=lambda p: -tried[p]["per_second"]):
        if tried[precision]["per_second"] < min_speed:
            continue
        for part in (x[:FIRST_IMAGES], x):
            if tried[baseline].get("images") != len(part):
                tried[baseline] |= errors(baseline, part)
            tried[precision] |= errors(precision, part)
            most = MAX_ERROR_RATIO * tried[baseline]["round_trip"]
            # `not all(... <= ...)` also rejects NaN.
            if not all(tried[precision][name] <= most for name in ("round_trip", "decoded_by_float32")):
                break
        else:
            return _result(precision, tried)
    return _result(baseline, tried)


def _result(precision: str, tried: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """For JSON: an error that is not finite, such as that of overflowing latents, becomes None."""
    figures = {p: {k: v if isfinite(v) else None for k, v in row.items()} for p, row in tried.items()}
    return {"precision": precision, "tried": figures}
