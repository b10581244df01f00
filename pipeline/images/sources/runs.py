"""Runs of Palindrome below a collection's root: what they have written is no input, of them or of others."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.images.sources.listing import Listed, Seen, path_of
from palindrome.pipeline.storage.folder import is_outage

LARGEST = 1 << 20  # bytes of a run.json


class RunFolders:
    """The folders of runs among those whose `run.json` was seen so far, by their names below the root."""

    def __init__(self, fs: Any, seen: Seen) -> None:
        self.fs, self.seen, self.looked = fs, seen, 0
        self.names: set[str] = set()

    def without(self, files: Iterable[Listed]) -> Iterator[Listed]:
        """Those of the files that no run's folder holds. Of files in order, all that was listed is known by then."""
        for file in files:
            self._look()
            if not self.names or not any(folder in self.names for folder in _folders(file.name)):
                yield file

    def _look(self) -> None:
        if self.looked < len(self.seen.runs):
            new, self.looked = self.seen.runs[self.looked :], len(self.seen.runs)
            self.names |= {file.name.rpartition("/")[0] for file, is_run in in_threads(self._read, new) if is_run}

    def _read(self, file: Listed) -> tuple[Listed, bool]:
        """Whether the file is what `runs.manifest` takes for a run's."""
        if file.size > LARGEST:
            return file, False
        try:
            content = json.loads(self.fs.cat_file(path_of(self.fs, file.uri)))
        except (OSError, ValueError) as e:
            if is_outage(e, self.fs):
                raise
            return file, False
        return file, isinstance(content, dict) and {"job", "config"} <= content.keys()


def _folders(name: str) -> Iterator[str]:
    """`a/b/c.png`: `a`, `a/b`."""
    at = name.find("/")
    while at != -1:
        yield name[:at]
        at = name.find("/", at + 1)
