"""Lines of JSON, and lines that come from elsewhere."""

import io
import json
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime

import pytest

from palindrome.pipeline.base.log import KEYS, Lines, note, relay, say, structured


def told(run):
    """What `run` says under `structured`: its exit code, the objects on standard output and on standard error."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = structured("encode", run)
    return code, *([json.loads(line) for line in text.getvalue().splitlines()] for text in (out, err))


def test_every_line_is_an_object_and_the_last_says_how_it_ended():
    before = datetime.now(UTC)

    def run():
        print("one", "two", end="")
        print(" three\n\nfour")
        print("five", file=sys.stderr)
        say("six of 9", "progress", done=6, of=9, rate=float("nan"), eta=None, at=("a", 1.5))
        say("seven", "shard_failed", "error", shard="s")
        note(summary={"count": 8, "ids": ["a", "b"], "rows": [{"error": 1e-13, "worst": ["a"]}]})
        return 1

    code, out, err = told(run)
    assert code == 1
    assert all(record.keys() >= KEYS for record in out + err)
    times = [datetime.fromisoformat(record["time"]) for record in out]
    assert all(time.tzinfo == UTC for time in times) and times == sorted(times)
    assert before.timestamp() - 0.001 <= times[0].timestamp() <= datetime.now(UTC).timestamp()
    said = [(record["level"], record["event"], record["message"]) for record in out]
    assert said == [
        ("info", "message", "one two three"),
        ("info", "message", "four"),
        ("info", "progress", "six of 9"),
        ("error", "end", "encode: exit code 1"),
    ]
    numbers = {"done": 6, "of": 9, "rate": None, "eta": None, "at": ["a", 1.5]}
    assert {k: v for k, v in out[2].items() if k not in KEYS} == numbers
    assert (out[3]["job"], out[3]["exit_code"]) == ("encode", 1) and out[3]["seconds"] >= 0
    assert out[3]["summary"] == {"count": 8, "rows": [{"error": 1e-13}]}
    assert err[-1]["shard"] == "s" and err[-1]["level"] == "error"
    assert (err[0]["message"], err[0]["level"]) == ("five", "warning")


@pytest.mark.parametrize(("raised", "expected"), [(SystemExit(2), 2), (SystemExit(None), 0), (KeyError("k"), 1)])
def test_whatever_ends_it_is_an_exit_code(raised, expected):
    def run():
        raise raised

    code, out, err = told(run)
    assert (code, out[-1]["exit_code"]) == (expected, expected)
    if isinstance(raised, KeyError):
        [record] = err
        assert record["message"] == "palindrome encode: KeyError: 'k'"
        assert record["traceback"].startswith("Traceback") and "raise raised" in record["traceback"]
    assert not isinstance(sys.stdout, Lines)


def test_threads_that_print_at_once_break_no_line():
    def run():
        def lines(name):
            for i in range(200):
                print(name, i)

        threads = [threading.Thread(target=lines, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return 0

    _, out, _ = told(run)
    assert {record["message"] for record in out[:-1]} == {f"{name} {i}" for name in "abcd" for i in range(200)}


def relayed(text, size):
    with relay() as show:
        for start in range(0, len(text), size):
            show(text[start : start + size])
    return 0


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_lines_from_elsewhere_are_text_for_people_and_objects_for_programs(size):
    def run():
        say("encode: 1/2 shards", "progress", shards_done=1)
        raise ZeroDivisionError

    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        structured("encode", run)
    text = "waiting: 0 of 1 gpus up\n" + said.getvalue() + '{"another": "object"}\n{no object'
    out = io.StringIO()
    with redirect_stdout(out):
        relayed(text, size)
    lines = out.getvalue().splitlines()
    assert lines[:3] == ["waiting: 0 of 1 gpus up", "encode: 1/2 shards", "Traceback (most recent call last):"]
    assert lines[-3:] == ["ZeroDivisionError", '{"another": "object"}', "{no object"]

    _, out, _ = told(lambda: relayed(text, size))
    assert out[1:-3] == [json.loads(line) for line in said.getvalue().splitlines()]
    assert [out[0]["message"], out[-3]["message"], out[-2]["message"]] == [*lines[:1], *lines[-2:]]
