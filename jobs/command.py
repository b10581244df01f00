"""The commands, and the parser of their command lines."""

import argparse
import importlib
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, NoReturn

from palindrome.jobs.arguments import ConfigError, Options, add_arguments, flag_of, from_arguments
from palindrome.jobs.config import LogOptions, StorageOptions
from palindrome.pipeline.base.frozen_gc import frozen_gc
from palindrome.pipeline.base.log import say
from palindrome.pipeline.base.text import printable

JOBS = {
    "encode": "images -> latents, by DDIM inversion",
    "reconstruct": "latents -> images, compared with the originals",
    "export": "write the images of a run as image files, tars or Parquet",
    "calibrate": "fit a ladder to a model, for --ladder",
    "score": "images -> scores: out of distribution, member, generated",
    "sweep": "measure error and network evaluations over settings",
    "regenerate": "latents -> images, with any number of steps, or as variations",
    "generate": "noise -> new images",
    "watermark": "write keys of watermarks, for generate and score",
    "edit": "latents -> images changed by another text, image or direction, in a mask",
    "direction": "write the direction from one group of latents to another, for edit",
    "restore": "images with a part missing -> whole: inpainted, upscaled, coloured",
    "interpolate": "latents -> the images between them",
    "animate": "write the paths of interpolate as strips and videos",
    "evaluate": "measure how far generated images are from real ones",
    "train": "train a model on an image collection",
    "convert": "write a model as a checkpoint folder with safetensors",
    "status": "show the progress of a run",
    "verify": "check that a run is complete and consistent",
    "rejects": "list the inputs that a run rejected",
    "submit": "run a command on a Ray cluster",
    "jobs": "list the jobs submitted to a cluster",
    "logs": "print the output of a submitted job",
    "stop": "stop a submitted job",
}
HINT = "palindrome COMMAND --help shows the options of a command, and examples."
OPTIONS = "storage_options"
CLUSTER_COMMANDS = {"submit", "jobs", "logs", "stop"}  # they open no URIs themselves
WITHOUT_LOG = {"status", "verify", "rejects", "jobs", "stop"}  # their output is a result; some have --json or --format


@dataclass(frozen=True)
class Command:
    """A job, its function, its config, and fsspec's options by protocol."""

    job: str
    start: Callable[[Any], int]
    config: Options
    stores: dict[str, dict[str, Any]]


class Parser(argparse.ArgumentParser):
    """Reports an error in one line and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: error: {message.removeprefix('argument ')}", "error", "error")
        sys.exit(2)


class Version(argparse.Action):
    """Prints the versions of Palindrome, Python, Ray and torch, from the packages' metadata: importing torch and Ray
    takes seconds."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version  # slow to import, and used only here

        def version_of(package: str) -> str:
            try:
                return version(package)
            except PackageNotFoundError:  # Palindrome itself, if `submit` shipped its code
                return "unknown"

        rest = ", ".join(f"{package} {version_of(package)}" for package in ("ray", "torch"))
        print(f"palindrome {version_of('palindrome')} (python {platform.python_version()}, {rest})")
        sys.exit(0)


def parse(argv: Sequence[str]) -> Command:
    """The command of `palindrome ARGV`. Exits with code 2 and one line if it is invalid, with 0 after help."""
    parser = Parser(
        prog="palindrome",
        usage="%(prog)s COMMAND [options]",
        description="Image collections to diffusion latents and back, on Ray.",
        epilog="\n".join(["commands:", *(f"  {name:<12} {summary}" for name, summary in JOBS.items()), "", HINT]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    jobs = parser.add_subparsers(
        dest="job", metavar="COMMAND", help=argparse.SUPPRESS, prog="palindrome", parser_class=Parser
    )
    chosen = next((word for word in argv if not word.startswith("-")), None)
    if chosen is not None and chosen == argv[0] and chosen not in JOBS:
        parser.error(_no_command(chosen))
    flags = ["--help", "--version"]
    for name in JOBS:
        sub = jobs.add_parser(name, allow_abbrev=False)
        if name == chosen:  # a job's module is imported only to run it or to show its help
            with frozen_gc():
                module = importlib.import_module(f"palindrome.jobs.{name}")
            config = getattr(module, f"{name.capitalize()}Config")
            shared: list[type[Options]] = []
            if name not in CLUSTER_COMMANDS:
                shared.append(StorageOptions)
            if name not in WITHOUT_LOG:
                shared.append(LogOptions)
            flags = add_arguments(sub, config, *shared)
            sub.set_defaults(start=module.run, config=config)
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unrecognized(unknown, flags, hasattr(parsed, OPTIONS)))
    if parsed.job is None:
        parser.error("the following arguments are required: COMMAND")
    try:
        stores = {} if parsed.job in CLUSTER_COMMANDS else from_arguments(StorageOptions, parsed).read()
        return Command(parsed.job, parsed.start, from_arguments(parsed.config, parsed), stores)
    except ConfigError as e:
        refuse(parsed.job, e)


def _no_command(name: str) -> str:
    similar = get_close_matches(name, JOBS, 1)
    return f"no command {name!r}; " + (f"did you mean {similar[0]!r}?" if similar else f"choose from {', '.join(JOBS)}")


def _unrecognized(unknown: list[str], flags: list[str], secret: bool) -> str:
    """The error for unknown arguments, with the flags that were probably meant. Unquoted JSON of --storage-options,
    split by the shell, may contain a secret: then only the suggestion is shown. The values of unknown flags are never
    shown, because such a flag may be --storage-options misspelt."""
    names = [word.partition("=")[0] for word in unknown if word.startswith("--") and not (secret and "=" in word)]
    similar = dict.fromkeys(flag for name in names for flag in _meant(name, flags))
    hidden = secret or flag_of(OPTIONS) in similar
    return (
        "unrecognized arguments"
        + ("" if hidden else f": {printable(' '.join(names or unknown))}")
        + (f"; did you mean {', '.join(similar)}?" if similar else "")
    )


def _meant(name: str, flags: list[str]) -> list[str]:
    """The only flag with the name as prefix, else the most similar one, else none."""
    prefixed = [flag for flag in flags if flag.startswith(name)]
    return prefixed if len(prefixed) == 1 else get_close_matches(name, flags, 1)


def logs_json(argv: Sequence[str], terminal: bool) -> bool:
    """Whether the output of `palindrome ARGV` is JSON. Decided before ARGV is parsed, because parse errors are reported
    in that format too. `parse` reports an invalid --log; an invalid $PALINDROME_LOG raises ConfigError here."""
    words = list(argv[: argv.index("--")] if "--" in argv else argv)
    if not words or words[0] not in JOBS.keys() - WITHOUT_LOG or {"-h", "--help"} & set(words):
        return False
    named = [after for before, after in pairwise(words) if before == "--log"]
    named += [word.removeprefix("--log=") for word in words if word.startswith("--log=")]
    known = [value for value in named if value in ("auto", "text", "json")]
    return LogOptions(log=known[-1] if known else None).as_json(terminal)  # type: ignore[arg-type]


def refuse(job: str, error: ConfigError) -> NoReturn:
    """Reports an invalid command, and exits with code 2."""
    say(f"palindrome {job}: error: {error}", "error", "error")
    sys.exit(2)
