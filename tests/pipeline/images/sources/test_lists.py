"""Lists of URIs as text, CSV, TSV and Parquet, the tables written by polars, DuckDB and pyarrow."""

import bz2
import errno
import gzip
import http.server
import json
import lzma
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections import Counter
from contextlib import suppress

import duckdb
import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from palindrome.pipeline.base.errors import SourceError, StoreError
from palindrome.pipeline.images.decode import Preprocess, Rejected, decode
from palindrome.pipeline.images.sources import FILES, LIST, PARQUET, files, list_pieces, open_collection, read_raw
from palindrome.pipeline.runs.plan import extend_plan, read_plan, write_plan
from palindrome.pipeline.storage import folder
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.verify_deep import _only


@pytest.fixture
def images(tmp_path, pngs, fill):
    """A folder with `in/0.png` .. `in/5.png`."""
    fill(tmp_path, {f"in/{i}.png": pngs[i] for i in range(6)})
    return tmp_path


def read(found):
    return {raw.image_id: raw.data for raw in found}


# Text


def test_text_with_blank_lines_comments_and_carriage_returns(images, pngs, fill, rows):
    odd = ["in/a b.png", "in/ü#1.png", "in/x\u2028y\x0bz\x85.png"]
    fill(images, {name: pngs[10 + i] for i, name in enumerate(odd)})
    lines = [
        "\ufeff# a comment",
        "",
        f"{images}/in/0.png",
        "  in/1.png\t",
        f"file://{images}/in/2.png",
        " # no",
        *odd,
        "",
    ]
    for ending in ("\n", "\r\n"):
        (images / "list.txt").write_bytes(ending.join(lines).encode())
        assert open_collection(f"{images}/list.txt").kind == LIST
        assert read(rows(images / "list.txt")) == {
            f"{images}/in/0.png": pngs[0],
            "in/1.png": pngs[1],
            f"file://{images}/in/2.png": pngs[2],
            **{name: pngs[10 + i] for i, name in enumerate(odd)},
        }


def test_they_come_by_name_and_a_second_line_is_the_same_image(images, pngs, rows):
    (images / "list.TXT").write_text("in/2.png\nin/0.png\nin/2.png\nin/1.png\nin/0.png")
    assert [raw.image_id for raw in rows(images / "list.TXT", 2)] == ["in/0.png", "in/1.png", "in/2.png"]


def test_missing_and_odd_entries_are_rejects_of_their_own(images, pngs, fill, rows):
    lines = [
        "in/0.png",
        "in/none.png",
        "/none/at/all.png",
        "nosuch://a/b.png",
        "in",
        "zip://a.png::/none.zip",
        "file://",
    ]
    (images / "list.txt").write_text("\n".join(lines))
    found = {raw.image_id: (raw.data, raw.reason) for raw in rows(images / "list.txt")}
    assert found == {
        "in/0.png": (pngs[0], ""),
        "in/none.png": (None, "missing"),
        "/none/at/all.png": (None, "missing"),
        "nosuch://a/b.png": (None, "unreadable"),
        "in": (None, "unreadable"),
        "zip://a.png::/none.zip": (None, "missing"),
        "file://": (None, "unreadable"),
    }


def test_list_by_a_relative_path(images, pngs, rows, monkeypatch):
    (images / "list.txt").write_text("in/1.png\n")
    monkeypatch.chdir(images)
    assert read(rows("list.txt")) == {"in/1.png": pngs[1]}
    monkeypatch.chdir(images / "in")
    assert read(rows("../list.txt")) == {"in/1.png": pngs[1]}


