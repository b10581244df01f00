"""Bytes -> uint8 image of the model's size, or a reject with its reason."""

import errno
import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import ExifTags, UnidentifiedImageError
from PIL import Image as PIL
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from palindrome.pipeline.images import bmp, jpeg, jpeg2000, png, tiff

# Formats that are pictures and whose decoders run in this process (EPS, say, would start Ghostscript).
PIL.init()
KNOWN = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
FORMATS = tuple(name for name in KNOWN if name in PIL.OPEN)  # a Pillow may be built without some
MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8[79]a|BM|II\*\0|MM\0\*|RIFF....WEBP|P[1-6]\s|....ftypavi"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    re.DOTALL,
)
HTML = re.compile(rb"<(?:!doctype\s+html|html)\b", re.IGNORECASE)
BROKEN = (  # what Pillow's plugins raise on bytes that are not as they should be
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, AttributeError, OverflowError),
    *(ZeroDivisionError, AssertionError, RuntimeError, SystemError, struct.error, zlib.error),
)
SHORT = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO)  # of what the machine is, and no picture
# What is wrong with a file stands in its reject; a worker's stderr is for what is wrong with the run. Said once, as
# warnings.catch_warnings around each image would let threads restore one another's filters.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())
MAX_SCANS = 100  # of a JPEG, as in libtiff; a progressive one has about ten
GRAY_KEYS = {"L;2": (3, 85), "L;4": (15, 17)}  # of a PNG of 2 or 4 bits: its largest value, and what makes it 255
FILTERS = {
    "lanczos": PIL.Resampling.LANCZOS,
    "bicubic": PIL.Resampling.BICUBIC,
    "bilinear": PIL.Resampling.BILINEAR,
    "box": PIL.Resampling.BOX,
    "openai": PIL.Resampling.BICUBIC,
    "area": None,  # not Pillow's
}
FITS = ("crop", "pad", "exact")
TRUNCATED = ("reject", "keep")
RECOMPRESS = re.compile(r"jpeg:(100|[1-9]\d?)")
LARGEST_JPEG = 65535  # pixels, of either side
# Of records, where they are as before there was a choice.
LEFT_OUT = {"fit": "crop", "truncated": "reject", "recompress": None, "through": None}
TURNS = {  # EXIF's orientation -> what makes the image upright
    2: PIL.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Transpose.ROTATE_180,
    4: PIL.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Transpose.TRANSPOSE,
    6: PIL.Transpose.ROTATE_270,
    7: PIL.Transpose.TRANSVERSE,
    8: PIL.Transpose.ROTATE_90,
}


