"""palindrome logs: the output of a submitted job."""

from dataclasses import dataclass
from typing import ClassVar

from palindrome.infra.submission import SubmissionError
from palindrome.jobs.arguments import config_error
from palindrome.jobs.config import ClusterOptions
from palindrome.pipeline.base.log import relay


@dataclass(frozen=True, kw_only=True)
class LogsConfig(ClusterOptions):
    """Print the output of a submitted job."""

    GROUP: ClassVar[str] = "output"
    EXAMPLES: ClassVar[str] = """
    palindrome logs raysubmit_4kbBPhVrTsJCfYLV
    palindrome logs --follow --address http://head:8265 raysubmit_4kbBPhVrTsJCfYLV
    """

    POSITIONAL: ClassVar[frozenset[str]] = frozenset({"job_id"})

    job_id: str
    """The job's id, as printed by submit and jobs."""
    follow: bool = False
    """Keep printing until the job ends."""


def run(config: LogsConfig) -> int:
    cluster = config.cluster()
    with config_error("JOB_ID", SubmissionError), relay() as show:
        if config.follow:
            cluster.follow(config.job_id, show)
        else:
            show(cluster.logs(config.job_id))
    return 0
