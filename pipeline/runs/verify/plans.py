"""The files that a run must have, from its own plan or from the committed shards of its source run."""

from array import array
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from palindrome.pipeline.base.text import one_line
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.runs.entries import entries
from palindrome.pipeline.runs.kinds import KINDS, Kind
from palindrome.pipeline.runs.manifest import Manifest, open_run
from palindrome.pipeline.runs.plan import ids_of, plan_totals, read_plan
from palindrome.pipeline.runs.shards import open_checked
from palindrome.pipeline.runs.verify.findings import Finding
from palindrome.pipeline.storage.folder import Folder

MAX_HASHES = 20_000_000  # of ids, in memory at once


@dataclass(frozen=True)
class Unit:
    """One file of a run: its name without extension, and its shard of the plan, None if the plan can't be read."""

    name: str
    shard: Shard | None


class Plan(Protocol):
    """Lists the files that must exist, then reports what is wrong with the list."""

    orphan: str
    """The message for a file of no unit."""

    def units(self) -> Iterator[Unit]: ...

    def conclude(self) -> tuple[list[Finding], bool]:
        """After `units` is exhausted: the findings, and whether the list is complete, so that other files are
        orphans."""
        ...


class OwnPlan:
    """`plan/` of the run itself. Each shard is one unit; in a sweep, one per setting of `settings`. `images` is the
    number of images that the plan must have, None if not known."""

    orphan = "belongs to no shard of the plan"

    def __init__(self, run: Folder, settings: Collection[str] | None = None, images: int | None = None) -> None:
        self.run, self.settings, self.requested = run, settings, images
        self.damaged: list[Finding] = []
        self.shards: set[str] = set()
        self.images = 0
        self.totals = _totals(run, self.damaged)

    def units(self) -> Iterator[Unit]:
        for shard in shards_of(self.run, self.damaged):
            if shard.name in self.shards:
                self.damaged.append(Finding("plan", f"shard {shard.name} occurs twice"))
                continue
            self.shards.add(shard.name)
            self.images += shard.images
            if shard.name != Shard.of(shard.kind, shard.pieces).name:
                self.damaged.append(Finding("plan", f"shard {shard.name} is not named by its content"))
            if self.settings is None:
                yield Unit(shard.name, shard)
            else:
                yield from (Unit(f"{shard.name}-{setting}", shard) for setting in self.settings)

    def conclude(self) -> tuple[list[Finding], bool]:
        if self.damaged:
            return self.damaged, False
        found, counted = [], (len(self.shards), self.images)
        if self.totals != counted:
            (shards, images), (has_shards, has_images) = self.totals, counted
            message = f"says {shards} shards and {images} images, and there are {has_shards} and {has_images}"
            found.append(Finding("plan/complete.json", message))
        if self.requested not in (None, self.images):
            found.append(Finding("plan", f"has {self.images} images, and run.json asks for {self.requested}"))
        found += [Finding("plan", f"{name} occurs {n} times") for name, n in _duplicates(self.run, self.images)]
        return found, True


class EncodePlan:
    """The committed shards of an encode run, in its plan's order. If that run can't be read there is a warning, and
    the files `present` are the units."""

    def __init__(self, uri: str, present: Collection[str]) -> None:
        self.present, self.planned = present, set[str]()
        self.latents, self.manifest, self.warnings = open_source(uri, KINDS["encode"])
        self.orphan = f"belongs to no shard of {self.latents.uri}"
        self.done: set[str] = set()
        if self.manifest:
            self.done = names_in(self.latents, KINDS["encode"].folder)

    def units(self) -> Iterator[Unit]:
        if self.manifest:
            damaged: list[Finding] = []
            for shard in shards_of(self.latents, damaged):
                if shard.name in self.done and shard.name not in self.planned:
                    self.planned.add(shard.name)
                    yield Unit(shard.name, shard)
            self.warnings += [Finding(f"{self.latents.uri}/{f.where}", f.what, warning=True) for f in damaged]
        if self.warnings:
            yield from (Unit(name, None) for name in sorted(set(self.present) - self.planned))

    def conclude(self) -> tuple[list[Finding], bool]:
        return self.warnings, not self.warnings


def open_source(uri: str, *kinds: Kind) -> tuple[Folder, Manifest | None, list[Finding]]:
    """The source run, of one of the kinds, and its run.json; or None and a warning if it can't be read."""
    try:
        run, manifest = open_run(uri, *(kind.name for kind in kinds))
        next(entries(run, manifest.kind.folder), None)
        return run, manifest, []
    except Exception as e:  # stores raise errors of many types
        message = f"can't be read, so the run is checked without it: {one_line(e)}"
        return Folder(uri), None, [Finding(uri, message, warning=True)]


def names_in(run: Folder, folder: str) -> set[str]:
    """The names of the shards that have a file in the folder."""
    return {entry.shard for entry in entries(run, folder) if entry.shard}


def shards_of(run: Folder, damaged: list[Finding]) -> Iterator[Shard]:
    """The plan's shards up to the first unreadable file; unreadable files are added to `damaged`. Yields nothing if
    `damaged` is not empty."""
    if damaged:
        return
    try:
        yield from read_plan(run)
    except Exception as e:
        found = False
        for name in sorted(entry.name for entry in entries(run, "plan") if entry.shard):
            try:
                with open_checked(run, f"plan/{name}") as file:
                    for _ in file.iter_batches(1024):
                        pass
            except Exception as cause:
                found = True
                damaged.append(Finding(f"plan/{name}", f"can't be read: {one_line(cause)}"))
        if not found:
            damaged.append(Finding("plan", f"can't be read: {one_line(e)}"))


def _totals(run: Folder, damaged: list[Finding]) -> tuple[int, int]:
    try:
        totals = plan_totals(run)
    except Exception as e:
        damaged.append(Finding("plan/complete.json", f"can't be read: {one_line(e)}"))
        return 0, 0
    if totals is None:
        damaged.append(Finding("plan", "is not complete: the run was interrupted while it listed the images"))
        return 0, 0
    return totals.shards, totals.images


def _duplicates(run: Folder, images: int) -> Iterator[tuple[str, int]]:
    """Ids that occur more than once in the plan, and how often. Compares hashes first, then ids with equal hashes."""
    parts = -(-images // MAX_HASHES)
    for part in range(parts):
        hashes = array("q")
        for shard in read_plan(run):
            all_hashes = map(hash, ids_of(shard))
            hashes.extend(all_hashes if parts == 1 else (h for h in all_hashes if h % parts == part))
        found = np.array(hashes)
        found.sort()
        repeated = set(found[1:][found[1:] == found[:-1]].tolist())
        if repeated:
            count = Counter(i for shard in read_plan(run) for i in ids_of(shard) if hash(i) in repeated)
            yield from ((image_id, n) for image_id, n in sorted(count.items()) if n > 1)


def expected_metadata(manifest: Manifest, **settings: Any) -> dict[str, Any]:
    """Values that a shard's metadata must have under these keys, if it has them."""
    return {k: v for k, v in manifest.facts.items() if k != "collection"} | settings
