"""Listings against `find`, `sorted`, a shell's braces, and the keys that were put into S3."""

import os
import random
import subprocess
import threading
import time
import uuid
import zipfile

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palindrome.pipeline.base.errors import SourceError
from palindrome.pipeline.images.sources import WEBDATASET, list_pieces, listing, open_collection
from palindrome.pipeline.images.sources.listing import Listed, Seen, in_order, list_files
from palindrome.pipeline.runs.plan import extend_plan, read_plan, write_plan
from palindrome.pipeline.storage.folder import Folder


def listed(uri, options=None, extensions=()):
    """The names, in order; each once."""
    found = [file.name for file in in_order(list_files(str(uri), options or {}, extensions))]
    assert len(set(found)) == len(found)
    return found


def refused(uri, options=None):
    with pytest.raises(SourceError) as info:
        listed(uri, options)
    return str(info.value)


# Order


NAMES = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=60)


@settings(max_examples=80)
@given(names=NAMES, at_once=st.integers(1, 20))
def test_any_number_on_disk_comes_in_the_order_of_sorted(names, at_once):
    entries = [Listed(name, f"x://{name}", i, str(i), f'{{"n": {i}}}') for i, name in enumerate(names)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "IN_MEMORY", at_once)
        assert list(in_order(iter(entries))) == sorted(entries, key=lambda entry: entry.name)


def test_order_on_disk_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "IN_MEMORY", 10)
    monkeypatch.setattr(listing.tempfile, "tempdir", str(tmp_path))
    entries = in_order(Listed(str(i), "") for i in range(100))
    assert next(entries).name == "0"
    assert os.listdir(tmp_path)
    entries.close()
    assert not os.listdir(tmp_path)


# Folders


@pytest.fixture
def tree(tmp_path, fill):
    """Folders whose names sort otherwise with their files than alone, hidden ones, and a few odd names."""
    names = ["a/1.png", "a.b/1.png", "a0/1.png", "a/b/c/2.JPG", "a/b/3.png", "z.png", "A/1.png", "ü/ö.png", " b/ c.png"]
    hidden = [".git/1.png", "a/.hidden/1.png", "a/.1.png", "a/b/.DS_Store"]
    fill(tmp_path / "t", dict.fromkeys([*names, *hidden, "a/note.txt"], b"x"))
    (tmp_path / "t" / "empty").mkdir()
    return tmp_path / "t"


def test_a_tree_is_what_find_finds(tree):
    command = ["find", ".", "-type", "f", "-not", "-path", "*/.*", "-printf", "%P\\0"]
    found = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout
    assert listed(tree) == sorted(found.split("\0")[:-1])
    assert listed(f"{tree}/") == listed(f"file://{tree}") == listed(tree)


@pytest.mark.parametrize(
    "pattern", ["*", "*.png", "*/*.png", "a*/1.png", "**/*.png", "a/**/*", "[aA]/1.png", "a/?.png"]
)
def test_globs_are_those_of_pathlib(pattern, tree):
    root = tree / "a" if pattern.startswith("a/") else tree  # below which names begin
    shown = [str(path.relative_to(root)) for path in tree.glob(pattern) if path.is_file()]
    visible = sorted(name for name in shown if not any(part.startswith(".") for part in name.split("/")))
    assert listed(f"{tree}/{pattern}") == visible


def test_two_stars_alone_are_all_files(tree):
    assert listed(f"{tree}/**") == listed(tree)


def test_a_glob_of_one_level_does_not_descend(tree):
    if os.geteuid() == 0:
        looked = []
        original = os.scandir
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(listing.os, "scandir", lambda path: looked.append(str(path)) or original(path))
            listed(f"{tree}/*.png")
        assert looked == [str(tree)]
    else:
        (tree / "a" / "b").chmod(0)
        assert listed(f"{tree}/*/1.png") == ["A/1.png", "a.b/1.png", "a/1.png", "a0/1.png"]
        (tree / "a" / "b").chmod(0o755)


