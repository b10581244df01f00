"""WebDataset tars, written by tarfile and by GNU tar: whole, odd, damaged, and changed after they were planned."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import tarfile
import uuid

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palindrome.pipeline.base.errors import RunError
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.read import first_images
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.images.sources import FILES, WEBDATASET, list_pieces, open_collection, read_raw, tars, unpack
from palindrome.pipeline.runs.plan import extend_plan, read_plan, write_plan
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.verify_deep import _only

BLOCK = 512
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 143014\n"


def samples(pngs, n=6):
    """Members of n samples, images of odd sizes with a class and a caption; and what is to be read of them."""
    members, expected = [], []
    for i in range(n):
        image, caption = pngs[i][: 2048 if i % 3 else None] or b"", f"picture {i}, größer"
        members += [(f"d/{i:03d}.png", image), (f"d/{i:03d}.cls", b"%d\n" % i), (f"d/{i:03d}.txt", caption.encode())]
        expected.append((image, {"cls": i, "txt": caption, "__key__": f"d/{i:03d}"}))
    return members, expected


KEEP = ["cls", "txt", "__key__"]


def values(found):
    return [(raw.data, raw.kept) for raw in found]


def test_samples_are_grouped_by_key_with_their_sidecars(tmp_path, pngs, fill, tar_of, rows):
    members, expected = samples(pngs)
    meta = json.dumps({"width": 32, "tags": ["a", "ü"]})
    extra = [("e/x.seg.PNG", pngs[9]), ("e/x.JSON", meta.encode()), ("e/x.cls", b"12")]
    fill(tmp_path, {"a.tar": tar_of([*members, *extra])})
    found = rows(tmp_path, keep=[*KEEP, "json"])
    assert values(found) == [
        *((image, {**kept, "json": None}) for image, kept in expected),
        (pngs[9], {"cls": 12, "txt": None, "__key__": "e/x", "json": meta}),
    ]
    assert [raw.image_id for raw in found] == [f"a.tar#{i}" for i in range(7)]
    uri = (tmp_path / "a.tar").as_uri()
    assert [raw.source for raw in found] == [*(f"{uri}#d/{i:03d}" for i in range(6)), f"{uri}#e/x"]


def test_classes_are_numbers_unless_one_is_a_name(tmp_path, fill, tar_of, rows):
    def tar(*classes):
        return tar_of([m for i, c in enumerate(classes) for m in ((f"{i}.png", b"x"), (f"{i}.cls", c))])

    fill(
        tmp_path, {"n/a.tar": tar(b"7", b" -3\n"), "t/a.tar": tar(b"cat", b"7"), "l/a.tar": tar(*[b"1"] * 100, b"cat")}
    )
    fill(tmp_path, {"h/a.tar": tar(b"1", b"9" * 30)})
    assert open_collection(str(tmp_path / "n"), keep=["cls"]).kept == (pa.field("cls", pa.int64()),)
    assert [raw.kept["cls"] for raw in rows(tmp_path / "n", keep=["cls"])] == [7, -3]
    assert [raw.kept["cls"] for raw in rows(tmp_path / "t", keep=["cls"])] == ["cat", "7"]
    assert [raw.kept["cls"] for raw in rows(tmp_path / "h", keep=["cls"])] == ["1", "9" * 30]
    assert [raw.kept["cls"] for raw in rows(tmp_path / "l", keep=["cls"])][-2:] == [1, None]  # known too late


def gnu_tar(folder, archive, *arguments):
    subprocess.run(["tar", "-cf", archive, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "v7"])
def test_gnu_tar_with_folders_links_hidden_and_long_names(form, tmp_path, pngs, fill, rows, capsys):
    long = "n" * 90 if form in ("v7", "ustar") else "/".join(["deep" * 20] * 3) + "/" + "ü" * 100
    contents = {"a.png": pngs[0], "a.cls": b"3", "b/c.d.png": pngs[1], "b/c.cls": b"4", f"{long}.png": pngs[2]}
    fill(tmp_path / "in", contents | {"._a.png": b"mac", ".hidden/e.png": b"no", "b/.DS_Store": b"no"})
    (tmp_path / "in" / "z.png").symlink_to("a.png")
    (tmp_path / "in" / "zz.png").hardlink_to(tmp_path / "in" / "b" / "c.d.png")
    gnu_tar(tmp_path / "in", tmp_path / "x.tar", f"--format={form}", "--sort=name", ".")
    keys = {raw.source.rpartition("#")[2]: raw for raw in rows(tmp_path / "x.tar", keep=["cls"])}
    assert f"passed over in {tmp_path}/x.tar: links and sparse files in tars: 2" in capsys.readouterr().err
    assert {key: (raw.data, raw.kept["cls"]) for key, raw in keys.items()} == {
        "./a": (pngs[0], 3),
        "./b/c": (pngs[1], 4),
        f"./{long}": (pngs[2], None),
    }


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_member_names_that_are_no_utf_8(form, tmp_path, pngs, rows):
    (tmp_path / "in").mkdir()
    for name, content in {b"\xe9t\xe9.png": pngs[0], b"\xe9t\xe9.txt": b"summer", b"ok.p\xff": b"x"}.items():
        with open(bytes(tmp_path / "in") + b"/" + name, "wb") as f:
            f.write(content)
    gnu_tar(tmp_path / "in", tmp_path / "x.tar", f"--format={form}", "--sort=name", ".")
    found = {raw.kept["__key__"]: raw for raw in rows(tmp_path / "x.tar", keep=["txt", "__key__"])}
    assert found["./\\udce9t\\udce9"].data == pngs[0]
    assert found["./\\udce9t\\udce9"].kept["txt"] == "summer"
    assert found["./ok"].reason == "null"


def test_unordered_tar_as_a_shell_makes_it(tmp_path, pngs, fill, rows):
    """`tar cf x.tar *.png *.txt *.cls`: the second member of each sample is farther than what is looked at first."""
    fill(tmp_path / "in", {f"{i:03d}.png": pngs[i] for i in range(150)})
    fill(tmp_path / "in", {f"{i:03d}.txt": b"%d" % i for i in range(150)} | {"007.cls": b"7"})
    subprocess.run("tar cf ../x.tar *.png *.txt *.cls", shell=True, cwd=tmp_path / "in", check=True)
    found = rows(tmp_path / "x.tar", 20, keep=["txt", "cls"])
    assert [(raw.data, raw.kept) for raw in found] == [
        (pngs[i], {"txt": str(i), "cls": 7 if i == 7 else None}) for i in range(150)
    ]


def unordered(pngs, n=6):
    members, expected = samples(pngs, n)
    return sorted(members, key=lambda m: (not m[0].endswith("png"), m[0].rpartition(".")[2], m[0])), expected


@pytest.mark.parametrize("size", [1, 4, 100])
def test_members_of_a_sample_far_apart(size, tmp_path, pngs, fill, tar_of, rows, shards):
    members, expected = unordered(pngs, 120)
    fill(tmp_path, {"a.tar": tar_of(members), "b.tar": tar_of(samples(pngs, 3)[0])})
    found = rows(tmp_path, size, keep=KEEP)
    assert values(found) == expected + samples(pngs, 3)[1]
    assert [raw.image_id for raw in found] == [*(f"a.tar#{i}" for i in range(120)), *(f"b.tar#{i}" for i in range(3))]


# Damage


def bodies(data):
    """Of a whole tar: what each member's bytes end at, by its key; and where the archive's own end begins."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        ends = {}
        for info in archive:
            key = info.name.partition(".")[0]
            ends[key] = max(ends.get(key, 0), info.offset_data + info.size)
        return ends, -(-(info.offset_data + info.size) // BLOCK) * BLOCK


def listed_of(data, cut):
    """How many samples are known there; and one more, unless one of them is what is cut, or all are."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        there = [info for info in archive if info.offset_data <= cut]
    keys = {info.name.partition(".")[0] for info in there}
    inside = bool(there) and cut < there[-1].offset_data + there[-1].size
    return len(keys) + (not inside and cut < bodies(data)[1] + BLOCK)


def check_cut(found, expected, ends, end, cut):
    """Whole samples are right, nobody has another's bytes, and that the archive breaks off is said."""
    assert [raw.image_id for raw in found] == [f"a.tar#{i}" for i in range(len(found))]
    for i, (image, kept) in enumerate(expected):
        if i < len(found) and found[i].data is not None:
            assert found[i].data == image
            assert all(found[i].kept[name] in (kept[name], None) for name in kept)
        if ends[f"d/{i:03d}"] <= cut:
            assert (found[i].data, found[i].kept) == (image, kept), (i, cut)
    said = [raw for raw in found if raw.data is None]
    if cut < end + BLOCK:
        assert said and all(raw.reason == "truncated" for raw in said), (cut, said)
    else:
        assert not said


def cuts(data):
    return sorted({*range(0, len(data) + 1, BLOCK), *range(BLOCK - 1, len(data), BLOCK), *range(1, len(data), 373)})


@pytest.mark.parametrize("order", [samples, unordered])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_tar_that_breaks_off_anywhere(size, order, tmp_path, pngs, fill, tar_of, accounted, shards):
    members, expected = order(pngs, 5)
    data = tar_of(members)
    ends, end = bodies(data)
    fill(tmp_path, {"a.tar": data, "b.tar": data})
    collection = open_collection(str(tmp_path / "a.tar"), keep=KEEP)
    for cut in (c for c in cuts(data) if c < end + 3 * BLOCK):
        fill(tmp_path, {"a.tar": data[:cut]})
        found = accounted(collection, shards(collection, size))
        assert len(found) == listed_of(data, cut)
        check_cut(found, expected, ends, end, cut)


@pytest.mark.parametrize("order", [samples, unordered])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_tar_that_breaks_off_after_it_was_planned(size, order, tmp_path, pngs, fill, tar_of, accounted, shards):
    members, expected = order(pngs, 5)
    data = tar_of(members)
    ends, end = bodies(data)
    fill(tmp_path, {"a.tar": data})
    collection = open_collection(str(tmp_path / "a.tar"), keep=KEEP)
    planned = shards(collection, size)
    for cut in (c for c in cuts(data) if c < end):
        fill(tmp_path, {"a.tar": data[:cut]})
        found = accounted(collection, planned)
        assert len(found) == 5
        for raw, (image, kept) in zip(found, expected, strict=True):
            if ends[kept["__key__"]] <= cut:
                assert (raw.data, raw.kept) == (image, kept), cut
            elif raw.data is not None:  # a sidecar may be gone without a trace, where its header is
                assert raw.data == image
            else:
                assert raw.reason == "truncated", (cut, raw)


def test_broken_tar_alone_or_first_or_among_others(tmp_path, pngs, fill, tar_of, rows):
    members, expected = samples(pngs)
    bad = {
        "1-empty.tar": b"",
        "1-none.tar": b"\0" * 10240,
        "1-text.tar": b"no tar\n" * 200,
        "1-zip.tar": b"PK\3\4" * 300,
    }
    fill(tmp_path, {"0.tar": b"", **bad, "2.tar": tar_of(members), "3.tar": b"\xff" * 3000})
    found = rows(tmp_path, keep=KEEP)
    good = [raw for raw in found if raw.data is not None]
    assert values(good) == expected
    assert {raw.image_id: raw.reason for raw in found if raw.data is None} == {
        f"{name}#0": "truncated" for name in ("0.tar", "1-empty.tar", "1-text.tar", "1-zip.tar", "3.tar")
    }


@pytest.mark.parametrize("content", [b"", b"\0" * 10240, b"no tar\n" * 200])
def test_no_tar_at_all_is_refused_by_name(content, tmp_path, fill, refused):
    fill(tmp_path, {"a.tar": content})
    assert f"{tmp_path}/a.tar" in refused(tmp_path / "a.tar")


@pytest.mark.parametrize("size", [1, 4, 100])
def test_damaged_header_in_the_middle(size, tmp_path, pngs, fill, tar_of, rows):
    members, expected = samples(pngs)
    data = bytearray(tar_of(members))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        at = archive.getmember("d/003.png").offset
    data[at : at + 20] = b"\xff" * 20
    fill(tmp_path, {"a.tar": bytes(data)})
    found = rows(tmp_path, size, keep=KEEP)
    assert values(found[:3]) == expected[:3]
    assert [(raw.image_id, raw.reason) for raw in found[3:]] == [("a.tar#3", "truncated")]
    assert str(at) in found[3].detail


@pytest.mark.parametrize("size", [1, 4, 100])
def test_tar_that_breaks_off_behind_folders(size, tmp_path, pngs, fill, rows):
    fill(tmp_path / "in", {"a.png": pngs[0]})
    for folder in ("b", "c", "d"):
        (tmp_path / "in" / folder).mkdir()
    gnu_tar(tmp_path / "in", tmp_path / "x.tar", "a.png", "b", "c", "d")
    whole = (tmp_path / "x.tar").read_bytes()
    end = whole.index(b"d/\0")  # the last header
    for cut in (end - 2 * BLOCK, end - BLOCK, end, end + 100, end + BLOCK):
        (tmp_path / "x.tar").write_bytes(whole[:cut])
        found = rows(tmp_path / "x.tar", size)
        assert [(raw.data, raw.reason) for raw in found] == [(pngs[0], ""), (None, "truncated")], cut


def test_header_with_a_negative_size_ends(tmp_path, pngs, fill, tar_of, rows):
    """Of which tarfile goes back, and round and round."""
    members, expected = samples(pngs, 2)
    data = tar_of(members)
    _, end = bodies(data)
    info = tarfile.TarInfo("d/9.png")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-2048).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    fill(tmp_path, {"a.tar": data[:end] + bytes(header) + b"\0" * 1024})
    found = rows(tmp_path, keep=KEEP)
    assert values(found[:2]) == expected
    assert [raw.reason for raw in found[2:]] == ["truncated"]


