"""Image files in folders, by globs, on several filesystems: references, and the bytes behind each exactly once."""

import errno
import os
import re
import subprocess
import sys
import threading
import time
import uuid
import zipfile
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem

from palindrome.pipeline.base.errors import StoreError
from palindrome.pipeline.images.sources import FILES, LIST, PARQUET, WEBDATASET, files, open_collection, read_raw
from palindrome.pipeline.storage.folder import is_outage

ROOT = Path(__file__).parents[4]


def test_folder_tree_gives_relative_paths_in_order(tmp_path, pngs, rows, fill):
    contents = {"b/y.png": pngs[1], "a.png": pngs[0], "b/c/z.png": pngs[2], "b.png": pngs[3]}
    fill(tmp_path, contents)
    found = rows(tmp_path)
    assert [raw.image_id for raw in found] == ["a.png", "b.png", "b/c/z.png", "b/y.png"]
    assert {raw.image_id: raw.data for raw in found} == contents
    assert open_collection(str(tmp_path)).kind == FILES


def test_source_is_a_uri_that_fsspec_opens(tmp_path, pngs, rows, fill):
    fill(tmp_path, {"a b.png": pngs[0], "c/d%20#e.png": pngs[1]})
    for raw in rows(tmp_path):
        with fsspec.open(raw.source, "rb") as f:
            assert f.read() == raw.data


def test_hidden_files_and_folders_are_left_out(tmp_path, pngs, names, fill):
    fill(tmp_path, dict.fromkeys([".DS_Store", ".git/a.png", "b/.hidden/c.png", "b/.d.png", "b/e.png"], pngs[0]))
    assert names(tmp_path) == ["b/e.png"]


def test_folder_below_a_hidden_one_can_be_named(tmp_path, pngs, names, fill):
    fill(tmp_path, {".cache/a.png": pngs[0]})
    assert names(tmp_path / ".cache") == ["a.png"]


def test_glob_of_one_level_and_of_all(tmp_path, pngs, names, fill):
    fill(tmp_path, dict.fromkeys(["a.png", "b.jpg", "c/d.png", "c/e/f.png"], pngs[0]))
    assert names(f"{tmp_path}/*.png") == ["a.png"]
    assert names(f"{tmp_path}/**/*.png") == ["a.png", "c/d.png", "c/e/f.png"]
    assert names(f"{tmp_path}/c/*") == ["d.png"]


def test_single_file(tmp_path, pngs, rows, fill):
    fill(tmp_path, {"a/b.png": pngs[0], "a/c.png": pngs[1]})
    (found,) = rows(tmp_path / "a/b.png")
    assert (found.image_id, found.data) == ("b.png", pngs[0])


def test_ids_do_not_depend_on_where_the_folder_lies(tmp_path, pngs, names, fill):
    for place in ("here", "there/deeper"):
        fill(tmp_path / place, {"a.png": pngs[0], "b/c.png": pngs[1]})
    assert names(tmp_path / "here") == names(f"{tmp_path}/there/deeper/") == ["a.png", "b/c.png"]


def test_relative_and_file_uris(tmp_path, pngs, monkeypatch, names, fill):
    fill(tmp_path, {"in/a.png": pngs[0]})
    monkeypatch.chdir(tmp_path)
    assert names("in") == names(f"file://{tmp_path}/in") == ["a.png"]


def test_memory_filesystem(pngs, rows, names):
    root = f"memory://{uuid.uuid4().hex}"
    fs = fsspec.filesystem("memory")
    for name, content in {"a.png": pngs[0], "b/c.png": pngs[1], "b/.d.png": pngs[2]}.items():
        fs.pipe_file(f"{root.removeprefix('memory:/')}/{name}", content)
    assert [(raw.image_id, raw.data) for raw in rows(root)] == [("a.png", pngs[0]), ("b/c.png", pngs[1])]
    assert names(f"{root}/*.png") == ["a.png"]


def test_files_inside_a_zip(tmp_path, pngs, rows):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("in/a.png", pngs[0])
        archive.writestr("in/b.png", pngs[1])
    found = rows(f"zip://in::{tmp_path}/x.zip")
    assert [(raw.image_id, raw.data) for raw in found] == [("a.png", pngs[0]), ("b.png", pngs[1])]


def test_odd_names_are_read(tmp_path, pngs, rows, fill):
    odd = ["a::b.png", "c#d?e.png", "f%20g.png", "[h].png", "i\nj.png", "k*.png", "ü 漢字.png", "'\"\\.png", "~.png"]
    fill(tmp_path, {name: pngs[i] for i, name in enumerate(odd)})
    assert {raw.image_id: raw.data for raw in rows(tmp_path)} == {name: pngs[i] for i, name in enumerate(odd)}


