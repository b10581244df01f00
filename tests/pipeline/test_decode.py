"""Every kind of file that a folder of images holds: the right pixels, checked against Pillow and numpy, or the right
reason; and whatever the bytes are, nothing but Rejected."""

import io
import re
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.decode import Preprocess, Rejected, decode
from pipeline.records import REASONS

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SMALL = Preprocess(32, max_pixels=200_000)  # for damaged files, whose headers may say any size


@pytest.fixture(scope="module")
def picture(pngs):
    """A real picture, 48x32 RGB."""
    return Image.open(io.BytesIO(pngs[0])).resize((48, 32), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def files(picture, corpus):
    """That picture's bytes in every format."""
    return {name: corpus.encoded(picture, name) for name in FORMATS}


def pixels(data, how=None, **options):
    return decode(data, how or Preprocess(32, **options))[0]


def rejected(data, how=None):
    with pytest.raises(Rejected) as info:
        decode(data, how or Preprocess(32))
    assert info.value.reason in REASONS
    return info.value


def centre(array):
    """The middle 32 columns of 48."""
    return array[:, 8:40]


def over(rgba, background=(255, 255, 255)):
    """Straight alpha laid over a colour, in float64."""
    alpha = rgba[..., 3:].astype(float) / 255
    return rgba[..., :3] * alpha + np.array(background) * (1 - alpha)


def test_32x32_rgb_png_comes_back_to_the_bit(pngs):
    for png in pngs:
        found, width, height = decode(png, Preprocess(32))
        assert (width, height, found.dtype) == (32, 32, np.uint8)
        np.testing.assert_array_equal(found, np.asarray(Image.open(io.BytesIO(png))))


@pytest.mark.parametrize("name", FORMATS)
def test_format_gives_pillows_pixels(name, files):
    found, width, height = decode(files[name], Preprocess(32))
    assert (width, height) == (48, 32)
    np.testing.assert_array_equal(found, centre(np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB"))))


def test_lossless_formats_agree_with_the_picture(picture, files):
    for name in ("PNG", "BMP", "TIFF"):
        np.testing.assert_array_equal(pixels(files[name]), centre(np.asarray(picture)))


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(name, picture, corpus):
    second = ImageOps.invert(picture)
    options = {"lossless": True} if name == "WEBP" else {}
    data = corpus.encoded(picture, name, save_all=True, append_images=[second], duration=40, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    first, other = (centre(np.asarray(image)).astype(int) for image in (picture, second))
    found = pixels(data).astype(int)
    assert np.abs(found - first).mean() < 8 < 40 < np.abs(found - other).mean()
    if name != "GIF":  # whose palette costs some
        np.testing.assert_array_equal(found, first)


def test_16_bit_gray_is_shown_by_its_high_byte(corpus):
    values = np.random.default_rng(3).integers(0, 65536, (32, 32), dtype=np.uint16)
    for name in ("PNG", "TIFF"):
        found = pixels(corpus.encoded(Image.fromarray(values), name))
        np.testing.assert_array_equal(found, np.repeat((values // 256)[..., None], 3, axis=2))


def test_16_bit_gray_decodes_to_one_channel_too(corpus):
    values = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    found = pixels(corpus.encoded(Image.fromarray(values), "PNG"), channels=1)
    np.testing.assert_array_equal(found[..., 0], values // 256)


def test_float_image_has_no_8_bit_meaning(corpus):
    found = rejected(corpus.encoded(Image.fromarray(np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)), "TIFF"))
    assert found.reason == "corrupt"
    assert "mode F" in found.detail


def test_gray_is_repeated(picture, corpus):
    gray = picture.convert("L")
    found = pixels(corpus.encoded(gray, "PNG"))
    np.testing.assert_array_equal(found, np.repeat(centre(np.asarray(gray))[..., None], 3, axis=2))


def test_one_channel_is_luma(picture, files):
    found = pixels(files["PNG"], channels=1)
    assert found.shape == (32, 32, 1)
    luma = centre(np.asarray(picture)) @ np.array([299, 587, 114]) / 1000
    assert np.abs(found[..., 0] - luma).max() <= 1


def test_bilevel_is_black_and_white(picture, corpus):
    bits = picture.convert("1")
    found = pixels(corpus.encoded(bits, "PNG"))
    np.testing.assert_array_equal(found, centre(np.where(np.asarray(bits), 255, 0))[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (200, 10, 60)])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_the_background(mode, background, picture, corpus):
    image = picture.convert(mode)
    ramp = np.tile(np.linspace(0, 255, 48).astype(np.uint8), (32, 1))
    image.putalpha(Image.fromarray(ramp))
    found = pixels(corpus.encoded(image, "PNG"), background=background).astype(float)
    color = np.asarray(image.convert("RGB"), float)
    expected = over(np.dstack([color, ramp]), background)
    assert np.abs(found - centre(expected)).max() <= 1


def test_transparent_palette_entry_shows_the_background(picture, corpus):
    image = picture.quantize(16)
    indices, palette = np.asarray(image), np.array(image.getpalette()[:48]).reshape(16, 3)
    index = int(np.bincount(centre(indices).ravel()).argmax())
    expected = palette[indices]
    expected[indices == index] = (1, 2, 3)
    for name in ("PNG", "GIF"):
        data = corpus.encoded(image, name, transparency=index, optimize=False)
        np.testing.assert_array_equal(pixels(data, background=(1, 2, 3)), centre(expected))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_transparent_color_shows_the_background(mode, picture, corpus):
    image = picture.convert(mode)
    key = image.getpixel((20, 10))
    data = corpus.encoded(image, "PNG", transparency=key)
    shown = np.asarray(image.convert("RGB")).copy()
    shown[(shown == np.array(key)).all(-1)] = (1, 2, 3)
    assert (shown == (1, 2, 3)).all(-1).any()
    np.testing.assert_array_equal(pixels(data, background=(1, 2, 3)), centre(shown))


def test_cmyk_jpeg_becomes_rgb(picture, corpus):
    data = corpus.encoded(picture.convert("CMYK"), "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == "CMYK"
        ink = np.asarray(opened, float) / 255
    expected = 255 * (1 - ink[..., :3]) * (1 - ink[..., 3:])
    assert np.abs(pixels(data) - centre(expected)).max() <= 1
    assert np.abs(pixels(data) - centre(np.asarray(picture, float))).mean() < 12  # and not its negative


TURNED = {  # EXIF orientation -> how a viewer shows the stored rows and columns
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_applied(orientation, name, picture, corpus):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture.resize((64, 32))
    plain = corpus.encoded(stored, name)
    shown = TURNED[orientation](np.asarray(Image.open(io.BytesIO(plain)).convert("RGB")))
    found, width, height = decode(corpus.encoded(stored, name, exif=exif), Preprocess(32))
    assert (height, width) == shown.shape[:2]
    middle = shown[16:48] if orientation > 4 else shown[:, 16:48]
    np.testing.assert_array_equal(found, middle)


def exif_block():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x9286] = 6, "a camera", b"a comment"
    return exif.tobytes()


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_exif_that_cannot_be_read_turns_nothing(name, picture, corpus):
    for block in (b"Exif\0\0garbage", exif_block()[:13], exif_block()[:16], b"Exif\0\0" + bytes(40)):
        assert decode(corpus.encoded(picture, name, exif=block), Preprocess(32))[1:] == (48, 32)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_exif_that_cannot_be_written_back_still_turns(name, picture, corpus):
    """A text where a number should be: of no matter for the orientation, and Pillow's exif_transpose stumbles on it."""
    block = exif_block().replace(b"\x01\x0f\0\x02", b"\x01\0\0\x02")
    data = corpus.encoded(picture, name, exif=block)
    with pytest.raises(struct.error), Image.open(io.BytesIO(data)) as image:
        ImageOps.exif_transpose(image)
    assert decode(data, Preprocess(32))[1:] == (32, 48)


@given(
    name=st.sampled_from(["JPEG", "PNG", "WEBP"]),
    edits=st.lists(st.tuples(st.integers(6, 120), st.integers(0, 255)), max_size=5),
    length=st.integers(12, 200),
)
def test_damaged_exif_rejects_no_image(name, edits, length, picture, corpus):
    block = bytearray(exif_block())
    for at, value in edits:
        block[at % len(block)] = value
    found, width, height = decode(corpus.encoded(picture, name, exif=bytes(block[:length])), Preprocess(32))
    assert found.shape == (32, 32, 3)
    assert sorted((width, height)) == [32, 48]


@settings(max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([8, 32, 33]), st.integers(0, 2**32 - 1))
def test_the_largest_centred_square_is_resized(width, height, size, seed):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, content = Image.fromarray(values), io.BytesIO()
    image.save(content, "PNG")
    found, *found_size = decode(content.getvalue(), Preprocess(size))
    assert found_size == [width, height]
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    square = Image.fromarray(np.ascontiguousarray(values[top : top + edge, left : left + edge]))
    assert np.array_equal(found, np.asarray(square.resize((size, size), Image.Resampling.LANCZOS)))


def test_each_bad_file_has_its_reason(tmp_path, corpus):
    expected = corpus.bad_images(tmp_path)
    assert len(expected) == 40
    on_disk = {name: reason for name, reason in expected.items() if reason != "missing"}
    found = {name: rejected((tmp_path / name).read_bytes()).reason for name in on_disk}
    assert found == on_disk


def test_each_good_file_decodes(tmp_path, corpus):
    names = corpus.good_images(tmp_path, 300)
    assert len(set(names)) == 300
    for name in names:
        found, width, height = decode((tmp_path / name).read_bytes(), Preprocess(32))
        assert found.shape == (32, 32, 3)
        assert found.std() > 0
        assert (width, height) == Image.open(tmp_path / name).size


def test_bomb_is_rejected_by_its_header(corpus):
    bomb = corpus.bomb(20_000, 20_000)
    assert len(bomb) < 100_000
    found = rejected(bomb, Preprocess(32, max_pixels=10_000_000))
    assert (found.reason, found.detail) == ("too_large", "20000x20000 is more than 10000000 pixels")


def test_max_pixels_is_inclusive(files):
    assert pixels(files["PNG"], max_pixels=48 * 32).shape == (32, 32, 3)
    assert rejected(files["PNG"], Preprocess(32, max_pixels=48 * 32 - 1)).reason == "too_large"


@pytest.mark.parametrize("name", ["PNG", "JPEG"])
def test_image_that_breaks_off_is_truncated(name, files):
    data = files[name]
    header = data.index(b"IDAT" if name == "PNG" else b"\xff\xda") + 20
    reasons = {rejected(data[:length]).reason for length in range(header, len(data) - 30, 7)}
    assert reasons == {"truncated"}


def test_bad_checksum_in_a_png_is_corrupt_not_truncated(pngs, corpus):
    assert {rejected(corpus.damaged_png(png, i)).reason for png in pngs[:8] for i in range(4)} == {"corrupt"}


@pytest.mark.parametrize("data", [b"\0", b"BM", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"\xff\xd8\xff", b"II*\0"])
def test_few_bytes_are_rejected(data):
    assert rejected(data).reason in ("not_an_image", "truncated")


def test_postscript_is_no_known_format():
    """Pillow would start Ghostscript on it."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    assert rejected(eps).reason == "not_an_image"


def judged(data, how=SMALL):
    """What decode says: the pixels' bytes, or reason and detail. Anything but Rejected goes through."""
    try:
        found, width, height = decode(data, how)
    except Rejected as e:
        assert e.reason in REASONS
        assert e.detail
        assert len(e.detail) <= 300
        assert not re.search(r"0x[0-9a-f]{6,}|object at", e.detail)
        return e.reason, e.detail
    assert (found.shape, found.dtype) == ((how.size, how.size, how.channels), np.uint8)
    assert width > 0
    assert height > 0
    return found.tobytes()


@settings(max_examples=300)
@given(name=st.sampled_from(FORMATS), cut=st.floats(0, 1, exclude_max=True))
def test_cut_anywhere_is_an_image_or_a_reject(name, cut, files):
    data = files[name][: int(cut * len(files[name]))]
    first = judged(data)
    assert first == judged(bytes(bytearray(data)))


@settings(max_examples=300)
@given(
    name=st.sampled_from(FORMATS),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    in_header=st.booleans(),
)
def test_changed_bytes_are_an_image_or_a_reject(name, edits, in_header, files):
    data = bytearray(files[name])
    reach = min(100, len(data)) if in_header else len(data)
    for where, value in edits:
        data[int(where * reach)] = value
    first = judged(bytes(data))
    assert first == judged(bytes(data))


@settings(max_examples=100)
@given(name=st.sampled_from(FORMATS), noise=st.binary(max_size=200), kept=st.integers(0, 64))
def test_noise_after_a_real_header_is_an_image_or_a_reject(name, noise, kept, files):
    judged(files[name][:kept] + noise)
