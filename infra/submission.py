"""Ray jobs on a cluster: submit, follow, list, stop. Error messages say what to do."""

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from packaging.version import Version
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from palindrome.pipeline.base.text import error_message

MIN_RAY_VERSION = "2.55"
DASHBOARD_PORT = 8265
ENTRYPOINT = "python -m palindrome.infra.entrypoint"
POLL_INTERVAL = 1.0  # seconds
AGENT_TIMEOUT = 60.0  # seconds until a head node that has just started can start jobs
MAX_FAILED_POLLS = 30  # in a row, after which `follow` fails
ENDED = {status.value for status in JobStatus if status.is_terminal()}


class SubmissionError(RuntimeError):
    """The cluster can't be reached, refuses the request, or has no such job."""


@dataclass(frozen=True)
class Job:
    """A job as the cluster reports it; times are seconds since 1970."""

    id: str
    status: str
    command: str
    started: float | None
    ended: float | None
    exit_code: int | None
    message: str


def address_of(given: str | None) -> str:
    """The URL of a cluster's dashboard: `given`, else $RAY_API_SERVER_ADDRESS, else this machine's."""
    address = given or os.environ.get("RAY_API_SERVER_ADDRESS") or f"http://127.0.0.1:{DASHBOARD_PORT}"
    return address.rstrip("/") if "://" in address else f"http://{address.rstrip('/')}"


class Cluster:
    """The jobs of the cluster whose dashboard is at `address`. Every method raises SubmissionError."""

    def __init__(self, address: str) -> None:
        self.address = address
        logging.getLogger("ray.dashboard").setLevel(logging.WARNING)  # the client logs every request
        self.client = self._request(lambda: JobSubmissionClient(address))
        version = getattr(self.client, "_server_ray_version", None)
        if version and Version(version) < Version(MIN_RAY_VERSION):
            raise SubmissionError(f"{address} runs Ray {version}; Palindrome requires {MIN_RAY_VERSION} or later there")

    def submit(self, command: Sequence[str], package: Path | None) -> str:
        """Starts a Palindrome command on the cluster, with `package` as working directory; returns the job's id."""
        runtime_env: dict[str, Any] = {"worker_process_setup_hook": "palindrome.infra.entrypoint.load"}
        if package is not None:
            runtime_env["working_dir"] = str(package)
        entrypoint = f"{ENTRYPOINT} {shlex.join(command)}"
        deadline = time.monotonic() + AGENT_TIMEOUT
        while True:
            try:
                submit = partial(self.client.submit_job, entrypoint=entrypoint, runtime_env=runtime_env)
                return str(self._request(submit))
            except SubmissionError as e:
                if "No available agent" not in str(e) or time.monotonic() > deadline:
                    raise
            time.sleep(POLL_INTERVAL)

    def job(self, job_id: str) -> Job:
        return _job(self._request(lambda: self.client.get_job_info(job_id), job_id))

    def jobs(self) -> list[Job]:
        """The submitted jobs, newest first."""
        found = [_job(details) for details in self._request(self.client.list_jobs) if details.submission_id]
        return sorted(found, key=lambda job: job.started or time.time(), reverse=True)

    def logs(self, job_id: str) -> str:
        """The output of a job so far."""
        return str(self._request(lambda: self.client.get_job_logs(job_id), job_id))

    def stop(self, job_id: str) -> bool:
        """Requests that a job stop; False if it had ended."""
        return bool(self._request(lambda: self.client.stop_job(job_id), job_id))

    def follow(self, job_id: str, show: Callable[[str], None]) -> Job:
        """Passes a job's output to `show` as it comes, in pieces, and returns the job once it has ended. Reconnects
        after a lost connection; raises SubmissionError after MAX_FAILED_POLLS."""
        shown = failures = 0  # characters shown; failed polls in a row

        async def tail() -> None:
            nonlocal shown, failures
            skip = shown  # each connection starts from the beginning of the output
            async for text in self.client.tail_job_logs(job_id):
                new, skip = text[skip:], max(0, skip - len(text))
                shown, failures = shown + len(new), 0
                show(new)

        while True:
            try:
                job = self.job(job_id)
                if job.status != "PENDING":
                    self._request(lambda: asyncio.run(tail()), job_id)
                    job = self.job(job_id)
                failures = 0
            except SubmissionError:
                failures += 1
                if failures > MAX_FAILED_POLLS:
                    raise
            else:
                if job.status in ENDED:
                    show(self.logs(job_id)[shown:])
                    return job
            time.sleep(POLL_INTERVAL)

    def _request(self, send: Callable[[], Any], job_id: str = "") -> Any:
        try:
            return send()
        except AuthenticationError:
            raise SubmissionError(_authentication_hint(self.address)) from None
        except RuntimeError as e:
            if job_id and "does not exist" in str(e):
                raise SubmissionError(f"{self.address} has no job {job_id}") from None
            raise SubmissionError(f"{self.address}: {error_message(e)}") from e
        except (OSError, ValueError, aiohttp.ClientError) as e:  # requests' exceptions are OSErrors
            raise SubmissionError(f"no Ray dashboard answers at {self.address}: {error_message(e)}") from e


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


def _authentication_hint(address: str) -> str:
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        if os.environ.get("RAY_AUTH_MODE") == "token":
            return f"{address} refuses the token of $RAY_AUTH_TOKEN or $RAY_AUTH_TOKEN_PATH"
        return f"{address} requires a token: set RAY_AUTH_MODE=token, so that yours is sent"
    return f"{address} requires a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
