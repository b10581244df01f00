"""Errors that reach the person who gave the command. Light to import."""


class SourceError(ValueError):
    """A collection that can't be used as asked: the message names the URI or column, `field` the setting at fault."""

    def __init__(self, message: str, field: str = "images") -> None:
        super().__init__(message)
        self.field = field


class ManifestError(ValueError):
    """A run folder that belongs to another command, or is none."""


class RunError(RuntimeError):
    """The run can't go on. Exit code 1."""