def test_sparse_member_is_no_image(tmp_path, pngs, fill, rows):
    fill(tmp_path / "in", {"a.png": pngs[0], "c.png": pngs[2]})
    with open(tmp_path / "in" / "b.png", "wb") as f:
        f.write(pngs[1])
        f.truncate(1 << 20)
    gnu_tar(tmp_path / "in", tmp_path / "x.tar", "-S", "--sort=name", "a.png", "b.png", "c.png")
    assert [raw.data for raw in rows(tmp_path / "x.tar") if raw.data] == [pngs[0], pngs[2]]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=600)), min_size=1),
    size=st.integers(1, 7),
)
def test_any_damage_accounts_for_each_sample_twice_the_same(edits, size, tmp_path, pngs, tar_of, shards, accounted):
    data = bytearray(tar_of(samples(pngs)[0]))
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    collection = open_collection(str(path), keep=KEEP)
    planned = shards(collection, size)
    for where, noise in edits:
        at = int(where * len(data))
        data[at : at + len(noise)] = noise
    path.write_bytes(data)
    found = accounted(collection, planned)
    assert [raw.image_id for raw in found] == [f"a.tar#{i}" for i in range(6)]
    assert found == accounted(collection, planned)
    again = accounted(collection, shards(collection, size))  # and where it was so when it was planned
    assert again == accounted(collection, shards(collection, size))


