"""Ctrl-C and SIGTERM end a job by an exception. Python drops exceptions that are raised in a destructor, so the signal
handler also records it here, and the run's loop checks for it."""

_pending: KeyboardInterrupt | None = None


def set_pending(interrupt: KeyboardInterrupt | None) -> None:
    global _pending
    _pending = interrupt


def check() -> None:
    """Raises the pending interrupt, if any."""
    if _pending is not None:
        raise _pending
