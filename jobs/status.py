"""palindrome status: the progress of a run, read from its folder."""

import shutil
import sys
import time
from dataclasses import dataclass
from typing import ClassVar

from palindrome.jobs.arguments import Options, config_error
from palindrome.pipeline.runs.kinds import SHARDED
from palindrome.pipeline.runs.manifest import open_run
from palindrome.pipeline.runs.status import State, StateReader, as_json, describe

EVERY = 2.0  # seconds


@dataclass(frozen=True, kw_only=True)
class StatusConfig(Options):
    """Show the progress of a sharded run: shards, images, rejects, speed and time left.

    The command only reads the run folder, so it works from any machine, during the run or after it."""

    GROUP: ClassVar[str] = "output"
    EXAMPLES: ClassVar[str] = """
    palindrome status runs/photos
    palindrome status s3://bucket/run --watch
    """

    POSITIONAL: ClassVar[frozenset[str]] = frozenset({"run"})

    run: str
    """The run folder, a path or an fsspec URI."""
    watch: bool = False
    """Repeat every 2 seconds until the run is complete; stop with Ctrl-C."""
    json: bool = False
    """Print one JSON object per line instead of text."""


def run(config: StatusConfig) -> int:
    with config_error("RUN"):
        folder, manifest = open_run(config.run, *SHARDED)
        reader = StateReader(folder, manifest)
        state = reader.read()
    printed = _show(config, state, 0)
    while config.watch and not state.complete:
        time.sleep(EVERY)
        with config_error("RUN"):
            state = reader.read()
        printed = _show(config, state, printed)
    return 0


def _show(config: StatusConfig, state: State, printed: int) -> int:
    """Prints the state, on a terminal over the `printed` lines of the previous one; returns the number of lines."""
    if config.json:
        print(as_json(state), flush=True)
        return 0
    lines = describe(state)
    if config.watch and sys.stdout.isatty():
        width = shutil.get_terminal_size().columns  # lines are cut: one that wraps would take two rows
        up = f"\x1b[{printed}F" if printed else ""
        print(up + "".join(f"\x1b[K{line[: width - 1]}\n" for line in lines) + "\x1b[J", end="", flush=True)
    else:
        print("\n".join(lines), end="\n\n" if config.watch and not state.complete else "\n", flush=True)
    return len(lines)
