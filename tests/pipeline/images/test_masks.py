"""Masks: of which pixels a recipe says that they are known, and what is no mask for an image."""

import hashlib
import io
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from palindrome.pipeline.images.decode import Rejected
from palindrome.pipeline.images.masks import Masks, mask_hash


def picture(hole, mode="L", size=8):
    """A PNG that is white in a slice of rows."""
    pixels = np.zeros((size, size), np.uint8)
    pixels[hole] = 255
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, "PNG")
    return content.getvalue()


def named(image_id, **kept):
    return SimpleNamespace(image_id=image_id, kept=kept)


@given(st.floats(0.02, 0.8), st.integers(8, 64))
def test_a_box_is_a_centred_square_of_that_area(area, size):
    known = Masks.of(f"box:{area}", size).find(named("x"))
    rows, columns = np.flatnonzero(~known.all(1)), np.flatnonzero(~known.all(0))
    assert np.array_equal(rows, columns) and not known[np.ix_(rows, columns)].any()
    assert np.array_equal(rows, np.arange(rows[0], rows[-1] + 1))
    assert abs(len(rows) - size * area**0.5) <= 0.5 and abs(rows[0] - (size - 1 - rows[-1])) <= 1


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P"])
def test_a_picture_is_white_where_pixels_are_missing(mode, tmp_path):
    (tmp_path / "mask.png").write_bytes(picture(slice(2, 5), mode))
    masks = Masks.of(f"file:{tmp_path}/mask.png", 8)
    known = masks.find(named("any"))
    assert np.array_equal(~known, np.repeat((np.arange(8) // 1 >= 2) & (np.arange(8) < 5), 8).reshape(8, 8))
    digest = hashlib.sha256(bytes([1] * 16 + [0] * 24 + [1] * 24)).hexdigest()
    assert mask_hash(known) == digest
    assert masks.record() == {"recipe": f"file:{tmp_path}/mask.png", "sha256": digest}


def test_a_folder_has_one_for_each_image(tmp_path):
    (tmp_path / "a").mkdir()
    for name, hole in {"a/1.png": slice(1), "2.jpg.png": slice(2), "x.parquet#3.png": slice(3)}.items():
        (tmp_path / name).write_bytes(picture(hole))
    masks = Masks.of(f"file:{tmp_path}/", 8)
    for image_id, rows in {"a/1.png": 1, "2.jpg": 2, "x.parquet#3": 3}.items():
        assert (~masks.find(named(image_id))).sum() == 8 * rows
    assert masks.record() == {"recipe": f"file:{tmp_path}"}


def test_they_are_read_from_any_store():
    store = fsspec.filesystem("memory")
    store.pipe_file("/masks/a/1.jpg.png", picture(slice(3)))
    assert (~Masks.of("file:memory://masks", 8).find(named("a/1.jpg"))).sum() == 24
    assert (~Masks.of("file:memory://masks/a/1.jpg.png", 8).find(named("any"))).sum() == 24


def test_a_column_has_them_as_bytes_or_structs():
    masks = Masks.of("column:mask", 8)
    for value in (picture(slice(4)), {"bytes": picture(slice(4)), "path": None}):
        assert (~masks.find(named("x", mask=value))).sum() == 32


@pytest.mark.parametrize(
    ("value", "reason", "words"),
    [
        (None, "no_mask", "the column has none for this image"),
        ({"bytes": None}, "no_mask", "the column has none"),
        (b"no picture", "no_mask", "the mask is not_an_image"),
        (picture(slice(4), size=9), "mask_size", "the mask has 9x9 pixels, and the image 8x8"),
        (picture(slice(0)), "all_known", "64 of 64 are known"),
        (picture(slice(8)), "none_known", "0 of 64 are known"),
    ],
)
def test_what_is_no_mask_is_a_reject(value, reason, words):
    with pytest.raises(Rejected) as e:
        Masks.of("column:mask", 8).find(named("x", mask=value))
    assert e.value.reason == reason and words in e.value.detail


def test_a_missing_file_is_a_reject_of_its_image(tmp_path):
    with pytest.raises(Rejected) as e:
        Masks.of(f"file:{tmp_path}", 8).find(named("a.jpg"))
    assert (e.value.reason, e.value.detail) == ("no_mask", "a.jpg.png does not exist")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("box", "no fraction of the area"),
        ("box:1.5", "box:1.5 is no fraction of the area between 0 and 1"),
        ("box:nan", "no fraction"),
        ("box:0.001", "all known"),
        ("box:0.999", "none known"),
        ("circle:3", "'circle:3' is not box:FRACTION, file:URI or column:NAME"),
        ("column:", "is not box:FRACTION"),
        ("file:HERE/none.png", "HERE/none.png does not exist"),
        ("file:HERE/large.png", "HERE/large.png: mask size: the mask has 9x9 pixels"),
        ("file:HERE/text.png", "HERE/text.png: the mask is not_an_image"),
    ],
)
def test_what_is_no_recipe_is_refused(recipe, words, tmp_path):
    (tmp_path / "large.png").write_bytes(picture(slice(4), size=9))
    (tmp_path / "text.png").write_text("none")
    with pytest.raises((ValueError, OSError)) as e:
        Masks.of(recipe.replace("HERE", str(tmp_path)), 8)
    assert words.replace("HERE", str(tmp_path)) in str(e.value)
