"""palindrome submit: run a command on a Ray cluster."""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import ClassVar, Literal

from palindrome.infra.package import PackageError, build
from palindrome.infra.submission import Job, SubmissionError
from palindrome.jobs.arguments import ConfigError, config_error, flag_of
from palindrome.jobs.command import Command, parse
from palindrome.jobs.config import STORAGE_OPTIONS, ClusterOptions, Config
from palindrome.pipeline.base.log import relay
from palindrome.pipeline.base.text import single_line

PATH_FIELDS = ("images", "model", "out", "latents")  # fields that are paths or URIs
MAYBE_PATH_FIELDS = ("ids", "pairs", "ladder")  # fields that are paths if such a file exists


@dataclass(frozen=True, kw_only=True)
class SubmitConfig(ClusterOptions):
    """Run a command on a Ray cluster, through the cluster's dashboard.

    Palindrome's code is uploaded; its dependencies must be installed on the cluster. For a cluster with token
    authentication, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."""

    GROUP: ClassVar[str] = "submission"
    EXAMPLES: ClassVar[str] = """
    palindrome submit --address http://head:8265 -- \\
        encode --images s3://bucket/photos --model s3://bucket/model --out s3://bucket/run
    palindrome submit --ship checkpoints/cifar10-32 --no-wait -- \\
        generate --model checkpoints/cifar10-32 --count 64 --out s3://bucket/samples
    """

    POSITIONAL: ClassVar[frozenset[str]] = frozenset({"command"})

    command: tuple[str, ...]
    """The command and its flags, after --. Every node must be able to reach images, model and output."""
    wait: bool = True
    """Print the job's output until it ends, and exit with its exit code; otherwise return once it is submitted."""
    code: Literal["ship", "image"] = "ship"
    """ship: upload the code of this Palindrome; image: use the Palindrome installed on the nodes."""
    ship: tuple[str, ...] = ()
    """Files and folders below the working directory to upload, such as a checkpoint or a ladder; the command names them
    by the same paths. At most 100 MiB in total."""
    env: tuple[str, ...] = ()
    """Environment variables to set for the job, such as HF_TOKEN or 'AWS_*'. Like --storage-options they are uploaded
    in the package, so that Ray does not show or log them."""


def run(config: SubmitConfig) -> int:
    """Submits the command and returns its exit code, or 0 with --no-wait."""
    inner = parse(config.command)
    _check_paths(inner, config.ship)
    environment = _environment(config.env)
    if inner.stores:
        environment[STORAGE_OPTIONS] = json.dumps(inner.stores)
    cluster = config.cluster()
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder)
        with config_error("--ship", PackageError):
            size = build(package, config.ship, environment, config.code == "ship")
        with config_error("--address", SubmissionError):
            job_id = cluster.submit(_without_options(config.command), package if size else None)
    print(f"{job_id} submitted to {cluster.address} with {size / 2**20:.1f} MiB of files", flush=True)
    again = f"--address {cluster.address} {job_id}"
    if not config.wait:
        print(f"palindrome logs --follow {again}\npalindrome stop {again}")
        return 0
    try:
        with relay() as show:
            job = cluster.follow(job_id, show)
        return _ended(job)
    except SubmissionError as e:
        print(f"{e}\nthe job may still be running; palindrome logs --follow {again}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if _wants_to_stop(job_id):
            cluster.stop(job_id)
            print(f"{job_id} is stopping; the same command resumes its run", file=sys.stderr)
        else:
            print(f"{job_id} keeps running; palindrome logs --follow {again}", file=sys.stderr)
        raise


def _ended(job: Job) -> int:
    """The exit code of an ended job; prints the reason if it is not 0."""
    if job.status == "SUCCEEDED":
        return 0
    code = job.exit_code
    end = "was stopped" if job.status == "STOPPED" else f"failed, exit code {'unknown' if code is None else code}"
    print(f"{job.id} {end}" + (f": {single_line(job.message)}" if code is None else ""), file=sys.stderr)
    return code if code and code > 0 else 1


def _check_paths(inner: Command, ship: tuple[str, ...]) -> None:
    """Raises ConfigError for commands that don't run on a cluster, and for relative paths that are not shipped: the
    cluster would resolve them in its own folders."""
    if not isinstance(inner.config, Config):
        raise ConfigError(f"COMMAND: {inner.job} does not run on a cluster; start it here")
    if inner.config.address is not None:
        raise ConfigError("COMMAND: --address belongs before --: the job runs on the cluster itself")
    for field in (*PATH_FIELDS, *MAYBE_PATH_FIELDS):
        path = getattr(inner.config, field, None)
        if not isinstance(path, str) or "://" in path or "::" in path or os.path.isabs(path):
            continue
        if field in MAYBE_PATH_FIELDS and not Path(path).exists():  # a ladder's kind, for example
            continue
        if not any(PurePath(path).is_relative_to(PurePath(shipped)) for shipped in ship):
            raise ConfigError(
                f"COMMAND: {flag_of(field)} {path} is a path on this machine; give a URI, an absolute path that all"
                f" nodes share, or --ship small files"
            )


def _environment(patterns: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pattern in patterns:
        named = {name: value for name, value in os.environ.items() if fnmatchcase(name, pattern)}
        if not named:
            raise ConfigError(f"--env: {pattern} is not set")
        found |= named
    return found


def _without_options(command: tuple[str, ...]) -> list[str]:
    """The command without --storage-options, as Ray shows a job's command to everyone."""
    flag, kept, words = "--storage-options", [], iter(command)
    for word in words:
        if word == flag:
            next(words, None)
        elif not word.startswith(f"{flag}="):
            kept.append(word)
    return kept


def _wants_to_stop(job_id: str) -> bool:
    """Asks the user on a terminal; otherwise False."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"\nstop {job_id}, or leave it running? [s/L] ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip().lower().startswith("s")
    except KeyboardInterrupt:
        return False
