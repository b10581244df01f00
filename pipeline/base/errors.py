"""Errors that are reported to the user. Light to import."""

from collections.abc import Iterator
from contextlib import contextmanager


class SettingError(ValueError):
    """A setting that does not match the input or the cluster; `field` is its name."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class SourceError(SettingError):
    """A collection that can't be read with these settings; the message names the URI or column. `column` is the one of
    those to keep that is at fault."""

    def __init__(self, message: str, field: str = "images", column: str | None = None) -> None:
        super().__init__(message, field)
        self.column = column


class ManifestError(ValueError):
    """A folder that is not a run folder, or belongs to another command."""


class RunError(RuntimeError):
    """The run can't continue. Exit code 1."""


class StoreError(OSError):
    """A store refuses, fails or can't be reached; the URI is in `filename`. An `outage` concerns the store as a whole:
    requests for other objects will fail as well."""

    def __init__(self, number: int, message: str, uri: str, outage: bool = False) -> None:
        super().__init__(number, message, uri)
        self.outage = outage

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Converts an OSError while writing `what` to a RunError: a full or read-only disk ends the run, and is not an
    error of the input."""
    try:
        yield
    except OSError as e:
        raise RunError(f"{what} can't be written: {e.strerror or e}") from e
