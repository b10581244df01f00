"""JPEGs: Pillow's pixels, and nothing of those that lack a part: what is right is Pillow's picture of the whole."""

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from palindrome.pipeline.images import decode as decoding
from palindrome.pipeline.images import jpeg
from palindrome.pipeline.images.decode import Preprocess, Rejected, decode

EOI = b"\xff\xd9"
KINDS = {
    "baseline": {},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "best": {"quality": 100, "subsampling": 0},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
    "progressive, restarts": {"progressive": True, "restart_marker_rows": 1},
}


@pytest.fixture(scope="module")
def picture(pngs):
    """A real picture with some grain, 64x48 RGB: no part of it is flat."""
    smooth = np.asarray(Image.open(io.BytesIO(pngs[1])).convert("RGB").resize((64, 48)), float)
    grain = np.random.default_rng(0).normal(0, 8, smooth.shape)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def pixels(data, **options):
    return decode(data, Preprocess(64, fit="pad", **options))[0][8:56]


def pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def reason(data, **options):
    with pytest.raises(Rejected) as info:
        pixels(data, **options)
    return info.value.reason


def scan(data):
    """Where the data of the first scan begins."""
    at = data.index(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_pillows(kind, mode, picture, corpus):
    for size in ((64, 48), (64, 47), (63, 48), (17, 5), (8, 8), (1, 1)):
        data = corpus.encoded(picture.convert(mode).resize(size), "JPEG", **KINDS[kind])
        side, expected = max(size), pillow(data)
        top, left = (side - size[1]) // 2, (side - size[0]) // 2
        found = decode(data, Preprocess(side, fit="pad"))[0][top : top + size[1], left : left + size[0]]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_that_breaks_off_is_truncated_whatever_is_behind(kind, mode, picture, corpus):
    """An end marker, nothing, or the zeros of a file that was never written to its end."""
    data = corpus.encoded(picture.convert(mode), "JPEG", **KINDS[kind])
    whole = pixels(data)
    for length in np.linspace(scan(data) + 1, len(data) - 3, 25).astype(int):
        for end in (EOI, b"", bytes(500), b"\xff" + EOI):
            try:
                found = pixels(data[:length] + end)
            except Rejected as e:
                assert e.reason in ("truncated", "corrupt")
            else:  # the last bits of a scan may be of no consequence
                np.testing.assert_array_equal(found, whole)


def test_half_of_one_is_gray_to_pillow_and_truncated_here(picture, corpus):
    data = corpus.encoded(picture, "JPEG", quality=95)
    half = data[: len(data) // 2] + EOI
    assert (np.abs(pillow(half)[-8:].astype(int) - 128) < 3).all()
    assert reason(half) == "truncated"


def test_the_last_bytes_matter_too(picture, corpus):
    data = corpus.encoded(picture, "JPEG", quality=95)
    assert {reason(data[: -2 - n] + EOI) for n in range(2, 20)} == {"truncated"}


def test_progressive_one_without_its_later_scans_is_truncated(picture, corpus):
    """libjpeg shows it blurred, without a warning."""
    data = corpus.encoded(picture, "JPEG", progressive=True)
    scans = [s.start for s in jpeg.segments(data, 100) if s.code == jpeg.SCAN]
    assert len(scans) == 10
    silent = [data[:start] + EOI for start in scans[5:]]  # of fewer simplejpeg can't tell the colours' sampling
    for cut in silent:
        assert simplejpeg.decode_jpeg(cut, strict=True).shape == (48, 64, 3)
    assert {reason(data[:start] + EOI) for start in scans[1:]} == {"truncated"}


def test_restart_interval_that_is_lost_is_truncated(picture, corpus):
    data = corpus.encoded(picture, "JPEG", restart_marker_blocks=3)
    places = [data.index(bytes([0xFF, 0xD0 + n]), scan(data)) for n in range(3)]
    cuts = (data[: places[0]] + data[places[1] :], data[: places[1] - 12] + data[places[1] :], data[: places[2]] + EOI)
    assert {reason(cut) for cut in cuts} == {"truncated"}


@pytest.mark.parametrize("kind", KINDS)
def test_data_of_which_simplejpeg_says_nothing_is_looked_through_by_pillow(kind, picture, corpus, monkeypatch):
    """As where it knows the sampling of the colours not."""
    monkeypatch.setattr(jpeg, "COLORS", {})
    data = corpus.encoded(picture, "JPEG", **KINDS[kind])
    np.testing.assert_array_equal(pixels(data), pillow(data))
    start = scan(data)
    for part in (0.2, 0.5, 0.9):
        assert reason(data[: start + int((len(data) - start) * part)] + EOI) in ("truncated", "corrupt")
    if kind == "restarts":
        places = [data.index(bytes([0xFF, 0xD0 + n]), start) for n in range(3)]
        cuts = (data[: places[0]] + data[places[1] :], data[: places[1] - 12] + data[places[1] :])
        assert {reason(cut) for cut in (*cuts, data[: places[2]] + EOI)} == {"truncated"}


def test_odd_sampling_of_colours(picture, corpus):
    """Which simplejpeg does not know. These state fewer blocks than the data has."""
    data = bytearray(corpus.encoded(picture, "JPEG", subsampling=0))
    frame = data.index(b"\xff\xc0")
    for component, factors in zip(range(3), (0x11, 0x21, 0x12), strict=True):
        data[frame + 11 + 3 * component] = factors
    data = bytes(data)
    with pytest.raises(ValueError, match="subsampling"):
        simplejpeg.decode_jpeg(data)
    np.testing.assert_array_equal(pixels(data), pillow(data))
    assert reason(data[: scan(data) + 40] + EOI) == "truncated"


@pytest.mark.parametrize("stray", [b"\0", b"\0\0\0", b"\xff\xff", b"noise", b"\xff\0"])
def test_stray_bytes_between_segments_lose_nothing(stray, picture, corpus):
    for kind in KINDS.values():
        data = corpus.encoded(picture, "JPEG", **kind)
        for marker in (b"\xff\xdb", b"\xff\xc4", b"\xff\xda"):
            at = data.index(marker)
            np.testing.assert_array_equal(pixels(data[:at] + stray + data[at:]), pixels(data))


def test_bytes_behind_the_data_and_the_end_lose_nothing(picture, corpus):
    for kind in KINDS.values():
        data = corpus.encoded(picture, "JPEG", **kind)
        whole = pixels(data)
        tails = (
            EOI + b"\r\n--boundary--\r\n" * 40,
            EOI + bytes(5000),
            EOI + data,
            b"\0\0\0" + EOI,
            b"\xff\xff" + EOI,
            b"",
        )
        for tail in tails:
            np.testing.assert_array_equal(pixels(data[:-2] + tail), whole)


def test_kept_one_is_what_the_decoder_makes_of_it(picture, corpus):
    data = corpus.encoded(picture, "JPEG", quality=95)
    for end in (EOI, b""):
        found = pixels(data[: len(data) // 2] + end, truncated="keep")
        np.testing.assert_array_equal(found[:12], pixels(data)[:12])
        assert (np.abs(found[-8:].astype(int) - 128) < 3).all()
    np.testing.assert_array_equal(pixels(data, truncated="keep"), pixels(data))
    progressive = corpus.encoded(picture, "JPEG", progressive=True)
    start = [s.start for s in jpeg.segments(progressive, 100) if s.code == jpeg.SCAN][6]
    np.testing.assert_array_equal(
        pixels(progressive[:start] + EOI, truncated="keep"), pillow(progressive[:start] + EOI)
    )


def test_orientation_of_one_that_simplejpeg_has_decoded(picture, corpus):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = corpus.encoded(picture, "JPEG", exif=exif)
    assert decode(data, Preprocess(32))[1:] == (48, 64)


def test_memory_and_own_errors_are_no_rejects(picture, corpus, monkeypatch):
    """A reject is for ever, and would be said of every picture."""
    for name, module in (("decode_jpeg", simplejpeg), ("_fitted", decoding), ("_tiff_gray", decoding)):
        for error in (MemoryError, KeyError, TypeError):
            if module is simplejpeg and error is not MemoryError:
                continue

            def fails(*_, error=error, **__):
                raise error("of our own")

            with monkeypatch.context() as patched, pytest.raises(error):
                patched.setattr(module, name, fails)
                pixels(corpus.encoded(picture, "JPEG"))
