"""Objects put whole or not at all, on a disk, in memory and on S3, also when the writer is killed."""

import ctypes
import mmap
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import time
import uuid
from pathlib import Path

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from palindrome.pipeline.storage.folder import GROUP_BYTES, TEMPORARY, Folder, absolute, open_fs, using

ROOT = Path(__file__).parents[3]
TABLE = pa.table({"id": ["a", "b", "c"], "n": [1, 2, 3], "bytes": [b"x", None, b""]})


@pytest.fixture(params=["disk", "memory", "moto", "rclone"])
def folder(request, tmp_path):
    if request.param in ("moto", "rclone"):
        store = request.getfixturevalue(request.param)
        with using(store.options):
            yield Folder(f"{store.bucket()}/run")
    else:
        yield Folder(str(tmp_path / "run") if request.param == "disk" else f"memory://{uuid.uuid4().hex}/run")


def test_put_is_read_back_by_fsspec_alone(folder):
    folder.put("plan/deep/a.bin", b"\0\1\2")
    fs, root = open_fs(folder.uri, folder.storage_options)
    assert fs.cat_file(f"{root}/plan/deep/a.bin") == b"\0\1\2"
    assert folder.read("plan/deep/a.bin") == b"\0\1\2"
    assert folder.exists("plan/deep/a.bin")
    assert not folder.exists("plan/deep/b.bin")


@pytest.mark.parametrize("content", [b"", b"x", os.urandom(3_000_000)])
def test_any_length_round_trips(folder, content):
    folder.put("a", content)
    assert folder.read("a") == content
    assert folder.files("") == {"a": len(content)}


def test_put_takes_arrow_buffers(folder):
    folder.put("a", pa.py_buffer(b"abc"))
    assert folder.read("a") == b"abc"


def test_put_overwrites_with_longer_and_shorter(folder):
    for content in (b"middle", b"much longer than that", b"s"):
        folder.put("a", content)
        assert folder.read("a") == content
    assert folder.files("") == {"a": 1}


def test_missing_object_is_file_not_found(folder):
    for read in (folder.read, folder.read_parquet, folder.parquet_file):
        with pytest.raises(FileNotFoundError):
            read("latents/none.parquet")


def test_files_are_those_right_below_by_name(folder):
    for name in ("b", "a", "c/d", "c/e/f"):
        folder.put(f"plan/{name}", name.encode())
    assert list(folder.files("plan").items()) == [("a", 1), ("b", 1)]
    assert folder.files("plan/c") == {"d": 3}
    assert folder.files("none") == {}


def test_files_sees_what_another_writer_put_since(folder):
    assert folder.files("plan") == {}
    folder.put("plan/a", b"1")
    assert folder.files("plan") == {"a": 1}
    Folder(folder.uri).put("plan/b", b"22")
    assert folder.files("plan") == {"a": 1, "b": 2}


def test_parquet_is_read_by_pyarrow_duckdb_and_polars(tmp_path):
    size = Folder(str(tmp_path)).put_parquet("t/a.parquet", TABLE)
    path = tmp_path / "t" / "a.parquet"
    assert path.stat().st_size == size
    assert pq.read_table(path).equals(TABLE)
    assert polars.read_parquet(path).rows() == [tuple(row.values()) for row in TABLE.to_pylist()]
    assert duckdb.sql(f"select id, n from '{path}' order by n").fetchall() == [("a", 1), ("b", 2), ("c", 3)]


def test_parquet_by_columns_and_by_ranges(folder):
    folder.put_parquet("a.parquet", TABLE, row_group_size=1)
    assert folder.read_parquet("a.parquet").equals(TABLE)
    assert folder.read_parquet("a.parquet", ["n"]).to_pydict() == {"n": [1, 2, 3]}
    with folder.parquet_file("a.parquet") as file:
        assert file.metadata.num_row_groups == 3
        assert file.read_row_group(1).to_pylist() == TABLE.to_pylist()[1:2]


def test_parquet_is_zstd_unless_asked_otherwise(folder):
    folder.put_parquet("a.parquet", TABLE)
    folder.put_parquet("b.parquet", TABLE, compression="none")
    found = [folder.parquet_file(name).metadata.row_group(0).column(0).compression for name in folder.files("")]
    assert found == ["ZSTD", "UNCOMPRESSED"]


def test_temporary_files_are_not_listed(tmp_path):
    (tmp_path / f"{TEMPORARY}123-a.parquet").write_bytes(b"half")
    Folder(str(tmp_path)).put("b", b"whole")
    assert Folder(str(tmp_path)).files("") == {"b": 5}


def test_put_leaves_nothing_else_behind(tmp_path):
    folder = Folder(str(tmp_path))
    folder.put("a", b"1")
    folder.put("a", b"2")
    assert os.listdir(tmp_path) == ["a"]


