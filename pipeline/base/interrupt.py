"""Ctrl-C and SIGTERM end a job by an exception, which Python drops where it comes up in a destructor, say: the run's
loop asks whether there was one."""

_pending: KeyboardInterrupt | None = None


def set_pending(interrupt: KeyboardInterrupt | None) -> None:
    global _pending
    _pending = interrupt


def check() -> None:
    """Raises the interrupt that has come since the job began."""
    if _pending is not None:
        raise _pending
