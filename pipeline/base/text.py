"""Text for people: durations, sizes, and errors in one printable line."""

import re


def printable(text: str) -> str:
    """The text on one line, with control and invisible characters escaped: they could move a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def single_line(text: str) -> str:
    """The text, printable, with every run of whitespace as one space."""
    return printable(" ".join(text.split()))


def duration(seconds: float) -> str:
    """1:02:03, or 2 d 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{h}:{m:02d}:{s:02d}"


def size(count: float) -> str:
    """A number of bytes: 2 kB, 3.4 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def figure(value: float | None) -> str:
    """A measured value, of which None is none."""
    return "none" if value is None else f"{value:.3g}"


def one_line(e: BaseException, most: int = 200) -> str:
    """Type and message of an error in one line of at most `most` characters, without memory addresses: a retry then
    reports the same."""
    text = re.sub(r"0x[0-9a-f]{6,}", "0x…", str(e), flags=re.IGNORECASE)
    return single_line(f"{type(e).__name__}: {text}")[:most]


def error_message(e: BaseException) -> str:
    """The message of an error in one line; the name of its type if it has none."""
    return single_line(str(e)) or type(e).__name__