def resident(path):
    """The part of a file that is in the page cache."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(view)
        where, size = ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(view))
        assert ctypes.CDLL(None).mincore(where, size, pages) == 0
        del start
    return sum(page & 1 for page in pages) / len(pages)


def test_large_files_leave_the_page_cache_and_small_ones_stay(tmp_path):
    large, small = os.urandom(GROUP_BYTES), os.urandom(1 << 20)
    with open(tmp_path / "tried", "wb") as file:
        file.write(large)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(tmp_path / "tried"):
        pytest.skip("this file system is in memory")
    folder = Folder(str(tmp_path))
    folder.put("large", large)
    folder.put("small", small)
    assert resident(tmp_path / "large") < 0.01
    assert resident(tmp_path / "small") == 1
    assert folder.read("large") == large and folder.read("small") == small


def test_failed_put_leaves_what_was_there(tmp_path):
    folder = Folder(str(tmp_path))
    folder.put("a", b"before")
    with pytest.raises(TypeError):
        folder.put("a", "text, not bytes")
    assert os.listdir(tmp_path) == ["a"]
    assert folder.read("a") == b"before"


def test_full_disk_leaves_what_was_there(tmp_path):
    """A limit on the size of files stands for the disk: the write stops in the middle with an OSError."""
    script = """
import errno, resource, signal, sys
from palindrome.pipeline.storage.folder import Folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Folder(sys.argv[1])
folder.put("a", b"before")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    folder.put("a", bytes(200_000))
except OSError as e:
    print(errno.errorcode[e.errno])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "EFBIG"
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"before"


def test_files_have_the_modes_that_the_umask_gives(tmp_path):
    Folder(str(tmp_path)).put("a", b"1")
    (tmp_path / "plain").write_bytes(b"1")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


WRITER = """
import sys
from palindrome.pipeline.storage.folder import Folder
folder, size, i = Folder(sys.argv[1]), int(sys.argv[2]), 0
while True:
    folder.put("latents/a.bin", bytes([65 + i % 26]) * size)
    i += 1
"""


def test_killed_writer_leaves_a_whole_file_or_none(tmp_path):
    """SIGKILL at any moment of a loop of puts, and reads meanwhile: always one whole version under the name."""
    size, clock = 12_000_000, random.Random(5)
    folder, final, interrupted, versions = Folder(str(tmp_path)), tmp_path / "latents" / "a.bin", 0, set()

    def assert_whole():
        content = final.read_bytes()
        assert len(content) == size
        assert content == content[:1] * size
        versions.add(content[:1])

    for _ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(size)], cwd=ROOT)
        try:
            before = final.stat().st_ino if final.exists() else None
            deadline = time.monotonic() + 30
            while not final.exists() or final.stat().st_ino == before:
                assert writer.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.002)
            for _ in range(3):
                assert_whole()
            time.sleep(clock.random() * 0.05)
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        assert_whole()
        left = [name for name in os.listdir(final.parent) if name != "a.bin"]
        assert all(name.startswith(TEMPORARY) for name in left)
        interrupted = len(left)
        assert folder.files("latents") == {"a.bin": size}
    assert interrupted  # at least one of them died in the middle of a write
    assert len(versions) > 1
    folder.put("latents/a.bin", b"after")
    assert folder.read("latents/a.bin") == b"after"


def test_two_writers_of_one_name_leave_one_whole_file(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(n)], cwd=ROOT) for n in (1000, 2000)]
    final, lengths = tmp_path / "latents" / "a.bin", set()
    try:
        deadline = time.monotonic() + 30
        while lengths != {1000, 2000}:
            assert time.monotonic() < deadline
            assert all(writer.poll() is None for writer in writers)
            if final.exists():
                content = final.read_bytes()
                assert content == content[:1] * len(content)
                lengths.add(len(content))
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert lengths == {1000, 2000}


def test_absolute_keeps_uris_and_resolves_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert absolute("s3://bucket/a b") == "s3://bucket/a b"
    assert absolute("zip://a.png::x.zip") == "zip://a.png::x.zip"
    assert absolute("runs/../a") == str(tmp_path / "a")
    assert absolute("~/runs") == "/home/somebody/runs"


def test_trailing_slash_names_the_same_folder(folder):
    folder.put("a", b"1")
    assert Folder(folder.uri + "/").read("a") == b"1"
    assert Folder(folder.uri + "/").files("") == {"a": 1}


def test_folder_goes_to_another_process_and_hides_its_options(tmp_path):
    folder = Folder(str(tmp_path), {"file": {"auto_mkdir": True}})
    folder.put("a", b"1")
    copy = pickle.loads(pickle.dumps(folder))
    assert copy == folder
    assert copy.read("a") == b"1"
    assert isinstance(copy.fs, LocalFileSystem)
    assert copy.fs.auto_mkdir
    assert "auto_mkdir" not in repr(folder)