def test_existing_folder_with_brackets_is_no_glob(tmp_path, pngs, names, fill):
    fill(tmp_path, {"set [2020]/a*.png": pngs[0], "set [2020]/ab.png": pngs[1]})
    assert names(tmp_path / "set [2020]") == ["a*.png", "ab.png"]
    assert names(tmp_path / "set [2020]" / "a*.png") == ["a*.png"]


def test_name_that_is_no_utf_8_is_read_and_fits_arrow(tmp_path, pngs, rows):
    folder = os.fsencode(tmp_path)
    for name, content in {b"\xe9t\xe9.png": pngs[0], b"ok.png": pngs[1]}.items():
        with open(folder + b"/" + name, "wb") as f:
            f.write(content)
    found = rows(tmp_path)
    assert {raw.image_id: raw.data for raw in found} == {"\\udce9t\\udce9.png": pngs[0], "ok.png": pngs[1]}
    assert pa.array([raw.source for raw in found], pa.string()).to_pylist() == [raw.source for raw in found]


def test_symlinks_to_files_are_read_and_dangling_ones_are_missing(tmp_path, pngs, rows, fill):
    fill(tmp_path, {"in/a.png": pngs[0], "elsewhere/b.png": pngs[1]})
    (tmp_path / "in" / "b.png").symlink_to("../elsewhere/b.png")
    (tmp_path / "in" / "c.png").symlink_to("nowhere.png")
    found = {raw.image_id: (raw.data, raw.reason) for raw in rows(tmp_path / "in")}
    assert found == {"a.png": (pngs[0], ""), "b.png": (pngs[1], ""), "c.png": (None, "missing")}


def test_symlink_loops_end(tmp_path, pngs, rows, fill):
    fill(tmp_path, {"a.png": pngs[0], "s/b.png": pngs[1]})
    (tmp_path / "s" / "up").symlink_to("..")
    (tmp_path / "here").symlink_to(".")
    (tmp_path / "self").symlink_to("self")
    found = {raw.image_id: raw for raw in rows(tmp_path)}
    assert {name for name, raw in found.items() if raw.data} == {"a.png", "s/b.png"}
    assert {raw.reason for raw in found.values() if raw.data is None} == {"unreadable"}


def test_pipe_is_unreadable_and_hangs_nobody(tmp_path, pngs, rows, fill):
    fill(tmp_path, {"a.png": pngs[0]})
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "to-pipe.png").symlink_to("pipe.png")
    found = []
    reader = threading.Thread(target=lambda: found.extend(rows(tmp_path)), daemon=True)
    reader.start()
    reader.join(20)
    assert [(raw.image_id, raw.reason) for raw in found] == [
        ("a.png", ""),
        ("pipe.png", "unreadable"),
        ("to-pipe.png", "unreadable"),
    ]


