"""Containers and JPEG qualities, of files that Pillow wrote."""

import io

import numpy as np
import pytest
from PIL import Image

from palindrome.pipeline.images.container import CONTAINERS, container_of, jpeg_quality
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.read import read_image
from palindrome.pipeline.images.sources import RawImage

PICTURE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (24, 24, 3), np.uint8))


def written(kind, **how):
    content = io.BytesIO()
    PICTURE.save(content, kind, **how)
    return content.getvalue()


@pytest.mark.parametrize("kind", [kind for kind in CONTAINERS if kind in Image.SAVE])
def test_pillow_s_files_are_named_as_pillow_names_them(kind):
    data = written(kind)
    assert container_of(data) == Image.open(io.BytesIO(data)).format == kind
    assert jpeg_quality(data) is None or kind == "JPEG"


def test_what_is_no_image_has_no_container():
    assert container_of(b"") is None and container_of(b"<html>") is None


@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}], ids=str)
def test_libjpeg_s_qualities_are_found(how):
    qualities = range(1, 101) if not how else (10, 75, 95)
    assert [jpeg_quality(written("JPEG", quality=quality, **how)) for quality in qualities] == list(qualities)


def test_gray_and_other_tables():
    content = io.BytesIO()
    PICTURE.convert("L").save(content, "JPEG", quality=83)
    assert jpeg_quality(content.getvalue()) == 83
    flat = written("JPEG", qtables=[[17] * 64, [17] * 64])
    assert 1 <= jpeg_quality(flat) <= 100 and jpeg_quality(written("JPEG", qtables=[[1] * 64])) == 100


def test_sixteen_bit_tables_and_cut_ones():
    data = written("JPEG", quality=75)
    at = data.index(b"\xff\xdb") + 4
    table = np.frombuffer(data[at + 1 : at + 65], np.uint8)
    wide = data[: at - 4] + b"\xff\xdb\x00\x83\x10" + table.astype(">u2").tobytes() + data[at + 65 :]
    assert jpeg_quality(wide) == 75
    assert jpeg_quality(data[: at + 30]) is None and jpeg_quality(data[: at - 1]) is None


def test_they_come_with_the_image():
    found = read_image(RawImage("a", "a", written("JPEG", quality=61), {}), Preprocess(8), True)
    assert (found.container, found.jpeg_quality) == ("JPEG", 61)
    found = read_image(RawImage("a", "a", written("PNG"), {}), Preprocess(8, recompress="jpeg:5"), True)
    assert (found.container, found.jpeg_quality) == ("PNG", None), "of the file, not of what is made of it"
