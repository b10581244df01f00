"""The connection to a Ray cluster, or to a Ray started on this machine for one command."""

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from tempfile import TemporaryDirectory

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # CPU workers keep the environment as it is
os.environ.setdefault("RAY_DEDUP_LOGS", "1")
# A node's scheduler looks twenty times a second, not once, whether the object store that starts beside it is up.
os.environ.setdefault("RAY_raylet_client_connect_timeout_milliseconds", "50")
os.environ.setdefault("RAY_raylet_client_num_connect_attempts", "200")

import ray

from palindrome.pipeline.base.ray_private import stop_monitor


class ClusterError(ConnectionError):
    """No Ray at the address."""


@contextmanager
def connect(address: str | None = None) -> Iterator[None]:
    """A Ray for the time of the `with`: the one at `address` or $RAY_ADDRESS, else one started here and stopped after.

    A connection that is open already is used and left open. Raises ClusterError when nothing answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    local = {"include_dashboard": False} if where == "local" else {}
    _answers(where)
    before = signal.getsignal(signal.SIGTERM)
    # Ray puts the driver's working directory first in its workers' sys.path: a user's own torch.py or palindrome/ there
    # would be imported instead. Workers get an empty folder.
    with TemporaryDirectory(prefix="palindrome-", ignore_cleanup_errors=True) as empty:
        try:
            with chdir(empty):
                ray.init(address=where, logging_level=logging.ERROR, log_to_driver=False, **local)
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise ClusterError(f"no Ray cluster at {where}: {str(e).splitlines()[0]}") from e
        if callable(before):  # Ray has put its own there, which ends the process on the spot
            signal.signal(signal.SIGTERM, before)
        try:
            yield
        finally:
            if local:
                stop_monitor()
            ray.shutdown()


def _answers(address: str) -> None:
    """Refuses a host and port where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as e:
        raise ClusterError(f"nothing answers at {address}: {e.strerror or e}") from e