def test_list_alone_in_a_folder_or_by_a_glob(images, pngs, fill, rows):
    fill(images, {"lists/all.txt": b"../in/3.png\n"})
    for uri in (images / "lists", f"{images}/lists/*.txt", f"{images}/{{lists,none}}/a*.txt"):
        assert read(rows(uri)) == {"../in/3.png": pngs[3]}


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl", "parquet", "feather"])
def test_a_folder_of_lists(ending, images, pngs, fill, rows):
    """Each relative to its own folder; what two of them name is one image. Texts beside tables are no lists."""
    for path, names in {
        "a": ["in/0.png", "in/2.png"],
        "sub/b": ["../in/1.png", "/none.png"],
        "z": ["in/0.png"],
    }.items():
        file = images / "lists" / f"{path}.{ending}"
        below = [f"../{name}" if name[0] != "/" else name for name in names]
        file.parent.mkdir(parents=True, exist_ok=True)
        if ending == "txt":
            file.write_text("\n".join(below))
        else:
            frame = pl.DataFrame({"uri": below, "n": [path] * len(below)})
            getattr(frame, WRITERS[ending])(file)
    fill(
        images / "lists",
        {"README.md": b"# x", "_SUCCESS": b"", **({} if ending == "txt" else {"notes.txt": b"no uri"})},
    )
    found = {raw.image_id: (raw.data, raw.reason, raw.kept) for raw in rows(images / "lists", 2)}
    assert found == {
        "../in/0.png": (pngs[0], "", {}),
        "../in/2.png": (pngs[2], "", {}),
        "../../in/1.png": (pngs[1], "", {}),
        "/none.png": (None, "missing", {}),
    }
    if ending != "txt":
        kept = {raw.image_id: raw.kept["n"] for raw in rows(images / "lists", keep=["n"])}
        assert kept == {"../in/0.png": "a", "../in/2.png": "a", "../../in/1.png": "sub/b", "/none.png": "sub/b"}


def test_lists_of_several_kinds_are_refused(images, fill, refused, rows):
    fill(images, {"lists/a.csv": b"uri\n../in/3.png\n", "lists/b.jsonl": b'{"uri": "../in/4.png"}\n'})
    assert "several kinds" in refused(images / "lists")
    assert len(rows(f"{images}/lists/*.csv")) == 1


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_lists_where_one_has_nulls_alone_or_numbers_otherwise(ending, first, images, rows):
    def put(name, n):
        frame = pl.DataFrame({"uri": [f"in/{name}{i}.png" for i in range(2)], "n": n})
        getattr(frame, WRITERS[ending])(images / f"{'ab'[name]}.{ending}")

    for one, other in [([None, None], [1, 2]), ([1, 2], [1.5, 2.5]) if ending != "parquet" else ([1, 2], [3, None])]:
        put(first, one)
        put(1 - first, other)
        uri = f"{images}/*.{ending}"
        found = {raw.image_id: raw.kept["n"] for raw in rows(uri, keep=["n"])}
        expected = {f"in/{first}{i}.png": one[i] for i in range(2)} | {
            f"in/{1 - first}{i}.png": other[i] for i in range(2)
        }
        assert found == expected


@pytest.mark.parametrize("content", [b"\xff\xfei\0n\0/\0", b"in/0.png\n\xe9.png\n"])
def test_text_that_is_no_utf_8_is_refused_by_name(content, images, refused):
    (images / "list.txt").write_bytes(content)
    assert "list.txt can't be read" in refused(images / "list.txt")


def test_list_of_another_store_with_relative_and_whole_uris(images, pngs, rows):
    root = uuid.uuid4().hex
    fs = fsspec.filesystem("memory")
    fs.pipe({f"/{root}/a/0.png": pngs[0], f"/{root}/1.png": pngs[1]})
    fs.pipe_file(f"/{root}/list.txt", f"a/0.png\nmemory://{root}/1.png\n{images}/in/2.png\nnone.png".encode())
    found = rows(f"memory://{root}/list.txt")
    assert [(raw.data, raw.reason) for raw in found] == [
        (pngs[2], ""),
        (pngs[0], ""),
        (pngs[1], ""),
        (None, "missing"),
    ]


def test_list_and_its_images_in_a_zip(images, pngs, rows):
    (images / "list.csv").write_text("path\nin/2.png\nin/none.png\n")
    subprocess.run([sys.executable, "-m", "zipfile", "-c", "x.zip", "list.csv", "in"], cwd=images, check=True)
    for raw in (found := rows(f"zip://list.csv::{images}/x.zip")):
        assert raw.source.endswith(f"::{images}/x.zip")
    assert [(raw.data, raw.reason) for raw in found] == [(pngs[2], ""), (None, "missing")]


# JSON lines, columns


WRITERS = {"csv": "write_csv", "jsonl": "write_ndjson", "parquet": "write_parquet", "feather": "write_ipc"}


