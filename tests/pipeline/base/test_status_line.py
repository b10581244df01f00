"""The status line on a pseudo-terminal, in a text log and in a JSON log."""

import io
import json
import os
import threading
from contextlib import suppress
from math import inf

import pytest

from palindrome.pipeline.base import status_line
from palindrome.pipeline.base.log import Lines
from palindrome.pipeline.base.status_line import StatusLine


@pytest.fixture
def terminal():
    """A pseudo-terminal: the stream to write to, and a function that closes it and reads what was written."""
    ours, theirs = os.openpty()

    def written():
        stream.close()
        parts = []
        with suppress(OSError):  # EIO, once there is no more
            while part := os.read(ours, 4096):
                parts.append(part)
        return b"".join(parts).decode()

    with open(theirs, "w") as stream:
        yield stream, written
    os.close(ours)


def test_on_a_terminal_each_update_erases_the_line_before_it(terminal):
    stream, written = terminal
    line = StatusLine(stream)
    line.show("1 of 2", images=1)
    line.show("2 of 2", last=True, images=2)
    assert written() == "\r\x1b[K1 of 2\r\x1b[K2 of 2\r\n"


def test_it_makes_place_for_other_output_on_a_terminal(terminal):
    stream, written = terminal
    line = StatusLine(stream, log_interval=inf)
    line.show("1 of 2")
    line.clear()
    print("an error", file=stream, flush=True)
    assert written() == "\r\x1b[K1 of 2\r\x1b[Kan error\r\n"


def test_in_a_log_each_update_is_a_line():
    stream = io.StringIO()
    line = StatusLine(stream)
    line.show("1 of 2", images=1)
    line.clear()
    line.show("2 of 2", last=True, images=2)
    assert stream.getvalue() == "1 of 2\n2 of 2\n"


def test_in_a_json_log_each_update_is_an_object_with_its_figures():
    stream = io.StringIO()
    StatusLine(Lines(stream, "info", threading.Lock())).show("1 of 2", job="encode", images=1)
    found = json.loads(stream.getvalue())
    assert (found["event"], found["message"], found["job"], found["images"]) == ("progress", "1 of 2", "encode", 1)


def test_updates_are_due_at_the_interval_of_the_stream(terminal, monkeypatch):
    assert StatusLine(io.StringIO(), log_interval=0).due()
    assert not StatusLine(io.StringIO(), log_interval=inf).due()
    monkeypatch.setattr(status_line, "TERMINAL_INTERVAL", 0)
    assert StatusLine(terminal[0], log_interval=inf).due()
