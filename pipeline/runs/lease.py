"""The lease of a run folder: one command writes into a run at a time.

`lease.json` names its owner and is renewed. A command that finds one which is not renewed takes the run over: at once
if the owner was a process of this machine that has ended, else after STALE seconds without a change, by its own clock.
An owner that was only slow finds the other's lease at its next renewal, and ends its run. The lease guards the plan and
temporary files. Shards need none: whoever writes one writes it whole, and alike.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from palindrome.pipeline.base import interrupt
from palindrome.pipeline.base.errors import ManifestError, RunError
from palindrome.pipeline.storage.folder import Folder

NAME = "lease.json"
RENEWAL = 10.0  # seconds
STALE = 60.0  # seconds without a renewal: a process may be slow, or its store


class Lease:
    """A lease that this process holds, and renews in a thread."""

    def __init__(self, run: Folder, owner: dict[str, Any]) -> None:
        self.run, self.owner, self.ended = run, owner, threading.Event()
        self.thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self.thread.start()

    def release(self) -> None:
        self.ended.set()
        self.thread.join()
        with suppress(OSError):  # then it becomes stale
            if self._is_ours():
                self.run.remove(NAME)

    def _renew(self) -> None:
        while not self.ended.wait(RENEWAL):
            with suppress(OSError):  # a store that is down for a moment
                if not self._is_ours():
                    what = f"another command has taken {self.run.uri} over, as this one did not renew its lease"
                    interrupt.set_pending(RunError(what))
                    return
                self.run.put(NAME, _content(self.owner))

    def _is_ours(self) -> bool:
        found = _read(self.run)
        return found is not None and found.get("id") == self.owner["id"]


_held: list[Lease] = []


def acquire(run: Folder, job: str, take_over: bool = False) -> None:
    """Has this process hold the lease of a run until `release_all`; if it is lost, `interrupt.check` raises RunError.
    With `take_over`, another's is not waited for. Raises ManifestError if another command is writing into the run."""
    owner = {"id": uuid.uuid4().hex, "job": job, "since": _now(), **_this_process()}
    while (found := _read(run)) is None or found.get("id") != owner["id"]:
        if found is None:
            run.put_new(NAME, _content(owner))  # whether it was ours or another's shows when it is read
        elif take_over or not _is_alive(run, found):
            run.remove(NAME)
        else:
            raise ManifestError(
                f"{run.uri} is being written by {found.get('job')} (process {found.get('pid')} on {found.get('host')},"
                f" since {found.get('since')}); if that command is gone, give --take-over"
            )
    _held.append(Lease(run, owner))


def release_all() -> None:
    while _held:
        _held.pop().release()


def _is_alive(run: Folder, found: dict[str, Any]) -> bool:
    """Whether the owner is a process of this machine that has not ended; of another machine, whether it renews the
    lease within STALE seconds."""
    if _machine(found) == _machine(_this_process()):
        try:
            return _start_of(int(found["pid"])) == found["started"]
        except (KeyError, TypeError, ValueError):
            return True
    where = f"process {found.get('pid')} on {found.get('host')}"
    print(f"{run.uri} has a lease of {where}: waiting up to {STALE:g} s for it to be renewed", file=sys.stderr)
    deadline = time.monotonic() + STALE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, STALE / 10))
        if _read(run) != found:
            return True
    return False


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "namespace": _link("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
    }


def _machine(process: dict[str, Any]) -> tuple[Any, ...]:
    """What a process id is valid in: containers have ids of their own."""
    return tuple(process.get(name) for name in ("host", "boot", "namespace"))


def _start_of(pid: int) -> str | None:
    """When a process was started, in ticks since the boot, by which a later one with its id is told apart; None if it
    has ended. Where there is no /proc, whether it is there."""
    if stat := _text(f"/proc/{pid}/stat"):
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "there"


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _read(run: Folder) -> dict[str, Any] | None:
    """The lease's content; None where there is none, {} where it can't be understood."""
    try:
        content = json.loads(run.read(NAME))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _content(owner: dict[str, Any]) -> bytes:
    return (json.dumps({**owner, "renewed": _now()}, indent=2) + "\n").encode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