@pytest.mark.parametrize("name", ["list.jsonl", "list.NDJSON"])
def test_json_lines(name, images, pngs, rows, refused):
    lines = [
        {"file_name": "in/0.png", "text": "a\n\u00fc", "n": 1, "x": 0.5, "ok": True, "meta": {"a": [1]}},
        {"file_name": "in/1.png", "n": None, "when": "2024-01-01"},
        {"text": "no picture"},
        {"file_name": "in/2.png", "n": 2, "late": "z"},
    ]
    (images / name).write_text("\n\n".join(map(json.dumps, lines)))
    assert (open_collection(f"{images}/{name}").kind, open_collection(f"{images}/{name}").image_column) == (
        LIST,
        "file_name",
    )
    keep = ["text", "n", "x", "ok", "when", "late"]
    found = rows(images / name, keep=keep)
    assert [raw.data for raw in found] == pngs[:3]
    assert [raw.kept for raw in found] == [{k: lines[i].get(k) for k in keep} for i in (0, 1, 3)]
    assert "'meta'" in refused(images / name, keep=["meta"])
    assert "'nothing'" in refused(images / name, image_column="nothing")
    assert "file_name, text" in refused(images / name, keep=["colour"])


PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("packed", [*PACK, "zst"])
@pytest.mark.parametrize("ending", ["txt", "csv", "tsv", "jsonl"])
def test_compressed_lists(ending, packed, images, pngs, rows, fill, refused):
    content = {
        "txt": "in/0.png\nin/2.png",
        "csv": "url,n\nin/0.png,1\nin/2.png,2",
        "tsv": "url\tn\nin/0.png\t1\nin/2.png\t2",
        "jsonl": '{"url": "in/0.png", "n": 1}\n{"url": "in/2.png", "n": 2}',
    }[ending]
    if packed == "zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content.encode())
        data = sink.getvalue().to_pybytes()
    else:
        data = PACK[packed](content.encode())
    keep = [] if ending == "txt" else ["n"]
    for name in (f"a.{ending}.{packed}", f"A.{ending.upper()}.{packed.upper()}", f"b.{ending}"):
        fill(images, {name: data})
        found = rows(images / name, keep=keep)
        assert [raw.data for raw in found] == [pngs[0], pngs[2]]
        assert not keep or [raw.kept["n"] for raw in found] == [1, 2]
    fill(images, {name: data[: len(data) // 2]})
    assert name in refused(images / name)


def test_names_in_json_that_look_like_times_stay_texts(tmp_path, pngs, fill, rows):
    fill(tmp_path, {"2020-01-01": pngs[0], "list.jsonl": b'{"file": "2020-01-01"}\n'})
    assert read(rows(tmp_path / "list.jsonl")) == {"2020-01-01": pngs[0]}


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b'{"uri": "in/0.png"}\n{"uri": ', b'{"uri": 7}\n', b"\xff\xfe"])
def test_damaged_json_is_refused_by_name(content, images, refused):
    (images / "list.jsonl").write_bytes(content)
    assert f"{images}/list.jsonl" in refused(images / "list.jsonl")


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("column", ["URL", "Url", "IMAGE_PATH", "File_Name"])
def test_columns_in_capitals(column, ending, images, pngs, rows, refused):
    """As LAION has them: URL, TEXT."""
    frame = pl.DataFrame(
        {column: [f"in/{i}.png" for i in range(2)], "TEXT": ["a", None], "WIDTH": [1, 2], "x": [0.5, 1.5]}
    )
    getattr(frame, WRITERS[ending])(images / f"laion.{ending}")
    for named in (None, column):
        found = rows(images / f"laion.{ending}", keep=["TEXT", "x"], image_column=named)
        assert [raw.data for raw in found] == pngs[:2]
        assert [raw.kept["x"] for raw in found] == [0.5, 1.5]
    getattr(frame.rename({column: "where"}), WRITERS[ending])(images / f"laion.{ending}")
    with pytest.raises(SourceError) as info:
        open_collection(f"{images}/laion.{ending}")
    assert info.value.field == "image_column" and "where, TEXT" in str(info.value)


# Tables


def table(n=6):
    """Each simple type, with a null in it; texts with all that CSV has to quote."""
    return pl.DataFrame(
        {
            "note": [f'a, "b"\n\n{i}' for i in range(n)],
            "n": [None, *range(1, n)],
            "x": [0.1, None, *(i / 3 for i in range(2, n))],
            "ok": [True, False, None, *[True] * (n - 3)],
            "image_path": [f"in/{i}.png" for i in range(n)],
            "text": ["", *(f"ü, {i}" for i in range(1, n))],
        }
    )


def write(frame, path):
    """By polars, and what is read of it by DuckDB."""
    if path.suffix == ".parquet":
        frame.write_parquet(path)
        return duckdb.sql(f"select * from '{path}'").fetchall()
    frame.write_csv(path, separator="\t" if path.suffix == ".tsv" else ",", quote_style="non_numeric")
    return duckdb.sql(f"select * from read_csv('{path}', nullstr='', allow_quoted_nulls=false)").fetchall()


KEEP = ["text", "n", "x", "ok", "note"]


@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.parquet"])
def test_columns_are_kept_with_their_types_and_nulls(name, images, pngs, rows):
    expected = {row[4]: row for row in write(table(), images / name)}
    collection = open_collection(f"{images}/{name}", keep=KEEP)
    assert (collection.kind, collection.image_column) == (LIST, "image_path")
    found = rows(images / name, keep=KEEP)
    assert [raw.data for raw in found] == pngs[:6]
    for raw in found:
        note, n, x, ok, _, text = expected[raw.image_id]
        assert raw.kept == {"text": text, "n": n, "x": x, "ok": ok, "note": note}
    by_type = {str(field.type).removeprefix("large_") for field in collection.kept}
    assert by_type == {"string", "int64", "double", "bool"}
    pa.Table.from_pylist([raw.kept for raw in found], pa.schema(collection.kept))


@pytest.mark.parametrize("name", ["list.csv", "list.parquet"])
def test_column_by_its_name_or_as_it_is_named(name, images, pngs, rows, refused):
    frame = table(3).rename({"image_path": "where"})
    write(frame, images / name)
    if name == "list.csv":
        assert "image_uri" in refused(images / name)
        assert "note, n, x, ok, where, text" in refused(images / name)
    assert "'nothing'" in refused(images / name, image_column="nothing", kind=LIST)
    assert [raw.data for raw in rows(images / name, image_column="where")] == pngs[:3]
    assert "'colour'" in refused(images / name, image_column="where", keep=["colour"])
    write(frame.with_columns(url=pl.lit("in/4.png")), images / name)
    assert [raw.data for raw in rows(images / name)] == pngs[4:5]
    assert [raw.kept for raw in rows(images / name, keep=["where", "url"])] == [
        {"where": "in/0.png", "url": "in/4.png"}
    ]


def test_names_of_digits_and_dates_in_csv_stay_texts(tmp_path, pngs, fill, rows):
    fill(tmp_path, {"0007": pngs[0], "2020-01-01": pngs[1], "true": pngs[2]})
    (tmp_path / "a.csv").write_text("file,day,none\n0007,2020-01-01,\n")
    (tmp_path / "b.csv").write_text("file,day,none\n2020-01-01,2020-01-02,\n")
    (tmp_path / "c.csv").write_text("\ufefffile,day,none\r\ntrue,12:30:00,\r\n\r\n")
    kept = ["day", "none"]
    assert [(raw.data, raw.kept["day"]) for raw in rows(tmp_path / "a.csv", keep=kept)] == [(pngs[0], "2020-01-01")]
    assert [(raw.data, raw.kept["day"]) for raw in rows(tmp_path / "b.csv", keep=kept)] == [(pngs[1], "2020-01-02")]
    assert [(raw.data, raw.kept["day"]) for raw in rows(tmp_path / "c.csv", keep=kept)] == [(pngs[2], "12:30:00")]


def test_rows_without_a_uri_are_no_images(images, rows):
    pq.write_table(pa.table({"uri": [None, "in/0.png", "", "  ", "in/1.png"]}), images / "list.parquet")
    assert [raw.image_id for raw in rows(images / "list.parquet")] == ["in/0.png", "in/1.png"]
    (images / "list.csv").write_text("n,uri\n1,in/0.png\n2,\n3,in/1.png\n")
    assert [raw.image_id for raw in rows(images / "list.csv")] == ["in/0.png", "in/1.png"]


def test_a_column_that_is_neither_number_nor_text_is_refused(images, refused):
    pq.write_table(pa.table({"uri": ["in/0.png"], "tags": [["a"]]}), images / "list.parquet")
    assert "'tags'" in refused(images / "list.parquet", keep=["tags"])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0\0", b"uri,n\nin/0.png\nin/1.png,2,3\n", b"uri\n\xff.png\n"])
def test_damaged_csv_is_refused_by_name(content, images, refused):
    (images / "list.csv").write_bytes(content)
    assert f"{images}/list.csv" in refused(images / "list.csv")


def test_value_that_is_of_another_type_far_down(images, rows):
    """Beyond what CSV readers look at to tell a type."""
    lines = [f"in/{i}.png,{i}" for i in range(2_000)]
    (images / "list.csv").write_text("uri,n\n" + "\n".join(lines * 100 + ["last.png,x"]))
    (field,) = open_collection(f"{images}/list.csv", keep=["n"]).kept
    assert field.type == pa.string()


def test_images_in_parquet_are_no_list(images, sample):
    both = pq.read_table(sample).slice(0, 2).append_column("url", pa.array(["in/0.png", "in/1.png"]))
    pq.write_table(both, images / "both.parquet")
    assert open_collection(f"{images}/both.parquet").kind == PARQUET
    assert open_collection(f"{images}/both.parquet", image_column="url").kind == LIST
    assert open_collection(f"{images}/in").kind == FILES


@settings(max_examples=50)
@given(
    names=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8), min_size=1),
    size=st.integers(1, 5),
)
def test_any_names_once_in_order(names, size, tmp_path_factory, shards, accounted):
    folder = tmp_path_factory.mktemp("lists")
    for path in (folder / "a.parquet", folder / "a.csv", folder / "a.tsv"):
        write(pl.DataFrame({"uri": names, "n": range(len(names))}), path)
        collection = open_collection(str(path), keep=["n"])
        found = accounted(collection, shards(collection, size))
        assert [raw.image_id for raw in found] == sorted({name.strip() for name in names} - {""})
        first = {name.strip(): n for n, name in reversed(list(enumerate(names)))}
        assert [raw.kept["n"] for raw in found] == [first[raw.image_id] for raw in found]
        assert len({shard.name for shard in shards(collection, size)}) == len(shards(collection, size))


