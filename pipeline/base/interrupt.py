"""What ends a job from outside of its loop, which checks for it: Ctrl-C and SIGTERM, since Python drops exceptions that
are raised in a destructor; and what another thread finds out, such as a lost lease."""

_pending: BaseException | None = None


def set_pending(interrupt: BaseException | None) -> None:
    global _pending
    _pending = interrupt


def check() -> None:
    """Raises the pending exception, if any."""
    if _pending is not None:
        raise _pending
