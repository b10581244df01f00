"""Every kind of file that a folder of images holds: the right pixels, checked against Pillow and numpy, or the right
reason; and whatever the bytes are, nothing but Rejected."""

import io
import json
import re
import runpy
import struct
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, features

from palindrome.pipeline.images.decode import Preprocess, Rejected, decode
from palindrome.pipeline.images.records import REASONS

AVIF = ("AVIF",) if features.check("avif") else ()
FIXTURES = Path(__file__).parents[2] / "fixtures"
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


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF", *AVIF])
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


BACK = (200, 10, 60)


@pytest.fixture(scope="module")
def values(picture, corpus):
    """The picture as numbers [32, 48, C] of 8 and 16 bits, and what makes files of them without an encoder's help."""
    rgb, noise = np.asarray(picture), np.random.default_rng(5).integers(0, 256, (32, 48, 5))
    deep = rgb.astype(np.uint16) * 256 + noise[..., :3].astype(np.uint16)
    deep[16, 25] = deep[16, 24] ^ 1  # another value with the same high byte
    ramp = np.tile(np.linspace(0, 255, 48).astype(np.uint8), (32, 1))[..., None]
    flat = picture.quantize(16)
    table = np.array(flat.getpalette()[:48]).reshape(16, 3)
    of_color = {"rgb": rgb, "deep": deep, "gray": rgb[..., :1], "deep_gray": deep[..., :1]}
    of_alpha = {"alpha": ramp, "deep_alpha": ramp.astype(np.uint16) * 256 + noise[..., 3:4].astype(np.uint16)}
    of_palette = {"palette": table, "indices": np.asarray(flat).astype(int)[..., None]}
    made_with = {"picture": picture, "png": corpus.png_from, "tiff": corpus.tiff_from, "encoded": corpus.encoded}
    return SimpleNamespace(**of_color, **of_alpha, **of_palette, **made_with, corpus=corpus)


def shown_over(color, alpha):
    return over(np.dstack([np.broadcast_to(color, (*alpha.shape[:2], 3)), alpha]), BACK)


def where(mask, shown):
    return np.where(mask[..., None], BACK, shown)