# Over HTTP


@pytest.fixture(scope="session")
def web(tmp_path_factory):
    """A folder, and the URL at which `python -m http.server` shows it."""
    folder = tmp_path_factory.mktemp("web")
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        port = process.stdout.readline().split("port ")[1].split()[0]
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 30
        while time.monotonic() < until:
            with suppress(OSError):
                urllib.request.urlopen(url).close()
                break
        yield folder, url
        process.kill()


def test_images_of_a_web_server(web, images, pngs, fill, rows):
    site, url = web
    fill(site, {"a.png": pngs[1], "d/b c.png": pngs[2], "list.txt": b"a.png\nd/b c.png\nnone.png\n"})
    lines = [f"{url}/a.png", f"{url}/none.png", f"{url}/d/b%20c.png", "in/3.png", "https://[bad/x.png"]
    (images / "list.txt").write_text("\n".join(lines))
    found = {raw.image_id: (raw.data, raw.reason) for raw in rows(images / "list.txt", 3)}
    assert found == {
        f"{url}/a.png": (pngs[1], ""),
        f"{url}/none.png": (None, "missing"),
        f"{url}/d/b%20c.png": (pngs[2], ""),
        "in/3.png": (pngs[3], ""),
        "https://[bad/x.png": (None, "unreadable"),
    }
    assert [(raw.data, raw.reason) for raw in rows(f"{url}/list.txt")] == [
        (pngs[1], ""),
        (pngs[2], ""),
        (None, "missing"),
    ]