def test_listing_reads_no_picture(tmp_path):
    """2 GB of sparse files are listed with their sizes."""
    for i in range(4):
        with open(tmp_path / f"{i}.png", "wb") as f:
            f.truncate(500_000_000)
    script = """
import resource, sys
from palindrome.pipeline.images.sources import list_pieces, open_collection
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(*(piece.size for piece in list_pieces(open_collection(sys.argv[1]), 10)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    sizes, kilobytes = done.stdout.splitlines()
    assert sizes.split() == ["500000000"] * 4
    assert int(kilobytes) < 100_000


def test_file_removed_since_the_plan_is_missing(tmp_path, pngs, shards, accounted, fill):
    fill(tmp_path, {"a.png": pngs[0], "b.png": pngs[1], "c/d.png": pngs[2]})
    collection = open_collection(str(tmp_path))
    planned = shards(collection)
    (tmp_path / "b.png").unlink()
    (tmp_path / "c" / "d.png").unlink()
    (tmp_path / "c").rmdir()
    found = accounted(collection, planned)
    assert [(raw.image_id, raw.reason) for raw in found] == [
        ("a.png", ""),
        ("b.png", "missing"),
        ("c/d.png", "missing"),
    ]


def test_file_that_became_a_folder_is_unreadable(tmp_path, pngs, shards, accounted, fill):
    fill(tmp_path, {"a.png": pngs[0]})
    collection = open_collection(str(tmp_path))
    planned = shards(collection)
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.png").mkdir()
    (found,) = accounted(collection, planned)
    assert (found.reason, found.detail) == ("unreadable", "Is a directory")


@pytest.mark.parametrize("uri", ["{}/none", "{}/none/*.png", "{}/file.txt/below", "{}/empty", "{}/empty/*"])
def test_nothing_there_is_refused_by_name(uri, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("no folder")
    uri = uri.format(tmp_path)
    assert uri in refused(uri)


@pytest.mark.parametrize("uri", ["nosuch://bucket/a", "memory://nothing-here", "nosuch://a::memory://b"])
def test_wrong_uri_is_refused_by_name(uri, refused):
    assert uri in refused(uri)


OUTAGES = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.EAGAIN, errno.EMFILE, errno.ENFILE)
OF_THE_FILE = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)


@pytest.mark.parametrize("kind", [FILES, WEBDATASET, PARQUET])
def test_outage_of_a_disk_is_nobodys_reject(kind, tmp_path, pngs, tar_of, shards, accounted, fill, monkeypatch):
    """As of NFS: the file is sound, and its server away, or this process has no handle left."""
    if kind == FILES:
        fill(tmp_path, {"a.png": pngs[0]})
    elif kind == WEBDATASET:
        fill(tmp_path, {"a.tar": tar_of([("a.png", pngs[0])])})
    else:
        pq.write_table(pa.table({"img": pa.array(pngs[:1], pa.binary())}), tmp_path / "a.parquet")
    collection = open_collection(str(tmp_path))
    assert collection.kind == kind
    planned, opened = shards(collection), LocalFileOpener._open
    for number in (*OUTAGES, errno.ENOMEM, *OF_THE_FILE):

        def fails(self, number=number):
            if not self.path.startswith(str(tmp_path)):
                return opened(self)
            raise OSError(number, os.strerror(number), self.path)

        with monkeypatch.context() as patched:
            patched.setattr(LocalFileOpener, "_open", fails)
            if number in OF_THE_FILE:
                assert {raw.reason for raw in accounted(collection, planned)} == {"unreadable"}
                continue
            with pytest.raises(OSError, match=re.escape(os.strerror(number))) as info:
                accounted(collection, planned)
            assert info.value.errno == number
    assert [raw.data for raw in accounted(collection, planned)] == pngs[:1]


def test_memory_that_is_short_is_nobodys_reject(tmp_path, pngs, shards, accounted, fill, monkeypatch):
    fill(tmp_path, {"a.png": pngs[0]})
    collection = open_collection(str(tmp_path))
    planned = shards(collection)

    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(LocalFileSystem, "cat_file", fails)
    with pytest.raises(MemoryError):
        accounted(collection, planned)


def test_ids_are_the_same_whatever_the_locale(tmp_path, pngs):
    folder = os.fsencode(tmp_path)
    for name, content in {"ü 漢.png".encode(): pngs[0], b"\xe9.png": pngs[1]}.items():
        with open(folder + b"/" + name, "wb") as f:
            f.write(content)
    script = """
