"""Which precision a run's network computes in: the fastest whose round trips are as good as float32's, by trial."""

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
MIN_IMAGES_FOR_TRIAL = 1000  # images of a run for which a trial pays
IMAGES, FEW = 16, 4  # of a trial, and of a first look that shows what is far off
FASTER, WORSE = 1.1, 1.1  # than float32: how much a candidate must be, and how much its mean error may be


def try_precisions(
    checkpoint: Checkpoint,
    pixels: np.ndarray,
    how: Inversion,
    resources: Resources,
    batch_size: int,
    executor: Executor,
) -> dict[str, Any]:
    """`precision` is the fastest that is as good as float32 on images, uint8 [N, H, W, C]; `tried` says by precision
    the network evaluations a second, `per_second`, and of those that are fast enough the mean error on so many `images`
    of the round trip, and of the latents decoded by float32, as anyone may; None is no number."""
    return dict(executor.call(resources, _trial, checkpoint, pixels, how, batch_size, resources.threads))


def _trial(
    checkpoint: Checkpoint, pixels: np.ndarray, how: Inversion, batch_size: int, threads: int | None
) -> dict[str, Any]:
    def model_in(precision: str) -> Model:  # made anew for each use: TF32 is a setting of the process
        model = Model(checkpoint, threads, execution=Execution(precision))
        tune_process(model)
        return model

    def errors(precision: str, x: Tensor) -> dict[str, Any]:
        latents = model_in(precision).encode(x, how.levels, how.corrections, how.tolerance)[0]
        stored = latents.to(getattr(torch, how.dtype)).float()
        decoders = {"round_trip": precision, "decoded_by_float32": FLOAT32.precision}
        back = {name: model_in(decoder).decode(stored, how.levels) for name, decoder in decoders.items()}
        return {"images": len(x), **{name: float(round_trip_error(x, y).mean()) for name, y in back.items()}}

    exact = FLOAT32.precision
    x, device = to_model(pixels), model_in(exact).device.type
    tried: dict[str, dict[str, Any]] = {
        precision: {"per_second": evaluations_per_second(model_in(precision), batch_size)}
        for precision in (exact, *CANDIDATES[device])
    }
    slow = tried[exact]["per_second"]
    for precision in sorted(CANDIDATES[device], key=lambda p: -tried[p]["per_second"]):
        if tried[precision]["per_second"] < FASTER * slow:
            continue
        for part in (x[:FEW], x):
            if tried[exact].get("images") != len(part):
                tried[exact] |= errors(exact, part)
            tried[precision] |= errors(precision, part)
            most = WORSE * tried[exact]["round_trip"]
            if not all(tried[precision][name] <= most for name in ("round_trip", "decoded_by_float32")):  # NaN is not
                break
        else:
            return _found(precision, tried)
    return _found(exact, tried)


def _found(precision: str, tried: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """As JSON can say it: an error that is no number, as of latents that overflow, is None."""
    told = {p: {k: v if isfinite(v) else None for k, v in figures.items()} for p, figures in tried.items()}
    return {"precision": precision, "tried": told}
