"""Pieces -> shards named by what is in them, and the plan's files."""

import json
import os
import uuid
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import duckdb
import fsspec
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palindrome.pipeline.base.errors import SourceError
from palindrome.pipeline.images.records import Piece, Shard, pack
from palindrome.pipeline.images.sources import list_pieces, open_collection
from palindrome.pipeline.runs import plan
from palindrome.pipeline.runs.plan import Totals, extend_plan, plan_totals, read_plan, write_plan
from palindrome.pipeline.storage.folder import Folder


def piece(i, images=1, start=0):
    return Piece(f"file:///in/{i:03d}", f"{i:03d}", 1000 + i, f"v{i}", start, start + images)


def images_of(pieces):
    """Every image that stands in these pieces: (file, row)."""
    return [(p.name, row) for p in pieces for row in range(p.start, p.stop)]


@st.composite
def listings(draw):
    """A shard size, and pieces none of which is larger, as list_pieces makes them."""
    shard_size = draw(st.integers(1, 20))
    sizes = draw(st.lists(st.integers(1, shard_size), max_size=40))
    return shard_size, [piece(i, n, draw(st.integers(0, 5))) for i, n in enumerate(sizes)]


@given(listings())
def test_no_group_is_larger_and_nothing_is_lost_or_moved(listing):
    shard_size, pieces = listing
    groups = list(pack(pieces, shard_size))
    assert [p for group in groups for p in group] == pieces
    assert all(0 < len(images_of(group)) <= shard_size for group in groups)


@given(listings())
def test_groups_are_as_full_as_order_allows(listing):
    shard_size, pieces = listing
    groups = list(pack(pieces, shard_size))
    for group, after in pairwise(groups):
        assert len(images_of(group)) + len(images_of(after[:1])) > shard_size


@given(listings(), st.integers(0, 300))
def test_limit_is_exact(listing, limit):
    shard_size, pieces = listing
    groups = list(pack(pieces, shard_size, limit))
    assert images_of([p for group in groups for p in group]) == images_of(pieces)[:limit]
    assert all(0 < len(images_of(group)) <= shard_size for group in groups)


def test_limit_reads_no_further_than_it_must():
    seen = []

    def listing():
        for i in range(1000):
            seen.append(i)
            yield piece(i)

    assert len(list(pack(listing(), 4, 10))) == 3
    assert seen == list(range(10))


@given(listings(), st.integers(0, 60))
def test_limit_keeps_the_names_of_full_shards(listing, limit):
    """So that a run with a higher limit would find the shards of one with a lower."""
    shard_size, pieces = listing
    whole = [Shard.of("files", group).name for group in pack(pieces, shard_size)]
    limited = [Shard.of("files", group).name for group in pack(pieces, shard_size, limit)]
    assert limited[:-1] == whole[: len(limited[:-1])]


@given(listings())
def test_names_differ_between_shards_of_a_plan(listing):
    shard_size, pieces = listing
    found = [Shard.of("files", group).name for group in pack(pieces, shard_size)]
    assert len(set(found)) == len(found)


def test_name_depends_on_content_and_nothing_else():
    pieces = (piece(1), piece(2, 5))
    name = Shard.of("files", pieces).name
    assert Shard.of("files", list(pieces)).name == name
    assert Shard.of("files", [replace(p, uri=f"s3://elsewhere/{p.name}") for p in pieces]).name == name  # moved
    changes = [{"name": "x"}, {"size": 7}, {"version": "later"}, {"start": 1}, {"stop": 6}]
    others = [Shard.of("files", (pieces[0], replace(pieces[1], **change))).name for change in changes]
    others += [Shard.of("files", some).name for some in (pieces[::-1], pieces[:1], pieces[1:])]
    others.append(Shard.of("parquet", pieces).name)
    assert len({name, *others}) == 1 + len(others)


@settings(max_examples=50)
@given(st.text(min_size=1, max_size=12), st.text(min_size=1, max_size=12))
def test_name_is_a_plain_file_name_whatever_the_pictures_are_called(one, other):
    names = {Shard.of("files", [replace(piece(0), name=name)]).name for name in (one, other)}
    assert len(names) == len({one, other})
    for name in names:
        assert len(name) == 24
        assert set(name) <= set("0123456789abcdef")


@pytest.fixture(params=["disk", "memory"])
def run(request, tmp_path):
    return Folder(str(tmp_path / "run") if request.param == "disk" else f"memory://{uuid.uuid4().hex}/run")