import sys
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.images.sources import list_pieces, open_collection, read_raw
collection = open_collection(sys.argv[1])
shard = Shard.of(collection.kind, list(list_pieces(collection, 10)))
print(*(f"{ascii(raw.image_id)} {len(raw.data or b'')}" for raw in read_raw(collection, shard)), shard.name, sep="|")
print(sys.getfilesystemencoding())
"""
    said = {}
    for utf8 in "01":
        env = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": utf8}
        command = [sys.executable, "-c", script, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        found, encoding = done.stdout.splitlines()
        said[encoding] = found
    assert len(said) == 2 and said["utf-8"].split("|")[:2] == [
        rf"'\\udce9.png' {len(pngs[1])}",
        rf"'\xfc \u6f22.png' {len(pngs[0])}",
    ]
    assert len(set(said.values())) == 1


def test_files_have_no_columns(tmp_path, pngs, fill, refused):
    fill(tmp_path, {"a.png": pngs[0]})
    assert "'label'" in refused(tmp_path, keep=["label"])
    assert "'img'" in refused(tmp_path, image_column="img")


# On S3


@pytest.fixture
def bucket(moto, pngs):
    """With `in/000.png` .. `in/099.png`."""
    uri, fs = moto.bucket(), moto.fs
    fs.pipe({f"{uri}/in/{i:03d}.png": pngs[i] for i in range(100)})
    return uri


@pytest.mark.parametrize("key", ["in", "in/", "in/deep/"])
def test_empty_object_with_the_folders_name_is_not_the_collection(key, bucket, moto, pngs, rows):
    bucket_name, client = bucket.removeprefix("s3://"), moto.fs
    client.call_s3("put_object", Bucket=bucket_name, Key=key, Body=b"")
    found = rows(f"{bucket}/in", storage_options=moto.options)
    assert [raw.data for raw in found] == pngs[:100]


def test_empty_object_with_nothing_below_is_a_file(bucket, moto, rows):
    moto.fs.call_s3("put_object", Bucket=bucket.removeprefix("s3://"), Key="alone.png", Body=b"")
    assert [raw.data for raw in rows(f"{bucket}/alone.png", storage_options=moto.options)] == [b""]


def test_many_are_read_at_once_in_order_and_few_ahead(bucket, moto, stores, pngs, shards, monkeypatch):
    with stores.Proxy(moto.endpoint) as proxy:
        collection = open_collection(f"{bucket}/in", storage_options=moto.through(proxy).options)
        (shard,) = shards(collection, 100)
        for ahead, most in [(files.AHEAD_BYTES, 2 * files.READS), (20_000, 20)]:
            monkeypatch.setattr(files, "AHEAD_BYTES", ahead)
            proxy.requests.clear()
            found = read_raw(collection, shard)
            assert next(found).data == pngs[0]
            time.sleep(0.5)
            assert 5 < len(proxy.requests) <= most + 1
            assert [raw.data for raw in found] == pngs[1:100]
            assert len(proxy.requests) == 100  # and none for a size first


def test_what_is_wrong_with_one_object_is_said_of_it(bucket, moto, stores, pngs, shards, accounted):
    with stores.Proxy(moto.endpoint, faults=["archived"]) as proxy:
        collection = open_collection(f"{bucket}/in", storage_options=moto.through(proxy).options)
        planned = shards(collection, 20)
        moto.fs.rm_file(f"{bucket}/in/007.png")
        found = {raw.image_id: raw for raw in accounted(collection, planned)}
        assert (found.pop("007.png").reason, len(found)) == ("missing", 99)
        assert all(raw.data == pngs[int(name[:3])] for name, raw in found.items())
        proxy.rate = 0.3
        found = accounted(collection, planned[1:2])
        assert {raw.reason for raw in found} == {"", "unreadable"}
        assert all("archived" in raw.detail for raw in found if raw.data is None)
        assert all(raw.data == pngs[20 + i] for i, raw in enumerate(found) if raw.data is not None)


@pytest.mark.parametrize("fault", ["503", "reset", "expired"])
def test_a_store_out_of_order_is_nobodys_reject(fault, bucket, moto, stores, shards, accounted):
    with stores.Proxy(moto.endpoint, faults=[fault]) as proxy:
        options = {"s3": {**moto.through(proxy).options["s3"], "config_kwargs": {"retries": {"total_max_attempts": 1}}}}
        collection = open_collection(f"{bucket}/in", storage_options=options)
        planned = shards(collection, 10)
        proxy.rate = 1
        with pytest.raises(StoreError) as info:
            accounted(collection, planned)
        assert info.value.outage and bucket in str(info.value)


def test_faults_that_pass_are_waited_out(bucket, moto, stores, pngs, shards, accounted):
    with stores.Proxy(moto.endpoint, rate=0.2, faults=["500", "503", "reset", "lost", "slow", "truncated"]) as proxy:
        patient = {
            "s3": {**moto.through(proxy).options["s3"], "config_kwargs": {"retries": {"total_max_attempts": 12}}}
        }
        collection = open_collection(f"{bucket}/in", storage_options=patient)
        assert [raw.data for raw in accounted(collection, shards(collection, 30))] == pngs[:100]
        assert proxy.counts.total() - proxy.counts["none"] > 5


@pytest.mark.parametrize("kind", [FILES, WEBDATASET, PARQUET, LIST])
def test_each_kind_of_collection_there(kind, bucket, moto, stores, pngs, tar_of, shards, accounted, tmp_path):
    """The same bytes, also where the store fails now and then; and an outage is no reject."""
    fs, uri = moto.fs, f"{bucket}/in"
    if kind == WEBDATASET:
        uri = f"{bucket}/{{0..1}}.tar"
        for k in range(2):
            fs.pipe_file(f"{bucket}/{k}.tar", tar_of([(f"{i}.png", pngs[i]) for i in range(50 * k, 50 * k + 50)]))
    if kind == PARQUET:
        uri = f"{bucket}/tables"
        pq.write_table(pa.table({"img": pa.array(pngs[:100], pa.binary())}), tmp_path / "a.parquet", row_group_size=30)
        fs.put_file(f"{tmp_path}/a.parquet", f"{uri}/a.parquet")
    if kind == LIST:
        uri = f"{bucket}/list.csv"
        rows = [f"{bucket}/in/{i:03d}.png" if i >= 50 else f"in/{i:03d}.png" for i in range(100)]
        fs.pipe_file(uri, "\n".join(["uri", *rows]).encode())
    with stores.Proxy(moto.endpoint, rate=0.05, faults=["503", "reset", "truncated", "slow"]) as proxy:
        options = moto.through(proxy).options
        collection = open_collection(uri, storage_options=options)
        assert collection.kind == kind
        planned = shards(collection, 20)
        assert [raw.data for raw in accounted(collection, planned)] == pngs[:100]
        proxy.rate, proxy.faults = 1, ["500"]
        once = {"s3": {**options["s3"], "config_kwargs": {"retries": {"total_max_attempts": 1}}}}
        with pytest.raises(OSError) as info:
            accounted(replace(collection, storage_options=once), planned)
        assert is_outage(info.value, fs)
