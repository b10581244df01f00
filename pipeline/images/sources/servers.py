"""The web servers of a list: one that is gone costs its own images, and one wait."""

import errno
import threading
from collections import Counter
from collections.abc import Callable, Collection

from palindrome.pipeline.base.errors import StoreError

TIRED = 5  # failures in a row, after which a server that has answered before is asked no more


class Servers:
    """Which of one shard's have answered, and which fail; for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answered: set[str] = set()
        self._in_a_row: Counter[str] = Counter()
        self._failed: dict[str, str] = {}

    def answered(self, server: str) -> None:
        with self._lock:
            self._answered.add(server)
            self._in_a_row[server] = 0

    def failed(self, server: str, why: str, out_of_order: bool) -> None:
        """`out_of_order`: its other images would fail alike."""
        with self._lock:
            self._in_a_row[server] += out_of_order
            self._failed.setdefault(server, why)

    def answers(self, server: str) -> bool:
        return server in self._answered

    def gone(self, server: str) -> str:
        """Why a server is not to be asked any more; "" where it is."""
        with self._lock:
            enough = TIRED if server in self._answered else 1
            return self._failed[server] if self._in_a_row[server] >= enough else ""

    def check(self, another_answers: Callable[[Collection[str]], bool]) -> None:
        """Raises StoreError of the first that failed, where none has answered, nor does `another_answers`, which is
        told those that failed, find one that does: then it is likely the network. Likewise of one that has answered,
        and then no more: the next try will show whether it is gone."""
        network = not self._failed or bool(self._answered) or another_answers(self._failed.keys())
        for server, why in self._failed.items():
            if not network:
                raise StoreError(errno.EIO, f"{why}, and no other web server of the list answers", server, True)
            if server in self._answered and self._in_a_row[server] >= TIRED:
                raise StoreError(errno.EIO, f"{why}, {TIRED} times in a row", server, True)
