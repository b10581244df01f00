"""What ends a job from outside its loop, which asks for it: Ctrl-C and SIGTERM, whose exception Python drops where it
comes up in a destructor, say; and what another thread finds, such as a lost lease."""

_pending: BaseException | None = None


def set_pending(interrupt: BaseException | None) -> None:
    global _pending
    _pending = interrupt


def check() -> None:
    """Raises what has come since the job began."""
    if _pending is not None:
        raise _pending
