"""What a cluster runs of a submitted job: `python -m palindrome.infra.entrypoint encode --images ...`, in the folder of
the job's package."""

import json
import os
import runpy
import sys
from pathlib import Path

from palindrome.infra.package import ENVIRONMENT


def load() -> None:
    """Sets the environment that came with the package: in the driver, and by Ray's worker_process_setup_hook in every
    other process of the job. It is no part of the job's runtime environment, which Ray shows and logs."""
    file = Path(ENVIRONMENT)
    if file.exists():
        os.environ.update(json.loads(file.read_text()))


if __name__ == "__main__":
    load()
    os.environ.setdefault("PALINDROME_LOG", "json")  # for what collects the cluster's logs; `palindrome logs` reads it
    sys.argv[0] = "palindrome"
    runpy.run_module("palindrome", run_name="__main__", alter_sys=False)
