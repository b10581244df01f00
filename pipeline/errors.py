"""Errors that reach the person who gave the command. Light to import."""

from collections.abc import Iterator
from contextlib import contextmanager


class SourceError(ValueError):
    """A collection that can't be used as asked: the message names the URI or column, `field` the setting at fault."""

    def __init__(self, message: str, field: str = "images") -> None:
        super().__init__(message)
        self.field = field


class ManifestError(ValueError):
    """A run folder that belongs to another command, or is none."""


class RunError(RuntimeError):
    """The run can't go on. Exit code 1."""


@contextmanager
def writing(what: str) -> Iterator[None]:
    """A disk that is full, or may not be written to, is the run's end, and not the fault of what was being read."""
    try:
        yield
    except OSError as e:
        raise RunError(f"{what} can't be written: {e.strerror or e}") from e