@pytest.fixture
def planned(tmp_path, pngs, fill, tar_of, shards):
    """20 samples, planned in shards of 3; the tar's path, and its members."""
    members, expected = samples(pngs, 20)
    fill(tmp_path, {"a.tar": tar_of(members)})
    collection = open_collection(str(tmp_path / "a.tar"), keep=KEEP)
    return collection, shards(collection, 3), tmp_path / "a.tar", expected


def test_grown_tar_gives_the_listed_samples(planned, pngs, tar_of, accounted):
    collection, plan, path, expected = planned
    path.write_bytes(tar_of(samples(pngs, 40)[0]))
    assert values(accounted(collection, plan)) == expected


def test_shorter_tar_that_is_whole(planned, pngs, tar_of, accounted):
    collection, plan, path, expected = planned
    path.write_bytes(tar_of(samples(pngs, 7)[0]))
    found = accounted(collection, plan)
    assert values(found[:7]) == expected[:7]
    assert {raw.data for raw in found[7:]} == {None}
    assert {raw.reason for raw in found[7:]} <= {"missing", "truncated"}


def test_removed_tar_is_missing_and_a_folder_unreadable(planned, accounted):
    collection, plan, path, _ = planned
    path.unlink()
    assert {(raw.reason, raw.detail) for raw in accounted(collection, plan)} == {("missing", "no such file")}
    path.mkdir()
    assert {raw.reason for raw in accounted(collection, plan)} == {"unreadable"}


