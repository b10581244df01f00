"""Names of files from any ids, the check of a PNG, and what pictures become."""

import hashlib
import io
import re
import unicodedata
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from palindrome.pipeline.images.pixels import check_png, png
from palindrome.pipeline.tasks.export import encoded, name_of

# Letters that some file system takes for others, what has a meaning in paths, and what our own names are made of.
AWKWARD = [
    "a",
    "A",
    "b",
    "1",
    "f",
    "é",
    "e\u0301",
    "É",
    "ß",
    "ss",
    "ſ",
    "s",
    "ı",
    "i",
    "I",
    "İ",
    "K",
    "k",
    "ﬁ",
    "fi",
    "µ",
]
AWKWARD += [
    "/",
    "//",
    ".",
    "..",
    "~",
    "~1",
    ",",
    "_",
    "-",
    " ",
    "\\",
    ":",
    "*",
    "\0",
    "\n",
    "\x7f",
    "\u200d",
    "\ufe0f",
    "🐱",
]
AWKWARD += [".png", ".jpg", ".PNG", ".webp", ".json", "con", "NUL", "com1", "x" * 90, "ж" * 90, "metadata.parquet"]
PARTS = st.lists(st.sampled_from(AWKWARD), max_size=4).map("".join)
IDS = st.one_of(st.lists(PARTS, min_size=1, max_size=3).map("/".join), st.text(max_size=300))
IGNORED = re.compile("[\u034f\u115f\u1160\u200b-\u200f\u3164\ufe00-\ufe0f\uffa0]")  # by ext4 with casefold, and HFS+
FOLDS = {  # names that are equal after one of these are one file somewhere
    "ext4": lambda name: name,
    "ext4 with casefold": lambda name: unicodedata.normalize(
        "NFD", IGNORED.sub("", unicodedata.normalize("NFD", name)).casefold()
    ),
    "upper": str.upper,  # about what NTFS does
    "lower": str.lower,
}
WEBDATASET = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # as webdataset splits a member's name: key, extension
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in "0123456789¹²³")}
MANY = settings(max_examples=1000)


@MANY
@given(st.lists(IDS, unique=True, min_size=2, max_size=40), st.booleans())
@example(["a.jpg", "A.jpg", "a.JPG", "a.png", "a", "a/b", "a.png/b", "A.PNG/b", "a~3", "A", "a~1"], False)
@example(["a", "a\ufe0f", "\u3164a", "a\u200d", "k", "\u212a", "é", "e\u0301", "ss", "ß", "fi", "ﬁ", "σ", "ς"], False)
@example(["a.b", "a,b", "a_b", "A.b", "a.b~8", "x" * 200 + "1", "x" * 200 + "2"], True)
def test_different_ids_have_different_names_and_none_is_the_folder_of_another(ids, dotless):
    for end in (".png", ".webp", ".jpg"):
        names = [name_of(image_id, dotless) + end for image_id in ids]
        for fold in FOLDS.values():
            files = {fold(name) for name in [*names, "metadata.parquet"]}
            assert len(files) == len(ids) + 1
            folders = {"/".join(parts[:i]) for parts in (f.split("/") for f in files) for i in range(1, len(parts))}
            assert not folders & files


@MANY
@given(IDS, st.booleans())
@example("a./b .", False)
@example("d/" * 800 + "z", False)
def test_a_name_is_one_that_any_file_system_takes_and_stays_in_the_folder(image_id, dotless):
    name = name_of(image_id, dotless)
    assert name == name_of(image_id, dotless)
    assert len(name.encode()) < 900
    for part in f"{name}.webp".split("/"):
        assert part not in ("", ".", "..") and len(part.encode()) <= 255
        assert part.isprintable() and not set(part) & set('\\:*?"<>|')
        assert part[0] not in " .-" and part[-1] not in " ."
        assert part.split(".")[0].rstrip().lower() not in DEVICES
        assert unicodedata.is_normalized("NFC", part)


@given(IDS)
def test_a_dotless_name_is_a_key_of_webdataset(image_id):
    key = name_of(image_id, dotless=True)
    assert WEBDATASET.fullmatch(f"{key}.json").groups() == (key, "json")


