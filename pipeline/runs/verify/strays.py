"""Files in a run's folders that belong to no shard."""

from collections.abc import Iterator, Sequence

from palindrome.pipeline.runs.entries import Entry, entries
from palindrome.pipeline.runs.verify.findings import Finding
from palindrome.pipeline.storage.folder import TEMPORARY, Folder


def strays(run: Folder, folders: Sequence[str], end: str = ".parquet") -> Iterator[Finding]:
    """Warnings for files in `folders` other than those of shards, which end in `end`, and for temporary files of killed
    writers in the run's own folder, where users may keep files of their own."""
    found: list[tuple[str, Entry]] = [(entry.name, entry) for entry in entries(run, "") if is_temporary(entry.name)]
    for folder in folders:
        expected = {"plan": "complete.json"}.get(folder)
        for entry in entries(run, folder):
            committed = entry.is_file and entry.name.endswith(end) and not is_temporary(entry.name)
            if not committed and entry.name != expected:
                found.append((f"{folder}/{entry.name}", entry))
    for name, entry in sorted(found):
        if is_temporary(entry.name):
            yield temporary(name)
        else:
            yield Finding(name, "is not a file that a run writes", warning=True)


def is_temporary(name: str) -> bool:
    return name.startswith(TEMPORARY)


def temporary(name: str) -> Finding:
    return Finding(name, "is a temporary file of an active or killed writer", warning=True)