def test_replaced_tar_never_hangs_nor_raises(planned, tar_of, accounted):
    collection, plan, path, _ = planned
    for content in (
        b"",
        b"\0" * 50_000,
        b"text\n" * 9000,
        gzip.compress(b"x" * 9000),
        tar_of([("q.jpg", b"x" * 40_000)]),
    ):
        path.write_bytes(content)
        assert len(accounted(collection, plan)) == 20


# Compressed


def arrow(name):
    def compress(data):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, name) as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()

    return compress


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": arrow("zstd"), "lz4": arrow("lz4")}
ENDINGS = {"gz": ["tgz"], "bz2": ["tbz", "tbz2"], "xz": ["txz"], "zst": ["tzst", "tar.zstd"], "lz4": []}


@pytest.mark.parametrize("kind", COMPRESS)
def test_compressed_tar_whatever_its_name(kind, tmp_path, pngs, fill, tar_of, rows):
    members, expected = samples(pngs)
    data = COMPRESS[kind](tar_of(members))
    for i, ending in enumerate(["tar", f"tar.{kind}", f"Tar.{kind.upper()}", "tar.gz", *ENDINGS[kind]]):
        fill(tmp_path, {f"{i}/a.{ending}": data})
        assert values(rows(tmp_path / str(i), 2, keep=KEEP)) == expected
    parts = COMPRESS[kind](tar_of(members)[:5000]) + COMPRESS[kind](tar_of(members)[5000:])
    fill(tmp_path, {"parts/a.tar": parts + b"\0" * 512})
    assert values(rows(tmp_path / "parts", keep=KEEP)) == expected


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_tar_that_unpacks_to_far_too_much_is_one_reject(kind, tmp_path, pngs, fill, tar_of, rows, monkeypatch):
    monkeypatch.setattr(unpack, "FREE", 1 << 20)
    bomb = COMPRESS[kind](tar_of([("0.png", pngs[0]), ("1.png", bytes(60 << 20))]))
    fill(tmp_path, {"a.tar": tar_of([("0.png", pngs[1])]), "b.tar": bomb})
    assert [(raw.data, raw.reason, raw.detail) for raw in rows(tmp_path)] == [
        (pngs[1], "", ""),
        (None, "unreadable", "it unpacks to more than 100 times its size"),
    ]


def test_a_full_disk_is_no_fault_of_the_tar(tmp_path, pngs, fill, tar_of, shards, accounted, monkeypatch):
    fill(tmp_path, {"a.tar.gz": gzip.compress(tar_of([("0.png", pngs[0])]))})
    collection = open_collection(str(tmp_path))
    planned = shards(collection)
    monkeypatch.setattr(tars.tempfile, "TemporaryFile", lambda **_: open("/dev/full", "r+b", 0))  # noqa: SIM115
    with pytest.raises(RunError, match="No space left"):
        accounted(collection, planned)


