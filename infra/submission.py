"""Ray Jobs on a cluster: submit, follow, list, stop. Errors say what to do."""

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from packaging.version import Version
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

OLDEST = "2.55"  # of Ray, that a cluster may run
PORT = 8265  # of a cluster's dashboard
ENTRYPOINT = "python -m palindrome.infra.entrypoint"
POLL = 1.0  # seconds
AGENT = 60.0  # seconds in which a head that has just started has an agent that starts jobs
RETRIES = 30  # polls without an answer, after which the cluster is taken for gone
ENDED = {status.value for status in JobStatus if status.is_terminal()}


class SubmissionError(RuntimeError):
    """A cluster that can't be reached, refuses, or knows no such job."""


@dataclass(frozen=True)
class Job:
    """A job as the cluster tells of it; times are seconds since 1970."""

    id: str
    status: str
    command: str
    started: float | None
    ended: float | None
    exit_code: int | None
    message: str


def address_of(given: str | None) -> str:
    """The URL of a cluster's dashboard: what is given, $RAY_API_SERVER_ADDRESS, or this machine's."""
    address = given or os.environ.get("RAY_API_SERVER_ADDRESS") or f"http://127.0.0.1:{PORT}"
    return address.rstrip("/") if "://" in address else f"http://{address.rstrip('/')}"


class Cluster:
    """The jobs of the cluster whose dashboard is at a URL. Raises SubmissionError where it can't be used."""

    def __init__(self, address: str) -> None:
        self.address = address
        logging.getLogger("ray.dashboard").setLevel(logging.WARNING)  # its client tells of every step
        self.client = self._asked(lambda: JobSubmissionClient(address))
        version = getattr(self.client, "_server_ray_version", None)
        if version and Version(version) < Version(OLDEST):
            raise SubmissionError(f"{address} runs Ray {version}; Palindrome needs {OLDEST} or later there")

    def submit(self, command: Sequence[str], package: Path | None) -> str:
        """Starts a command of Palindrome there, in the package's folder where it has one; returns the job's id."""
        runtime_env: dict[str, Any] = {"worker_process_setup_hook": "palindrome.infra.entrypoint.load"}
        if package is not None:
            runtime_env["working_dir"] = str(package)
        entrypoint = f"{ENTRYPOINT} {shlex.join(command)}"
        until = time.monotonic() + AGENT
        while True:
            try:
                return str(self._asked(lambda: self.client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)))
            except SubmissionError as e:
                if "No available agent" not in str(e) or time.monotonic() > until:
                    raise
            time.sleep(POLL)

    def job(self, job_id: str) -> Job:
        return _job(self._asked(lambda: self.client.get_job_info(job_id), job_id))

    def jobs(self) -> list[Job]:
        """Those that were submitted, the newest first."""
        found = [_job(details) for details in self._asked(self.client.list_jobs) if details.submission_id]
        return sorted(found, key=lambda job: job.started or time.time(), reverse=True)

    def logs(self, job_id: str) -> str:
        """All that a job has said so far."""
        return str(self._asked(lambda: self.client.get_job_logs(job_id), job_id))

    def stop(self, job_id: str) -> bool:
        """Asks a job to stop; False where it had ended."""
        return bool(self._asked(lambda: self.client.stop_job(job_id), job_id))

    def follow(self, job_id: str, show: Callable[[str], None]) -> Job:
        """Shows what a job says as it comes, in pieces, and returns the job once it has ended. A link that is down for
        a while ends nothing."""
        said = failures = 0

        async def tail() -> None:
            nonlocal said, failures
            left = said  # a new connection begins with what was said before
            async for text in self.client.tail_job_logs(job_id):
                new, left = text[left:], max(0, left - len(text))
                said, failures = said + len(new), 0
                show(new)

        while True:
            try:
                job = self.job(job_id)
                if job.status != "PENDING":
                    self._asked(lambda: asyncio.run(tail()), job_id)
                    job = self.job(job_id)
                failures = 0
            except SubmissionError:
                failures += 1
                if failures > RETRIES:
                    raise
            else:
                if job.status in ENDED:
                    show(self.logs(job_id)[said:])
                    return job
            time.sleep(POLL)

    def _asked(self, ask: Callable[[], Any], job_id: str = "") -> Any:
        try:
            return ask()
        except AuthenticationError:
            raise SubmissionError(_refused(self.address)) from None
        except RuntimeError as e:
            if job_id and "does not exist" in str(e):
                raise SubmissionError(f"{self.address} knows no job {job_id}") from None
            raise SubmissionError(f"{self.address}: {_words(e)}") from e
        except (OSError, ValueError, aiohttp.ClientError) as e:  # those of requests are among them
            raise SubmissionError(f"no Ray dashboard answers at {self.address}: {_words(e)}") from e


def _job(details: Any) -> Job:
    def seconds(milliseconds: int | None) -> float | None:
        return None if milliseconds is None else milliseconds / 1000

    return Job(
        details.submission_id,
        details.status.value,
        details.entrypoint.removeprefix(f"{ENTRYPOINT} "),
        seconds(details.start_time),
        seconds(details.end_time),
        details.driver_exit_code,
        details.message or "",
    )


def _refused(address: str) -> str:
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        if os.environ.get("RAY_AUTH_MODE") == "token":
            return f"{address} refuses the token of $RAY_AUTH_TOKEN or $RAY_AUTH_TOKEN_PATH"
        return f"{address} wants a token: set RAY_AUTH_MODE=token, so that the one there is is sent"
    return f"{address} wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"


def _words(e: BaseException) -> str:
    return " ".join(str(e).split()) or type(e).__name__
