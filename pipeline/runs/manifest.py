"""`run.json`: what a run folder holds and which command may go on in it."""

import json
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from palindrome.pipeline.base.errors import ManifestError, RunError
from palindrome.pipeline.storage.folder import TEMPORARY, Folder, absolute

NAME = "run.json"
COMPLETE = "plan/complete.json"  # put when a plan is whole: one without it was cut short, and is made again
LIBRARIES = ("palindrome", "torch", "ray", "pyarrow", "pillow", "numpy")


def claim(
    run: Folder,
    job: str,
    config: Mapping[str, Any],
    free: Collection[str],
    facts: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> bool:
    """Writes `run.json`, or checks the one that is there; True if the run goes on from an earlier one.

    `config` are the command's settings, which must be the same again but for those named in `free`; `facts` what was
    found (the model's digest), likewise. A setting that the run of an earlier version does not have had the value that
    `defaults` names, if any. Raises ManifestError naming what differs.
    """
    wanted = json.loads(json.dumps({"job": job, "config": dict(config), **facts}))
    found = read_manifest(run)
    if found is not None:
        run.clear_unfinished()
    names = {path.rpartition("/")[2] for path in run.fs.ls(run.path(), detail=False)} if run.exists() else set()
    names = {name for name in names if not name.startswith(TEMPORARY)}  # a run killed at its first put leaves one
    if names <= {NAME, "plan"} and not run.exists(COMPLETE):  # nothing is done here yet: a first try may have failed
        meaning = {k: "may change" if k in free else "must be the same to resume" for k in config}
        content = {**wanted, "versions": _versions(), "fields": meaning}
        run.put(NAME, (json.dumps(content, indent=2) + "\n").encode())
        return False
    if found is None:
        raise ManifestError(f"{run.uri} is not empty and is no run folder (it has no {NAME})")
    if found["job"] != job:
        raise ManifestError(f"{run.uri} belongs to another command: {found['job']}, not {job}")
    for key in ("config", *facts):
        before, now = found.get(key), wanted[key]
        if isinstance(now, dict) and isinstance(before, dict):
            if key == "config":
                before = {**json.loads(json.dumps(dict(defaults or {}))), **before}
            for name in sorted((now.keys() | before.keys()) - set(free)):
                if now.get(name) != before.get(name):
                    what = f"--{name.replace('_', '-')}" if key == "config" else f"{key} {name}"
                    raise ManifestError(
                        f"{run.uri} belongs to another command: {what} was {before.get(name)}, now {now.get(name)}"
                    )
        elif before != now:
            raise ManifestError(f"{run.uri} belongs to another command: {key} was {before}, now {now}")
    return True


def read_manifest(run: Folder) -> dict[str, Any] | None:
    """The content of `run.json`, or None where there is none. Raises ManifestError when it can't be parsed."""
    try:
        content = json.loads(run.read(NAME))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise ManifestError(f"{run.uri} is a file, not a folder") from None
    except ValueError as e:
        raise ManifestError(f"{run.uri}/{NAME} is not JSON: {e}") from e
    if not isinstance(content, dict) or "job" not in content or "config" not in content:
        raise ManifestError(f"{run.uri}/{NAME} is not a run's")
    return content


def note(run: Folder, **found: Any) -> None:
    """Adds to `run.json` what was found once there was a cluster to find it on."""
    content = {**(read_manifest(run) or {}), **found}
    run.put(NAME, (json.dumps(content, indent=2) + "\n").encode())


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def open_run(uri: str, *jobs: str) -> tuple[Folder, dict[str, Any]]:
    """The folder of a run of one of `jobs`, and its `run.json`. Raises RunError."""
    run = Folder(absolute(uri))
    exists = run.exists()  # an unknown scheme is said here
    try:
        manifest = read_manifest(run)
    except ManifestError as e:
        raise RunError(str(e)) from e
    if manifest is None:
        raise RunError(f"{run.uri} is no run folder (it has no {NAME})" if exists else f"{run.uri} is not there")
    if manifest["job"] not in jobs or not isinstance(manifest["config"], dict):
        raise RunError(f"{run.uri} is a run of {manifest['job']}; this takes one of {' or '.join(jobs)}")
    return run, manifest