@pytest.mark.parametrize("kind", ["bz2", "xz", "zst", "lz4"])
def test_compressed_otherwise_and_broken_off(kind, tmp_path, pngs, fill, tar_of, rows):
    members = [(f"{i}.png", pngs[i]) for i in range(200)]
    data = COMPRESS[kind](tar_of(members))
    for cut in (len(data) - 3, len(data) * 2 // 3):
        fill(tmp_path, {"a.tar": tar_of(members[:1]), "b.tar": data[:cut]})
        *found, last = rows(tmp_path)
        assert [raw.data for raw in found] == [pngs[0], *pngs[: len(found) - 1]]
        assert last.reason == "truncated" or len(found) == 200
        assert len(found) > (60 if kind != "bz2" else 0)  # which unpacks 900 kB or nothing


def test_git_lfs_pointers_in_place_of_tars(tmp_path, pngs, fill, tar_of, rows, refused):
    fill(tmp_path, {"b.tar": POINTER, "c.tar.gz": POINTER})
    assert "b.tar: it is a Git LFS pointer" in refused(tmp_path)
    fill(tmp_path, {"d.tar": tar_of([("0.png", pngs[0])])})
    found = rows(tmp_path)
    assert [(raw.image_id, raw.reason) for raw in found] == [
        ("b.tar#0", "unreadable"),
        ("c.tar.gz#0", "unreadable"),
        ("d.tar#0", ""),
    ]
    assert "Git LFS pointer" in found[0].detail


def test_compressed_in_parts_and_not_compressed_at_all(tmp_path, pngs, fill, tar_of, rows):
    members, expected = samples(pngs)
    data = tar_of(members)
    parts = gzip.compress(data[:5000]) + gzip.compress(data[5000:]) + b"\0" * 512
    fill(tmp_path, {"a.tar.gz": parts, "b.tar.gz": data})
    assert values(rows(tmp_path, keep=KEEP)) == expected * 2


def test_compressed_tar_that_breaks_off_anywhere(tmp_path, pngs, fill, tar_of, accounted, shards):
    members, expected = samples(pngs, 5)
    data = gzip.compress(tar_of(members))
    fill(tmp_path, {"a.tar.gz": data})
    collection = open_collection(str(tmp_path / "a.tar.gz"), keep=KEEP)
    whole = shards(collection)
    for cut in range(1, len(data), 331):
        fill(tmp_path, {"a.tar.gz": data[:cut]})
        unpacked = subprocess.run(["gzip", "-dc"], input=data[:cut], capture_output=True).stdout
        ends, end = bodies(tar_of(members))
        found = accounted(collection, shards(collection))
        for i, (image, kept) in enumerate(expected):
            if ends[kept["__key__"]] <= len(unpacked):
                assert (found[i].data, found[i].kept) == (image, kept)
            elif i < len(found) and found[i].data is not None:
                assert found[i].data == image
        assert len(unpacked) > end + BLOCK or {raw.reason for raw in found if raw.data is None} == {"truncated"}
        assert len(accounted(collection, whole)) == 5


# Which member is the image


def test_sample_without_an_image_is_a_reject(tmp_path, pngs, fill, tar_of, rows):
    fill(tmp_path, {"a.tar": tar_of([("0.png", pngs[0]), ("1.txt", b"alone"), ("2.jpg", pngs[2]), ("3.png", b"")])})
    found = rows(tmp_path, 1, keep=["txt"])
    assert [(raw.data, raw.reason) for raw in found] == [(pngs[0], ""), (None, "null"), (pngs[2], ""), (b"", "")]
    assert found[1].kept == {"txt": "alone"}


def test_several_images_a_sample_must_be_named(tmp_path, pngs, fill, tar_of, rows, refused):
    pairs = [(f"{i}.{side}.jpg", pngs[2 * i + k]) for i in range(3) for k, side in enumerate(["left", "RIGHT"])]
    fill(tmp_path, {"a.tar": tar_of(pairs)})
    assert "left.jpg, right.jpg" in refused(tmp_path)
    assert [raw.data for raw in rows(tmp_path, image_column="left.jpg")] == pngs[0:6:2]
    assert [raw.data for raw in rows(tmp_path, image_column="Right.jpg")] == pngs[1:6:2]
    for asked in ("jpg", ".JPG", "*.jpg", "*"):  # each is a sample of its own where its key ends at the last dot
        assert [raw.data for raw in rows(tmp_path, image_column=asked)] == pngs[:6]
    assert "end keys at the last dot: '*.jpg'" in refused(tmp_path)
    assert ".png" in refused(tmp_path, image_column="png")


def test_one_image_a_sample_of_several_kinds(tmp_path, pngs, fill, tar_of, rows):
    members = [("0.jpg", pngs[0]), ("1.PNG", pngs[1]), ("2.thumb.webp", pngs[2])]
    later = [(f"{i}.jpg", pngs[i]) for i in range(3, 120)] + [("x.depth.png", b"depth"), ("x.png", pngs[120])]
    fill(tmp_path, {"a.tar": tar_of(members + later)})
    assert [raw.data for raw in rows(tmp_path)] == [*pngs[:121], b"depth"]


def test_names_with_dots_are_samples_of_their_own(tmp_path, pngs, fill, tar_of, rows):
    """22.05.png is no image `05.png` of a sample 22: the numbers differ, what follows the last dot does not."""
    names = [f"v1.2/2{i // 3}.{i % 3 * 5:02d}" for i in range(9)]
    members = [m for i, name in enumerate(names) for m in ((f"{name}.png", pngs[i]), (f"{name}.cls", b"%d" % i))]
    fill(tmp_path, {"a.tar": tar_of(members)})
    expected = [(pngs[i], {"cls": i, "__key__": name}) for i, name in enumerate(names)]
    assert values(rows(tmp_path, 2, keep=["cls", "__key__"])) == expected
    assert open_collection(str(tmp_path)).image_column == "*"
    fill(tmp_path, {"b/b.tar": tar_of([(name.replace("v1.", "v1-"), content) for name, content in members[::6]])})
    assert [raw.data for raw in rows(tmp_path / "b")] == pngs[:9:3]  # one each: nothing tells
    for column in ("png", "*.png"):
        assert [raw.data for raw in rows(tmp_path / "b", image_column=column)] == pngs[:9:3]


def test_keeps_of_names_with_dots(tmp_path, pngs, fill, tar_of, rows, refused):
    members = [m for i in range(3) for m in ((f"{i}.{i}.png", pngs[i]), (f"{i}.{i}.cls", b"%d" % i))]
    fill(tmp_path, {"a.tar": tar_of(members)})
    assert values(rows(tmp_path, keep=["cls"])) == [(pngs[i], {"cls": i}) for i in range(3)]
    fill(tmp_path, {"a.tar": tar_of([("0.left.png", pngs[0]), ("0.info.json", b"{}")])})
    assert "no member .json" in refused(tmp_path, keep=["json"]).replace("has a", "no")  # whose it is, is not known


FURTHER = [("v1.05.png", 5), ("v1.05.cls", 1), ("v1.10.png", 6), ("v1.10.cls", 2), ("w.a.png", 7), ("w.cls", 3)]
FURTHER += [("w.png", 8), ("x.png", 9), ("x.PNG", 10), ("x.cls", 4), ("y.jpg", 11), ("y.png", 12), ("z.png", 13)]


@pytest.mark.parametrize("order", ["ordered", "unordered", "packed"])
@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_further_images_of_a_sample_are_rows_behind(order, size, tmp_path, pngs, fill, tar_of, rows, capsys):
    """Where the first samples have one each; those of the samples keep their ids."""
    first = [m for i in range(100) for m in ((f"{i:03d}.png", pngs[i]), (f"{i:03d}.cls", b"0"))]
    more = [(name, pngs[n] if n > 4 else b"%d" % n) for name, n in FURTHER]
    members = first + more
    if order == "unordered":
        members = members[:2] + sorted(members[2:], key=lambda member: member[0].endswith("cls"))
    data = tar_of(members)
    fill(tmp_path, {"a.tar": gzip.compress(data) if order == "packed" else data, "b.tar": tar_of([("0.png", pngs[0])])})
    found = rows(tmp_path, size, keep=["cls", "__key__"])
    assert [raw.image_id for raw in found] == [*(f"a.tar#{i}" for i in range(109)), "b.tar#0"]
    later = {"x.png": "x", "x.PNG": "x"}
    assert [(raw.data, raw.kept["__key__"], raw.kept["cls"]) for raw in found[100:109]] == [
        (pngs[5], "v1.05", 1),
        (pngs[8], "w", 3),
        (pngs[10], later["x.PNG"], 4),
        (pngs[11], "y", None),
        (pngs[13], "z", None),
        (pngs[6], "v1.10", 2),
        (pngs[7], "w.a", 3),
        (pngs[9], later["x.png"], 4),
        (pngs[12], "y", None),
    ]
    assert "4 images are further ones of their samples" in capsys.readouterr().err or size > 1


def test_plans_of_before_there_were_further_images(tmp_path, pngs, fill, tar_of, accounted, shards):
    """A sample was one image: those pieces are still listed, and give the same."""
    first = [(f"{i:03d}.png", pngs[i]) for i in range(100)]
    fill(tmp_path, {"a.tar": tar_of([*first, ("v.1.png", pngs[5]), ("v.2.png", pngs[6]), ("z.png", pngs[7])])})
    collection = open_collection(str(tmp_path))
    found = list(list_pieces(collection, 60))
    assert [(p.start, p.stop, p.length > 0) for p in found] == [(0, 51, True), (51, 102, True), (102, 103, False)]
    before = [Shard.of(WEBDATASET, found[:2])]
    assert [raw.data for raw in accounted(collection, before)] == [*pngs[:100], pngs[5], pngs[7]]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_archive_that_breaks_off_in_a_further_image(size, tmp_path, pngs, fill, tar_of, rows):
    members = [*((f"{i:03d}.png", pngs[i]) for i in range(100)), ("a.1.png", pngs[1]), ("a.2.png", pngs[2])]
    data = tar_of(members)
    fill(tmp_path, {"a.tar": data[: data.rindex(pngs[2]) + 100]})
    found = rows(tmp_path, size)
    assert [raw.data for raw in found[:100]] == pngs[:100]
    assert [(raw.image_id, raw.reason) for raw in found[100:]] == [
        ("a.tar#100", "truncated"),
        ("a.tar#101", "truncated"),
    ]
    fill(tmp_path, {"a.tar": data[: data.rindex(pngs[2]) - BLOCK]})
    assert [raw.reason for raw in rows(tmp_path, size)[100:]] == ["", "truncated"]


def test_image_of_an_extension_that_is_no_pictures(tmp_path, pngs, fill, tar_of, rows, refused):
    fill(tmp_path, {"a.tar": tar_of([(f"{i}.input", pngs[i]) for i in range(3)])})
    assert ".input" not in refused(tmp_path)
    assert "there is input" in refused(tmp_path)
    assert [raw.data for raw in rows(tmp_path, image_column="input")] == pngs[:3]


def test_unknown_member_is_refused_with_what_there_is(tmp_path, pngs, fill, tar_of, refused):
    fill(tmp_path, {"a.tar": tar_of(samples(pngs)[0])})
    message = refused(tmp_path, keep=["caption"])
    assert ".caption" in message and "cls, png, txt" in message


# Many tars


def test_tars_by_braces_by_glob_and_by_folder(tmp_path, pngs, fill, tar_of, rows, refused):
    for i in range(13):
        fill(tmp_path, {f"{i:05d}.tar": tar_of([(f"{i}.png", pngs[i]), (f"{i}.cls", b"%d" % i)])})
    for uri in (f"{tmp_path}/{{00000..00012}}.tar", f"{tmp_path}/*.tar", str(tmp_path), f"{tmp_path}/000{{0,1}}?.tar"):
        found = rows(uri, 5, keep=["cls"])
        assert [(raw.image_id, raw.data, raw.kept["cls"]) for raw in found] == [
            (f"{i:05d}.tar#0", pngs[i], i) for i in range(13)
        ]
    assert [raw.data for raw in rows(f"{tmp_path}/{{00003..00005}}.tar")] == pngs[3:6]
    (tmp_path / "00007.tar").unlink()
    assert "00007.tar" in refused(f"{tmp_path}/{{00000..00012}}.tar")


def test_output_of_img2dataset_is_recognised(tmp_path, pngs, fill, tar_of, rows):
    """A table and statistics beside each tar."""
    for i in range(3):
        table = pa.table({"url": ["http://a/b.jpg"], "key": ["0"], "status": ["success"]})
        pq.write_table(table, tmp_path / f"{i:05d}.parquet")
        members = [
            (f"{i:05d}{n:04d}.{kind}", content)
            for n in range(4)
            for kind, content in [("jpg", pngs[4 * i + n]), ("json", b'{"url": "u"}'), ("txt", b"caption")]
        ]
        fill(tmp_path, {f"{i:05d}.tar": tar_of(members), f"{i:05d}_stats.json": b"{}"})
    collection = open_collection(str(tmp_path), keep=["json", "txt"])
    assert collection.kind == WEBDATASET
    assert [raw.data for raw in rows(tmp_path, keep=["json", "txt"])] == pngs[:12]


def test_tars_and_pictures_in_one_folder(tmp_path, pngs, fill, tar_of, rows, refused):
    """Either could be meant, unless one of them is nearly all there is."""
    fill(tmp_path, {"a.tar": tar_of([("0.png", pngs[0])]), "b.PNG": pngs[1]})
    assert "1 pictures and 1 tars; say which of them are meant: files, webdataset" in refused(tmp_path)
    assert [(raw.image_id, raw.data) for raw in rows(tmp_path, kind=WEBDATASET)] == [("a.tar#0", pngs[0])]
    assert [raw.image_id for raw in rows(tmp_path, kind=FILES)] == ["a.tar", "b.PNG"]
    fill(tmp_path, {"a.tar": tar_of([(f"{i}.png", pngs[i]) for i in range(40)])})
    assert open_collection(str(tmp_path)).kind == WEBDATASET


def test_tars_on_another_store_and_in_upper_case(pngs, tar_of, rows):
    root, (members, expected) = f"memory://{uuid.uuid4().hex}", samples(pngs)
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"{root.removeprefix('memory:/')}/A.TAR", tar_of(members))
    fs.pipe_file(f"{root.removeprefix('memory:/')}/B.TAR.GZ", gzip.compress(tar_of(members)))
    assert values(rows(root, 2, keep=KEEP)) == expected * 2


