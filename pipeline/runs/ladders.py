"""The values of --ladder: a kind, a list of timesteps, or a file that `palindrome calibrate` wrote."""

import json
from collections.abc import Callable
from typing import Any

import fsspec

from palindrome.model.ladder import LADDERS, Ladder, check_ladder, default_top, ladder, logsnr_ladder
from palindrome.model.process import CLEAN, Process
from palindrome.pipeline.storage.folder import options_for

KINDS = (*LADDERS, "logsnr")
DIFFUSERS = "diffusers"  # the ladder of the model's own scheduler
NAMED = (*KINDS, DIFFUSERS)  # whose number of steps --steps says
DEFAULT_STEPS = 20


def ladder_of_kind(kind: str, steps: int, process: Process, top: int | None = None) -> Ladder:
    """A ladder of one of `KINDS` with `steps` steps, up to `top`: by default where diffusers' leading spacing ends for
    linear, and where the image is gone (default_top) for the others. Raises ValueError."""
    if kind == "logsnr":
        return logsnr_ladder(process, steps, top)
    if kind == "quadratic" and top is None:
        top = default_top(process, steps)
    return ladder(kind, steps, process.num_train_timesteps, top)


def resolve(
    named: str,
    steps: int | None,
    process: Process,
    top: int | None = None,
    own: Callable[[int], Ladder] | None = None,
) -> Ladder:
    """The ladder `named`: one of `NAMED`, timesteps such as `0,3,11,800`, or the path or URI of a ladder file
    (`.json`).

    `steps` is the number of steps for those of NAMED (default: DEFAULT_STEPS), `top` the last level of KINDS, `own`
    makes the ladder of the model's own scheduler; `steps` must match that of a list or a file. Raises ValueError, and
    OSError for a file that can't be read.
    """
    T = process.num_train_timesteps
    if named in NAMED:
        count = DEFAULT_STEPS if steps is None else steps
        return own(count) if named == DIFFUSERS and own else ladder_of_kind(named, count, process, top)
    if named.endswith(".json"):
        levels = check_ladder(_read(named), T)
    else:
        try:
            levels = check_ladder([CLEAN, *(float(level) for level in named.split(","))], T)
        except ValueError as e:
            raise ValueError(
                f"{named!r} is not one of {', '.join(NAMED)}, a .json file or ascending timesteps: {e}"
            ) from e
    if steps not in (None, len(levels) - 1):
        raise ValueError(f"{named} has {len(levels) - 1} steps, but --steps is {steps}")
    return levels


def _read(uri: str) -> list[float]:
    with fsspec.open(uri, "rb", **options_for(uri)) as file:
        try:
            content: Any = json.load(file)
            levels = content["levels"]
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{uri} is not a ladder file: {type(e).__name__}: {e}") from e
    if not isinstance(levels, list) or not all(type(level) in (int, float) for level in levels):
        raise ValueError(f"{uri} is not a ladder file: its levels are not numbers")
    return levels
