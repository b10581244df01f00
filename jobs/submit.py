"""palindrome submit: a job of Palindrome on a Ray cluster."""

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

PLACES = ("images", "model", "out", "latents")  # fields that name files and folders
FILES = ("ids", "pairs", "ladder")  # and those that may


@dataclass(frozen=True, kw_only=True)
class SubmitConfig(ClusterOptions):
    """Run a command on a Ray cluster, through the cluster's dashboard.

    Palindrome's code is sent along; the cluster needs its dependencies. For a cluster with token authentication, set
    RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."""

    GROUP: ClassVar[str] = "submission"
    EXAMPLES: ClassVar[str] = """
    palindrome submit --address http://head:8265 -- \\
        encode --images s3://bucket/photos --model s3://bucket/model --out s3://bucket/run
    palindrome submit --ship checkpoints/cifar10-32 --no-wait -- \\
        generate --model checkpoints/cifar10-32 --count 64 --out s3://bucket/samples
    """

    POSITIONAL: ClassVar[frozenset[str]] = frozenset({"command"})

    command: tuple[str, ...]
    """The job and its flags, behind --. Images, model and output lie where every node reaches them."""
    wait: bool = True
    """Show what the job says until it ends, and exit with its code; else return once it is submitted."""
    code: Literal["ship", "image"] = "ship"
    """Send this Palindrome along, or use the one that is installed on the nodes."""
    ship: tuple[str, ...] = ()
    """Files and folders below this one to send along, such as a checkpoint or a ladder; the command names them as here.
    100 MiB at most, all in all."""
    env: tuple[str, ...] = ()
    """Variables of the environment that the job gets, such as HF_TOKEN or 'AWS_*'. They travel in the package, as do
    --storage-options, and not in what Ray shows and logs of a job."""


def run(config: SubmitConfig) -> int:
    """Submits the command, and returns its exit code once it has ended, or 0 where that is not waited for."""
    inner = parse(config.command)
    _check_places(inner, config.ship)
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
    print(f"{job_id} submitted to {cluster.address}, {size / 2**20:.1f} MiB with it", flush=True)
    again = f"--address {cluster.address} {job_id}"
    if not config.wait:
        print(f"palindrome logs --follow {again}\npalindrome stop {again}")
        return 0
    try:
        with relay() as show:
            job = cluster.follow(job_id, show)
        return _ended(job)
    except SubmissionError as e:
        print(f"{e}\nthe job may go on; palindrome logs --follow {again}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if _wants_to_stop(job_id):
            cluster.stop(job_id)
            print(f"{job_id} is asked to stop; the same command resumes it", file=sys.stderr)
        else:
            print(f"{job_id} goes on; palindrome logs --follow {again}", file=sys.stderr)
        raise


def _ended(job: Job) -> int:
    """The exit code of a job that has ended; says so where it is not 0."""
    if job.status == "SUCCEEDED":
        return 0
    code = job.exit_code
    what = "was stopped" if job.status == "STOPPED" else f"failed, exit code {'unknown' if code is None else code}"
    print(f"{job.id} {what}" + (f": {' '.join(job.message.split())}" if code is None else ""), file=sys.stderr)
    return code if code and code > 0 else 1


def _check_places(inner: Command, ship: tuple[str, ...]) -> None:
    """What a cluster would look for in its own folders. Raises ConfigError."""
    if not isinstance(inner.config, Config):
        raise ConfigError(f"COMMAND: {inner.job} does not run on a cluster; start it here")
    if inner.config.address is not None:
        raise ConfigError("COMMAND: --address belongs before --: the job runs on the cluster itself")
    for field in (*PLACES, *FILES):
        place = getattr(inner.config, field, None)
        if not isinstance(place, str) or "://" in place or "::" in place or os.path.isabs(place):
            continue
        if field in FILES and not Path(place).exists():  # a ladder's kind, say
            continue
        if not any(PurePath(place).is_relative_to(PurePath(sent)) for sent in ship):
            raise ConfigError(
                f"COMMAND: {flag_of(field)} {place} is a place on this machine; name a URI, an absolute path that all"
                f" nodes share, or --ship what is small"
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
    """The command without --storage-options, which Ray would show to all."""
    flag, kept, words = "--storage-options", [], iter(command)
    for word in words:
        if word == flag:
            next(words, None)
        elif not word.startswith(f"{flag}="):
            kept.append(word)
    return kept


def _wants_to_stop(job_id: str) -> bool:
    """Asked on a terminal; elsewhere a job goes on."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"\nstop {job_id}, or leave it running? [s/L] ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip().lower().startswith("s")
    except KeyboardInterrupt:
        return False
