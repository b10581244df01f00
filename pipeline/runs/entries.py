"""What lies right below a run's folder: one listing, with sizes and times."""

import os
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

from palindrome.pipeline.storage.folder import TEMPORARY, Folder


class Entry(NamedTuple):
    """A file, or a folder, right below a run's folder. `modified` (seconds since 1970) where the store tells it."""

    name: str
    size: int
    modified: float | None
    is_file: bool = True

    @property
    def shard(self) -> str | None:
        """The shard of which this is a whole file."""
        whole = self.is_file and self.name.endswith(".parquet") and not self.name.startswith(TEMPORARY)
        return self.name.removesuffix(".parquet") if whole else None


def entries(run: Folder, below: str) -> Iterator[Entry]:
    """Everything right below a folder, in no order; nothing if it is missing."""
    if run.is_local:  # a quarter of the time of a listing by fsspec, and none of its memory
        try:
            with os.scandir(run.path(below)) as found:
                for file in found:
                    try:
                        about = file.stat()
                    except FileNotFoundError:  # a temporary file, gone since
                        continue
                    yield Entry(file.name, about.st_size, about.st_mtime, file.is_file())
        except FileNotFoundError:
            pass
        return
    run.fs.invalidate_cache(run.path(below))
    try:
        infos = run.fs.ls(run.path(below), detail=True)
    except FileNotFoundError:
        return
    for info in infos:
        name = info["name"].rstrip("/").rsplit("/", 1)[-1]
        if name and name != below:  # some stores keep an object that stands for the folder
            yield Entry(name, info.get("size") or 0, modified_of(info), info["type"] == "file")


def modified_of(info: dict[str, Any]) -> float | None:
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        when = info.get(key)
        if isinstance(when, str):
            try:
                when = datetime.fromisoformat(when)
            except ValueError:
                continue
        if isinstance(when, datetime):
            return when.timestamp()
        if isinstance(when, int | float):
            return float(when)
    return None
