"""The entrypoint of a submitted job on the cluster: `python -m palindrome.infra.entrypoint encode --images ...`, with
the job's package as working directory."""

import json
import os
import runpy
import sys
from pathlib import Path

from palindrome.infra.package import ENVIRONMENT


def load() -> None:
    """Sets the environment variables of the package, in the driver and, as Ray's worker_process_setup_hook, in every
    worker of the job. They are not in the job's runtime environment, because Ray shows and logs that."""
    file = Path(ENVIRONMENT)
    if file.exists():
        os.environ.update(json.loads(file.read_text()))


if __name__ == "__main__":
    load()
    os.environ.setdefault("PALINDROME_LOG", "json")  # for log collectors; `palindrome logs` prints it as text
    sys.argv[0] = "palindrome"
    runpy.run_module("palindrome", run_name="__main__", alter_sys=False)
