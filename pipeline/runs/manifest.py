"""`run.json`: what a run folder contains and which command may resume it."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from palindrome.model.ladder import Ladder
from palindrome.pipeline.base.errors import ManifestError, RunError
from palindrome.pipeline.runs.kinds import KINDS, Kind
from palindrome.pipeline.runs.lease import NAME as LEASE
from palindrome.pipeline.storage.folder import TEMPORARY, Folder, absolute

NAME = "run.json"
COMPLETE = "plan/complete.json"  # written last: a plan without it was interrupted, and is made again
LIBRARIES = ("palindrome", "torch", "ray", "pyarrow", "pillow", "numpy")


@dataclass(frozen=True)
class Manifest:
    """The JSON of `run.json` in `content`. The properties raise KeyError or TypeError if it is not what the run's job
    writes."""

    content: Mapping[str, Any]

    @property
    def job(self) -> str:
        """The command that made the run."""
        return str(self.content["job"])

    @property
    def kind(self) -> Kind:
        return KINDS[self.job]

    @property
    def config(self) -> Mapping[str, Any]:
        """The command's settings."""
        return dict(self.content["config"])

    @property
    def facts(self) -> dict[str, Any]:
        """Properties of the inputs when the run was made, such as the model's digest."""
        return {k: v for k, v in self.content.items() if k not in ("job", "config", "versions", "fields")}

    @property
    def source(self) -> str:
        """The URI of the run's input; "None" if run.json has none."""
        first, second = self.kind.source
        return str((self.content.get(first) or {}).get(second))

    @property
    def model_digest(self) -> str:
        return str(self.content["model_digest"])

    @property
    def levels(self) -> Ladder:
        """The ladder of a run with a single one."""
        return tuple(self.content["levels"])

    @property
    def top(self) -> int:
        """The last level of the ladder. Versions before chose another one for some noise schedules."""
        return int(self.levels[-1])

    @property
    def ladders(self) -> tuple[Ladder, ...]:
        """The ladders of a run that decodes on several; else empty."""
        return tuple(tuple(levels) for levels in self.content.get("ladders", ()))

    @property
    def precision(self) -> str | None:
        """The network's precision, None if the run does not record it."""
        return self.content.get("precision")


def claim(
    run: Folder,
    job: str,
    config: Mapping[str, Any],
    mutable: Collection[str],
    facts: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    check_only: bool = False,
) -> bool:
    """Writes `run.json`, or checks the existing one; True if an earlier run is resumed. With `check_only` nothing is
    written.

    `config` are the command's settings, which must not change except for those named in `mutable`; `facts` are
    properties of the inputs, such as the model's digest, which must not change either. A setting that an earlier
    version did not record has its value in `defaults`, if any. Raises ManifestError naming what differs.
    """
    wanted = json.loads(json.dumps({"job": job, "config": dict(config), **facts}))
    found = _content(run)
    names = {path.rpartition("/")[2] for path in run.fs.ls(run.path(), detail=False)} if run.exists() else set()
    names = {name for name in names if not name.startswith(TEMPORARY)}  # a run killed in its first put leaves one
    if names <= {NAME, LEASE, "plan"} and not run.exists(COMPLETE):  # no work was done; a first attempt may have failed
        if check_only:
            return False
        fields = {k: "may change" if k in mutable else "must be the same to resume" for k in config}
        content = {**wanted, "versions": _versions(), "fields": fields}
        run.put(NAME, (json.dumps(content, indent=2) + "\n").encode())
        return False
    if found is None:
        raise ManifestError(f"{run.uri} is not empty and is not a run folder (it has no {NAME})")
    if found["job"] != job:
        raise ManifestError(f"{run.uri} belongs to another command: {found['job']}, not {job}")
    for key in ("config", *facts):
        before, now = found.get(key), wanted[key]
        if isinstance(now, dict) and isinstance(before, dict):
            if key == "config":
                before = {**json.loads(json.dumps(dict(defaults or {}))), **before}
            for name in sorted((now.keys() | before.keys()) - set(mutable)):
                if now.get(name) != before.get(name):
                    label = f"--{name.rstrip('_').replace('_', '-')}" if key == "config" else f"{key} {name}"
                    raise ManifestError(
                        f"{run.uri} belongs to another command: {label} was {before.get(name)}, now {now.get(name)}"
                    )
        elif before != now:
            raise ManifestError(f"{run.uri} belongs to another command: {key} was {before}, now {now}")
    return True


def read_manifest(run: Folder) -> Manifest | None:
    """`run.json`, or None if there is none. Raises ManifestError if it can't be parsed."""
    content = _content(run)
    return None if content is None else Manifest(content)


def earlier_manifest(run: Folder, job: str) -> Manifest | None:
    """That of an earlier run of `job`, which its command resumes; None in another folder. Raises ManifestError."""
    manifest = read_manifest(run)
    return manifest if manifest and manifest.job == job else None


def _content(run: Folder) -> dict[str, Any] | None:
    try:
        content = json.loads(run.read(NAME))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise ManifestError(f"{run.uri} is a file, not a folder") from None
    except ValueError as e:
        raise ManifestError(f"{run.uri}/{NAME} is not JSON: {e}") from e
    if not isinstance(content, dict) or "job" not in content or "config" not in content:
        raise ManifestError(f"{run.uri}/{NAME} is not a run's: it has no job or no config")
    return content


def note(run: Folder, **found: Any) -> None:
    """Adds to `run.json` what is known only after the cluster has been reached, such as the precision."""
    content = {**(_content(run) or {}), **found}
    run.put(NAME, (json.dumps(content, indent=2) + "\n").encode())


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def open_run(uri: str, *jobs: str) -> tuple[Folder, Manifest]:
    """The folder of a run of one of `jobs`, and its `run.json`. Raises RunError."""
    run = Folder(absolute(uri))
    exists = run.exists()  # raises for an unknown scheme
    try:
        manifest = read_manifest(run)
    except ManifestError as e:
        raise RunError(str(e)) from e
    if manifest is None:
        raise RunError(f"{run.uri} is not a run folder (it has no {NAME})" if exists else f"{run.uri} does not exist")
    if manifest.job not in jobs or not isinstance(manifest.content["config"], dict):
        raise RunError(f"{run.uri} is a run of {manifest.job}, not of {' or '.join(jobs)}")
    return run, manifest
