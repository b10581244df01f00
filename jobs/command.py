"""Commands: which there are, and what the words of one say."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

from palindrome.jobs.arguments import ConfigError, Options, add_arguments, from_arguments
from palindrome.jobs.config import LogOptions, StorageOptions
from palindrome.pipeline.base.frozen_gc import frozen_gc
from palindrome.pipeline.base.log import say

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
    "submit": "start one of these on a Ray cluster, from anywhere",
    "jobs": "what was submitted to a cluster",
    "logs": "what a submitted job says",
    "stop": "stop a submitted job",
}
OPTIONS = "storage_options"
OF_CLUSTERS = {"submit", "jobs", "logs", "stop"}  # which open no stores themselves
ANSWERS = {"status", "verify", "rejects", "jobs", "stop"}  # which keep no log: some have --json or --format instead


@dataclass(frozen=True)
class Command:
    """A job to start, its settings, and how stores are opened for it."""

    job: str
    start: Callable[[Any], int]
    config: Options
    stores: dict[str, dict[str, Any]]


class Parser(argparse.ArgumentParser):
    """One line for what is wrong, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: error: {message.removeprefix('argument ')}", "error", "error")
        sys.exit(2)


def parse(argv: Sequence[str]) -> Command:
    """What `palindrome ARGV` says. Exits with code 2 and one line where it is wrong, with 0 where it asks for help."""
    parser = Parser(prog="palindrome", description="Image collections to diffusion latents and back, on Ray.")
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True, parser_class=Parser)
    words = set(argv[: argv.index("--")] if "--" in argv else argv)
    for name, summary in JOBS.items():
        sub = jobs.add_parser(name, help=summary, allow_abbrev=False)
        if name in words:  # a job's module is imported only to run it or to show its help
            with frozen_gc():
                module = importlib.import_module(f"palindrome.jobs.{name}")
            config = getattr(module, f"{name.capitalize()}Config")
            sub.description = config.__doc__
            add_arguments(sub, config)
            if name not in OF_CLUSTERS:
                add_arguments(sub, StorageOptions)
            if name not in ANSWERS:
                add_arguments(sub, LogOptions)
            sub.set_defaults(start=module.run, config=config)
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:  # what a shell has made of JSON without quotes may hold a secret
        parser.error("unrecognized arguments" + ("" if hasattr(parsed, OPTIONS) else f": {' '.join(unknown)}"))
    try:
        stores = {} if parsed.job in OF_CLUSTERS else from_arguments(StorageOptions, parsed).read()
        return Command(parsed.job, parsed.start, from_arguments(parsed.config, parsed), stores)
    except ConfigError as e:
        refuse(parsed.job, e)


def logs_json(argv: Sequence[str], terminal: bool) -> bool:
    """Whether what `palindrome ARGV` says is to be JSON. Found before ARGV is parsed, which may be wrong: that is said
    in this form too. What is wrong with the form itself, `parse` says, or ConfigError."""
    words = list(argv[: argv.index("--")] if "--" in argv else argv)
    if not words or words[0] not in JOBS.keys() - ANSWERS or {"-h", "--help"} & set(words):
        return False
    named = [after for before, after in pairwise(words) if before == "--log"]
    named += [word.removeprefix("--log=") for word in words if word.startswith("--log=")]
    known = [form for form in named if form in ("auto", "text", "json")]
    return LogOptions(log=known[-1] if known else None).as_json(terminal)  # type: ignore[arg-type]


def refuse(job: str, error: ConfigError) -> NoReturn:
    """Says what is wrong with a command, and exits with code 2."""
    say(f"palindrome {job}: error: {error}", "error", "error")
    sys.exit(2)
