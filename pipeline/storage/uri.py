"""What a URI names: RFC 3986's parts, RFC 8089's file URIs, and fsspec's chains (`zip://a.png::s3://bucket/x.zip`)."""

import os
import re
from urllib.parse import unquote, urljoin

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
FILE = re.compile(r"file:(?://(?:localhost)?(?=/)|(?=/[^/]))", re.IGNORECASE)
WEB = ("http", "https")
# What begins a chain: the stores of fsspec that are in others. In any other URI, and in a path, `::` is part of a name.
LINKS = {"zip", "tar", "libarchive", "simplecache", "filecache", "blockcache", "cached", "dir", "reference"}
_ANY = "|".join(sorted(LINKS))
LINK = re.compile(rf"({_ANY})://(.*?)::(?=/|[A-Za-z][A-Za-z0-9+.-]*://|(?:{_ANY})::)(.+)", re.DOTALL)


def scheme(uri: str) -> str:
    """In lower case; "" of a path."""
    found = SCHEME.match(uri)
    return found[1].lower() if found else "file" if FILE.match(uri) else ""


def is_chain(uri: str) -> bool:
    first, separator, _ = uri.partition("::")
    return bool(separator) and first.partition("://")[0] in LINKS


def chained(uri: str) -> tuple[str, str] | None:
    """Of a path in an archive its store, as a URI, and the path, which may hold `::` itself; None of any other URI."""
    found = LINK.fullmatch(uri)
    return (f"{found[1]}://::{found[3]}", found[2]) if found else None


def is_whole(uri: str) -> bool:
    """Whether it is no name that is relative to something."""
    return bool(scheme(uri)) or is_chain(uri) or uri.startswith("/")


def absolute(uri: str) -> str:
    """A path as every process of the run can open it; URIs with a scheme stay as they are."""
    return uri if scheme(uri) or is_chain(uri) else os.path.abspath(os.path.expanduser(uri))


def local_path(uri: str) -> str:
    """The path that a file URI names, percent-encoded; or as it stands, where only that file is there."""
    stands = FILE.sub("", uri, count=1) if FILE.match(uri) else re.sub("(?i)^file://", "", uri)
    path = unquote(stands, errors="surrogateescape")
    return stands if path != stands and os.path.lexists(stands) and not os.path.lexists(path) else path


def host(uri: str) -> str:
    """The web server that a URI is on, with its port; "" of another store."""
    return uri.partition("://")[2].partition("/")[0].lower() if scheme(uri) in WEB else ""


def joined(base: str, name: str) -> str:
    """A reference on a web page at `base`, which is a URL."""
    first = re.split("[/?#]", name, maxsplit=1)[0]
    return urljoin(base, f"./{name}" if ":" in first and not SCHEME.match(name) else name)