def test_extensions_in_any_case_with_and_without_a_dot(tree):
    assert listed(tree, extensions=["jpg"]) == listed(tree, extensions=[".JPG"]) == ["a/b/c/2.JPG"]
    assert listed(tree, extensions=("jpg", "txt")) == ["a/b/c/2.JPG", "a/note.txt"]
    assert listed(tree, extensions=["g"]) == []


def test_what_is_no_glob_is_refused(tree):
    assert "**.png" in refused(f"{tree}/**.png")


def test_a_folder_that_may_not_be_read_is_named(tree):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (tree / "a").chmod(0)
    try:
        with pytest.raises(PermissionError, match=f"{tree}/a"):
            listed(tree)
    finally:
        (tree / "a").chmod(0o755)


def test_linked_folders_are_followed_and_loops_end(tree, tmp_path, fill):
    fill(tmp_path, {"other/x/1.png": b"x"})
    (tree / "link").symlink_to("../other")
    (tree / "a" / "top").symlink_to("..")
    (tree / "a" / "b" / "up").symlink_to("../../a")
    (tree.parent / "other" / "back").symlink_to(tree)
    (tree / "ü" / "a").symlink_to("../A")
    command = ["find", "-L", ".", "-type", "f", "-printf", r"%P\0"]
    found = subprocess.run(command, cwd=tree, capture_output=True, text=True)  # it fails for the loops
    visible = [name for name in found.stdout.split("\0")[:-1] if not any(p.startswith(".") for p in name.split("/"))]
    assert listed(tree) == sorted(visible)
    assert "link/x/1.png" in visible and "ü/a/1.png" in visible


