"""The files that a run must have: by its own plan, or by what the run that it works from has committed."""

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

PART = 20_000_000  # ids whose hashes are held at once


@dataclass(frozen=True)
class Unit:
    """One file of a run, by its name without extension, and the shard of the plan that it is of: None where the plan
    can't be read."""

    name: str
    shard: Shard | None


class Plan(Protocol):
    """Lists the files that must be there, and says afterwards what was wrong with the list."""

    orphan: str
    """What is said of a file that is of no unit."""

    def units(self) -> Iterator[Unit]: ...

    def conclude(self) -> tuple[list[Finding], bool]:
        """To be called once `units` is read. Also whether the list is whole, so that other files are orphans."""
        ...


class OwnPlan:
    """`plan/` of the run itself. A shard is one unit, or one for each of the `settings` that a sweep has begun."""

    orphan = "is of no shard of the plan"

    def __init__(self, run: Folder, settings: Collection[str] | None = None, images: int | None = None) -> None:
        self.run, self.settings, self.asked = run, settings, images
        self.damaged: list[Finding] = []
        self.shards: set[str] = set()
        self.images = 0
        self.totals = _totals(run, self.damaged)

    def units(self) -> Iterator[Unit]:
        for shard in shards_of(self.run, self.damaged):
            if shard.name in self.shards:
                self.damaged.append(Finding("plan", f"shard {shard.name} is there twice"))
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
        found, here = [], (len(self.shards), self.images)
        if self.totals != here:
            what = f"says {self.totals[0]} shards and {self.totals[1]} images, and there are {here[0]} and {here[1]}"
            found.append(Finding("plan/complete.json", what))
        if self.asked not in (None, self.images):
            found.append(Finding("plan", f"is of {self.images} images, and run.json asks for {self.asked}"))
        found += [Finding("plan", f"{name} is there {n} times") for name, n in _duplicates(self.run, self.images)]
        return found, True


class EncodePlan:
    """The committed shards of an encode run, in its plan's order. Where that run can't be read there is a warning, and
    the files that are there are all the units."""

    def __init__(self, uri: str, present: Collection[str]) -> None:
        self.present, self.named = present, set[str]()
        self.latents, self.manifest, self.warnings = reached(uri, KINDS["encode"])
        self.orphan = f"is of no shard of {self.latents.uri}"
        self.done: set[str] = set()
        if self.manifest:
            self.done = names_in(self.latents, KINDS["encode"].folder)

    def units(self) -> Iterator[Unit]:
        if self.manifest:
            damaged: list[Finding] = []
            for shard in shards_of(self.latents, damaged):
                if shard.name in self.done and shard.name not in self.named:
                    self.named.add(shard.name)
                    yield Unit(shard.name, shard)
            self.warnings += [Finding(f"{self.latents.uri}/{f.where}", f.what, warning=True) for f in damaged]
        if self.warnings:
            yield from (Unit(name, None) for name in sorted(set(self.present) - self.named))

    def conclude(self) -> tuple[list[Finding], bool]:
        return self.warnings, not self.warnings


def reached(uri: str, *kinds: Kind) -> tuple[Folder, Manifest | None, list[Finding]]:
    """The run that another works from, of one of the kinds, and its run.json; or a warning in its place."""
    try:
        run, manifest = open_run(uri, *(kind.name for kind in kinds))
        next(entries(run, manifest.kind.folder), None)
        return run, manifest, []
    except Exception as e:  # of whichever store
        what = f"can't be read, so what was made of it is checked alone: {one_line(e)}"
        return Folder(uri), None, [Finding(uri, what, warning=True)]


def names_in(run: Folder, below: str) -> set[str]:
    """The names of the shards that have a file there."""
    return {entry.shard for entry in entries(run, below) if entry.shard}


def shards_of(run: Folder, damaged: list[Finding]) -> Iterator[Shard]:
    """As much of the plan as can be read; what can't be is added to `damaged`. Nothing where that is not empty."""
    if damaged:
        return
    try:
        yield from read_plan(run)
    except Exception as e:
        named = False
        for name in sorted(entry.name for entry in entries(run, "plan") if entry.shard):
            try:
                with open_checked(run, f"plan/{name}") as file:
                    for _ in file.iter_batches(1024):
                        pass
            except Exception as why:
                named = True
                damaged.append(Finding(f"plan/{name}", f"can't be read: {one_line(why)}"))
        if not named:
            damaged.append(Finding("plan", f"can't be read: {one_line(e)}"))


def _totals(run: Folder, damaged: list[Finding]) -> tuple[int, int]:
    try:
        totals = plan_totals(run)
    except Exception as e:
        damaged.append(Finding("plan/complete.json", f"can't be read: {one_line(e)}"))
        return 0, 0
    if totals is None:
        damaged.append(Finding("plan", "is not complete: the run was cut short while it listed the images"))
        return 0, 0
    return totals.shards, totals.images


def _duplicates(run: Folder, images: int) -> Iterator[tuple[str, int]]:
    """Ids that are in the plan more than once, and how often. By hashes; where two are equal, the ids are compared."""
    parts = -(-images // PART)
    for part in range(parts):
        hashes = array("q")
        for shard in read_plan(run):
            of_all = map(hash, ids_of(shard))
            hashes.extend(of_all if parts == 1 else (h for h in of_all if h % parts == part))
        found = np.array(hashes)
        found.sort()
        twice = set(found[1:][found[1:] == found[:-1]].tolist())
        if twice:
            count = Counter(i for shard in read_plan(run) for i in ids_of(shard) if hash(i) in twice)
            yield from ((image_id, n) for image_id, n in sorted(count.items()) if n > 1)


def about(manifest: Manifest, **more: Any) -> dict[str, Any]:
    """What a shard may say of itself that must be equal to what run.json says."""
    return {k: v for k, v in manifest.facts.items() if k != "collection"} | more
