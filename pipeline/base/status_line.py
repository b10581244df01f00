"""The display of a long run's progress: one line, rewritten in place on a terminal, logged at intervals elsewhere."""

import time
from typing import Any, TextIO

from palindrome.pipeline.base.log import say

TERMINAL_INTERVAL = 0.2  # seconds between updates on a terminal
LOG_INTERVAL = 10.0  # and between lines elsewhere
ERASE = "\r\x1b[K"  # back to the line's start, and erase it


class StatusLine:
    """A line on `stream`. `log_interval` is in seconds; with infinity nothing is shown except on a terminal."""

    def __init__(self, stream: TextIO, log_interval: float = LOG_INTERVAL) -> None:
        self.stream, self.terminal = stream, stream.isatty()
        self.interval = TERMINAL_INTERVAL if self.terminal else log_interval
        self.shown = time.monotonic()

    def due(self) -> bool:
        """Whether the interval since the last update has passed."""
        return time.monotonic() - self.shown >= self.interval

    def show(self, line: str, last: bool = False, **fields: Any) -> None:
        """Shows the line now; `fields` are those of its JSON object in a structured log."""
        self.shown = time.monotonic()
        if self.terminal:
            print(f"{ERASE}{line}", end="\n" if last else "", file=self.stream, flush=True)
        else:
            say(line, "progress", stream=self.stream, **fields)

    def clear(self) -> None:
        """Makes place for other output on the terminal."""
        if self.terminal:
            print(ERASE, end="", file=self.stream, flush=True)