@settings(max_examples=40)
@given(names=st.lists(st.text("ab0.!~ü", min_size=1, max_size=3), min_size=1, max_size=20), depth=st.integers(1, 3))
def test_any_tree_in_the_order_of_whole_paths(names, depth, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    for i in range(0, len(names), depth):
        path = folder.joinpath(*names[i : i + depth])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError:  # a file where a folder is wanted, `.` or `..`
            continue
    expected = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    visible = [name for name in expected if not any(part.startswith(".") for part in name.split("/"))]
    assert listed(folder) == visible


# Braces


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..3}.tar",
        "{00..12}.tar",
        "{08..11}.tar",
        "{3..1}.tar",
        "{a,b}.tar",
        "x{,1}y{2,3}",
        "{a,b}/{0..1}.t",
        "{7..7}",
    ],
)
def test_braces_are_those_of_a_shell(pattern):
    done = subprocess.run(["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True)
    assert listing._expanded(pattern) == done.stdout.split("\n")[:-1]


def test_braces_name_files_and_each_must_be_there(tmp_path, fill):
    fill(
        tmp_path, dict.fromkeys(["a/0.png", "a/1.png", "b/0.png", "b/1.png", "b/2.png", "{c}.png", "{0..1}.png"], b"x")
    )
    assert listed(f"{tmp_path}/{{a,b}}/{{0..1}}.png") == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert listed(f"{tmp_path}/{{a,b,a}}/0.png") == ["a/0.png", "b/0.png"]
    assert f"{tmp_path}/a/2.png of" in refused(f"{tmp_path}/{{a,b}}/{{0..2}}.png")
    assert listed(f"{tmp_path}/{{a,b}}/*.png") == ["a/0.png", "a/1.png", "b/0.png", "b/1.png", "b/2.png"]
    assert listed(f"{tmp_path}/{{a,none}}/*.png") == ["a/0.png", "a/1.png"]
    assert listed(f"{tmp_path}/{{a,b/2.png}}") == ["a/0.png", "a/1.png", "b/2.png"]
    assert listed(f"{tmp_path}/{{c}}.png") == ["{c}.png"]
    assert listed(f"{tmp_path}/{{0..1}}.png") == ["{0..1}.png"]  # there is one of that name


# Other stores, steps


def test_memory_and_zip_as_on_disk(tree, tmp_path):
    fs, root = fsspec.filesystem("memory"), uuid.uuid4().hex
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in tree.rglob("*"):
            if path.is_file():
                name = str(path.relative_to(tree))
                fs.pipe_file(f"/{root}/{name}", path.read_bytes())
                archive.write(path, f"in/{name}")
    for uri in (f"memory://{root}", f"zip://in::{tmp_path}/x.zip"):
        assert listed(uri) == listed(tree)
        head, separator, rest = uri.partition("::")
        for pattern in ("*.png", "*/1.png", "**/*.png", "{a,A}/1.png", "{a,A}/*.png"):
            assert listed(f"{head}/{pattern}{separator}{rest}") == listed(f"{tree}/{pattern}")
    assert listed(f"zip://**/*.png::{tmp_path}/x.zip") == [f"in/{name}" for name in listed(f"{tree}/**/*.png")]


def test_steps_go_at_once_and_end_when_nobody_wants_more():
    lock, running, most, done = threading.Lock(), 0, 0, 0

    def step(depth):
        def run():
            nonlocal running, most, done
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.01)
            with lock:
                running, done = running - 1, done + 1
            return [f"{depth}"], [step(depth + 1) for _ in range(4)] if depth < 4 else []

        return run

    assert len(list(listing._explore(step(0)))) == 1 + 4 + 16 + 64 + 256
    assert 4 < most <= listing.LISTERS
    before, threads = done, threading.active_count()
    found = listing._explore(step(0))
    next(found), next(found)
    found.close()
    assert running == 0 and threading.active_count() <= threads
    time.sleep(0.1)
    assert done - before < 60


def test_few_steps_are_ahead_of_who_takes_the_files():
    """A folder of very many folders: else their files would pile up in memory."""
    done = []

    def folder(n):
        return lambda: (done.append(n), ([n] * 10, []))[1]

    found = listing._explore(lambda: (["root"], [folder(n) for n in range(5000)]))
    assert next(found) == "root"
    time.sleep(0.2)
    assert len(done) <= 3 * listing.LISTERS
    assert sum(1 for _ in found) == 50_000


def test_a_step_that_fails_ends_the_listing():
    def step(n):
        def run():
            if n == 7:
                raise PermissionError("folder 7")
            return [n], [step(n + 1), step(n + 1)]

        return run

    threads = threading.active_count()
    with pytest.raises(PermissionError, match="folder 7"):
        list(listing._explore(step(0)))
    assert threading.active_count() <= threads


def test_long_listings_say_how_far_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(listing, "EVERY", -1.0)
    for i in range(1030):
        (tmp_path / f"{i}.png").touch()
    assert len(listed(tmp_path)) == 1030
    assert f"listing {tmp_path}: 1024 files" in capsys.readouterr().err


# What is passed over


LEFT = [
    ".git/config",
    ".DS_Store",
    "._0.png",
    "_SUCCESS",
    "_metadata",
    "_common_metadata",
    "_committed_1",
    "_started_1",
]
LEFT += ["_delta_log/0.json", "_delta_log/0.checkpoint.parquet", "a/_temporary/0/part-0.png", "_tmp/1.feather"]
LEFT += ["__MACOSX/0.jpg", ".part-0.parquet.crc", "_notes.txt", "a/_x/b.parquet", "_spark_metadata/0", "_tmp/2.jpg"]
DATA = [
    "_DSC0001.jpg",
    "_IMG.TIFF",
    "a/_x.png",
    "_best/1.webp",
    "_year=2024/part.parquet",
    "a_b/c_.txt",
    "0.png",
    "a/1",
]
DATA += ["label=__HIVE_DEFAULT_PARTITION__/part-0.parquet", "x_temporary/1.png"]


def test_leftovers_of_other_tools_are_passed_over_on_any_store(tmp_path, fill, moto):
    """Names that begin with `.` or `_`, but for pictures and partitions."""
    fill(tmp_path / "in", dict.fromkeys([*LEFT, *DATA], b"x"))
    memory, bucket = f"memory://{uuid.uuid4().hex}", moto.bucket()
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in [*LEFT, *DATA]:
            fsspec.filesystem("memory").pipe_file(f"{memory.removeprefix('memory:/')}/{name}", b"x")
            archive.writestr(name, b"x")
            moto.fs.pipe_file(f"{bucket}/{name}", b"x")
    for uri in (tmp_path / "in", memory, f"zip://::{tmp_path}/x.zip", bucket):
        seen = Seen()
        found = sorted(file.name for file in list_files(str(uri), moto.options, (), seen))
        assert found == sorted(DATA), uri
        assert 0 < seen.hidden <= len(LEFT)  # a folder that is not entered is one
    assert listed(tmp_path / "in" / "_best") == ["1.webp"]


def test_what_is_asked_for_by_name_is_never_passed_over(tmp_path, fill):
    names = ["_a/0.tar", "_b/0.tar", "c/_0.tar", "_tmp/3.tar", ".x.png", "_x.dat"]
    fill(tmp_path, dict.fromkeys(names, b"x"))
    assert listed(tmp_path / ".x.png") == [".x.png"] and listed(tmp_path / "_a/0.tar") == ["0.tar"]
    assert listed(tmp_path / "_tmp") == ["3.tar"]
    assert listed(f"{tmp_path}/_[ab]/*.tar") == listed(f"{tmp_path}/{{_a,_b}}/0.tar") == ["_a/0.tar", "_b/0.tar"]
    assert listed(f"{tmp_path}/c/_*") == ["_0.tar"]
    assert listed(f"{tmp_path}/*/*.tar") == []
    assert listed(tmp_path, extensions=["dat"]) == ["_x.dat"]


def test_what_is_passed_over_is_counted_in_one_line(tmp_path, fill, pngs, names, refused, capsys):
    fill(
        tmp_path / "in",
        {"_SUCCESS": b"", ".git/a": b"x", "_temporary/0.png": b"x", "_1.png": pngs[1], "2.png": pngs[2]},
    )
    assert names(tmp_path / "in") == names(tmp_path / "in") == ["2.png", "_1.png"]
    said = capsys.readouterr().err
    assert said == f"passed over in {tmp_path}/in: names that begin with . or _: 3\n"  # once
    fill(tmp_path / "none", {"_SUCCESS": b"", "_data/0.parquet": b"x"})
    assert "holds no files (passed over: names that begin with . or _: 2)" in refused(tmp_path / "none")


def test_a_delta_table_is_warned_of(tmp_path, fill, sample, rows, capsys):
    fill(tmp_path, {"part-0.parquet": sample.read_bytes(), "_delta_log/00000000000000000000.json": b"{}"})
    assert len(rows(tmp_path)) == 256
    assert f"warning: {tmp_path} is a Delta table" in capsys.readouterr().err


def test_an_empty_key_with_the_name_of_a_folder_is_not_the_collection(moto, pngs, names):
    """As consoles and Hadoop leave them."""
    bucket, fs = moto.bucket(), moto.fs
    fs.call_s3("put_object", Bucket=bucket.removeprefix("s3://"), Key="photos", Body=b"")
    assert names(f"{bucket}/photos", storage_options=moto.options) == ["photos"]
    fs.pipe_file(f"{bucket}/photos/1.png", pngs[1])
    fs.pipe_file(f"{bucket}/photos2/2.png", pngs[2])
    assert names(f"{bucket}/photos", storage_options=moto.options) == ["1.png"]


def run_in(folder, fill, sample):
    """What a run leaves in a folder, in part."""
    fill(folder, {"run.json": b'{"job": "encode", "config": {}}', "plan/complete.json": b"{}", "summary.json": b"{}"})
    fill(folder, {"latents/a.parquet": sample.read_bytes(), "png/0.png": b"x", "plan/000000.parquet": b"x"})


@pytest.mark.parametrize("uri", ["{}", "{}/**", "{}/**/*.png", "{}/*/*/*.png", "{}/*"])
def test_runs_below_a_collection_are_no_inputs(uri, tmp_path, fill, sample, pngs, names, moto, capsys):
    root = tmp_path / "in"
    fill(root, {"0.png": pngs[0], "a/b/1.png": pngs[1], "other/run.json": b"[]", "other/2.png": pngs[2]})
    before = names(uri.format(root))
    run_in(root / "runs" / "one", fill, sample)
    run_in(root / "a" / "b" / "run", fill, sample)
    run_in(root / "flat", fill, sample)
    assert names(uri.format(root)) == before
    bucket, fs = moto.bucket(), moto.fs
    for path in root.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{bucket}/in/{path.relative_to(root)}", path.read_bytes())
    assert names(uri.format(f"{bucket}/in"), storage_options=moto.options) == before


def test_a_run_that_is_named_itself_is_read(tmp_path, fill, sample, names):
    run_in(tmp_path / "run", fill, sample)
    run_in(tmp_path / "other", fill, sample)
    assert "png/0.png" in names(tmp_path / "run", kind="files")
    assert names(tmp_path / "run" / "png") == ["0.png"]
    assert "run/png/0.png" in names(f"{tmp_path}/{{run,other}}", kind="files")


# What users have


def test_data_set_of_the_hub(tmp_path, sample, fill):
    fill(tmp_path, {"README.md": b"# x", ".gitattributes": b"x", "LICENSE": b"x", "dataset_infos.json": b"{}"})
    fill(tmp_path, {f"data/train-0000{i}-of-00002.parquet": sample.read_bytes() for i in range(2)})
    for uri in (tmp_path, tmp_path / "data", f"{tmp_path}/data/train-*.parquet", f"{tmp_path}/**/*.parquet"):
        collection = open_collection(str(uri), keep=["label"])
        assert (collection.kind, sum(p.stop - p.start for p in list_pieces(collection, 100))) == ("parquet", 512)


def test_upper_case_pictures_beside_notes(tmp_path, fill):
    fill(tmp_path, {"A.JPG": b"x", "B.Png": b"x", "notes.TXT": b"x", "labels.csv": b"uri\nA.JPG\n"})
    collection = open_collection(str(tmp_path), extensions=["jpg", "png"])
    assert [piece.name for piece in list_pieces(collection, 10)] == ["A.JPG", "B.Png"]


def test_many_files_before_the_first_tar(tmp_path, fill, tar_of, pngs):
    """More than are looked at to recognise a collection; which it is was said."""
    fill(tmp_path, {f"{i}.json": b"{}" for i in range(1100)} | {"z/z.tar": tar_of([("0.png", pngs[0])])})
    collection = open_collection(str(tmp_path), kind=WEBDATASET)
    assert open_collection(str(tmp_path)).kind == WEBDATASET
    assert [piece.name for piece in list_pieces(collection, 10)] == ["z/z.tar"]


def test_new_files_are_added_wherever_they_sort(tmp_path, fill, monkeypatch):
    monkeypatch.setattr(listing, "IN_MEMORY", 3)
    fill(tmp_path, {f"in/{name}": b"x" for name in ["b/1.png", "b.png", "d.png", "a0/2.png"]})
    collection, run = open_collection(f"{tmp_path}/in"), Folder(f"{tmp_path}/run")
    write_plan(run, collection, 2)
    before = list(read_plan(run))
    fill(tmp_path, {f"in/{name}": b"x" for name in ["a/9.png", "b/0.png", "c.png", "z.png"]})
    _, changes = extend_plan(run, collection, 2)
    assert (changes.added, changes.changed, changes.removed) == (4, 0, 0)
    assert list(read_plan(run))[: len(before)] == before
    planned = [piece.name for shard in read_plan(run) for piece in shard.pieces]
    assert sorted(planned) == listed(f"{tmp_path}/in")


# S3


@pytest.fixture(scope="module")
def fs(moto):
    return moto.fs


def put(fs, bucket, keys):
    for key in keys:
        fs.call_s3("put_object", Bucket=bucket, Key=key, Body=b"x")


PARTS = ["a", "a0", "a.b", "b", "ü", "a b", "%41", "x+y", "&<>", "'\"", "#?", "漢", "A", "~", "!", "a\tb", "", "", ""]
KEY = st.tuples(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4), st.booleans())
KEYS = st.lists(KEY, min_size=1, max_size=30)