@pytest.fixture
def pictures(tmp_path, pngs):
    """A folder of 25 PNGs, in three folders."""
    for i, png in enumerate(pngs[:25]):
        path = tmp_path / "in" / str(i // 10) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
        os.utime(path, (1_700_000_000, 1_700_000_000 + i))
    return tmp_path / "in"


def names(folder, size=10, **options):
    collection = open_collection(str(folder))
    return [Shard.of(collection.kind, group).name for group in pack(list_pieces(collection, size), size, **options)]


def test_names_stay_when_pictures_are_added_after(pictures, pngs):
    before = names(pictures)
    (pictures / "3").mkdir()
    (pictures / "3" / "30.png").write_bytes(pngs[30])
    after = names(pictures)
    assert len(before) == 3
    assert after[:2] == before[:2]  # which were full
    assert after[2] != before[2]


def test_names_of_a_copied_folder_are_the_same(pictures, tmp_path):
    pictures.rename(tmp_path / "moved")
    moved = names(tmp_path / "moved")
    (tmp_path / "moved").rename(pictures)
    assert moved == names(pictures)


def test_changed_file_renames_its_shard_alone(pictures, pngs):
    before = names(pictures)
    changed = pictures / "1" / "12.png"
    changed.write_bytes(pngs[100])  # another size
    os.utime(changed, (1_700_000_000, 1_700_000_012))
    resized = names(pictures)
    os.utime(changed, (1_700_000_000, 1_700_009_999))
    touched = names(pictures)
    assert before[0] == resized[0] == touched[0]
    assert before[2] == resized[2] == touched[2]
    assert len({before[1], resized[1], touched[1]}) == 3


def test_plan_comes_back_as_it_was_written(run, pictures):
    collection = open_collection(str(pictures))
    totals = write_plan(run, collection, 10)
    shards = list(read_plan(run))
    assert shards == [Shard.of(collection.kind, group) for group in pack(list_pieces(collection, 10), 10)]
    assert totals == plan_totals(run) == Totals(3, 25)
    assert [shard.images for shard in shards] == [10, 10, 5]


def test_plan_of_the_sample_covers_its_rows(run, sample):
    assert write_plan(run, open_collection(str(sample)), 100) == Totals(3, 256)
    assert images_of(p for shard in read_plan(run) for p in shard.pieces) == [(sample.name, i) for i in range(256)]


def test_plan_is_read_by_duckdb_and_polars(tmp_path, pictures):
    write_plan(Folder(str(tmp_path / "run")), open_collection(str(pictures)), 10)
    files = f"{tmp_path}/run/plan/*.parquet"
    listed = duckdb.sql(f"select p.name from (select unnest(pieces) as p from '{files}')").fetchall()
    on_disk = sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("*.png"))
    assert [name for (name,) in listed] == on_disk
    assert polars.read_parquet(files)["images"].to_list() == [10, 10, 5]


def test_long_plan_is_split_over_files(run, pictures, monkeypatch):
    collection = open_collection(str(pictures))
    whole = [Shard.of(collection.kind, group) for group in pack(list_pieces(collection, 2), 2)]
    monkeypatch.setattr(plan, "PIECES_PER_FILE", 6)
    assert write_plan(run, collection, 2) == Totals(13, 25)
    assert list(run.files("plan")) == [f"{i:06d}.parquet" for i in range(5)] + ["complete.json"]
    assert list(read_plan(run)) == whole


def test_file_that_ends_with_the_plan_is_not_followed_by_an_empty_one(run, pictures, monkeypatch):
    monkeypatch.setattr(plan, "PIECES_PER_FILE", 5)
    assert write_plan(run, open_collection(str(pictures)), 5) == Totals(5, 25)
    assert len(run.files("plan")) == 5 + 1


def test_plan_without_its_last_file_is_none(run, pictures):
    collection = open_collection(str(pictures))
    assert plan_totals(run) is None
    write_plan(run, collection, 10)
    run.fs.rm_file(run.path("plan/complete.json"))
    assert run.files("plan")
    assert plan_totals(run) is None
    with pytest.raises(FileNotFoundError):
        list(read_plan(run))
    assert write_plan(run, collection, 10) == plan_totals(run)


def test_remains_of_a_longer_plan_are_not_read(run, pictures, monkeypatch):
    """A plan that was cut short, made again from a folder that had shrunk meanwhile."""
    monkeypatch.setattr(plan, "PIECES_PER_FILE", 5)
    write_plan(run, open_collection(str(pictures)), 5)
    run.fs.rm_file(run.path("plan/complete.json"))
    totals = write_plan(run, open_collection(str(pictures / "0")), 5)
    assert totals == Totals(2, 10)
    assert sum(shard.images for shard in read_plan(run)) == 10


