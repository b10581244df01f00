"""What a URI names, against urllib's and fsspec's reading of it."""

import os
from pathlib import Path
from urllib.parse import urljoin

import fsspec
import pytest

from palindrome.pipeline.storage.folder import Folder, open_fs, options_for
from palindrome.pipeline.storage.uri import absolute, chained, host, is_chain, is_whole, joined, local_path, scheme

CHAINS = (
    *(
        "zip://a.png::/x.zip",
        "zip://in/std::vector.png::/x.zip",
        "zip://a.png::s3://bucket/x.zip",
        "zip://a.png::x.zip",
    ),
    *("simplecache::s3://bucket/k", "zip://a.png::simplecache::s3://bucket/x.zip", "zip://in::zip://b.zip::/x.zip"),
)
OTHERS = (
    *("std::vector.png", "a::/b.png", "/in/std::vector.png", "http://h/std::vector.png", "http://[::1]:80/a.png"),
    *("s3://bucket/std::vector.png", "file:///a::b.png", "zip.png", "zip/a::b.png"),
)


@pytest.mark.parametrize("uri", CHAINS)
def test_chain(uri):
    assert is_chain(uri) and is_whole(uri) and absolute(uri) == uri


@pytest.mark.parametrize("uri", OTHERS)
def test_no_chain(uri):
    assert not is_chain(uri) and chained(uri) is None


def test_path_in_an_archive_may_hold_two_colons():
    assert chained("zip://in/std::vector.png::/x.zip") == ("zip://::/x.zip", "in/std::vector.png")
    assert chained("zip://a.png::simplecache::s3://b/x.zip") == ("zip://::simplecache::s3://b/x.zip", "a.png")
    assert chained("simplecache::s3://bucket/k") is None


def test_scheme_in_any_case():
    assert [scheme(uri) for uri in ("HTTP://h/a", "S3://b/k", "file:/a", "a", "/a:b", "C:a")] == [
        "http",
        "s3",
        "file",
        "",
        "",
        "",
    ]
    assert open_fs("MEMORY://a/b", {})[1] == "/a/b"


@pytest.mark.parametrize("name", ["a b.png", "ü 漢字.png", "50%.png", "a#b?c.png", "std::vector.png", "f%20g.png"])
def test_file_uri_is_percent_encoded(name, tmp_path):
    """As pathlib writes it; as it stands where only that is there."""
    (tmp_path / name).write_bytes(b"x")
    for uri in ((tmp_path / name).as_uri(), f"file://{tmp_path}/{name}"):
        for form in (
            uri,
            uri.replace("file://", "file://localhost"),
            uri.replace("file://", "file:"),
            "FILE" + uri[4:],
        ):
            assert local_path(form) == str(tmp_path / name)
            fs, path = open_fs(form, {})
            assert fs.cat_file(path) == b"x"


def test_encoded_file_uri_is_the_decoded_file_where_both_are_there(tmp_path):
    for name in ("a b.png", "a%20b.png"):
        (tmp_path / name).write_text(name)
    assert Path(local_path(f"file://{tmp_path}/a%20b.png")).read_text() == "a b.png"
    assert Path(local_path(f"file://{tmp_path}/a%2520b.png")).read_text() == "a%20b.png"


def test_bytes_that_are_no_utf8_in_a_file_uri(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xe9.png"
    with open(path, "wb"):
        pass
    assert os.fsencode(local_path(Path(os.fsdecode(path)).as_uri())) == path


def test_folder_to_write_by_its_encoded_uri(tmp_path):
    Folder(f"file://{tmp_path}/my%20run").put("a", b"x")
    assert (tmp_path / "my run" / "a").read_bytes() == b"x"


@pytest.mark.parametrize(
    "name", ["a.png", "../b.png", "/c.png", "//cdn.org/d.png", "e%20f.png?q=1", "https://g.org/h.png", "i j.png"]
)
def test_reference_on_the_web_is_rfc_3986s(name):
    assert joined("http://h.org/x/list.txt", name) == urljoin("http://h.org/x/list.txt", name)


def test_name_with_a_colon_on_the_web_is_below_the_list():
    assert joined("http://h.org/x/list.txt", "std::vector.png") == "http://h.org/x/std::vector.png"


def test_host():
    uris = ("HTTP://H.org:81/a", "https://[::1]:80/x::y", "s3://bucket/k", "/a", "http://h")
    assert [host(uri) for uri in uris] == ["h.org:81", "[::1]:80", "", "", "h"]


def test_options_are_those_of_the_store_that_is_named():
    options = {"s3": {"key": "k"}, "file": {"auto_mkdir": True}, "http": {"block_size": 1}}
    assert options_for("s3://b/std::vector.png", options) == {"s3": {"key": "k"}}
    assert options_for("std::vector.png", options) == {"file": {"auto_mkdir": True}}
    assert options_for("zip://a::s3://b/k", options) == {"s3": {"key": "k"}}
    assert options_for("https://[::1]/a", options) == {"https": {"block_size": 1}}


def test_address_of_six_bytes_and_two_colons_are_opened_as_the_web():
    for uri in ("http://[::1]:8080/a.png", "http://h.org/std::vector.png"):
        fs, path = open_fs(uri, {})
        assert type(fs) is fsspec.get_filesystem_class("http") and path == uri
