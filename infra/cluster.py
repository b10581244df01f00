"""The connection to a Ray cluster, or to a Ray started on this machine for one command."""

import logging
import os
import secrets
import signal
import socket
import sys
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

SOCKET_PATH = 103 if sys.platform == "darwin" else 107  # bytes of a socket's path, at most
BELOW = len("/ray/session_2000-01-01_00-00-00_000000_1234567/sockets/plasma_store.1")  # what Ray adds to a folder
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
TOKEN = secrets.token_hex(32)  # of a Ray that this process starts: Ray would write one where others may read it


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
    local = {"include_dashboard": False, "_temp_dir": _short_folder()} if where == "local" else {}
    if local and not any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = TOKEN
    try:
        _answers(where)
    except ClusterError as e:
        raise ClusterError(f"{e}{_hint(address)}") from e
    before = signal.getsignal(signal.SIGTERM)
    # Ray puts the driver's working directory first in its workers' sys.path: a user's own torch.py or palindrome/ there
    # would be imported instead. Workers get an empty folder.
    with TemporaryDirectory(prefix="palindrome-", ignore_cleanup_errors=True) as empty:
        try:
            with chdir(empty):
                ray.init(address=where, logging_level=logging.ERROR, log_to_driver=False, **local)
        except (OSError, RuntimeError, ValueError) as e:
            words = "Ray can't be started on this machine" if local else f"no Ray cluster at {where}"
            why = next(iter(str(e).splitlines()), type(e).__name__)
            raise ClusterError(f"{words}: {why}{_hint(address)}") from e
        if callable(before):  # Ray has put its own there, which ends the process on the spot
            signal.signal(signal.SIGTERM, before)
        try:
            yield
        finally:
            if local:
                stop_monitor()
            ray.shutdown()


def _hint(address: str | None) -> str:
    given = not address and os.environ.get("RAY_ADDRESS")
    return "; $RAY_ADDRESS names it: without it, Ray is started on this machine" if given else ""


def _short_folder() -> str | None:
    """Where Ray may put its sockets, None for where it would by itself: the $TMPDIR of a Slurm job, say, is too long a
    path. Raises ClusterError where there is none."""
    for variable in ("RAY_TMPDIR", "TMPDIR"):
        if given := os.environ.get(variable):
            break
    else:
        return None
    if len(os.fsencode(os.path.abspath(given))) + BELOW <= SOCKET_PATH:
        return None
    for folder in SHORT_FOLDERS:
        if os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
            return os.path.join(folder, f"ray-{os.getuid()}")  # not `ray`, which may be another user's
    raise ClusterError(f"${variable} is too long a path for Ray's sockets: set RAY_TMPDIR to a folder of a short one")


def _answers(address: str) -> None:
    """Refuses a host and port where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as e:
        raise ClusterError(f"nothing answers at {address}: {e.strerror or e}") from e