class Answers(http.server.BaseHTTPRequestHandler):
    """The status that is asked for, of 200 a picture; a page; or none. `down`: 503 to all."""

    picture, down, asked = b"", False, Counter()

    def do_GET(self):
        name = self.path[1:4]
        self.asked[name] += 1
        if name == "non":
            time.sleep(2)
            return
        status = 503 if type(self).down else 200 if name == "htm" else int(name)
        self.send_response(status)
        self.end_headers()
        if status == 200:
            self.wfile.write(b"<!DOCTYPE html><html>moved</html>" if name == "htm" else self.picture)

    do_HEAD = do_GET

    def log_message(self, *words):
        pass


@pytest.fixture
def answers(pngs, monkeypatch):
    """The URL of a server of Answers, which are waited for a little."""
    monkeypatch.setattr(files, "AGAIN", (0.01, 0.01))
    monkeypatch.setattr(folder, "WEB_WAITS", {"total": 5, "sock_connect": 0.5, "sock_read": 0.5})
    Answers.picture, Answers.down, Answers.asked = pngs[0], False, Counter()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def read_list(tmp_path, shards, accounted):
    def read_list(*lines, size=100):
        (tmp_path / "list.txt").write_text("\n".join(lines))
        collection = open_collection(f"{tmp_path}/list.txt")
        return {raw.image_id: raw for raw in accounted(collection, shards(collection, size))}

    return read_list


