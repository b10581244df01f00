"""Files in a run's folders that are of no shard."""

from collections.abc import Iterator, Sequence

from palindrome.pipeline.runs.entries import Entry, entries
from palindrome.pipeline.runs.verify.findings import Finding
from palindrome.pipeline.storage.folder import TEMPORARY, Folder


def strays(run: Folder, folders: Sequence[str], end: str = ".parquet") -> Iterator[Finding]:
    """What lies in the folders besides the files of shards, which end in `end`; and what writers that were killed have
    left right below the run, where people may keep files of their own. It does no harm."""
    found: list[tuple[str, Entry]] = [(entry.name, entry) for entry in entries(run, "") if is_temporary(entry.name)]
    for folder in folders:
        kept = {"plan": "complete.json"}.get(folder)
        for entry in entries(run, folder):
            whole = entry.is_file and entry.name.endswith(end) and not is_temporary(entry.name)
            if not whole and entry.name != kept:
                found.append((f"{folder}/{entry.name}", entry))
    for name, entry in sorted(found):
        if is_temporary(entry.name):
            yield temporary(name)
        else:
            yield Finding(name, "is nothing that a run writes", warning=True)


def is_temporary(name: str) -> bool:
    return name.startswith(TEMPORARY)


def temporary(name: str) -> Finding:
    return Finding(name, "is a temporary file, of a writer at work or of one that was killed", warning=True)