def test_listing_that_fails_completes_no_plan(run, tmp_path, sample, monkeypatch):
    monkeypatch.setattr(plan, "PIECES_PER_FILE", 1)
    (tmp_path / "in").mkdir()
    pq.write_table(pq.read_table(sample).slice(0, 8), tmp_path / "in" / "0.parquet")
    (tmp_path / "in" / "1.parquet").write_bytes(b"no Parquet file")
    with pytest.raises(SourceError, match=r"1\.parquet"):
        write_plan(run, open_collection(str(tmp_path / "in")), 4)
    assert plan_totals(run) is None


def test_collection_without_rows_is_refused(run, tmp_path):
    pq.write_table(pa.table({"img": pa.array([], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet holds no images"):
        write_plan(run, open_collection(str(tmp_path / "a.parquet")), 10)
    assert plan_totals(run) is None


def test_names_that_are_no_utf_8_are_planned(run, tmp_path, pngs):
    (tmp_path / "in").mkdir()
    with open(os.fsencode(tmp_path / "in") + b"/\xff\xfe.png", "wb") as f:
        f.write(pngs[0])
    write_plan(run, open_collection(str(tmp_path / "in")), 10)
    (shard,) = read_plan(run)
    assert shard.pieces[0].name == "\\udcff\\udcfe.png"


def test_storage_options_are_in_no_file(run, pictures):
    collection = open_collection(str(pictures), storage_options={"auto_mkdir": False})
    write_plan(run, collection, 10)
    fs, root = fsspec.url_to_fs(run.uri)
    assert not any(b"auto_mkdir" in content for content in fs.cat(fs.find(root)).values())
    assert "auto_mkdir" not in repr(collection)


def test_complete_json_says_what_the_plan_holds(run, pictures):
    write_plan(run, open_collection(str(pictures)), 10, limit=12)
    assert json.loads(run.read("plan/complete.json")) == {
        "shards": 2,
        "images": 12,
        "files": 1,
        "generations": [1],
    }


@st.composite
def histories(draw):
    """Listings of one collection as it changes: name -> (version, rows) at each time, names of any text."""
    names = draw(st.lists(st.text("ab/é\U0001f600.", min_size=1, max_size=4), min_size=1, max_size=12, unique=True))
    state = st.dictionaries(st.sampled_from(names), st.tuples(st.integers(0, 2), st.integers(1, 9)))
    return draw(st.lists(state, min_size=2, max_size=5)), draw(st.integers(1, 8))


@settings(max_examples=60)
@given(histories())
def test_a_plan_grows_by_what_is_new_and_says_what_is_lost(tmp_path_factory, history):
    """Against a dictionary of what was planned first."""
    states, shard_size = history
    folder = Folder(str(tmp_path_factory.mktemp("plan")))
    planned, before = {}, []
    for state in states:
        listed = [
            Piece(f"memory://{name}", name, 1, str(version), start, min(start + shard_size, rows))
            for name, (version, rows) in sorted(state.items())
            for start in range(0, rows, shard_size)
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "list_pieces", lambda *_, listed=listed: iter(listed))
            totals, changes = extend_plan(folder, SimpleNamespace(kind="parquet"), shard_size)
        new = {name: found for name, found in state.items() if name not in planned}
        assert changes.added == sum(rows for _, rows in new.values())
        assert changes.removed == len(planned.keys() - state.keys())
        assert changes.changed == sum(state[name] != planned[name] for name in planned.keys() & state.keys())
        planned |= new
        if not planned:
            assert plan_totals(folder) is None
            continue
        shards = list(read_plan(folder))
        assert [shard.name for shard in shards][: len(before)] == before
        before = [shard.name for shard in shards]
        assert len(set(before)) == len(before) == totals.shards
        images = [image for shard in shards for image in images_of(shard.pieces)]
        assert sorted(images) == sorted((name, row) for name, (_, rows) in planned.items() for row in range(rows))
        assert totals == plan_totals(folder) == Totals(len(shards), len(images))


def test_a_plan_that_grew_is_listed_against_in_the_order_of_names(run, pictures, pngs):
    """Real files, some of whose names are no UTF-8, that come in between the others."""
    collection = open_collection(str(pictures))
    first = write_plan(run, collection, 4)
    for name in (b"000-a.png", b"005-\xff.png", b"\xc3\xa9.png", b"zz.png"):
        (pictures / os.fsdecode(name)).write_bytes(pngs[0])
    totals, changes = extend_plan(run, collection, 4)
    assert (changes.added, changes.changed, changes.removed) == (4, 0, 0)
    assert totals == Totals(first.shards + 1, first.images + 4)
    assert extend_plan(run, collection, 4)[1] == plan.Changes()
    (pictures / "zz.png").unlink()
    (pictures / "000-a.png").write_bytes(pngs[1] + b"more")
    changes = extend_plan(run, collection, 4)[1]
    assert changes == plan.Changes(0, 1, 1, ["000-a.png", "zz.png"])