class Rejected(Exception):
    """Why an input is no usable image: `reason` is a key of records.REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Preprocess:
    """How a file becomes the model's input; written to every latent file, so that an original can be read again.

    EXIF orientation applied, the first frame of an animation, alpha laid over `background`, converted to RGB (16-bit
    values by their high byte, colour profiles not applied). Then `fit`: `crop` is the largest centred square; `pad` is
    the whole image, centred on `background` (of an odd number of pixels left over, one more is on the right or below).
    Resized to `size` pixels by `resample`: lanczos, bicubic, bilinear or box as Pillow does it, or area, the mean over
    the area that each new pixel covers (OpenCV's INTER_AREA; box counts a pixel in full or not at all), or openai, as
    guided-diffusion reads its images: halved by box while it is at least twice too large, then bicubic, and cropped
    last. Where `fit` is `exact`, an image of other than size x size pixels is a reject instead. With `size` 0 an image
    is not made square and keeps its own size. A file that lacks a part of the picture is a reject, or, where
    `truncated` is `keep`, what its decoder fills in, as far as that gives any.

    Before all that, `recompress`, such as jpeg:90, makes a JPEG of the upright RGB picture, with colours at half the
    resolution, and reads that. With `through` the square is first resized to that many pixels, by the same filter.
    Raises ValueError for a value that is none of these.
    """

    size: int
    channels: int = 3
    max_pixels: int = 100_000_000
    background: tuple[int, int, int] = (255, 255, 255)
    resample: str = "lanczos"
    fit: str = "crop"
    truncated: str = "reject"
    recompress: str | None = None
    through: int | None = None

    def __post_init__(self) -> None:
        red, green, blue = self.background
        object.__setattr__(self, "background", (red, green, blue))  # JSON makes it a list
        if not all(0 <= value <= 255 for value in self.background):
            raise ValueError(f"background {self.background} is no colour of three numbers from 0 to 255")
        if self.resample not in FILTERS:
            raise ValueError(f"resample {self.resample!r} is none of {', '.join(FILTERS)}")
        if self.fit not in FITS:
            raise ValueError(f"fit {self.fit!r} is none of {', '.join(FITS)}")
        if self.truncated not in TRUNCATED:
            raise ValueError(f"truncated {self.truncated!r} is none of {', '.join(TRUNCATED)}")
        if self.recompress is not None and not RECOMPRESS.fullmatch(self.recompress):
            raise ValueError(f"recompress {self.recompress!r} is not jpeg:QUALITY, of a quality from 1 to 100")

    def record(self) -> dict[str, Any]:
        """For files, as JSON's types; `Preprocess(**record)` is equal. What LEFT_OUT names is left out where it is the
        default, as in files from before there was a choice: runs from then go on, with the same metadata in each of
        their files."""
        found = {**asdict(self), "background": list(self.background)}
        return {name: value for name, value in found.items() if LEFT_OUT.get(name) != value}


def decode(data: bytes, how: Preprocess) -> tuple[np.ndarray, int, int]:
    """Returns uint8 [size, size, channels] and the width and height before resizing; raises Rejected for what is wrong
    with the bytes. A MemoryError is not."""
    if not data:
        raise Rejected("empty", "0 bytes")
    # Some plugins allocate while they open a file: a GIF's first frame may ask for 4 GB. They keep to twice this limit,
    # which the whole process shares: hence no lower than other pictures need.
    PIL.MAX_IMAGE_PIXELS = max(how.max_pixels, 1 << 24)
    if (image := bmp.masked(data, how.max_pixels)) is not None:
        image, width, height = _converted(image, {}, data, how)
        return _array(image, how), width, height
    data = _readable(data, how)
    with _of_pillow(data, how):
        opened = _open(data)
    with opened:
        _check_size(opened, how)
        tags = _tags(opened, data, how)
        _check_cost(opened, tags, data, how.max_pixels)
        _check_tiff(opened, tags)
        alpha = _keyed_out(opened, data, how)
        image = _loaded(opened, tags, data, how)
        if alpha is not None:
            image.putalpha(alpha)
        image, width, height = _converted(image, tags, data, how)
    return _array(image, how), width, height


def from_pillow(image: PIL.Image, how: Preprocess) -> np.ndarray:
    """A picture that Pillow has opened or made, at the frame that it shows -> uint8 [size, size, channels]; raises
    Rejected. What `decode` makes of its file, but for those few that Pillow reads otherwise."""
    _check_size(image, how)
    with _of_pillow(b"", how):
        image.load()
    return _array(_converted(image, _tags(image, b"", how), b"", how)[0], how)


@contextmanager
def _of_pillow(data: bytes, how: Preprocess) -> Iterator[None]:
    """What Pillow raises within it is said of those bytes. Not what this program's own code does wrong outside of it,
    nor that memory is short: neither is the picture's fault."""
    try:
        yield
    except UnidentifiedImageError:
        # Pillow says the same of a text file and of a PNG that ends inside its header.
        if MAGIC.match(data):
            reason, detail = "corrupt", "the header can't be read, or states a layout that is not supported"
            raise Rejected("truncated" if len(data) < 64 else reason, detail) from None
        page = data.removeprefix(b"\xef\xbb\xbf").lstrip()[:2048]
        is_html = page.startswith(b"<") and HTML.search(page)
        raise Rejected("not_an_image", "a page of HTML" if is_html else "no known image format") from None
    except PIL.DecompressionBombError as e:
        raise Rejected("too_large", f"{_number(e)} pixels are more than {how.max_pixels}") from None
    except BROKEN as e:
        if isinstance(e, OSError) and e.errno in SHORT:
            raise
        if str(e).startswith("out of memory"):  # as Pillow says that malloc failed
            raise MemoryError(str(e)) from None
        raise Rejected(_reason(e, data), _words(e)) from None


def _readable(data: bytes, how: Preprocess) -> bytes:
    """Without what keeps Pillow from reading a sound picture."""
    if data[:2] in (b"P1", b"P2", b"P3"):  # a megabyte of comments takes Pillow ten seconds
        return re.sub(rb"#[^\r\n]*[\r\n]?", b"", data)
    if data.startswith(png.SIGNATURE):
        return png.without_metadata(data)
    if how.truncated == "keep" and data.startswith(b"\xff\xd8"):
        return jpeg.clean(data, jpeg.segments(data, MAX_SCANS))
    return data


def _loaded(opened: ImageFile, tags: tiff.Tags, data: bytes, how: Preprocess) -> PIL.Image:
    """The picture as it stands in its file, which is all there unless it is to be kept as it is. Raises Rejected."""
    if opened.format in ("JPEG", "MPO"):
        try:
            return _loaded_jpeg(opened, data, how)
        except jpeg.Incomplete as e:
            raise Rejected("truncated", str(e)) from None
    checked = how.truncated == "reject"
    lacks = ""
    if checked and isinstance(opened, TiffImageFile):
        lacks = tiff.lacks(tags) or tiff.lacks_of_jpegs(tags, data)
    elif checked and opened.format == "JPEG2000":
        lacks = jpeg2000.lacks(data)
    if lacks:
        raise Rejected("truncated", f"the file lacks a part of the picture: {lacks}")
    with _of_pillow(data, how):
        opened.load()
    if checked and opened.format == "PNG" and (lacks := png.lacks(opened, data)):
        raise Rejected("truncated", f"the file lacks a part of the picture: {lacks}")
    return opened


def _loaded_jpeg(opened: ImageFile, data: bytes, how: Preprocess) -> PIL.Image:
    """Raises Rejected, and Incomplete."""
    keep = how.truncated == "keep"
    found = jpeg.segments(data, MAX_SCANS)
    if sum(segment.code == jpeg.SCAN for segment in found) > MAX_SCANS:  # each goes over all pixels, for 10 bytes
        raise Rejected("corrupt", f"more than {MAX_SCANS} scans")
    pixels = jpeg.pixels(data, found, opened.mode, opened.size, keep)
    if pixels is None:
        with _of_pillow(data, how):
            opened.load()
        if not keep and not _same(opened, jpeg.filled(data, found), data, how):
            raise jpeg.Incomplete("a part of the picture is missing")
    if not keep:
        jpeg.check_scans(data, found)
    if pixels is not None:  # as `load` does it, with the pixels in place of the file's data
        opened.load_prepare()
        opened.frombytes(pixels)
        opened.tile = []
    return opened


def _same(image: PIL.Image, other: bytes, data: bytes, how: Preprocess) -> bool:
    """Whether a picture is the one of another file."""
    with _of_pillow(data, how), _open(other) as second:
        second.load()
        rows = range(0, image.height, 256)  # at a time: as arrays they are copies
        boxes = [(0, top, image.width, min(top + 256, image.height)) for top in rows]
        return all(np.array_equal(np.asarray(image.crop(box)), np.asarray(second.crop(box))) for box in boxes)


def _converted(loaded: PIL.Image, tags: tiff.Tags, data: bytes, how: Preprocess) -> tuple[PIL.Image, int, int]:
    """A picture as it stands in its file -> upright, RGB or L, and its width and height."""
    image = _upright(_tiff_gray(loaded, tags))
    width, height = image.size
    image = _rgb(image, data, how)
    return image.convert("L") if how.channels == 1 else image, width, height


def _array(image: PIL.Image, how: Preprocess) -> np.ndarray:
    """RGB or L of any size -> uint8 [size, size, channels]."""
    if how.recompress:
        image = _recompressed(image, int(how.recompress.partition(":")[2]))
    if not how.size:
        return np.asarray(image).reshape(image.height, image.width, how.channels)
    if how.through:
        image = _fitted(image, replace(how, size=how.through))
    return np.asarray(_fitted(image, how)).reshape(how.size, how.size, how.channels)


def _recompressed(image: PIL.Image, quality: int) -> PIL.Image:
    if max(image.size) > LARGEST_JPEG:
        raise Rejected("too_large", f"{image.width}x{image.height} is more than a JPEG can have")
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    again = PIL.open(content)
    again.load()
    return again


def _open(data: bytes) -> ImageFile:
    """As PIL.open, without its check of the size, which leaves out width and height."""
    for name in FORMATS:
        factory, accepts = PIL.OPEN[name]
        try:
            if accepts is None or accepts(data[:16]) is True:
                return factory(io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue
    raise UnidentifiedImageError


def _check_size(image: PIL.Image, how: Preprocess) -> None:
    if image.width * image.height > how.max_pixels:
        raise Rejected("too_large", f"{image.width}x{image.height} is more than {how.max_pixels} pixels")
    _check_fit(image, how)


def _check_fit(image: PIL.Image, how: Preprocess) -> None:
    if how.fit == "exact" and image.size != (how.size, how.size):
        raise Rejected("wrong_size", f"{image.width}x{image.height} pixels, not {how.size}x{how.size}")


def _check_cost(image: PIL.Image, tags: tiff.Tags, data: bytes, max_pixels: int) -> None:
    """Raises Rejected for a few kB that would cost gigabytes or hours, though the image has few pixels.

    Not found out here is an AVIF whose coded frame is larger than it says: libavif ends at 16384x16384, 0.6 GB."""
    limit = max(max_pixels, 1 << 20)
    if image.format == "JPEG2000":
        for tiles in jpeg2000.tiles_of(data):
            if tiles * 2048 > limit:  # OpenJPEG takes 7 kB a tile, the pixels 4 bytes each
                raise Rejected("too_large", f"{tiles} tiles")
    elif isinstance(image, TiffImageFile):
        there = tiff.tags_of(data)
        if any(there.count(tag) > 1 for tag in tiff.TILE):  # Pillow believes the last, libtiff the first
            raise Rejected("corrupt", "two sizes of tiles")
        width, height = (tiff.number(tags.get(tag), 0) for tag in tiff.TILE)
        if width * height > limit:  # libtiff's buffer is one tile, however small the image
            raise Rejected("too_large", f"a tile of {width}x{height} is more than {limit} pixels")


def _tags(image: PIL.Image, data: bytes, how: Preprocess) -> tiff.Tags:
    """Those of a TIFF that matter here, {} of another file."""
    if not isinstance(image, TiffImageFile):
        return {}
    with _of_pillow(data, how):
        return {tag: image.tag_v2[tag] for tag in tiff.TAGS if tag in image.tag_v2}


def _check_tiff(image: PIL.Image, tags: tiff.Tags) -> None:
    """Raises Rejected for layouts that Pillow takes for another, and sets right those that it can read if told."""
    if not isinstance(image, TiffImageFile) or not image.tile:
        return
    stored_plainly, photometric = image.tile[0].codec_name == "raw", tags.get(tiff.PHOTOMETRIC)
    bits, planes = tags.get(tiff.BITS, (1,)), tags.get(tiff.PLANAR) == 2
    if stored_plainly and photometric == 6 and tags.get(tiff.SUBSAMPLING, (1, 1)) != (1, 1):
        raise Rejected("corrupt", "YCbCr of fewer colours than pixels without compression is not supported")
    if photometric == 8 and planes:
        raise Rejected("corrupt", "LAB with its values in planes is not supported")
    if bits == (8,) and tags.get(tiff.SIGNS) == (2,):  # of 16 and 32 bits _rgb looks at the values
        raise Rejected("corrupt", "signed 8-bit values have no stated range to show as 8-bit")
    if stored_plainly and planes and bits[0] == 16:  # Pillow would take each byte for a value
        order = "L" if image.tag_v2.prefix == b"II" else "B"
        image.tile = [t._replace(args=(f"{t.args[0]};16{order}", *t.args[1:])) for t in image.tile]  # type: ignore[index]


def _tiff_gray(image: PIL.Image, tags: tiff.Tags) -> PIL.Image:
    """A loaded image as it is; of a TIFF's gray 12 bits brought to 16, and 16 that count from white turned round."""
    if not tags or not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.uint16)
    if tags.get(tiff.BITS) == (12,):
        return PIL.fromarray(values << 4)
    return PIL.fromarray(65535 - values) if tags.get(tiff.PHOTOMETRIC) == 0 else image


def _keyed_out(image: ImageFile, data: bytes, how: Preprocess) -> PIL.Image | None:
    """The alpha of a 16-bit RGB PNG with a transparent colour, else None.

    Pillow compares that colour, which has the file's depth, with 8-bit values: for gray of 2 or 4 bits it is brought
    to 8 here, and for RGB of 16 bits the file is read a second time, the low bytes in place of the high ones."""
    key = image.info.get("transparency")
    layout = image.tile[0].args if image.format == "PNG" and image.tile else None
    if key is None or layout not in (*GRAY_KEYS, "RGB;16B"):
        return None
    if layout in GRAY_KEYS:
        largest, scale = GRAY_KEYS[layout]
        image.info["transparency"] = (key & largest) * scale
        return None
    del image.info["transparency"]
    with _of_pillow(data, how), _open(data) as second:
        second.tile = [tile._replace(args="RGB;16L") for tile in second.tile]
        low, high = np.asarray(second), np.asarray(image)
    values = high.astype(np.uint16) << 8 | low
    return PIL.fromarray(np.where((values == key).all(-1), 0, 255).astype(np.uint8))


def _upright(image: PIL.Image) -> PIL.Image:
    """EXIF orientation applied; EXIF that can't be read turns nothing (ImageOps.exif_transpose would raise)."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except BROKEN:
        return image
    return image if turn is None else image.transpose(turn)


def _rgb(image: PIL.Image, data: bytes, how: Preprocess) -> PIL.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        if image.mode == "F" or not (values.min() >= 0 and values.max() <= 65535):
            raise Rejected("corrupt", f"mode {image.mode} has no stated range to show as 8-bit")
        pixels = np.repeat((values.astype(np.uint16) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        pixels[values == image.info.get("transparency", -1)] = how.background
        return PIL.fromarray(pixels)
    with _of_pillow(data, how):
        if image.mode == "La":  # premultiplied, which Pillow converts to nothing else
            image = image.convert("LA")
        if image.has_transparency_data:
            over = PIL.new("RGBA", image.size, (*how.background, 255))
            return PIL.alpha_composite(over, image.convert("RGBA")).convert("RGB")
        return image.convert("RGB")


def _fitted(image: PIL.Image, how: Preprocess) -> PIL.Image:
    """RGB or L of any size -> size x size."""
    if how.fit == "exact":  # else refused before it was decoded, but for a few BMPs
        _check_fit(image, how)
        return image
    if how.fit == "crop":
        if how.resample == "openai":
            image = _shortened(image, how)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        if image.size != (side, side):  # cropped first: a resize of a part would look past its edge
            image = image.crop((left, top, left + side, top + side))
        return _resized(image, (how.size, how.size), how.resample)
    longer = max(image.size)
    width, height = (max(1, (2 * side * how.size + longer) // (2 * longer)) for side in image.size)
    whole = PIL.new("RGB", (how.size, how.size), how.background).convert(image.mode)
    # Resized first, or the background would bleed into the picture.
    whole.paste(_resized(image, (width, height), how.resample), ((how.size - width) // 2, (how.size - height) // 2))
    return whole


def _shortened(image: PIL.Image, how: Preprocess) -> PIL.Image:
    """The whole picture with its shorter side at that size, as guided-diffusion's center_crop_arr makes it. Raises
    Rejected for a strip so long that it would have too many pixels then."""
    image = _halved(image, how.size)
    scale = how.size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if width * height > max(how.max_pixels, how.size**2):
        raise Rejected("too_large", f"{width}x{height}, before it is cropped, is more than {how.max_pixels} pixels")
    return image.resize((width, height), FILTERS["openai"])


def _halved(image: PIL.Image, side: int) -> PIL.Image:
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), PIL.Resampling.BOX)
    return image


def _resized(image: PIL.Image, size: tuple[int, int], resample: str) -> PIL.Image:
    if image.size == size:
        return image
    if resample == "openai":
        image = _halved(image, min(size))
    if resample != "area":
        return image.resize(size, FILTERS[resample])
    (width, height), covered = size, image.width * image.height
    sums = _area_sums(_area_sums(np.asarray(image), height).swapaxes(0, 1), width).swapaxes(0, 1)
    return PIL.fromarray(((sums + covered // 2) // covered).astype(np.uint8))


def _area_sums(pixels: np.ndarray, size: int) -> np.ndarray:
    """[N, ...] -> int64 [size, ...]: N times the mean over what each of `size` equal parts of axis 0 covers.

    In whole numbers, so that it is the same on every machine: a row counts `size`, and a part covers N of that."""
    n = len(pixels)
    sums = np.empty((size, *pixels.shape[1:]), np.int64)
    for i in range(size):
        (first, before), (last, after) = divmod(i * n, size), divmod((i + 1) * n, size)
        sums[i] = size * pixels[first:last].sum(axis=0, dtype=np.int64) - before * pixels[first].astype(np.int64)
        if after:
            sums[i] += after * pixels[last].astype(np.int64)
    return sums


def _reason(e: Exception, data: bytes) -> str:
    if data[:4] == b"RIFF" and len(data) < 8 + int.from_bytes(data[4:8], "little"):  # libwebp says only that it failed
        return "truncated"
    words = str(e).lower()
    ends = r"truncated|unexpected end|\beof\b|requires a buffer|not enough"
    broken_off = isinstance(e, EOFError) or re.search(ends, words)
    return "truncated" if broken_off else "corrupt"


def _number(e: Exception) -> str:
    found = re.search(r"\d+", str(e))
    return found[0] if found else "?"


def _words(e: Exception) -> str:
    """The exception's words without memory addresses, so that retries write the same reject."""
    words = re.sub(r"0x[0-9a-f]{6,}", "0x…", str(e), flags=re.IGNORECASE)
    return f"{type(e).__name__}: {words}"[:300]