# Pieces, plans


MEMBERS = st.lists(
    st.tuples(
        st.sampled_from(["png", "jpg", "txt", "cls", "seg.png"]),
        st.one_of(st.integers(0, 40), st.sampled_from([511, 512, 513, 1024, 3000])),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda member: member[0],
)


@settings(max_examples=150)
@given(
    tar=st.lists(
        st.tuples(MEMBERS, st.sampled_from(["", "", "", "folder", "hidden", "long", "link"])), min_size=1, max_size=12
    ),
    size=st.integers(1, 14),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_every_sample_once_with_its_own_bytes(tar, size, form, tmp_path_factory, shards, accounted):
    """Any tar and any size of shards, each shard read alone; the ids are the places in the tar."""
    path = tmp_path_factory.mktemp("tars") / "a.tar"
    expected, number = [], 0
    with tarfile.open(path, "w", format=form) as archive:

        def add(name, content=b"", kind=tarfile.REGTYPE):
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, "0.png" if kind == tarfile.SYMTYPE else ""
            archive.addfile(info, io.BytesIO(content))

        for i, (members, oddity) in enumerate(tar):
            prefix = "d/" * 40 if oddity == "long" else ""
            key = f"{prefix}{i}" + ("k" * 60 if oddity == "long" else "")
            if oddity in ("folder", "link"):
                add(f"x{i}.png", kind=tarfile.DIRTYPE if oddity == "folder" else tarfile.SYMTYPE)
            if oddity == "hidden":
                add(f"._{i}.png", b"no image" * 100)
            found = {}
            for extension, length in members:
                number += 1
                found[extension] = (b"%d." % number * length)[:length]
                add(f"{key}.{extension}", found[extension])
            expected.append((found.get("png"), found.get("txt", b"").decode() if "txt" in found else None, key))
    if not any("png" in dict(members) for members, _ in tar):
        return
    keep = ["__key__", *(["txt"] if any("txt" in dict(members) for members, _ in tar) else [])]
    collection = open_collection(str(path), image_column="png", keep=keep)
    pieces = list(list_pieces(collection, size))
    assert all(0 < piece.stop - piece.start <= size for piece in pieces)
    with open(path, "rb") as f:
        for piece in pieces:  # begins with the header of its first sample, or the extended one before it
            f.seek(piece.offset)
            with tarfile.open(fileobj=f) as rest:
                assert rest.next().name.startswith(expected[piece.start][2])
    found = accounted(collection, shards(collection, size))
    assert [(raw.image_id, raw.data, raw.kept["__key__"]) for raw in found] == [
        (f"a.tar#{i}", image, key) for i, (image, _, key) in enumerate(expected)
    ]
    assert [raw.kept.get("txt") for raw in found] == [text for _, text, _ in expected]


def test_a_plan_brings_pieces_back_as_they_were(tmp_path, pngs, fill, tar_of, accounted):
    members, expected = samples(pngs, 20)
    fill(tmp_path, {"in/a.tar": tar_of(members), "in/b.tar": tar_of(unordered(pngs, 4)[0])})
    collection, run = open_collection(str(tmp_path / "in"), keep=KEEP), Folder(str(tmp_path / "run"))
    totals = write_plan(run, collection, 6)
    planned = list(read_plan(run))
    assert [piece for shard in planned for piece in shard.pieces] == list(list_pieces(collection, 6))
    assert (totals.images, sum(shard.images for shard in planned)) == (24, 24)
    assert values(accounted(collection, planned)) == expected + samples(pngs, 4)[1]
    for shard in planned:
        for raw in read_raw(collection, shard):
            again = [r for r in read_raw(collection, _only(shard, raw.image_id)) if r.image_id == raw.image_id]
            assert again == [raw]
    fill(tmp_path, {"in/c.tar": tar_of(members)})
    totals, changes = extend_plan(run, collection, 6)
    assert (totals.images, changes.added, changes.changed, changes.removed) == (44, 20, 0, 0)
    assert list(read_plan(run))[: len(planned)] == planned
    fill(tmp_path, {"in/a.tar": tar_of(members[:30])})
    (tmp_path / "in" / "b.tar").unlink()
    totals, changes = extend_plan(run, collection, 6)
    assert (totals.images, changes.added, changes.changed, changes.removed) == (44, 0, 1, 1)


@pytest.mark.parametrize("limit", [1, 5, 8])
def test_limit_cuts_within_a_tar(limit, tmp_path, pngs, fill, tar_of, accounted):
    members, expected = samples(pngs, 9)
    fill(tmp_path, {"in/a.tar": tar_of(members)})
    collection, run = open_collection(str(tmp_path / "in"), keep=KEEP), Folder(str(tmp_path / "run"))
    write_plan(run, collection, 4, limit)
    assert values(accounted(collection, list(read_plan(run)))) == expected[:limit]


def test_first_images_of_tars(tmp_path, pngs, fill, tar_of):
    fill(tmp_path, {"a.tar": tar_of([(f"{i}.png", pngs[i]) for i in range(9)])})
    assert first_images(open_collection(str(tmp_path)), Preprocess(32, 3), 4).shape == (4, 32, 32, 3)