def test_what_a_web_server_refuses_is_a_reject_and_what_fails_is_an_outage(answers, read_list):
    for status, reason in [(403, "unreadable"), (404, "missing"), (410, "unreadable"), (451, "unreadable")]:
        (raw,) = read_list(f"{answers}/{status}.png").values()
        assert (raw.reason, raw.detail) == (reason, f"HTTP status {status}")
    for status in (429, 500, 503):
        with pytest.raises(StoreError, match=f"HTTP status {status}, and no other web server") as info:
            read_list(f"{answers}/{status}.png")
        assert info.value.outage
        assert Answers.asked[str(status)] == 3


def test_each_answer_of_a_server_is_said_of_its_image(answers, read_list, pngs):
    wanted = {"403": "HTTP status 403", "404": "HTTP status 404", "500": "HTTP status 500", "non": "timed out"}
    found = read_list(*(f"{answers}/{name}" for name in (*wanted, "200", "htm")))
    for name, words in wanted.items():
        raw = found[f"{answers}/{name}"]
        assert (raw.reason, raw.detail) == ("missing" if name == "404" else "unreadable", words)
    assert found[f"{answers}/200"].data == pngs[0]
    with pytest.raises(Rejected, match="HTML") as info:
        decode(found[f"{answers}/htm"].data, Preprocess(32))
    assert info.value.reason == "not_an_image"


