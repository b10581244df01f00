"""The command line: `palindrome COMMAND --flags`, or `python -m palindrome COMMAND --flags`."""

import atexit
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NoReturn

from palindrome.jobs.arguments import ConfigError
from palindrome.jobs.command import OPTIONS, logs_json, parse, refuse
from palindrome.jobs.config import ImagesConfig, OutOptions, Planned
from palindrome.pipeline.base import interrupt
from palindrome.pipeline.base.errors import RunError, StoreError
from palindrome.pipeline.base.log import say, structured
from palindrome.pipeline.runs.lease import release_all
from palindrome.pipeline.storage.folder import using

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send before they reclaim a machine."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Exit codes: 0 success; 1 the run failed; 2 the command is invalid; 130 SIGINT; 143 SIGTERM."""
    if arguments is not None:
        return _logged(arguments)
    argv, ended = sys.argv[1:], list[int]()
    _spare_loopback()
    _use_utf8()
    _hide_options(argv)
    atexit.register(_leave, ended)
    ended.append(_logged(argv))
    return ended[0]


def _leave(ended: list[int]) -> None:
    """Ends the process with this exit code, once all else that is to be done at its end is. Python would go on to take
    itself apart, during which a thread of Arrow's that still holds a file may abort it (apache/arrow#34314): a run that
    is complete would exit with 134."""
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except (AttributeError, OSError):  # closed: Python says so, and has an exit code for it
        return
    if ended:
        os._exit(ended[0])


def _logged(argv: list[str]) -> int:
    try:
        as_json = logs_json(argv, sys.stdout.isatty())
    except ConfigError as e:
        refuse(argv[0], e)
    return structured(argv[0], lambda: _main(argv)) if as_json else _main(argv)


def _main(argv: list[str]) -> int:
    command = parse(argv)
    config = command.config
    try:
        with _signals_raise(), using(command.stores):
            if isinstance(config, OutOptions) and config.dry_run:
                return _dry_run(command.start, config)
            code = int(command.start(config))
            return _export(config) if code == 0 and isinstance(config, ImagesConfig) and config.format else code
    except ConfigError as e:
        refuse(command.job, e)
    except (RunError, StoreError) as e:
        say(f"palindrome {command.job}: {e}", "error", "error")
        return 1
    except KeyboardInterrupt as e:
        if out := getattr(config, "out", None):
            print(f"\ninterrupted; the same command resumes {out}", file=sys.stderr)
        return 143 if isinstance(e, Terminated) else 130
    finally:
        release_all()


def _dry_run(start: Callable[[Any], int], config: OutOptions) -> int:
    estimate = importlib.import_module("palindrome.jobs.estimate")
    try:
        with estimate.dry(config) as planned:
            return start(planned)
    except Planned:
        print("dry run: nothing was done")
        return 0


def _export(config: ImagesConfig) -> int:
    """Exports the images of a job in the format of its --format."""
    export = importlib.import_module("palindrome.jobs.export")
    out = f"{config.out.rstrip('/')}/{config.format}"
    return int(export.run(export.ExportConfig(run=config.out, out=out, format=config.format)))


def _use_utf8() -> None:
    """Executes the same command again in Python's UTF-8 mode, which Ray's workers then have too, where the locale is
    another: names of files, and so the ids of images, would depend on it."""
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)


def _spare_loopback() -> None:
    """A company's proxy does not reach this machine: Ray and servers on it are asked directly."""
    for name in ("no_proxy", "NO_PROXY"):
        there = [part for part in os.environ.get(name, "").split(",") if part.strip()]
        os.environ[name] = ",".join([*there, *(own for own in LOOPBACK if own not in there)])


def _hide_options(argv: list[str]) -> None:
    """Re-executes the process with the JSON of --storage-options in a pipe: every user of the machine can read a
    process's command line, and Ray stores the driver's in its job table."""
    flag = f"--{OPTIONS.replace('_', '-')}"
    joined = [argument.removeprefix(f"{flag}=") for argument in argv if argument.startswith(f"{flag}=")]
    for value in [*joined, *(after for before, after in pairwise(argv) if before == flag)]:
        content = value.encode()
        if not value.lstrip().startswith("{") or len(content) > 2**14:  # a pipe's buffer may be no larger
            continue
        reading, writing = os.pipe()
        os.write(writing, content)
        os.close(writing)
        os.set_inheritable(reading, True)
        os.execv(sys.executable, [argument.replace(value, f"/dev/fd/{reading}") for argument in sys.orig_argv])


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Makes SIGTERM end a job like Ctrl-C: shards in flight are dropped, and the run can be resumed."""
    received: list[KeyboardInterrupt] = []

    def end(number: int, _: object) -> NoReturn:
        received.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        interrupt.set_pending(received[-1])
        raise received[-1]

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        if received:  # Ray replaces an exception raised inside its code by a plain KeyboardInterrupt
            raise received[-1] from None
        raise
    finally:
        interrupt.set_pending(None)
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