@settings(max_examples=40)
@given(keys=KEYS, ranges=st.sampled_from([1, 2, 3, 64]), page=st.sampled_from([1, 2, 7, 1000]))
def test_every_key_once(keys, ranges, page, moto, fs):
    """Keys with double slashes, markers of folders, and characters that XML and URLs quote; few or many a page."""
    bucket = moto.bucket().removeprefix("s3://")
    put_there = {"/".join(parts) + ("/" if marker and parts[-1] else "") for parts, marker in keys} - {""}
    put(fs, bucket, put_there)
    call = type(fs).call_s3

    def paged(self, method, *args, **kwargs):
        more = {"MaxKeys": page} if method == "list_objects_v2" else {}
        return call(self, method, *args, **kwargs, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "RANGES", ranges)
        patch.setattr(type(fs), "call_s3", paged)
        found = [file.path for file in listing._walk(fs, bucket)]
        below = [file.path for file in listing._walk(fs, f"{bucket}/a")]
        assert len(set(found)) == len(found)
        assert {path for path in found if not path.endswith("/")} == {
            f"{bucket}/{key}" for key in put_there if not key.endswith("/")
        }
        assert sorted(path for path in below if not path.endswith("/")) == sorted(
            f"{bucket}/{key}" for key in put_there if key.startswith("a/") and not key.endswith("/")
        )