def png_gray(v, bits, key=False):
    stored = v.deep_gray >> (16 - bits)
    shown = stored >> 8 if bits == 16 else stored * (255 // (2**bits - 1))
    if not key:
        return v.png(stored, bits, 0), shown
    clear = int(stored[16, 24, 0])
    return v.png(stored, bits, 0, (b"tRNS", struct.pack(">H", clear))), where(stored[..., 0] == clear, shown)


def png_rgb(v, bits, key=False):
    stored = v.deep >> (16 - bits)
    if not key:
        return v.png(stored, bits, 2), stored >> (bits - 8)
    clear = stored[16, 24]
    chunk = (b"tRNS", struct.pack(">3H", *clear.tolist()))
    return v.png(stored, bits, 2, chunk), where((stored == clear).all(-1), stored >> (bits - 8))


def png_alpha(v, bits, color):
    stored, alpha = v.deep if color == 6 else v.deep_gray, v.deep_alpha
    data = v.png(np.dstack([stored, alpha]) >> (16 - bits), bits, color)
    return data, shown_over(stored >> 8, alpha >> 8), 1


def png_palette(v, bits, alpha=False):
    used = v.indices % 2**bits
    chunk = (b"PLTE", v.palette[: 2**bits].astype(np.uint8).tobytes())
    if not alpha:
        return v.png(used, bits, 3, chunk), v.palette[used[..., 0]]
    of_entry = np.arange(2**bits if bits < 8 else 16) * 16
    data = v.png(used, bits, 3, chunk, (b"tRNS", of_entry.astype(np.uint8).tobytes()))
    return data, shown_over(v.palette[used[..., 0]], of_entry[used]), 1


def tiff_gray(v, bits, photometric=1, **options):
    stored = v.deep_gray >> (16 - bits)
    shown = stored >> (bits - 8) if bits > 8 else stored * (255 // (2**bits - 1))
    return v.tiff(stored, bits, photometric, **options), 255 - shown.astype(int) if photometric == 0 else shown


def tiff_rgb(v, bits, **options):
    return v.tiff(v.deep >> (16 - bits), bits, 2, **options), v.deep >> 8


def tiff_alpha(v, bits, channels, premultiplied=False):
    color, alpha = v.deep[..., :channels], v.deep_alpha
    shown = shown_over(color >> 8, alpha >> 8)
    if premultiplied:
        color = (color.astype(np.uint64) * alpha // 65535).astype(np.uint16)
        shown = (color >> 8) + np.array(BACK) * (1 - (alpha >> 8) / 255)
    stored = np.dstack([color, alpha]) >> (16 - bits)
    extra = {338: [1 if premultiplied else 2]}
    return v.tiff(stored, bits, 1 if channels == 1 else 2, extra), shown, 2 if premultiplied else 1


def cmyk(v, bits=8):
    """Four inks and how they look, by the plain formula: no profile says how they would print."""
    inks = 255 - np.dstack([v.rgb, v.rgb.max(2) // 2 + 128]).astype(np.uint16)
    return inks * (257 if bits == 16 else 1), (255 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255


def jpeg_cmyk(v, adobe=True):
    inks, shown = cmyk(v)
    data = v.encoded(Image.fromarray(inks.astype(np.uint8), "CMYK"), "JPEG", quality=100, subsampling=0)
    marker = data.index(b"\xff\xee")
    end = marker + 2 + int.from_bytes(data[marker + 2 : marker + 4], "big")
    assert data[marker + 4 : marker + 9] == b"Adobe"
    return data if adobe else data[:marker] + data[end:], shown, 4


def tiff_cmyk(v, bits):
    inks, shown = cmyk(v, bits)
    return v.tiff(inks, bits, 5), shown, 1


def tiff_ycbcr(v, **options):
    """JFIF's formula and its inverse."""
    luma = v.rgb @ np.array([0.299, 0.587, 0.114])
    blue, red = (v.rgb[..., 2] - luma) / 1.772 + 128, (v.rgb[..., 0] - luma) / 1.402 + 128
    stored = np.dstack([luma, blue, red]).round().clip(0, 255)
    y, cb, cr = np.moveaxis(stored - [0, 128, 128], 2, 0)
    shown = np.dstack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb])
    return v.tiff(stored.astype(np.uint8), 8, 6, **options), shown.clip(0, 255), 2


XYZ = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)
WHITE = np.array([0.9642, 1, 0.8249])  # D50; sRGB's colours are adapted to it, by Bradford's matrix


def tiff_lab(v):
    """CIE's formula, from sRGB and back: a and b are signed."""
    linear = np.where(v.rgb <= 10, v.rgb / 255 / 12.92, ((v.rgb / 255 + 0.055) / 1.055) ** 2.4)
    scaled = linear @ XYZ.T / WHITE
    root = np.where(scaled > 216 / 24389, np.cbrt(scaled), (24389 / 27 * scaled + 16) / 116)
    x, y, z = np.moveaxis(root, 2, 0)
    lab = np.dstack([(116 * y - 16) * 2.55, 500 * (x - y), 200 * (y - z)]).round()
    y = (lab[..., 0] / 2.55 + 16) / 116
    root = np.dstack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200])
    scaled = np.where(root > 6 / 29, root**3, (116 * root - 16) / (24389 / 27))
    linear = (scaled * WHITE @ np.linalg.inv(XYZ).T).clip(0, 1)
    shown = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return v.tiff(lab.astype(np.int16) & 255, 8, 8), shown, 12  # littleCMS goes by a table: 0.5 on average


def tiff_whole(v, shown, bits, kind, offset=0):
    """Gray of 32 bits, or with a sign."""
    return v.tiff(v.deep_gray.astype(np.int64) + offset, bits, 1, {339: [kind]}), shown


def tiff_float(v, kind):
    gray = (v.gray / 255).astype(kind)
    return v.tiff(gray.view(f"u{gray.itemsize}"), 8 * gray.itemsize, 1, {339: [3]}), "corrupt"


def pillows(v, name, within=0, **options):
    return v.encoded(v.picture, name, **options), v.rgb, within


def animated(v, name, **options):
    frames = {"save_all": True, "append_images": [ImageOps.invert(v.picture)], "duration": 40}
    return v.encoded(v.picture, name, **frames, **options), v.rgb


def profiled(v, name, **options):
    """With a profile by which a program that manages colours would show it far darker."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    plain = v.encoded(v.picture, name, **options)
    data = v.encoded(v.picture, name, icc_profile=profile, **options)
    assert profile[100:200] in data or name == "PNG"
    return data, np.asarray(Image.open(io.BytesIO(plain)))


def turned_by_xmp(v, name, **options):
    """To the right: no EXIF, but the same number in XMP."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r:D xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    if name == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        options["pnginfo"] = info
    else:
        options["xmp"] = xmp
    return v.encoded(v.picture, name, **options), np.rot90(v.rgb, -1), 6


def gif_of_a_part(v, clear):
    """A first frame of 8x8 in the middle of a canvas of 48x32: white on what is transparent."""
    mask = np.zeros((32, 48), bool)
    mask[12:20, 20:28] = True
    image = Image.fromarray(np.where(mask, 1, 0).astype(np.uint8), "P")
    image.putpalette([9, 9, 9, 255, 255, 255])
    data = v.encoded(image, "GIF", optimize=False, **({"transparency": 0} if clear else {}))
    return data, where(~mask, np.full((32, 48, 3), 255)) if clear else np.where(mask[..., None], 255, 9)


ODD = {
    **{f"PNG, gray, {bits} bits": partial(png_gray, bits=bits) for bits in (1, 2, 4, 8, 16)},
    **{f"PNG, gray, {bits} bits, a transparent shade": partial(png_gray, bits=bits, key=True)
       for bits in (1, 2, 4, 8, 16)},
    **{f"PNG, gray and alpha, {bits} bits": partial(png_alpha, bits=bits, color=4) for bits in (8, 16)},
    **{f"PNG, RGB, {bits} bits": partial(png_rgb, bits=bits) for bits in (8, 16)},
    **{f"PNG, RGB, {bits} bits, a transparent colour": partial(png_rgb, bits=bits, key=True) for bits in (8, 16)},
    **{f"PNG, RGBA, {bits} bits": partial(png_alpha, bits=bits, color=6) for bits in (8, 16)},
    **{f"PNG, palette, {bits} bits": partial(png_palette, bits=bits) for bits in (1, 2, 4, 8)},
    **{f"PNG, palette with alpha, {bits} bits": partial(png_palette, bits=bits, alpha=True) for bits in (1, 2, 4, 8)},
    "PNG, interlaced": lambda v: (v.corpus.interlaced(Image.fromarray(v.gray[..., 0])), v.gray),
    "PNG, animated": partial(animated, name="PNG"),
    "PNG, animated, with a picture for programs that show none": partial(animated, name="PNG", default_image=True),
    "PNG, colour profile": partial(profiled, name="PNG"),
    "PNG, turned by XMP": partial(turned_by_xmp, name="PNG"),
    "JPEG, turned by XMP": partial(turned_by_xmp, name="JPEG", quality=100, subsampling=0),
    "WebP, turned by XMP": partial(turned_by_xmp, name="WEBP", lossless=True),
    "JPEG": partial(pillows, name="JPEG", within=6, quality=100, subsampling=0),
    "JPEG, gray": lambda v: (v.encoded(Image.fromarray(v.gray[..., 0]), "JPEG", quality=100), v.gray, 2),
    "JPEG, progressive": partial(pillows, name="JPEG", within=6, quality=100, subsampling=0, progressive=True),
    "JPEG, CMYK, as Adobe inverts it": jpeg_cmyk,
    "JPEG, CMYK, nothing said of Adobe": partial(jpeg_cmyk, adobe=False),
    "JPEG, colour profile": partial(profiled, name="JPEG"),
    "JPEG, two pictures (MPO)": lambda v: (
        v.encoded(v.picture, "MPO", save_all=True, append_images=[ImageOps.invert(v.picture)], quality=100), v.rgb, 24),
    "GIF, palette": lambda v: (v.encoded(v.picture.quantize(16), "GIF"), v.palette[v.indices[..., 0]]),
    "GIF, frame on a transparent canvas": partial(gif_of_a_part, clear=True),
    "GIF, frame on an opaque canvas": partial(gif_of_a_part, clear=False),
    "WebP, lossless": partial(pillows, name="WEBP", lossless=True),
    "WebP, lossless, alpha": lambda v: (
        v.encoded(Image.fromarray(np.dstack([v.rgb, v.alpha])), "WEBP", lossless=True, exact=True),
        shown_over(v.rgb, v.alpha), 1),
    "WebP, animated": partial(animated, name="WEBP", lossless=True),
    **({"AVIF": partial(pillows, name="AVIF", within=4, quality=100, subsampling="4:4:4")} if AVIF else {}),
    "BMP": partial(pillows, name="BMP"),
    "BMP, run-length": lambda v: (v.corpus.run_length_bmp(Image.fromarray(v.gray[..., 0])), v.gray),
    "PPM": partial(pillows, name="PPM"),
    "PPM, plain": lambda v: (b"P3 48 32 255\n" + " ".join(map(str, v.rgb.ravel())).encode(), v.rgb),
    "PPM, values to 100": lambda v: (b"P6 48 32 100\n" + (v.rgb // 3).tobytes(), np.round(v.rgb // 3 * 2.55), 1),
    "PGM, 16 bits": lambda v: (b"P5 48 32 65535\n" + v.deep_gray.astype(">u2").tobytes(), v.gray),
    "JPEG 2000, lossless": partial(pillows, name="JPEG2000"),
    "JPEG 2000, gray, 16 bits": lambda v: (v.encoded(Image.fromarray(v.deep_gray[..., 0]), "JPEG2000"), v.gray),
    **{f"TIFF, gray, {bits} bits": partial(tiff_gray, bits=bits) for bits in (1, 2, 4, 8, 12, 16)},
    **{f"TIFF, gray from white, {bits} bits": partial(tiff_gray, bits=bits, photometric=0) for bits in (1, 4, 8, 16)},
    "TIFF, gray, 16 bits, big-endian": partial(tiff_gray, bits=16, order=">"),
    "TIFF, gray, 16 bits, deflate": partial(tiff_gray, bits=16, deflate=True),
    "TIFF, gray from white, 16 bits, deflate": partial(tiff_gray, bits=16, photometric=0, deflate=True),
    "TIFF, gray, 16 bits, big-endian, turned": lambda v: (
        v.tiff(v.deep_gray, 16, 1, {274: [6]}, order=">"), np.rot90(v.gray, -1)),
    **{f"TIFF, gray and alpha, 8 bits{how}": partial(tiff_alpha, bits=8, channels=1, premultiplied=bool(how))
       for how in ("", ", premultiplied")},
    **{f"TIFF, RGBA, {bits} bits{how}": partial(tiff_alpha, bits=bits, channels=3, premultiplied=bool(how))
       for bits in (8, 16) for how in ("", ", premultiplied")},
    **{f"TIFF, RGB, {bits} bits, {name}": partial(tiff_rgb, bits=bits, **options)
       for bits in (8, 16)
       for name, options in {"little-endian": {}, "big-endian": {"order": ">"}, "deflate": {"deflate": True},
                             "planes": {"planes": True}, "planes, big-endian": {"planes": True, "order": ">"},
                             "planes, deflate": {"planes": True, "deflate": True}}.items()},
    "TIFF, RGB and something unknown": lambda v: (v.tiff(np.dstack([v.rgb, v.alpha]), 8, 2, {338: [0]}), v.rgb),
    "TIFF, palette": lambda v: (
        v.tiff(v.indices, 8, 3, {320: (np.pad(v.palette, ((0, 240), (0, 0))) * 257).T.ravel().tolist()}),
        v.palette[v.indices[..., 0]]),
    "TIFF, CMYK, 8 bits": partial(tiff_cmyk, bits=8),
    "TIFF, CMYK, 16 bits": partial(tiff_cmyk, bits=16),
    "TIFF, YCbCr": partial(tiff_ycbcr, tags={530: [1, 1]}),
    "TIFF, YCbCr, deflate": partial(tiff_ycbcr, tags={530: [1, 1]}, deflate=True),
    "TIFF, LAB": tiff_lab,
    "TIFF, 32-bit whole numbers below 65536": lambda v: tiff_whole(v, v.gray, 32, 1),
    "TIFF, 16-bit numbers with a sign, none below 0": lambda v: (
        v.tiff(v.deep_gray >> 1, 16, 1, {339: [2]}), v.deep_gray >> 9),
    "TIFF, two pages": lambda v: (
        v.encoded(v.picture.copy(), "TIFF", save_all=True, append_images=[ImageOps.invert(v.picture)]), v.rgb),
    "TIFF, 32-bit whole numbers above 65535": lambda v: tiff_whole(v, "corrupt", 32, 1, offset=65536),
    "TIFF, 32-bit whole numbers below 0": lambda v: tiff_whole(v, "corrupt", 32, 2, offset=-65536),
    "TIFF, 8-bit numbers with a sign": lambda v: (v.tiff(v.gray, 8, 1, {339: [2]}), "corrupt"),
    "TIFF, float16": partial(tiff_float, kind=np.float16),
    "TIFF, float32": partial(tiff_float, kind=np.float32),
    "TIFF, float64": partial(tiff_float, kind=np.float64),
    "TIFF, gray from white, 16 bits, big-endian": lambda v: (
        v.tiff(v.deep_gray, 16, 0, order=">"), "corrupt"),
    "TIFF, YCbCr, fewer colours, not compressed": lambda v: (v.tiff(v.rgb, 8, 6, {530: [2, 2]}), "corrupt"),
    "TIFF, LAB in planes": lambda v: (v.tiff(v.rgb, 8, 8, planes=True), "corrupt"),
    "TIFF, two channels, no alpha said": lambda v: (v.tiff(v.rgb[..., :2], 8, 1), "corrupt"),
    "TIFF, cut": lambda v: (v.tiff(v.rgb, 8, 2)[:-500], "truncated"),
    "PNG, cut": lambda v: (v.png(v.rgb, 8, 2)[:-500], "truncated"),
    "PNG, 3 bits": lambda v: (v.png(v.gray >> 5, 8, 0).replace(b"\x08\0\0\0\0", b"\x03\0\0\0\0", 1), "corrupt"),
    "PNG, a palette that is missing": lambda v: (v.png(v.indices, 8, 3), "corrupt"),
    "PNG, no pixels": lambda v: (v.png(v.rgb[:0], 8, 2), "corrupt"),
    "PNG, 400 million pixels": lambda v: (v.corpus.bomb(20_000, 20_000), "too_large"),
    "JPEG, cut": lambda v: (v.encoded(v.picture, "JPEG")[:-500], "truncated"),
    "WebP, cut": lambda v: (v.encoded(v.picture, "WEBP", lossless=True)[:-500], "truncated"),
    "GIF, cut": lambda v: (v.encoded(v.picture, "GIF")[:-500], "truncated"),
    "a text": lambda v: (v.corpus.TEXT.encode(), "not_an_image"),
    "a web page": lambda v: (v.corpus.HTML.encode(), "not_an_image"),
    "a ZIP archive": lambda v: (v.corpus.zipped("a.png", v.png(v.rgb, 8, 2)), "not_an_image"),
    "an icon": lambda v: (v.encoded(v.picture, "ICO"), "not_an_image"),
    "SVG": lambda v: (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not_an_image"),
    "HEIC": lambda v: (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500), "not_an_image"),
    "nothing": lambda v: (b"", "empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_image(name, values):
    data, expected, *within = ODD[name](values)
    if isinstance(expected, str):
        assert rejected(data).reason == expected
        return
    found, width, height = decode(data, Preprocess(32, background=BACK))
    assert (height, width) == expected.shape[:2]
    middle = expected[8:40] if height > width else centre(expected)
    assert middle.std() > 5
    assert np.abs(found - middle.astype(float)).max() <= (within or [0])[0] + 1e-9 + 0.5 * bool(within)


@pytest.mark.parametrize("name", ODD)
def test_odd_image_in_one_channel_is_its_luma(name, values):
    data, expected, *_ = ODD[name](values)
    if isinstance(expected, str):
        assert rejected(data, Preprocess(32, 1)).reason == expected
        return
    luma = pixels(data, background=BACK).astype(float) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(pixels(data, background=BACK, channels=1)[..., 0] - luma).max() <= 1


def test_a_plane_that_is_missing_is_no_other_one(values):
    for bits in (8, 16):
        data = values.tiff(values.deep >> (16 - bits), bits, 2, planes=True)
        assert rejected(data[: -len(data) // 3]).reason == "truncated"


RESAMPLES = ("lanczos", "bicubic", "bilinear", "box")


@settings(max_examples=100)
@given(
    *(st.integers(1, 90), st.integers(1, 90), st.sampled_from([8, 32, 33]), st.sampled_from(RESAMPLES)),
    st.sampled_from([(255, 255, 255), BACK]),
    st.integers(0, 2**32 - 1),
)
def test_padded_is_all_of_the_image_on_the_background(width, height, size, resample, background, seed):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, content = Image.fromarray(values), io.BytesIO()
    image.save(content, "PNG")
    how = Preprocess(size, background=background, fit="pad", resample=resample)
    found, *found_size = decode(content.getvalue(), how)
    assert found_size == [width, height]
    wide, high = (max(1, int(Fraction(side * size, max(width, height)) + Fraction(1, 2))) for side in (width, height))
    left, top = (size - wide) // 2, (size - high) // 2
    expected = np.full((size, size, 3), background, np.uint8)
    expected[top : top + high, left : left + wide] = np.asarray(
        image.resize((wide, high), getattr(Image.Resampling, resample.upper()))
    )
    np.testing.assert_array_equal(found, expected)
    assert {wide, high} & {size}


def test_padding_of_one_channel_is_the_background_s_luma(picture, files):
    found = pixels(files["PNG"], fit="pad", background=BACK, channels=1)
    inner = np.asarray(picture.convert("L").resize((32, 21), Image.Resampling.LANCZOS))
    luma = round(np.dot(BACK, [0.299, 0.587, 0.114]))
    np.testing.assert_array_equal(found[..., 0], np.pad(inner, ((5, 6), (0, 0)), constant_values=luma))


def test_an_exact_size_is_asked_for_before_anything_is_decoded(picture):
    square = picture.crop((0, 0, 24, 24))
    content = io.BytesIO()
    square.save(content, "PNG")
    for resample in RESAMPLES:
        found = pixels(content.getvalue(), Preprocess(24, fit="exact", resample=resample))
        np.testing.assert_array_equal(found, np.asarray(square))
    assert (
        rejected(content.getvalue()[:60], Preprocess(32, fit="exact")).reason == "wrong_size"
    )  # there are no pixels yet
    assert rejected(content.getvalue()[:60], Preprocess(24, fit="exact")).reason == "truncated"


def coverage(n, size):
    """[size, n]: how much of each of n pixels each of `size` equal parts covers, in 1 / size of a pixel."""
    ends = [(max(i * n, j * size), min((i + 1) * n, (j + 1) * size)) for i in range(size) for j in range(n)]
    return np.array([max(0, end - start) for start, end in ends], object).reshape(size, n)


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 8, 9, 32]), st.booleans(), st.integers(0, 2**32 - 1))
def test_area_is_the_mean_over_what_each_pixel_covers(width, height, size, pad, seed):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(values).save(content, "PNG")
    found = pixels(content.getvalue(), Preprocess(size, resample="area", fit="pad" if pad else "crop"))
    if pad:
        wide, high = (max(1, (2 * s * size + max(width, height)) // (2 * max(width, height))) for s in (width, height))
        found = found[(size - high) // 2 :, (size - wide) // 2 :][:high, :wide]
    else:
        wide, high, edge = size, size, min(width, height)
        left, top = (width - edge) // 2, (height - edge) // 2
        values = values[top : top + edge, left : left + edge]
    rows, columns = coverage(values.shape[0], high), coverage(values.shape[1], wide)
    for channel in range(3):
        total = rows @ values[..., channel].astype(int).astype(object) @ columns.T
        covered = values.shape[0] * values.shape[1]
        np.testing.assert_array_equal(found[..., channel], (2 * total + covered) // (2 * covered))


def test_area_of_whole_blocks_is_their_mean_and_nearly_box(pngs):
    image = Image.open(io.BytesIO(pngs[0]))
    area, box = (pixels(pngs[0], Preprocess(8, resample=name)).astype(float) for name in ("area", "box"))
    blocks = np.asarray(image, float).reshape(8, 4, 8, 4, 3).mean((1, 3))
    assert np.abs(area - blocks).max() <= 0.5
    assert np.abs(box - blocks).max() <= 1


@pytest.mark.parametrize("resample", [*RESAMPLES, "area"])
def test_flat_image_stays_flat(resample, corpus):
    for size in (7, 32, 100):
        data = corpus.encoded(Image.new("RGB", (50, 41), BACK), "PNG")
        assert (pixels(data, Preprocess(size, resample=resample)) == BACK).all()


def test_record_is_json_and_makes_the_same_again():
    for how in (Preprocess(32), Preprocess(8, 1, 99, BACK, "area", "pad"), Preprocess(16, resample="box")):
        assert Preprocess(**json.loads(json.dumps(how.record()))) == how
        assert Preprocess(**json.loads(json.dumps(asdict(how)))) == how
    assert "fit" not in Preprocess(32).record()
    assert Preprocess(32, fit="pad").record()["fit"] == "pad"


def test_record_of_an_earlier_version_means_what_it_meant(files):
    """As run.json had it before there was a `fit`."""
    recorded = '{"size": 32, "channels": 3, "max_pixels": 9999, "background": [255, 255, 255], "resample": "lanczos"}'
    how = Preprocess(**json.loads(recorded))
    assert how.record() == json.loads(recorded)
    np.testing.assert_array_equal(pixels(files["PNG"], how), pixels(files["PNG"]))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"resample": "nearest"}, {"fit": "stretch"}, {"background": (0, 0)}, {"background": (0, 0, 256)}),
        {"background": (-1, 0, 0)},
        *({"recompress": "png:9"}, {"recompress": "jpeg:0"}, {"recompress": "jpeg:101"}, {"recompress": "jpeg"}),
    ],
)
def test_setting_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError):
        Preprocess(32, **wrong)


@settings(max_examples=100)
@given(
    *(st.integers(1, 90), st.integers(1, 90), st.sampled_from([8, 32, 33]), st.integers(0, 2**32 - 1)),
    st.sampled_from(RESAMPLES),
)
def test_the_largest_centred_square_is_resized(width, height, size, seed, resample):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, content = Image.fromarray(values), io.BytesIO()
    image.save(content, "PNG")
    how = Preprocess(size) if resample == "lanczos" else Preprocess(size, resample=resample)
    found, *found_size = decode(content.getvalue(), how)
    assert found_size == [width, height]
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    square = Image.fromarray(np.ascontiguousarray(values[top : top + edge, left : left + edge]))
    assert np.array_equal(found, np.asarray(square.resize((size, size), getattr(Image.Resampling, resample.upper()))))


def test_openai_s_resizing_is_that_of_guided_diffusion(corpus):
    """DIRE's fork of it read these files (tests/fixtures/scores/README.md)."""
    made = runpy.run_path(str(FIXTURES / "make_score_fixtures.py"))
    theirs = safetensors.numpy.load_file(FIXTURES / "scores/tensors.safetensors")["x"]
    for picture, expected in zip(made["pictures"](), theirs, strict=True):
        found = pixels(corpus.encoded(Image.fromarray(picture), "PNG"), Preprocess(16, resample="openai"))
        np.testing.assert_array_equal(found.transpose(2, 0, 1), np.rint((expected + 1) * 127.5))


def test_a_strip_that_openai_s_resizing_would_blow_up_is_too_large(corpus):
    strip = corpus.encoded(Image.new("RGB", (5000, 1)), "PNG")
    how = Preprocess(32, max_pixels=100_000, resample="openai")
    assert rejected(strip, how).reason == "too_large"
    assert pixels(strip, Preprocess(32, max_pixels=100_000)).shape == (32, 32, 3)


@pytest.mark.parametrize("resample", ["lanczos", "openai", "area"])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_recompressed_and_through_a_smaller_size_are_what_pillow_makes_first(picture, corpus, resample, fit):
    how = {"resample": resample, "fit": fit}
    jpeg = corpus.encoded(picture, "JPEG", quality=40)
    small = pixels(jpeg, Preprocess(8, **how))
    expected = pixels(corpus.encoded(Image.fromarray(small), "PNG"), Preprocess(32, **how))
    found = pixels(corpus.encoded(picture, "PNG"), Preprocess(32, recompress="jpeg:40", through=8, **how))
    np.testing.assert_array_equal(found, expected)
    record = Preprocess(32, recompress="jpeg:40", through=8).record()
    assert (record["recompress"], record["through"]) == ("jpeg:40", 8)
    assert not {"recompress", "through"} & Preprocess(32).record().keys()


def test_what_no_jpeg_can_hold_is_too_large_to_recompress(corpus):
    wide = corpus.encoded(Image.new("RGB", (70_000, 1)), "PNG")
    assert rejected(wide, Preprocess(8, recompress="jpeg:90")).reason == "too_large"


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
