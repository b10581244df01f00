"""The command line: `palindrome JOB --flags`, or `python -m jobs JOB --flags`."""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NoReturn

from jobs.config import ConfigError, ImagesConfig, StorageOptions, add_arguments, from_arguments
from pipeline import interrupt
from pipeline.errors import RunError, StoreError
from pipeline.storage import using

JOBS = {
    "encode": "images -> latents, by DDIM inversion",
    "reconstruct": "latents -> images, compared with the originals",
    "export": "the images of a run as files for others",
    "calibrate": "a ladder fitted to a model, for --ladder",
    "sweep": "the error against the network evaluations, over settings",
    "regenerate": "latents -> images, on ladders of any length, or varied",
    "generate": "new images, from noise",
    "interpolate": "latents -> the images between them",
    "animate": "the paths of interpolate as strips and films",
    "train": "train a model on a collection",
    "status": "how far a run is",
    "verify": "whether a run holds what it should",
    "rejects": "the inputs that a run could not use",
}


OPTIONS = "storage_options"


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a scheduler sends it before it takes the machine."""


class Parser(argparse.ArgumentParser):
    """One line for what is wrong, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: error: {message.removeprefix('argument ')}\n")
        sys.exit(2)


def main(arguments: list[str] | None = None) -> int:
    """Runs one job. Exit codes: 0 done; 1 the run failed; 2 the command was wrong; 130 interrupted, 143 by SIGTERM."""
    argv = sys.argv[1:] if arguments is None else arguments
    if arguments is None:
        _hide_options(argv)
    parser = Parser(prog="palindrome", description="Image collections to diffusion latents and back, on Ray.")
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True, parser_class=Parser)
    for name, summary in JOBS.items():
        sub = jobs.add_parser(name, help=summary, allow_abbrev=False)
        if name in argv:  # a job's module is imported only to run it or to show its help
            module = importlib.import_module(f"jobs.{name}")
            config = getattr(module, f"{name.capitalize()}Config")
            sub.description = config.__doc__
            add_arguments(sub, config)
            add_arguments(sub, StorageOptions)
            sub.set_defaults(start=module.run, config=config)
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:  # what a shell has made of JSON without quotes may hold a secret
        parser.error("unrecognized arguments" + ("" if hasattr(parsed, OPTIONS) else f": {' '.join(unknown)}"))
    try:
        stores = from_arguments(StorageOptions, parsed).read()
        with _signals_raise(), using(stores):
            config = from_arguments(parsed.config, parsed)
            code = int(parsed.start(config))
            return _export(config) if code == 0 and isinstance(config, ImagesConfig) and config.format else code
    except ConfigError as e:
        parser.exit(2, f"palindrome {parsed.job}: error: {e}\n")
    except (RunError, StoreError) as e:
        print(f"palindrome {parsed.job}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as e:
        if hasattr(parsed, "out"):
            print(f"\ninterrupted; the same command resumes {parsed.out}", file=sys.stderr)
        return 143 if isinstance(e, Terminated) else 130


def _export(config: ImagesConfig) -> int:
    """What a job has made, in the format that it was asked for."""
    export = importlib.import_module("jobs.export")
    out = f"{config.out.rstrip('/')}/{config.format}"
    return int(export.run(export.ExportConfig(run=config.out, out=out, format=config.format)))


def _hide_options(argv: list[str]) -> None:
    """Starts again as the same process with JSON of --storage-options in a pipe: anyone on the machine can read a
    command line, and Ray writes its own into its table of jobs."""
    flag = f"--{OPTIONS.replace('_', '-')}"
    joined = [argument.removeprefix(f"{flag}=") for argument in argv if argument.startswith(f"{flag}=")]
    for value in [*joined, *(after for before, after in pairwise(argv) if before == flag)]:
        content = value.encode()
        if not value.lstrip().startswith("{") or len(content) > 2**14:  # more than that may not fit into a pipe
            continue
        reading, writing = os.pipe()
        os.write(writing, content)
        os.close(writing)
        os.set_inheritable(reading, True)
        os.execv(sys.executable, [argument.replace(value, f"/dev/fd/{reading}") for argument in sys.orig_argv])


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM ends a job as Ctrl-C does: what is in flight is dropped, and the folder can be resumed."""

    def end(number: int, _: object) -> NoReturn:
        raised = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        interrupt.set_pending(raised)
        raise raised

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        interrupt.set_pending(None)
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
