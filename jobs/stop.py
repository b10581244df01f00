"""palindrome stop: stop a submitted job."""

from dataclasses import dataclass
from typing import ClassVar

from palindrome.infra.submission import SubmissionError
from palindrome.jobs.arguments import config_error
from palindrome.jobs.config import ClusterOptions


@dataclass(frozen=True, kw_only=True)
class StopConfig(ClusterOptions):
    """Stop a submitted job. Committed shards are kept; submitting the same command again resumes the run."""

    GROUP: ClassVar[str] = "cluster"
    EXAMPLES: ClassVar[str] = """
    palindrome stop --address http://head:8265 raysubmit_4kbBPhVrTsJCfYLV
    """

    POSITIONAL: ClassVar[frozenset[str]] = frozenset({"job_id"})

    job_id: str
    """The job's id, as printed by submit and jobs."""


def run(config: StopConfig) -> int:
    cluster = config.cluster()
    with config_error("JOB_ID", SubmissionError):
        job = cluster.job(config.job_id)
        stopped = cluster.stop(config.job_id)
    print(f"{job.id} is stopping" if stopped else f"{job.id} had ended: {job.status.lower()}")
    return 0
