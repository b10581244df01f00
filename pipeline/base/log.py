"""A command's output: text, or JSON lines for log collectors.

Commands print as usual. In JSON mode every printed line becomes an object. Lines with figures go through `say`, so that
the figures become fields of the object.
"""

import io
import json
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from typing import Any, TextIO

KEYS = {"time", "level", "event", "message"}  # of every line


class Lines(io.TextIOBase):
    """Writes each line to `stream` as an object: a message of `level`, unless `put` is called with other values."""

    def __init__(self, stream: TextIO, level: str, lock: threading.Lock) -> None:
        self.stream, self.level, self.lock = stream, level, lock
        self.partial = threading.local()  # the unfinished line of each thread
        self.figures: dict[str, Any] = {}  # for the last line

    def write(self, text: str) -> int:
        *lines, self.partial.text = (getattr(self.partial, "text", "") + text).split("\n")
        for line in lines:
            if line.strip():
                self.put(line.strip("\r"), "message", self.level)
        return len(text)

    def put(self, message: str, event: str, level: str, **fields: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        record = {"time": now, "level": level, "event": event, "message": message}
        self.put_line(json.dumps(_plain({**record, **fields}), allow_nan=False))

    def put_line(self, line: str) -> None:
        with self.lock:
            self.stream.write(f"{line}\n")
            self.stream.flush()

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()


def say(message: str, event: str, level: str = "info", stream: TextIO | None = None, **fields: Any) -> None:
    """Prints a line to `stream` (default: standard output for level info, else standard error); in JSON mode, an object
    with `fields`."""
    stream = stream or (sys.stdout if level == "info" else sys.stderr)
    if isinstance(stream, Lines):
        stream.put(message, event, level, **fields)
    else:
        print(message, file=stream, flush=True)


def note(**figures: Any) -> None:
    """Adds figures to the last line of a JSON log; lists of names are left out."""
    if isinstance(sys.stdout, Lines):
        sys.stdout.figures.update(_short(figures))


def structured(job: str, run: Callable[[], int]) -> int:
    """Calls `run` with its output as JSON lines, including an unexpected error and the event `end`. Returns the exit
    code."""
    lock, started = threading.Lock(), time.monotonic()
    out, err = Lines(sys.stdout, "info", lock), Lines(sys.stderr, "warning", lock)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = run()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except Exception as e:
            code = 1
            err.put(f"palindrome {job}: {type(e).__name__}: {e}", "error", "error", traceback=traceback.format_exc())
    seconds = round(time.monotonic() - started, 3)
    level = "error" if code else "info"
    out.put(f"{job}: exit code {code}", "end", level, job=job, exit_code=code, seconds=seconds, **out.figures)
    return code


@contextmanager
def relay() -> Iterator[Callable[[str], None]]:
    """Prints the output of a command that ran elsewhere, passed to the function in pieces. JSON lines are copied in
    JSON mode, and else become the text that they would have been."""
    partial = ""

    def add(text: str) -> None:
        nonlocal partial
        *lines, partial = (partial + text).split("\n")
        for line in lines:
            _relay_line(line)

    try:
        yield add
    finally:
        if partial:
            _relay_line(partial)


def _relay_line(line: str) -> None:
    record = _record(line)
    if record is None:
        print(line, flush=True)
    elif isinstance(sys.stdout, Lines):
        sys.stdout.put_line(line)
    elif record["event"] != "end":  # the exit code already tells it
        print(record.get("traceback", record["message"]).rstrip("\n"), flush=True)


def _record(line: str) -> dict[str, Any] | None:
    """The object that `Lines` wrote; None for another line."""
    try:
        found = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.keys() >= KEYS else None


def _plain(value: Any) -> Any:
    """The value as JSON can represent it: NaN and infinity become None, unknown types strings."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items() if not (isinstance(v, list) and v and isinstance(v[0], str))}
    return [_short(v) for v in value] if isinstance(value, list) else value
