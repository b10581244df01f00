"""The connection to a Ray cluster, or to one started on this machine for a single command."""

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from tempfile import TemporaryDirectory

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # leaves CUDA_VISIBLE_DEVICES of CPU workers alone
os.environ.setdefault("RAY_DEDUP_LOGS", "1")
# A starting raylet polls for its object store every 50 ms instead of every second.
os.environ.setdefault("RAY_raylet_client_connect_timeout_milliseconds", "50")
os.environ.setdefault("RAY_raylet_client_num_connect_attempts", "200")

import ray

from palindrome.pipeline.base.ray_private import stop_monitor


class ClusterError(ConnectionError):
    """There is no Ray cluster at the address."""


@contextmanager
def connect(address: str | None = None) -> Iterator[None]:
    """Connects to the Ray cluster at `address` or $RAY_ADDRESS for the `with`; without either, starts a local one and
    stops it afterwards. An existing connection is used and left open. Raises ClusterError if nothing answers.
    """
    if ray.is_initialized():
        yield
        return
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    local = {"include_dashboard": False} if where == "local" else {}
    _check_answers(where)
    before = signal.getsignal(signal.SIGTERM)
    # Ray puts the driver's working directory first in the workers' sys.path, and they would import a user's torch.py or
    # palindrome/ there. So ray.init runs in an empty folder.
    with TemporaryDirectory(prefix="palindrome-", ignore_cleanup_errors=True) as empty:
        try:
            with chdir(empty):
                ray.init(address=where, logging_level=logging.ERROR, log_to_driver=False, **local)
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise ClusterError(f"no Ray cluster at {where}: {str(e).splitlines()[0]}") from e
        if callable(before):  # Ray has replaced it by a handler that exits at once
            signal.signal(signal.SIGTERM, before)
        try:
            yield
        finally:
            if local:
                stop_monitor()
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises ClusterError if nothing listens at the host and port: Ray itself would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as e:
        raise ClusterError(f"nothing answers at {address}: {e.strerror or e}") from e