@settings(max_examples=200)
@given(IDS)
def test_a_file_can_be_made_of_that_name(tmp_path_factory, image_id):
    root = tmp_path_factory.getbasetemp() / "made"
    path = root / f"{name_of(image_id)}.webp"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    assert path.resolve().is_relative_to(root.resolve())
    assert f"{path.relative_to(root)}" == f"{name_of(image_id)}.webp"
    assert path.name in {file.name for file in path.parent.iterdir()}


@pytest.mark.parametrize(
    ("image_id", "name"),  # one that ends in ~ has the id's hash behind it
    [
        ("cats/1.jpg", "cats/1.jpg"),
        ("train.parquet#12", "train.parquet#12"),
        ("n01440764/n01440764_18.JPEG", "n01440764/n01440764_18.JPEG~f"),
        ("IMG_1.JPG", "IMG_1.JPG~3f"),
        ("été à la mer.jpg", "été à la mer.jpg"),
        ("Été à la mer.jpg", "Été à la mer.jpg~"),
        ("猫/一.png", "猫/一.png"),
        ("../../etc/passwd", "_/_/etc/passwd~"),
        ("/etc/passwd", "etc/passwd~"),
        ("https://host/cat.jpg?size=9", "https_/host/cat.jpg_size=9~"),
        ("a\0b", "a_b~"),
        ("con.txt", "_con.txt~"),
        (".hidden/-rf", "hidden/rf~"),
        ("a.png/b", "a.png_/b~"),
        ("d/" * 400 + "z", "z~"),
        ("", "_~"),
    ],
)
def test_names_read_like_the_ids(image_id, name):
    found = name_of(image_id)
    if name.endswith("~"):
        assert found == name + hashlib.sha256(image_id.encode()).hexdigest()[:16]
    else:
        assert found == name


def pixels(channels):
    return np.random.default_rng(0).integers(0, 256, (9, 7, channels), np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_whole_png_passes_and_no_part_or_changed_one_does(channels):
    content = png(pixels(channels))
    check_png(content)
    for length in range(len(content)):
        with pytest.raises(ValueError, match=r"there is no image|it is no PNG|damaged or breaks off"):
            check_png(content[:length])
    for at in range(8, len(content)):
        with pytest.raises(ValueError, match="damaged or breaks off"):
            check_png(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(ValueError, match="there is no image"):
        check_png(None)


@given(st.binary(max_size=60))
def test_no_bytes_are_taken_for_a_png(noise):
    for content in (noise, b"\x89PNG\r\n\x1a\n" + noise):
        with pytest.raises(ValueError):
            check_png(content)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_a_picture_becomes(channels):
    content, truth = png(pixels(channels)), pixels(channels)
    assert encoded(content, "png", None) is content
    webp = encoded(content, "webp", None)
    found = Image.open(io.BytesIO(webp))
    assert found.format == "WEBP"
    np.testing.assert_array_equal(np.asarray(found), np.broadcast_to(truth, (9, 7, 3)))
    lossy = encoded(content, "webp", 10)
    assert len(lossy) < len(webp) and Image.open(io.BytesIO(lossy)).format == "WEBP"
    best, worst = (encoded(content, "jpeg", quality) for quality in (100, 10))
    found = Image.open(io.BytesIO(best))
    assert found.format == "JPEG" and len(worst) < len(best)
    assert np.abs(np.asarray(found).reshape(truth.shape).astype(int) - truth).mean() < 3
    assert encoded(content, "jpeg", None) == encoded(content, "jpeg", 95)


def test_a_png_whose_pixels_are_damaged_is_no_picture():
    """All of its checksums are right."""
    content = png(pixels(3))
    at = content.index(b"IDAT")
    length = int.from_bytes(content[at - 4 : at])
    data = b"IDAT" + bytes(length)
    broken = content[: at - 4] + length.to_bytes(4, "big") + data + zlib.crc32(data).to_bytes(4, "big")
    broken += content[at + 8 + length :]
    check_png(broken)
    with pytest.raises(OSError):
        encoded(broken, "webp", None)
