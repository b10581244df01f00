"""The connection to a Ray cluster, or to one started on this machine for a single command."""

import logging
import os
import secrets
import signal
import socket
import sys
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

SOCKET_PATH = 103 if sys.platform == "darwin" else 107  # bytes of a socket's path, at most
BELOW = len("/ray/session_2000-01-01_00-00-00_000000_1234567/sockets/plasma_store.1")  # what Ray adds to a folder
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
TOKEN = secrets.token_hex(32)  # of a Ray that this process starts: Ray would write one where others may read it


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
    local = {"include_dashboard": False, "_temp_dir": _short_folder()} if where == "local" else {}
    if local and not any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = TOKEN
    try:
        _check_answers(where)
    except ClusterError as e:
        raise ClusterError(f"{e}{_hint(address)}") from e
    before = signal.getsignal(signal.SIGTERM)
    # Ray puts the driver's working directory first in the workers' sys.path, and they would import a user's torch.py or
    # palindrome/ there. So ray.init runs in an empty folder.
    with TemporaryDirectory(prefix="palindrome-", ignore_cleanup_errors=True) as empty:
        try:
            with chdir(empty):
                ray.init(address=where, logging_level=logging.ERROR, log_to_driver=False, **local)
        except Exception as e:  # Ray raises a bare one if its processes don't start in time
            words = "Ray can't be started on this machine" if local else f"no Ray cluster at {where}"
            why = next(iter(str(e).splitlines()), type(e).__name__)
            raise ClusterError(f"{words}: {why}{_hint(address)}") from e
        if callable(before):  # Ray has replaced it by a handler that exits at once
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


def _check_answers(address: str) -> None:
    """Raises ClusterError if nothing listens at the host and port: Ray itself would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as e:
        raise ClusterError(f"nothing answers at {address}: {e.strerror or e}") from e
