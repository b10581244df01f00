"""Words for people: durations, sizes, and anything in one printable line."""

import re


def printable(text: str) -> str:
    """The text in one line, with what would move a terminal's cursor, or hide, written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def duration(seconds: float) -> str:
    """1:02:03, or 2 d 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{h}:{m:02d}:{s:02d}"


def size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def figure(value: float | None) -> str:
    """A measured value, of which None is none."""
    return "none" if value is None else f"{value:.3g}"


def one_line(e: BaseException, most: int = 200) -> str:
    """An error in one line of at most so many characters, without memory addresses: retries say the same."""
    text = re.sub(r"0x[0-9a-f]{6,}", "0x…", str(e), flags=re.IGNORECASE)
    return printable(" ".join(f"{type(e).__name__}: {text}".split()))[:most]
