"""What a command says: text for people, or JSON objects, one a line, for programs that collect logs.

Commands print, and need not know which it is: where it is JSON, every line that is printed becomes an object. What has
figures in it goes through `say`, so that they are numbers there.
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
    """Writes each line as an object to `stream`: a message of `level`, where nothing else is said of it."""

    def __init__(self, stream: TextIO, level: str, lock: threading.Lock) -> None:
        self.stream, self.level, self.lock = stream, level, lock
        self.begun = threading.local()  # a line that is not whole yet, of each thread
        self.figures: dict[str, Any] = {}  # for the last line

    def write(self, text: str) -> int:
        *lines, self.begun.text = (getattr(self.begun, "text", "") + text).split("\n")
        for line in lines:
            if line.strip():
                self.put(line.strip("\r"), "message", self.level)
        return len(text)

    def put(self, message: str, event: str, level: str, **fields: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        about = {"time": now, "level": level, "event": event, "message": message}
        self.put_line(json.dumps(_plain({**about, **fields}), allow_nan=False))

    def put_line(self, line: str) -> None:
        with self.lock:
            self.stream.write(f"{line}\n")
            self.stream.flush()

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return self.stream.fileno()


def say(message: str, event: str, level: str = "info", stream: TextIO | None = None, **fields: Any) -> None:
    """A line on `stream` (default: standard output, or standard error where the level is not info), with `fields` where
    it is an object."""
    stream = stream or (sys.stdout if level == "info" else sys.stderr)
    if isinstance(stream, Lines):
        stream.put(message, event, level, **fields)
    else:
        print(message, file=stream, flush=True)


def note(**figures: Any) -> None:
    """Figures for the line with which a log of objects ends; lists of names stay behind."""
    if isinstance(sys.stdout, Lines):
        sys.stdout.figures.update(_short(figures))


def structured(job: str, run: Callable[[], int]) -> int:
    """`run`, with all that it prints as objects: the end among them, and an error that nobody expected. Returns its
    exit code."""
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
    """Takes what a command of Palindrome has said elsewhere, in pieces, and says it here: objects as they are where
    this command's lines are objects too, else as the text that they would have been."""
    begun = ""

    def add(text: str) -> None:
        nonlocal begun
        *lines, begun = (begun + text).split("\n")
        for line in lines:
            _say_again(line)

    try:
        yield add
    finally:
        if begun:
            _say_again(begun)


def _say_again(line: str) -> None:
    record = _record(line)
    if record is None:
        print(line, flush=True)
    elif isinstance(sys.stdout, Lines):
        sys.stdout.put_line(line)
    elif record["event"] != "end":  # people are told of that by the exit code
        print(record.get("traceback", record["message"]).rstrip("\n"), flush=True)


def _record(line: str) -> dict[str, Any] | None:
    """The object that `Lines` wrote, None where it is another line."""
    try:
        found = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.keys() >= KEYS else None


def _plain(value: Any) -> Any:
    """Without the numbers that JSON does not have."""
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
