"""Parquet -> references, and the bytes behind each of them exactly once."""

import decimal
import io
import pickle
import sys
import uuid

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather

from palindrome.pipeline.base.errors import SourceError
from palindrome.pipeline.images import sources
from palindrome.pipeline.images.sources import ARROW, PARQUET, list_pieces, listing, open_collection, read_raw
from palindrome.pipeline.runs.schemas import LATENT_COLUMNS


def table(pngs, n, plain=False):
    if plain:
        return pa.table({"id": pa.array(range(n)), "png": pa.array(pngs[:n], pa.binary())})
    images = [{"bytes": png, "path": f"{i}.png"} for i, png in enumerate(pngs[:n])]
    return pa.table({"img": images, "label": [i % 10 for i in range(n)]})


def test_sample_is_read_row_by_row(sample, rows):
    found = rows(sample, 64, keep=["label"])
    expected = duckdb.sql(f"select img.bytes, label from '{sample}'").fetchall()
    assert [(raw.data, raw.kept["label"]) for raw in found] == expected
    assert [raw.image_id for raw in found] == [f"{sample.name}#{i}" for i in range(256)]
    assert open_collection(str(sample)).kind == PARQUET


@pytest.mark.parametrize("column_type", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_plain_binary_column(column_type, tmp_path, pngs, rows):
    column = pa.array(pngs[:5]).cast(column_type)
    pq.write_table(pa.table({"name": list("abcde"), "data": column}), tmp_path / "a.parquet")
    assert open_collection(str(tmp_path)).image_column == "data"
    assert [raw.data for raw in rows(tmp_path)] == pngs[:5]


def test_several_files_in_folders_and_by_glob(tmp_path, pngs, rows, names):
    for i, name in enumerate(["train/0.parquet", "train/1.parquet", "test/0.PARQUET"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(table(pngs[3 * i :], 3), tmp_path / name)
    assert names(tmp_path) == [
        f"{name}#{i}" for name in ("test/0.PARQUET", "train/0.parquet", "train/1.parquet") for i in range(3)
    ]
    assert [raw.data for raw in rows(f"{tmp_path}/train/*.parquet")] == pngs[:6]
    assert [raw.data for raw in rows(tmp_path, 4)] == pngs[6:9] + pngs[:6]


def test_a_readme_beside_parquet_files_is_no_image(tmp_path, sample):
    (tmp_path / "README.md").write_text("# A data set, as the hub has it\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_bytes(sample.read_bytes())
    collection = open_collection(str(tmp_path))
    assert collection.kind == "parquet"
    assert [(p.name, p.start, p.stop) for p in list_pieces(collection, 512)] == [("data/train.parquet", 0, 256)]


def test_a_table_beside_pictures_is_one_input_more(tmp_path, pngs):
    """One without images, whatever its size, or a small one."""
    (tmp_path / "one.png").write_bytes(pngs[0])
    pq.write_table(pa.table({"name": [f"{i}.png" for i in range(5000)]}), tmp_path / "metadata.parquet")
    collection = open_collection(str(tmp_path))
    assert collection.kind == "files"
    assert [p.name for p in list_pieces(collection, 512)] == ["metadata.parquet", "one.png"]


@pytest.mark.parametrize("banner", ["assets/banner.png", "a.JPG", "z.webp"])
def test_a_banner_beside_parquet_is_passed_over(banner, tmp_path, sample, pngs, rows, fill, capsys):
    fill(tmp_path, {"data/train.parquet": sample.read_bytes(), "README.md": b"# x", banner: pngs[0]})
    assert len(rows(tmp_path)) == 256
    assert "files beside the parquet: 2" in capsys.readouterr().err
    assert open_collection(str(tmp_path), kind="files").kind == "files"


def test_pictures_and_parquet_in_like_amounts_are_refused(tmp_path, sample, pngs, fill, refused, rows):
    fill(tmp_path, {"data/train.parquet": sample.read_bytes(), **{f"{i}.png": pngs[i] for i in range(200)}})
    assert "200 pictures and 1 Parquet files; say which of them are meant: files, parquet" in refused(tmp_path)
    assert len(rows(tmp_path, kind="parquet")) == 256
    assert len(rows(tmp_path, image_column="img")) == 256  # pictures have no columns
    fill(tmp_path, {"more.bmp": b"x" * 20 * sample.stat().st_size})
    assert open_collection(str(tmp_path)).kind == "files"


@pytest.mark.parametrize("last", ["parquet", "pictures"])
def test_kind_does_not_depend_on_the_order_of_names(last, tmp_path, sample, pngs, fill, refused, monkeypatch):
    """Where only some of the names are looked at first, all of them are before a piece is planned."""
    monkeypatch.setattr(sources, "HEADS", 3)
    content = {"train.parquet": sample.read_bytes(), **{f"{i}.png": pngs[i] for i in range(3)}}
    fill(tmp_path, content)
    names = sorted(listing.list_files(str(tmp_path), {}), key=lambda file: file.name.endswith("parquet"))
    ordered = names if last == "parquet" else names[::-1]
    monkeypatch.setattr(sources, "list_files", lambda *_: iter(ordered))
    if last == "parquet":
        assert "looked like files by the first names listed, and by all like parquet" in refused(tmp_path)
    else:
        assert open_collection(str(tmp_path)).kind == PARQUET


def test_parquet_in_memory_filesystem(pngs, rows):
    root, sink = f"memory://{uuid.uuid4().hex}", io.BytesIO()
    pq.write_table(table(pngs, 7), sink, row_group_size=3)
    fsspec.filesystem("memory").pipe_file(f"{root.removeprefix('memory:/')}/a.parquet", sink.getvalue())
    assert [raw.data for raw in rows(root, 2)] == pngs[:7]


def test_kept_columns_come_along_in_order_with_their_types(tmp_path, pngs, rows):
    extra = {"caption": ["a", None, "ç"], "score": pa.array([1.5, 2.5, None], pa.float32()), "tags": [["x"], [], None]}
    base = table(pngs, 3)
    for name, values in extra.items():
        base = base.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
    pq.write_table(base, tmp_path / "a.parquet")
    keep = ["tags", "label", "caption", "score"]
    collection = open_collection(str(tmp_path), keep=keep)
    assert [(f.name, f.type) for f in collection.kept] == [(n, base.schema.field(n).type) for n in keep]
    found = rows(tmp_path, keep=keep)
    assert [raw.kept for raw in found] == base.select(keep).to_pylist()
    assert list(found[0].kept) == keep


def test_text_that_is_no_utf_8_harms_only_who_keeps_it(tmp_path, pngs, rows):
    """Arrow lets such text through, until it is looked at."""
    bad = pa.array([b"ok", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    images = pa.StructArray.from_arrays([pa.array(pngs[:2]), bad], ["bytes", "path"])
    pq.write_table(pa.table({"img": images, "caption": bad, "label": [1, 2]}), tmp_path / "a.parquet")
    assert [raw.data for raw in rows(tmp_path, keep=["label"])] == pngs[:2]
    assert {raw.reason for raw in rows(tmp_path, keep=["caption"])} == {"unreadable"}


def test_image_column_can_be_kept(tmp_path, pngs, rows):
    pq.write_table(table(pngs, 3), tmp_path / "a.parquet")
    for raw, png in zip(rows(tmp_path, keep=["img", "label"]), pngs[:3], strict=True):
        assert raw.data == raw.kept["img"]["bytes"] == png


@settings(max_examples=60)
@given(
    files=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=3),
    shard_size=st.integers(1, 12),
)
def test_row_ranges_cover_each_row_once_and_fit(files, shard_size, tmp_path_factory, shards, accounted):
    """Any sizes of row groups, empty ones too, and any size of shards."""
    folder, expected = tmp_path_factory.mktemp("ranges"), []
    schema = pa.schema([("n", pa.int64()), ("img", pa.binary())])
    for i, groups in enumerate(files):
        with pq.ParquetWriter(folder / f"{i}.parquet", schema) as writer:
            for size in groups:
                numbers = list(range(len(expected), len(expected) + size))
                writer.write_table(pa.table([numbers, [b"%d" % n for n in numbers]], schema=schema))
                expected += numbers
    collection = open_collection(str(folder), keep=["n"])
    pieces = list(list_pieces(collection, shard_size))
    assert all(0 < piece.stop - piece.start <= shard_size for piece in pieces)
    found = accounted(collection, shards(collection, shard_size))
    assert [raw.kept["n"] for raw in found] == expected
    assert [raw.data for raw in found] == [b"%d" % n for n in expected]


def test_part_of_a_row_group_is_read_alone(sample, shards, accounted):
    """The ids and bytes of a range are the same whether read alone or with its neighbours."""
    collection = open_collection(str(sample))
    whole = accounted(collection, shards(collection, 256))
    for shard in shards(collection, 37):
        (piece,) = shard.pieces
        assert list(read_raw(collection, shard)) == whole[piece.start : piece.stop]


def test_null_rows_are_rejects_and_empty_bytes_are_not(tmp_path, pngs, rows):
    images = [{"bytes": pngs[0], "path": "a"}, None, {"bytes": None, "path": "b"}, {"bytes": b"", "path": "c"}]
    pq.write_table(pa.table({"img": images, "label": [1, 2, None, 4]}), tmp_path / "a.parquet")
    found = rows(tmp_path, keep=["label"])
    assert [(raw.data, raw.reason) for raw in found] == [(pngs[0], ""), (None, "null"), (None, "null"), (b"", "")]
    assert [raw.kept["label"] for raw in found] == [1, 2, None, 4]


def test_unknown_column_is_refused_by_name(sample, refused):
    for option in ({"keep": ["colour"]}, {"keep": ["label", "colour"]}, {"image_column": "colour"}):
        message = refused(sample, **option)
        assert "'colour'" in message
        assert "img, label" in message  # what there is


def test_refusal_knows_the_setting_at_fault(tmp_path, sample, pngs, fill):
    fill(tmp_path, {"a.png": pngs[0]})
    for uri, options, setting in [
        (tmp_path / "none", {}, "images"),
        (tmp_path, {"keep": ["label"]}, "keep"),
        (tmp_path, {"image_column": "img"}, "image_column"),
        (sample, {"keep": ["colour"]}, "keep"),
        (sample, {"keep": ["label"], "image_column": "colour"}, "image_column"),
    ]:
        with pytest.raises(SourceError) as info:
            open_collection(str(uri), **options)
        assert info.value.field == setting


def test_column_without_bytes_is_refused(sample, refused):
    assert "'label' has no bytes" in refused(sample, image_column="label")


@pytest.mark.parametrize("name", ["latent", "image_id", "mse"])
def test_kept_column_may_not_shadow_a_latents_own(name, tmp_path, pngs, refused):
    pq.write_table(table(pngs, 2).append_column(name, pa.array([1, 2])), tmp_path / "a.parquet")
    assert repr(name) in refused(tmp_path, keep=[name], reserved=LATENT_COLUMNS)


def test_ambiguous_image_column_must_be_named(tmp_path, pngs, rows, refused):
    both = table(pngs, 4).append_column("mask", pa.array(pngs[4:8], pa.binary()))
    pq.write_table(both, tmp_path / "a.parquet")
    assert "img, mask" in refused(tmp_path)
    assert [raw.data for raw in rows(tmp_path, image_column="mask")] == pngs[4:8]
    assert [raw.data for raw in rows(tmp_path, image_column="img")] == pngs[:4]


def test_parquet_without_bytes_is_refused(tmp_path, refused):
    pq.write_table(pa.table({"text": ["a"], "s": [{"path": "x"}]}), tmp_path / "a.parquet")
    assert "text, s" in refused(tmp_path)


def corrupt(content, how):
    if how == "empty":
        return b""
    if how == "text":
        return b"id,label\n1,2\n" * 20
    if how == "cut":
        return content[:-100]
    if how == "thrift":
        return content[:-1000] + b"\xff" * 992 + content[-8:]
    if how == "column name":
        return content.replace(b"label", b"\xff\xfe\xfd\xfc\xfb")
    return content[:-8] + b"\xff\xff\xff\x7f" + content[-4:]  # the footer's length


@pytest.mark.parametrize("how", ["empty", "text", "cut", "thrift", "length", "column name"])
@pytest.mark.parametrize("name", ["0.parquet", "2.parquet"])
def test_corrupt_parquet_file_is_refused_by_name(name, how, tmp_path, pngs, refused):
    pq.write_table(table(pngs, 5), tmp_path / "1.parquet")
    (tmp_path / name).write_bytes(corrupt((tmp_path / "1.parquet").read_bytes(), how))
    message = refused(tmp_path)
    assert f"{tmp_path}/{name} is not a Parquet file" in message
    assert "\n" not in message


def test_dangling_parquet_file_is_refused_by_name(tmp_path, refused):
    (tmp_path / "a.parquet").symlink_to("nowhere")
    assert "a.parquet can't be opened: No such file or directory" in refused(tmp_path)


def test_later_file_must_have_the_columns_of_the_first(tmp_path, pngs, refused):
    pq.write_table(table(pngs, 3), tmp_path / "0.parquet")
    for other, column in [
        (pa.table({"label": [1]}), "img"),
        (pa.table({"img": ["text"], "label": [1]}), "img"),
        (table(pngs, 3).drop_columns(["label"]), "label"),
        (table(pngs, 3).set_column(1, "label", pa.array(["a", "b", "c"])), "label"),
    ]:
        pq.write_table(other, tmp_path / "1.parquet")
        message = refused(tmp_path, keep=["label"])
        assert "1.parquet" in message
        assert repr(column) in message


@pytest.fixture
def planned(tmp_path, pngs, shards):
    """20 rows in one file in groups of 7, planned in shards of 5 at most; and where the file is."""
    path = tmp_path / "a.parquet"
    pq.write_table(table(pngs, 20), path, row_group_size=7)
    collection = open_collection(str(path), keep=["label"])
    return collection, shards(collection, 5), path


def test_shrunk_parquet_file_accounts_for_each_listed_row(planned, pngs, accounted):
    collection, plan, path = planned
    pq.write_table(table(pngs, 9), path, row_group_size=2)
    found = accounted(collection, plan)
    assert [raw.data for raw in found[:9]] == pngs[:9]
    assert {raw.reason for raw in found[9:]} == {"missing"}
    assert [raw.image_id for raw in found] == [f"a.parquet#{i}" for i in range(20)]
    assert found[-1].kept == {"label": None}


def test_grown_parquet_file_gives_the_listed_rows(planned, pngs, accounted):
    collection, plan, path = planned
    pq.write_table(table(pngs, 40), path, row_group_size=11)
    assert [raw.data for raw in accounted(collection, plan)] == pngs[:20]


def test_removed_parquet_file_is_missing(planned, accounted):
    collection, plan, path = planned
    path.unlink()
    assert {(raw.reason, raw.detail) for raw in accounted(collection, plan)} == {("missing", "no such file")}


@pytest.mark.parametrize("what", ["text", "no image column", "other label"])
def test_replaced_parquet_file_is_unreadable(what, planned, pngs, accounted):
    collection, plan, path = planned
    if what == "text":
        path.write_text("something else\n" * 50)
    elif what == "no image column":
        pq.write_table(pa.table({"label": list(range(20))}), path)
    else:
        pq.write_table(table(pngs, 20).set_column(1, "label", pa.array(["x"] * 20)), path)
    found = accounted(collection, plan)
    assert {raw.reason for raw in found} == {"unreadable"}
    assert all("a.parquet" in raw.detail for raw in found)


@settings(max_examples=80)
@given(edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=30)), min_size=1))
def test_damaged_pages_account_for_each_row(edits, sample, tmp_path_factory, shards, accounted):
    """Bytes written over between plan and read: each listed row comes once, with bytes or a reason, twice the same."""
    path = tmp_path_factory.mktemp("damaged") / "a.parquet"
    pq.write_table(pq.read_table(sample).slice(0, 24), path, row_group_size=5)
    collection = open_collection(str(path))
    plan = shards(collection, 4)
    content = bytearray(path.read_bytes())
    for where, noise in edits:
        at = int(where * (len(content) - 4000))  # before the footer
        content[at : at + len(noise)] = noise
    path.write_bytes(content)
    found = accounted(collection, plan)
    assert [raw.image_id for raw in found] == [f"a.parquet#{i}" for i in range(24)]
    assert found == accounted(collection, plan)


# Nulls, files without rows, types


def write(path, table):
    """By the ending: Parquet, Feather, or a stream as save_to_disk writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".feather":
        feather.write_feather(table, str(path), compression="zstd")
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=4)


@pytest.mark.parametrize("ending", ["parquet", "feather", "arrow"])
@pytest.mark.parametrize("where", ["0", "2"])
def test_a_column_that_is_null_throughout_a_file(where, ending, tmp_path, pngs, rows):
    """Writers give it the type null; in the first file as in a later one."""
    for i, label in enumerate(["a", "b", "c"]):
        labels = pa.nulls(2) if str(i) == where else pa.array([label, None])
        write(tmp_path / f"{i}.{ending}", table(pngs[2 * i :], 2).set_column(1, "label", labels))
    found = rows(tmp_path, keep=["label"])
    assert [raw.data for raw in found] == pngs[:6]
    expected = [value for i, label in enumerate("abc") for value in ([None] * 2 if str(i) == where else [label, None])]
    assert [raw.kept["label"] for raw in found] == expected
    (field,) = open_collection(str(tmp_path), keep=["label"]).kept
    assert field.type == pa.string()


@pytest.mark.parametrize("name", ["0", "2"])
@pytest.mark.parametrize("images", [pa.nulls(2), pa.array([{"bytes": None, "path": "x"}] * 2)])
def test_images_that_are_null_throughout_a_file_are_rejects(images, name, tmp_path, pngs, rows):
    pq.write_table(table(pngs, 3), tmp_path / "1.parquet")
    pq.write_table(pa.table({"img": images, "label": [1, 2]}), tmp_path / f"{name}.parquet")
    found = {raw.image_id: (raw.data, raw.reason) for raw in rows(tmp_path, keep=["label"])}
    assert found == {f"1.parquet#{i}": (pngs[i], "") for i in range(3)} | {
        f"{name}.parquet#{i}": (None, "null") for i in range(2)
    }


@pytest.mark.parametrize("ending", ["parquet", "feather", "arrow"])
@pytest.mark.parametrize("name", ["0", "2"])
@pytest.mark.parametrize("columns", [{"img": pa.nulls(0), "label": pa.nulls(0)}, {"other": pa.nulls(0)}, {}])
def test_a_file_without_rows_holds_nothing(columns, name, ending, tmp_path, pngs, rows):
    write(tmp_path / f"1.{ending}", table(pngs, 3))
    write(tmp_path / f"{name}.{ending}", pa.table(columns))
    assert [raw.data for raw in rows(tmp_path, keep=["label"])] == pngs[:3]


def test_numbers_and_texts_that_are_stored_otherwise_in_a_later_file(tmp_path, pngs, rows, refused):
    def put(name, label):
        pq.write_table(table(pngs, 2).set_column(1, "label", label), tmp_path / f"{name}.parquet")

    for first, second, kind in [
        (pa.array([1, 2], pa.int32()), pa.array([2**40, 4]), pa.int64()),
        (pa.array([1, 2]), pa.array([3, 4], pa.int8()), pa.int64()),
        (pa.array(["a", "b"]), pa.array(["a", None]).dictionary_encode(), pa.string()),
        (pa.array(["a", "b"]), pa.array(["c", "d"], pa.large_string()), pa.string()),
        (pa.array([1.5, 2.5], pa.float32()), pa.array([1.25, 1e300]), pa.float64()),
    ]:
        put("0", first)
        put("1", second)
        assert open_collection(str(tmp_path), keep=["label"]).kept[0].type == kind
        assert [raw.kept["label"] for raw in rows(tmp_path, keep=["label"])] == [
            *first.to_pylist(),
            *second.to_pylist(),
        ]
    put("1", pa.array(["x", "y"]))
    assert "'label'" in refused(tmp_path, keep=["label"])


DAY = 86_400
KEPT = {
    "when": pa.array([1_700_000_000_123_456_789, None, 1], pa.timestamp("ns", "UTC")),
    "far": pa.array([-(10**18), None, 10**18], pa.timestamp("us")),
    "local": pa.array([1, None, 2], pa.timestamp("ms", "America/New_York")),
    "duration": pa.array([1, 2_000_000_001, None], pa.duration("ns")),
    "time": pa.array([1, None, DAY * 10**9 - 1], pa.time64("ns")),
    "seconds": pa.array([1, None, 5], pa.time32("ms")),
    "day": pa.array([1, None, -800_000], pa.date32()),
    "category": pa.array(["x", "y", None]).dictionary_encode(),
    "price": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("9.99")], pa.decimal128(9, 2)),
    "large": pa.array([decimal.Decimal(10) ** 60, None, decimal.Decimal(1)], pa.decimal256(70, 0)),
    "tags": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())),
    "times": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.timestamp("ns"))),
    "vector": pa.array([[0.5, 1.5]] * 3, pa.list_(pa.float32(), 2)),
    "nested": pa.array(
        [[{"t": 1, "s": "a"}], None, []], pa.list_(pa.struct([("t", pa.timestamp("ns")), ("s", "string")]))
    ),
    "half": pa.array([1.5, None, 2.5], pa.float16()),
    "fixed": pa.array([b"ab", None, b"cd"], pa.binary(2)),
    "unsigned": pa.array([2**64 - 1, None, 0], pa.uint64()),
    "view": pa.array(["a", None, "b"], pa.string_view()),
    "tensor": pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.float32(), (2,)), pa.array([[1, 2], [3, 4], None], pa.list_(pa.float32(), 2))
    ),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"a" * 16, None, b"b" * 16], pa.binary(16))),
}


@pytest.mark.parametrize("pandas", [True, False])
@pytest.mark.parametrize("ending", ["parquet", "feather", "arrow"])
@pytest.mark.parametrize("name", KEPT)
def test_a_kept_column_of_any_type_has_its_values(name, ending, pandas, tmp_path, pngs, rows, monkeypatch):
    """As it is written to the latents' rows; times to the nanosecond without pandas, too."""
    if not pandas:
        monkeypatch.setitem(sys.modules, "pandas", None)
    column = KEPT[name]
    write(tmp_path / f"a.{ending}", table(pngs, 3).append_column(name, column))
    (field,) = open_collection(str(tmp_path), keep=[name]).kept
    found = pickle.loads(pickle.dumps([raw.kept[name] for raw in rows(tmp_path, keep=[name])]))
    written = pa.array(found, field.type)
    assert written.cast(column.type).equals(column) if field.type != column.type else written.equals(column)
    if ending != "parquet":
        assert field.type == column.type


# Arrow files


@pytest.mark.parametrize("ending", ["arrow", "feather", "ipc", "ARROW"])
@pytest.mark.parametrize("size", [1, 3, 5, 100])
def test_arrow_files_are_read_row_by_row(size, ending, tmp_path, pngs, rows, shards):
    """The formats of streams and of files, in batches of 4 rows; each piece is read alone."""
    content = table(pngs, 11)
    write(tmp_path / "ds" / f"data-00000-of-00002.{ending}", content)
    with pa.ipc.new_file(str(tmp_path / "ds" / f"data-00001-of-00002.{ending}"), content.schema) as writer:
        writer.write_table(content.slice(0, 6), max_chunksize=4)
    (tmp_path / "ds" / "state.json").write_text("{}")
    collection = open_collection(str(tmp_path / "ds"), keep=["label"])
    assert (collection.kind, collection.image_column) == (ARROW, "img")
    found = rows(tmp_path / "ds", size, keep=["label"])
    assert [raw.data for raw in found] == pngs[:11] + pngs[:6]
    assert [raw.kept["label"] for raw in found] == [*(i % 10 for i in range(11)), *range(6)]
    assert found[11].image_id == f"data-00001-of-00002.{ending}#0"
    assert all(0 < piece.stop - piece.start <= size for piece in list_pieces(collection, size))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_arrow_files_with_dictionaries(size, tmp_path, pngs, rows):
    """A batch can't be read without the dictionaries before it."""
    labels = pa.array([f"label {i % 4}" for i in range(11)]).dictionary_encode()
    write(tmp_path / "a.arrow", table(pngs, 11).set_column(1, "label", labels))
    found = rows(tmp_path, size, keep=["label"])
    assert [(raw.data, raw.kept["label"]) for raw in found] == [(pngs[i], f"label {i % 4}") for i in range(11)]


def test_damaged_arrow_files(tmp_path, pngs, refused, accounted, shards):
    path = tmp_path / "a.arrow"
    write(path, table(pngs, 11))
    content = path.read_bytes()
    collection = open_collection(str(tmp_path))
    planned = shards(collection, 5)
    for cut in (0, 10, 600, len(content) // 2, len(content) - 20):
        path.write_bytes(content[:cut])
        assert "a.arrow" in refused(tmp_path)
        found = accounted(collection, planned)
        assert [raw.data for raw in found if raw.data] == pngs[: sum(bool(raw.data) for raw in found)]
        assert {raw.reason for raw in found if not raw.data} <= {"unreadable", "missing"}
    path.write_bytes(b"FEA1" + content)
    assert "version 1" in refused(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 143014\n"


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv", "a.jsonl", "a.txt"])
def test_git_lfs_pointers_are_named(name, tmp_path, fill, refused):
    fill(tmp_path, {name: POINTER})
    assert f"{name} is no" in (message := refused(tmp_path)) and "Git LFS pointer" in message


def test_git_lfs_pointers_in_place_of_pictures_are_rejects(tmp_path, fill, rows, pngs):
    fill(tmp_path / "in", {"0.png": POINTER, "1.png": pngs[1]})
    pq.write_table(pa.table({"img": [POINTER, pngs[1]]}), tmp_path / "a.parquet")
    fill(tmp_path, {"a.txt": b"in/0.png\nin/1.png\n"})
    for uri in ("in", "a.parquet", "a.txt"):
        first, second = rows(tmp_path / uri)
        assert (first.reason, second.data) == ("not_an_image", pngs[1])
        assert "`git lfs pull`" in first.detail
