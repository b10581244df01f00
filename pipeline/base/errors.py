"""Errors that reach the person who gave the command. Light to import."""

from collections.abc import Iterator
from contextlib import contextmanager


class SettingError(ValueError):
    """A setting that does not go with what is there; `field` is its name."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class SourceError(SettingError):
    """A collection that can't be used as asked: the message names the URI or column."""

    def __init__(self, message: str, field: str = "images") -> None:
        super().__init__(message, field)


class ManifestError(ValueError):
    """A run folder that belongs to another command, or is none."""


class RunError(RuntimeError):
    """The run can't go on. Exit code 1."""


class StoreError(OSError):
    """A store that refuses, fails or can't be reached, said of the URI in `filename`. An `outage` says nothing of the
    object that was asked for: the same will be said of others."""

    def __init__(self, number: int, words: str, uri: str, outage: bool = False) -> None:
        super().__init__(number, words, uri)
        self.outage = outage

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


@contextmanager
def writing(what: str) -> Iterator[None]:
    """A disk that is full, or may not be written to, is the run's end, and not the fault of what was being read."""
    try:
        yield
    except OSError as e:
        raise RunError(f"{what} can't be written: {e.strerror or e}") from e
