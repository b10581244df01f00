"""Shards -> batches: every input of a plan comes out once, as an image or as a reject, the same in every run."""

import hashlib
import io
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PIL

from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.read import read_batches, read_image
from palindrome.pipeline.images.records import REASONS, Image, Reject, Shard, pack
from palindrome.pipeline.images.sources import RawImage, list_pieces, open_collection
from palindrome.pipeline.runs.schemas import rejects_table

HOW = Preprocess(32)


def batches(uri, shard_size=16, batch_size=5, how=HOW, **options):
    collection = open_collection(str(uri), **options)
    found = []
    for pieces in pack(list_pieces(collection, shard_size), shard_size):
        shard = Shard.of(collection.kind, pieces)
        read = list(read_batches(collection, shard, how, batch_size))
        assert sum(len(batch.images) + len(batch.rejects) for batch in read) == shard.images
        found += read
    return found


def outcome(uri, **options):
    found = batches(uri, **options)
    images = [image for batch in found for image in batch.images]
    return images, [reject for batch in found for reject in batch.rejects]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    """100 good images and the 40 bad ones; their path, the good names, the bad names with their reasons."""
    path = tmp_path_factory.mktemp("corpus")
    return path, corpus.good_images(path, 100), corpus.bad_images(path)


def test_sample_comes_back_to_the_bit_with_labels_and_hashes(sample):
    images, rejects = outcome(sample, keep=["label"])
    assert not rejects
    expected = pq.read_table(sample).to_pylist()
    for image, row in zip(images, expected, strict=True):
        png = row["img"]["bytes"]
        np.testing.assert_array_equal(image.pixels, np.asarray(PIL.open(io.BytesIO(png))))
        assert image.content_hash == hashlib.sha256(png).hexdigest()
        assert (image.kept, image.width, image.height) == ({"label": row["label"]}, 32, 32)


def test_corpus_is_accounted_for_name_by_name(folder):
    path, good, bad = folder
    images, rejects = outcome(path)
    assert sorted(image.image_id for image in images) == sorted(good)
    assert {reject.image_id: reject.reason for reject in rejects} == bad
    assert len(rejects) == len(bad) == 40


def test_ten_kinds_of_bad_images(folder):
    _, _, bad = folder
    kinds = Counter(re.sub(r"-\d", "", name.split("/")[-1]) for name in bad)
    assert kinds.pop("text.jpg") + kinds.pop("page.png") == 4  # text under the name of a picture
    assert set(kinds.values()) == {4}
    assert len(kinds) == 9
    assert set(bad.values()) < set(REASONS)


def test_two_runs_write_the_same_rejects(folder):
    path, _, _ = folder
    first, second = (rejects_table(outcome(path)[1]) for _ in range(2))
    assert first.equals(second)
    assert not any(re.search(r"0x[0-9a-f]{6,}", detail) for detail in first["detail"].to_pylist())


def test_images_and_rejects_do_not_depend_on_shard_or_batch_size(folder):
    path, _, _ = folder

    def seen(**sizes):
        images, rejects = outcome(path, **sizes)
        return [(image.image_id, image.content_hash, image.pixels.tobytes()) for image in images], rejects

    assert seen(shard_size=7, batch_size=3) == seen(shard_size=1000, batch_size=64) == seen(shard_size=1, batch_size=1)


@settings(max_examples=50)
@given(good=st.lists(st.booleans(), min_size=1, max_size=40), batch_size=st.integers(1, 12))
def test_batches_are_full_but_the_last(good, batch_size, pngs, tmp_path_factory):
    path = tmp_path_factory.mktemp("batches") / "a.parquet"
    pq.write_table(pa.table({"img": pa.array([pngs[i] if g else b"?" for i, g in enumerate(good)], pa.binary())}), path)
    found = batches(path, shard_size=100, batch_size=batch_size)
    sizes = [len(batch.images) for batch in found]
    full, rest = divmod(sum(good), batch_size)
    assert [size for size in sizes if size] == [batch_size] * full + [rest] * bool(rest)
    ids = [image.image_id for batch in found for image in batch.images]
    assert ids == [f"a.parquet#{i}" for i, g in enumerate(good) if g]


def test_shard_of_rejects_alone_gives_batches_of_bounded_size(tmp_path):
    pq.write_table(pa.table({"img": pa.array([b"?"] * 2500, pa.binary())}), tmp_path / "a.parquet")
    found = batches(tmp_path, shard_size=5000, batch_size=64)
    assert [(len(batch.images), len(batch.rejects)) for batch in found] == [(0, 1024), (0, 1024), (0, 452)]


def test_reject_says_which_input_and_why():
    missing = RawImage("a.png", "file:///a.png", None, {}, "missing", "no such file")
    assert read_image(missing, HOW) == Reject("a.png", "file:///a.png", "missing", "no such file")
    empty = RawImage("b.png", "file:///b.png", b"", {"label": 1})
    assert read_image(empty, HOW) == Reject("b.png", "file:///b.png", "empty", "0 bytes")


def test_image_carries_the_size_before_preprocessing(picture_48x20):
    image = read_image(RawImage("a", "s", picture_48x20, {"k": 1}), HOW)
    assert isinstance(image, Image)
    assert (image.width, image.height, image.pixels.shape, image.kept) == (48, 20, (32, 32, 3), {"k": 1})


@pytest.fixture
def picture_48x20(pngs, corpus):
    return corpus.encoded(PIL.open(io.BytesIO(pngs[3])).resize((48, 20)), "PNG")


def test_null_missing_and_bad_rows_stand_beside_good_ones(tmp_path, pngs):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"img": pa.array([pngs[0], None, b"?", b"", pngs[1], pngs[2]], pa.binary())}), path)
    collection = open_collection(str(path))
    shard = Shard.of(collection.kind, list(list_pieces(collection, 10)))
    pq.write_table(pq.read_table(path).slice(0, 5), path)  # the last row is lost between plan and read
    (batch,) = read_batches(collection, shard, HOW, 10)
    assert [image.image_id for image in batch.images] == ["a.parquet#0", "a.parquet#4"]
    assert [(reject.image_id, reject.reason) for reject in batch.rejects] == [
        ("a.parquet#1", "null"),
        ("a.parquet#2", "not_an_image"),
        ("a.parquet#3", "empty"),
        ("a.parquet#5", "missing"),
    ]
