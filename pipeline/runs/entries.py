"""Listing one folder of a run, with sizes and modification times."""

import os
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

from palindrome.pipeline.storage.folder import TEMPORARY, Folder


class Entry(NamedTuple):
    """A file or a subfolder. `modified` is in seconds since 1970, None if the store does not report it."""

    name: str
    size: int
    modified: float | None
    is_file: bool = True

    @property
    def shard(self) -> str | None:
        """The shard's name, if this is a committed shard's file."""
        committed = self.is_file and self.name.endswith(".parquet") and not self.name.startswith(TEMPORARY)
        return self.name.removesuffix(".parquet") if committed else None


def entries(run: Folder, below: str) -> Iterator[Entry]:
    """The entries of a folder, unordered; none if it does not exist."""
    if run.is_local:  # takes a quarter of the time of fsspec's listing, and holds no list in memory
        try:
            with os.scandir(run.path(below)) as found:
                for file in found:
                    try:
                        stat = file.stat()
                    except FileNotFoundError:  # a temporary file that was removed meanwhile
                        continue
                    yield Entry(file.name, stat.st_size, stat.st_mtime, file.is_file())
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
        if name and name != below:  # some stores have an object that represents the folder
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
