"""ZIP archives as collections, written by zipfile."""

import zipfile
from dataclasses import replace

import pytest

from palindrome.pipeline.images.sources import FILES, LIST, PARQUET, WEBDATASET, open_collection
from palindrome.pipeline.storage.folder import open_fs


def pack(path, contents, how=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("name", ["x.zip", "X.ZIP"])
def test_pictures_in_an_archive_are_read_as_in_a_folder(name, how, tmp_path, pngs, fill, rows, names):
    """As macOS packs them, too."""
    contents = {"in/b.png": pngs[0], "in/a ü.JPG": pngs[1], "c.png": pngs[2], "note.txt": b"x"}
    fill(tmp_path / "in", contents)
    left = {"__MACOSX/in/._b.png": b"x", "__MACOSX/c.png": b"x", "in/.DS_Store": b"x", "in/": b""}
    pack(tmp_path / name, contents | left, how)
    assert open_collection(str(tmp_path / name)).kind == FILES
    assert {raw.image_id: raw.data for raw in rows(tmp_path / name, 2)} == contents
    assert names(tmp_path / name) == names(tmp_path / "in")
    assert names(tmp_path / name, extensions=["jpg"]) == ["in/a ü.JPG"]


def test_threads_that_read_a_large_archive_at_once_find_every_file(tmp_path, shards, accounted):
    """Its names take a while to read, and a worker has not listed it."""
    pack(tmp_path / "x.zip", {f"{i:05d}.png": b"%d" % i for i in range(20_000)}, zipfile.ZIP_STORED)
    collection = open_collection(str(tmp_path / "x.zip"))
    planned = shards(collection, 20_000)[0]
    ends = replace(planned, pieces=planned.pieces[-64:], images=64)
    for _ in range(5):
        open_fs(collection.uri, {})[0].clear_instance_cache()
        assert all(raw.data for raw in accounted(collection, [ends]))


def test_other_kinds_in_an_archive(tmp_path, pngs, sample, tar_of, fill, rows):
    fill(tmp_path, {"0.png": pngs[0]})
    for kind, contents, count in [
        (PARQUET, {"data/a.parquet": sample.read_bytes(), "README.md": b"x"}, 256),
        (WEBDATASET, {"a.tar": tar_of([("0.png", pngs[0])])}, 1),
        (LIST, {"a.csv": f"url\n{tmp_path}/0.png\n".encode()}, 1),
    ]:
        pack(tmp_path / "x.zip", contents)
        found = rows(tmp_path / "x.zip")
        assert (open_collection(str(tmp_path / "x.zip")).kind, len(found)) == (kind, count)
        assert all(raw.data for raw in found)


def test_archives_on_another_store(moto, pngs, tmp_path, rows):
    pack(tmp_path / "x.zip", {f"{i}.png": pngs[i] for i in range(40)})
    bucket = moto.bucket()
    moto.fs.pipe_file(f"{bucket}/x.zip", (tmp_path / "x.zip").read_bytes())
    found = rows(f"{bucket}/x.zip", storage_options=moto.options)
    assert {raw.image_id: raw.data for raw in found} == {f"{i}.png": pngs[i] for i in range(40)}


def test_a_damaged_or_encrypted_file_of_an_archive_is_a_reject(tmp_path, pngs, rows):
    pack(tmp_path / "x.zip", {f"{i}.png": pngs[i] for i in range(3)}, zipfile.ZIP_STORED)
    content = bytearray((tmp_path / "x.zip").read_bytes())
    content[content.index(pngs[0]) + 500] ^= 1
    for start, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = content.rindex(start)
        content[at + flags] |= 1  # encrypted, it says
    (tmp_path / "x.zip").write_bytes(content)
    found = {raw.image_id: (raw.data, raw.reason, raw.detail) for raw in rows(tmp_path / "x.zip")}
    assert found["1.png"][0] == pngs[1]
    assert found["0.png"][1] == found["2.png"][1] == "unreadable"
    assert "CRC" in found["0.png"][2] and "encrypted" in found["2.png"][2]


@pytest.mark.parametrize("content", [b"", b"PK\3\4" * 100, b"no archive" * 100])
def test_what_is_no_archive_is_refused(content, tmp_path, fill, refused):
    fill(tmp_path, {"x.zip": content})
    assert "x.zip is not a ZIP archive" in refused(tmp_path / "x.zip")


def test_several_archives_are_refused(tmp_path, pngs, refused):
    for name in "ab":
        pack(tmp_path / f"{name}.zip", {"0.png": pngs[0]})
    assert "holds 2 ZIP archives; name one of them" in refused(tmp_path)
