"""The checks of an export: one whole image file for each image of its source run."""

import json
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from palindrome.pipeline.base.text import one_line
from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.runs.entries import entries
from palindrome.pipeline.runs.exports import PICTURES, TABLES, commits_of, merged_index
from palindrome.pipeline.runs.kinds import IMAGES, INDEX, KINDS, WITH_PICTURES, Kind
from palindrome.pipeline.runs.manifest import Manifest
from palindrome.pipeline.runs.shards import open_checked
from palindrome.pipeline.runs.verify import plans
from palindrome.pipeline.runs.verify.findings import Checked, Finding
from palindrome.pipeline.runs.verify.plans import names_in, open_source
from palindrome.pipeline.runs.verify.shards import BATCH_PICTURES, Pictures
from palindrome.pipeline.runs.verify.strays import is_temporary, strays, temporary
from palindrome.pipeline.storage.folder import Folder

THREADS = 4  # each reads one shard at a time
FORMS = {"webp": "WEBP", "jpeg": "JPEG"}  # Pillow's names; all other exports contain PNGs


def check_export(run: Folder, manifest: Manifest) -> Iterator[Checked]:
    """Raises KeyError or TypeError if run.json is not what export writes."""
    export = _Export.of(run, manifest)
    return export.check()


@dataclass(frozen=True)
class _Export:
    run: Folder
    form: str
    steps: int | None  # if not None, only the images of this number of steps were exported
    kind: Kind  # of the source
    source: Folder | None  # None if it can't be read
    orphan: str  # the message for a file of no shard
    warnings: list[Finding]

    @classmethod
    def of(cls, run: Folder, manifest: Manifest) -> "_Export":
        config, facts = manifest.config, manifest.content["source"]
        if config["format"] not in {*PICTURES, *TABLES} or facts["job"] not in WITH_PICTURES:
            raise KeyError(config["format"])
        source, source_manifest, warnings = open_source(config["run"], KINDS[facts["job"]])
        if source_manifest and source_manifest.content.get("model_digest") != facts.get("model_digest"):
            source_manifest = None
            warnings = [Finding(source.uri, "is of another model than the exported images, and is not compared", True)]
        orphan = f"belongs to no shard of {source.uri}"
        readable, kind = source if source_manifest else None, KINDS[facts["job"]]
        return cls(run, config["format"], config.get("steps"), kind, readable, orphan, warnings)

    def check(self) -> Iterator[Checked]:
        folder, end = commits_of(self.form)
        present = {e.name.removesuffix(end) for e in entries(self.run, folder) if _is_committed(e.name, end)}
        planned = names_in(self.source, self.kind.folder) if self.source else present
        yield Checked(self.warnings)

        def check(shard: str) -> Checked:
            if shard in present:
                return self._shard(shard)
            missing = Finding(f"{folder}/{shard}{end}", "is missing: the shard is not exported")
            return Checked([missing], shard)

        rows, sound = 0, True
        for checked in in_threads(check, sorted(planned), THREADS):
            rows, sound = rows + checked.rows, sound and not checked.findings
            yield checked
        others = [f"{folder}/{name}{end}" for name in sorted(present - planned)]
        if self.form == "webdataset":  # an index without its tar is left by an interrupted shard
            others += [f"{INDEX}/{name}.parquet" for name in sorted(names_in(self.run, INDEX) - planned)]
        findings = [Finding(file, self.orphan) for file in others]
        if sound and not findings:
            findings += self._merged(rows)
            findings += self._orphaned_pictures(rows) if self.form in PICTURES else []
        findings += strays(self.run, [folder], end)
        findings += strays(self.run, [INDEX]) if self.form == "webdataset" else []
        yield Checked(sorted(set(findings), key=lambda f: (f.warning, f.where)))

    def _shard(self, shard: str) -> Checked:
        checked = Checked(shard=shard)
        folder, end = commits_of(self.form)
        file = f"{folder}/{shard}{end}"

        def wrong(message: str, where: str = file) -> None:
            checked.findings.append(Finding(where, message))

        ids: Counter[str] = Counter()
        names: list[str] = []
        pictures = Pictures(None, FORMS.get(self.form, "PNG"))
        reading = file if self.form == "parquet" else f"{INDEX}/{shard}.parquet"
        try:
            for row in self._rows(reading):
                ids[self._key(row)] += 1
                if self.form == "parquet":
                    if fault := pictures.fault((row["image"] or {}).get("bytes")):
                        wrong(f"{row['image_id']} {fault}")
                    continue
                names.append(row["file_name"])
                if row["shard"] != shard:
                    wrong(f"{row['file_name']} is of shard {row['shard']}", reading)
                if self.form in PICTURES and (fault := self._picture(row["file_name"], pictures)):
                    wrong(fault, f"{IMAGES}/{row['file_name']}")
            for name, count in Counter(names).items():
                if count > 1:
                    wrong(f"{name} occurs {count} times", reading)
            if self.form == "webdataset":
                reading = file
                for message in self._tar(file, names, pictures):
                    wrong(message)
        except Exception as e:  # damaged files raise errors of many types
            wrong(f"can't be read: {one_line(e)}", reading)
            return checked
        checked.rows = ids.total()
        for message in self._compare(shard, ids):
            wrong(message)
        return checked

    def _rows(self, file: str) -> Iterator[dict[str, Any]]:
        more = ["image"] if self.form == "parquet" else ["file_name", "shard"]
        columns = ["image_id", *self.kind.variants, *more]
        with open_checked(self.run, file) as opened:
            missing = {*columns} - {*opened.schema_arrow.names}
            if missing:
                raise ValueError(f"{file} has no column {' and no '.join(sorted(missing))}")
            for group in range(opened.metadata.num_row_groups):
                for batch in opened.iter_batches(BATCH_PICTURES, row_groups=[group]):  # all columns' pages are checked
                    yield from batch.select(columns).to_pylist()

    def _key(self, row: dict[str, Any]) -> str:
        """The id, with the variant if there are several."""
        return " ".join([str(row["image_id"]), *(f"{name}-{row[name]}" for name in self.kind.variants)])

    def _picture(self, name: str, pictures: Pictures) -> str | None:
        try:
            content = self.run.read(f"{IMAGES}/{name}")
        except FileNotFoundError:
            return "is missing"
        except Exception as e:  # stores raise errors of many types
            return f"can't be read: {one_line(e)}"
        return pictures.fault(content)

    def _tar(self, file: str, names: list[str], pictures: Pictures) -> Iterator[str]:
        """What is wrong with a tar that must contain the image files `names`, each followed by its JSON."""
        wanted = [member for name in names for member in (name, f"{name.removesuffix('.png')}.json")]
        found: list[str] = []
        with self.run.fs.open(self.run.path(file), "rb") as opened, tarfile.open(fileobj=opened, mode="r|") as tar:
            for member in tar:
                found.append(member.name)
                stream = tar.extractfile(member)
                content = stream.read() if stream else b""
                if member.name.endswith(".png"):
                    if fault := pictures.fault(content):
                        yield f"{member.name} {fault}"
                    continue
                try:
                    json.loads(content)
                except ValueError as e:
                    yield f"{member.name} is not JSON: {one_line(e)}"
        have, want = Counter(found), Counter(wanted)
        yield from (f"holds {name}, which the index does not name" for name in sorted(have - want))
        yield from (f"lacks {name}, which the index names" for name in sorted(want - have))

    def _compare(self, shard: str, ids: Counter[str]) -> Iterator[str]:
        """Compares with the ids of the source's shard."""
        if self.source is None:
            return
        stored: Counter[str] = Counter()
        try:
            with open_checked(self.source, f"{self.kind.folder}/{shard}.parquet") as opened:
                for batch in opened.iter_batches(1024, columns=["image_id", *self.kind.variants]):
                    rows = batch.to_pylist()
                    stored.update(self._key(row) for row in rows if self.steps is None or row["steps"] == self.steps)
        except Exception as e:
            yield f"its source shard can't be read: {one_line(e)}"
            return
        if different := (ids - stored) + (stored - ids):
            yield f"has other images than {self.source.uri}: {', '.join(sorted(different)[:3])}"

    def _merged(self, rows: int) -> Iterator[Finding]:
        """Checks the index of all shards."""
        name = merged_index(self.form)
        if name is None:
            return
        try:
            with open_checked(self.run, name) as opened:
                count = sum(len(batch) for batch in opened.iter_batches(1024))
        except FileNotFoundError:
            yield Finding(name, "is missing")
            return
        except Exception as e:
            yield Finding(name, f"can't be read: {one_line(e)}")
            return
        if count != rows:
            yield Finding(name, f"has {count} rows, and the shards have {rows} images")

    def _orphaned_pictures(self, rows: int) -> Iterator[Finding]:
        """Image files that no index names. Compares hashes of the names, at most MAX_HASHES per pass over the
        indexes."""
        parts = max(1, -(-rows // plans.MAX_HASHES))
        for part in range(parts):
            hashes = array("q")
            for name in self._named():
                if hash(name) % parts == part:
                    hashes.append(hash(name))
            known = np.sort(np.array(hashes))
            for name in _files(self.run, IMAGES):
                inner = name.removeprefix(f"{IMAGES}/")
                if hash(inner) % parts != part or name == merged_index(self.form):
                    continue
                if is_temporary(inner.rsplit("/", 1)[-1]):
                    yield temporary(name)
                    continue
                position = int(np.searchsorted(known, hash(inner)))
                if position == len(known) or known[position] != hash(inner):
                    yield Finding(name, "is in no shard's index")

    def _named(self) -> Iterator[str]:
        for shard in names_in(self.run, INDEX):
            with self.run.parquet_file(f"{INDEX}/{shard}.parquet") as file:
                for batch in file.iter_batches(1024, columns=["file_name"]):
                    yield from batch.column(0).to_pylist()


def _is_committed(name: str, end: str) -> bool:
    return name.endswith(end) and not is_temporary(name)


def _files(run: Folder, top: str) -> Iterator[str]:
    """The files in a folder and its subfolders, recursively; one folder's listing is in memory at a time."""
    folders = [top]
    while folders:
        folder = folders.pop()
        for entry in entries(run, folder):
            if entry.is_file:
                yield f"{folder}/{entry.name}"
            else:
                folders.append(f"{folder}/{entry.name}")