def test_what_is_listed_is_what_is_read(moto, fs, shards, accounted):
    bucket = moto.bucket()
    keys = ["a/1.png", "a//1.png", "/1.png", "1.png", "a.b/1.png", "a0/1.png", "ü b/%41+&.png", "c/", "c/2.png"]
    keys += ["a/.x/3.png"]
    for i, key in enumerate(keys):
        fs.call_s3("put_object", Bucket=bucket.removeprefix("s3://"), Key=key, Body=b"%d" % i)
    collection = open_collection(bucket, storage_options=moto.options)
    pieces = list(list_pieces(collection, 10))
    found = {raw.image_id: raw.data for raw in accounted(collection, shards(collection))}
    assert found == {key: b"%d" % i for i, key in enumerate(keys) if not key.endswith("/") and "/." not in key}
    assert [piece.name for piece in pieces] == sorted(found)
    assert all(piece.size == 1 and piece.version for piece in pieces)
    for uri, expected in [
        (f"{bucket}/a", ["/1.png", "1.png"]),
        (f"{bucket}/a/1.png", ["1.png"]),
        (f"{bucket}/a*/1.png", ["a.b/1.png", "a/1.png", "a0/1.png"]),
        (f"{bucket}/{{a,a0}}/1.png", ["a/1.png", "a0/1.png"]),
        (f"{bucket}/{{a0,c}}", ["a0/1.png", "c/2.png"]),
        (f"{bucket}/c/*", ["2.png"]),
    ]:
        assert listed(uri, moto.options) == expected, uri
    assert "a1/1.png" in refused(f"{bucket}/{{a,a1}}/1.png", moto.options)
    assert "none" in refused(f"{bucket}/none", moto.options)


@pytest.mark.parametrize(
    "keys", [["/b.png"], ["a//b.png"], ["a//", "a//b//c.png"], ["a/b/c/d/e.png"], ["//", "///x.png"]]
)
def test_folders_without_a_name_end(keys, moto, fs):
    bucket = moto.bucket()
    put(fs, bucket.removeprefix("s3://"), keys)
    assert listed(bucket, moto.options) == [key for key in keys if not key.endswith("/")]


def test_more_keys_than_a_page_in_many_folders(moto, fs):
    """Pages of the server's own size, and ranges that are cut where folders begin."""
    bucket, dice = moto.bucket(), random.Random(0)
    keys = sorted({f"{dice.randrange(30):02d}/{dice.randrange(9)}/{dice.randrange(10**6)}.png" for _ in range(1200)})
    with listing.ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: put(fs, bucket.removeprefix("s3://"), [key]), keys))
    assert listed(bucket, moto.options) == keys
    assert listed(f"{bucket}/1*/[0-4]/*.png", moto.options) == [k for k in keys if k[0] == "1" and k[3] in "01234"]