def test_a_server_that_is_gone_costs_its_own_images_and_one_wait(answers, read_list, stores, monkeypatch, pngs):
    """One refuses connections, one answers to none, one is no server at all."""
    monkeypatch.setattr(files, "READS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        gone = [f"127.0.0.1:{stores.free_port()}", f"127.0.0.1:{silent.getsockname()[1]}", "no-such-host.invalid"]
        started = time.monotonic()
        found = read_list(f"{answers}/200", *(f"http://{server}/{i}.png" for server in gone for i in range(30)))
    assert time.monotonic() - started < 10
    assert found.pop(f"{answers}/200").data == pngs[0]
    assert len(found) == 90 and {raw.reason for raw in found.values()} == {"unreadable"}
    assert {raw.detail for raw in found.values() if gone[1] in raw.image_id} == {"timed out"}
    refused = {raw.detail for raw in found.values() if gone[0] in raw.image_id}
    assert len(refused) == 1 and re.search("connect", refused.pop(), re.IGNORECASE)


def test_where_every_server_fails_it_is_an_outage(read_list, stores, images, monkeypatch):
    urls = [f"http://127.0.0.1:{stores.free_port()}/{i}.png" for i in range(3)]
    with pytest.raises(StoreError, match="no other web server of the list answers") as info:
        read_list(*urls, "in/0.png")
    assert info.value.outage


def test_a_shard_whose_only_server_is_gone_ends_where_another_of_the_list_answers(answers, read_list, stores, pngs):
    gone = [f"http://127.0.0.1:{stores.free_port()}/{i}.png" for i in range(2)]
    found = read_list(*gone, f"{answers}/404", f"{answers}/200", size=2)
    assert [found[uri].reason for uri in gone] == ["unreadable", "unreadable"]
    assert found[f"{answers}/200"].data == pngs[0]
    Answers.down = True
    with pytest.raises(StoreError, match="no other web server of the list answers"):
        read_list(*gone, f"{answers}/200", size=2)


def test_a_server_that_stops_amid_a_shard_is_an_outage(answers, read_list, monkeypatch):
    """At first; the next try finds that it is gone."""
    monkeypatch.setattr(files, "READS", 1)
    Answers.down = False
    first = Answers.do_GET

    def then_down(self):
        first(self)
        Answers.down = True

    monkeypatch.setattr(Answers, "do_GET", then_down)
    with pytest.raises(StoreError, match="503, 5 times in a row"):
        read_list(*(f"{answers}/200?{i}" for i in range(20)))


def test_whatever_is_wrong_with_an_entry_is_said_of_it(read_list, images, pngs):
    (images / "no.zip").write_bytes(b"PK\3\4 and no more")
    odd = [
        "zip://a.png::" + f"{images}/no.zip",
        "zip://::",
        "tar://a::b",
        "reference://a::b",
        "simplecache::",
        "http://",
    ]
    odd += ["http://:80/", "http://h:port/a.png", "http:///a.png", "https://[::1", "s3://", "git://x", "a\0b.png", "::"]
    found = read_list("in/0.png", *odd)
    assert found.pop("in/0.png").data == pngs[0]
    assert sorted(found) == sorted(odd) and {raw.reason for raw in found.values()} <= {"unreadable", "missing"}


def test_two_colons_are_part_of_a_name(images, fill, rows, pngs, web):
    fill(images, {"in/std::vector.png": pngs[4]})
    subprocess.run([sys.executable, "-m", "zipfile", "-c", "x.zip", "in"], cwd=images, check=True)
    site, url = web
    fill(site, {"std::vector.png": pngs[5]})
    names = ["in/std::vector.png", f"{images}/in/std::vector.png", f"file://{images}/in/std::vector.png"]
    names += [f"zip://in/std::vector.png::{images}/x.zip"]
    (images / "list.txt").write_text("\n".join([*names, f"{url}/std::vector.png"]))
    assert read(rows(images / "list.txt")) == {**dict.fromkeys(names, pngs[4]), f"{url}/std::vector.png": pngs[5]}


def test_file_uris_are_percent_encoded_and_paths_are_not(images, fill, rows, pngs):
    fill(images, {"a b.png": pngs[0], "a%20b.png": pngs[1], "50%.png": pngs[2], "ü.png": pngs[3]})
    encoded = [(images / name).as_uri() for name in ("a b.png", "a%20b.png", "50%.png", "ü.png")]
    plain = ["a b.png", "a%20b.png", "50%.png", "ü.png"]
    (images / "list.txt").write_text("\n".join([*encoded, *plain]))
    found = read(rows(images / "list.txt"))
    for names in (encoded, plain):
        assert [found[name] for name in names] == pngs[:4]


def test_references_in_a_list_on_the_web(web, fill, rows, pngs):
    site, url = web
    lines = ["e.png", "../top.png", "/top.png", f"//{url.removeprefix('http://')}/d/e.png", "f%20g.png", "x::y.png"]
    fill(site, {"top.png": pngs[0], "d/e.png": pngs[1], "d/f g.png": pngs[2], "d/x::y.png": pngs[3]})
    fill(site, {"d/list.txt": "\n".join(lines).encode()})
    found = read(rows(f"{url}/d/list.txt"))
    assert [found[line] for line in lines] == [pngs[1], pngs[0], pngs[0], pngs[1], pngs[2], pngs[3]]


def test_outage_of_a_disk_is_no_entrys_reject(images, read_list, monkeypatch):
    def fails(self, path, *_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)

    monkeypatch.setattr(LocalFileSystem, "cat_file", fails)
    with pytest.raises(OSError, match="Stale"):
        read_list("in/0.png")


# Plans


def test_grown_list_adds_what_is_new_and_a_changed_value_is_a_change(images, pngs, accounted):
    def listing(*lines):
        (images / "list.csv").write_text("\n".join(["uri,n,t", *lines]))

    listing("in/0.png,0,a", "in/3.png,3,")
    collection, run = open_collection(f"{images}/list.csv", keep=["n", "t"]), Folder(f"{images}/run")
    assert write_plan(run, collection, 10).images == 2
    planned = list(read_plan(run))
    assert [json.loads(piece.kept) for shard in planned for piece in shard.pieces] == [
        {"n": 0, "t": "a"},
        {"n": 3, "t": ""},
    ]
    for shard in planned:
        for raw in read_raw(collection, shard):
            (again,) = read_raw(collection, _only(shard, raw.image_id))
            assert again == raw
    listing("in/1.png,1,x", "in/3.png,3,", "in/0.png,0,a", "in/3.png,3,")
    totals, changes = extend_plan(run, collection, 10)
    assert (totals.images, changes.added, changes.changed, changes.removed) == (3, 1, 0, 0)
    assert list(read_plan(run))[:1] == planned
    listing("in/1.png,1,x", "in/0.png,7,a")
    totals, changes = extend_plan(run, collection, 10)
    assert (totals.images, changes.added, changes.changed, changes.removed) == (3, 0, 1, 1)
    assert sorted(changes.names) == ["in/0.png", "in/3.png"]
    found = accounted(collection, list(read_plan(run)))
    assert [(raw.image_id, raw.data, raw.kept["n"]) for raw in found] == [
        ("in/0.png", pngs[0], 0),
        ("in/3.png", pngs[3], 3),
        ("in/1.png", pngs[1], 1),
    ]


@pytest.mark.parametrize("name", ["list.csv", "list.parquet"])
def test_column_that_has_another_type_now_is_refused(name, images):
    def listing(values):
        write(pl.DataFrame({"uri": ["in/0.png"], "n": values}), images / name)

    listing([1])
    collection, run = open_collection(f"{images}/{name}", keep=["n"]), Folder(f"{images}/run")
    write_plan(run, collection, 10)
    listing(["one"])
    with pytest.raises(SourceError, match=name):
        extend_plan(run, collection, 10)
    write(pl.DataFrame({"uri": ["in/0.png"]}), images / name)
    with pytest.raises(SourceError, match=name):
        extend_plan(run, collection, 10)


def test_a_kept_value_names_the_shard(images, shards):
    for value in ("1", "2", "1"):
        (images / f"{value}.csv").write_text(f"uri,n\nin/0.png,{value}\n")
    first, second = (shards(open_collection(f"{images}/{n}.csv", keep=["n"]))[0] for n in "12")
    assert first.name != second.name
    assert first.name == shards(open_collection(f"{images}/1.csv", keep=["n"]))[0].name


def test_long_list_is_read_in_bounded_memory(tmp_path):
    """300,000 URIs, which would take 74 MB: neither the list nor its pieces are held. The short list has everything
    imported before memory is measured."""
    uris = (f"s3://bucket/some/folder/that/is/deep/{i * 7919 % 1_000_003:09d}.jpeg\n" for i in range(300_000))
    (tmp_path / "short.txt").write_text(next(uris))
    with open(tmp_path / "long.txt", "w") as f:
        f.writelines(uris)
    script = """
import resource, sys
from palindrome.pipeline.images.sources import list_pieces, open_collection, listing
listing.IN_MEMORY = 15_000
def count(path):
    return sum(1 for piece in list_pieces(open_collection(path), 10))
count(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(count(sys.argv[2]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, f"{tmp_path}/short.txt", f"{tmp_path}/long.txt"],
        capture_output=True,
        text=True,
        check=True,
        cwd=os.getcwd(),
    )
    count, kilobytes = done.stdout.split()
    assert (int(count), int(kilobytes) < 55_000) == (299_999, True), kilobytes


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream], ids=["file", "stream"])
def test_every_batch_of_a_list_in_arrow_s_formats(tmp_path, new):
    """Whether there are rows is asked first: of a stream, that must not use up a batch."""
    table = pa.table({"uri": [f"{i}.png" for i in range(6)]})
    with new(str(tmp_path / "list.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    collection = open_collection(str(tmp_path / "list.arrow"))
    assert collection.kind == LIST
    assert [piece.name for piece in list_pieces(collection, 10)] == table["uri"].to_pylist()
