"""Bytes -> uint8 image of the model's size, or a reject with its reason."""

import ctypes
import io
import logging
import re
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, UnidentifiedImageError, _imaging
from PIL import Image as PIL
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

# Formats that are pictures and whose decoders run in this process (EPS, say, would start Ghostscript).
PIL.init()
KNOWN = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
FORMATS = tuple(name for name in KNOWN if name in PIL.OPEN)  # a Pillow may be built without some
MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8[79]a|BM|II\*\0|MM\0\*|RIFF....WEBP|P[1-6]\s|....ftypavi"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    re.DOTALL,
)
BROKEN = (  # what Pillow's plugins raise on bytes that are not as they should be
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, AttributeError, OverflowError),
    *(ZeroDivisionError, AssertionError, RuntimeError, SystemError, struct.error, zlib.error),
)
# What is wrong with a file stands in its reject; a worker's stderr is for what is wrong with the run. Said once, as
# warnings.catch_warnings around each image would let threads restore one another's filters.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())
try:  # libtiff prints each error
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)
except (OSError, AttributeError):  # a Pillow without libtiff, or with one built in
    pass
MAX_SCANS = 100  # of a JPEG, as in libtiff; a progressive one has about ten
MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")  # of a JPEG, but those without a length
SIZ = re.compile(rb"\xff\x4f\xff\x51....(.{32})", re.DOTALL)  # the header of a JPEG 2000 codestream
TILE = (322, 323)  # a TIFF's tags of its tiles' width and height
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
    gray by its high byte), then the largest centred square cropped (an odd pixel left over is on the right or below)
    and resized to `size` x `size` pixels with Lanczos.
    """

    size: int
    channels: int = 3
    max_pixels: int = 100_000_000
    background: tuple[int, int, int] = (255, 255, 255)
    resample: str = "lanczos"


def decode(data: bytes, how: Preprocess) -> tuple[np.ndarray, int, int]:
    """Returns uint8 [size, size, channels] and the width and height before resizing; raises Rejected."""
    if not data:
        raise Rejected("empty", "0 bytes")
    try:
        return _decode(data, how)
    except Rejected:
        raise
    except UnidentifiedImageError:
        # Pillow says the same of a text file and of a PNG that ends inside its header.
        if MAGIC.match(data):
            raise Rejected("truncated" if len(data) < 64 else "corrupt", "the header can't be read") from None
        raise Rejected("not_an_image", "no known image format") from None
    except PIL.DecompressionBombError as e:
        raise Rejected("too_large", f"{_number(e)} pixels are more than {how.max_pixels}") from None
    except MemoryError:
        raise Rejected("too_large", "not enough memory to decode it") from None
    except BROKEN as e:
        raise Rejected(_reason(e), _words(e)) from None


def _decode(data: bytes, how: Preprocess) -> tuple[np.ndarray, int, int]:
    # Some plugins allocate while they open a file: a GIF's first frame may ask for 4 GB. They keep to twice this limit,
    # which the whole process shares: hence no lower than other pictures need.
    PIL.MAX_IMAGE_PIXELS = max(how.max_pixels, 1 << 24)
    with _open(data) as opened:
        width, height = opened.size
        if width * height > how.max_pixels:
            raise Rejected("too_large", f"{width}x{height} is more than {how.max_pixels} pixels")
        _check_cost(opened, data, how.max_pixels)
        opened.load()
        image = _upright(opened)
        width, height = image.size
        image = _rgb(image, how.background)
        if how.channels == 1:
            image = image.convert("L")
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        # Cropped first: a resize of a part would look past its edge.
        image = image.crop((left, top, left + side, top + side))
        if side != how.size:
            image = image.resize((how.size, how.size), PIL.Resampling.LANCZOS)
        return np.asarray(image).reshape(how.size, how.size, how.channels), width, height


def _open(data: bytes) -> ImageFile:
    """As PIL.open, without its check of the size, which leaves out width and height."""
    if data[:2] in (b"P1", b"P2", b"P3"):  # a megabyte of comments takes Pillow ten seconds
        data = re.sub(rb"#[^\r\n]*[\r\n]?", b"", data)
    for name in FORMATS:
        factory, accepts = PIL.OPEN[name]
        try:
            if accepts is None or accepts(data[:16]) is True:
                return factory(io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue
    raise UnidentifiedImageError


def _check_cost(image: PIL.Image, data: bytes, max_pixels: int) -> None:
    """Raises Rejected for a few kB that would cost gigabytes or hours, though the image has few pixels.

    Not found out here is an AVIF whose coded frame is larger than it says: libavif ends at 16384x16384, 0.6 GB."""
    limit = max(max_pixels, 1 << 20)
    if image.format in ("JPEG", "MPO"):
        if _scans(data) > MAX_SCANS:  # each goes over all pixels, and needs 10 bytes
            raise Rejected("corrupt", f"more than {MAX_SCANS} scans")
    elif image.format == "JPEG2000":
        for sizes in SIZ.findall(data):
            width, height, _, _, tile_width, tile_height, left, top = struct.unpack(">8I", sizes)
            tiles = -(-(width - left) // max(tile_width, 1)) * -(-(height - top) // max(tile_height, 1))
            if tiles * 2048 > limit:  # OpenJPEG takes 7 kB a tile, the pixels 4 bytes each
                raise Rejected("too_large", f"{tiles} tiles")
    elif isinstance(image, TiffImageFile):
        tags = _tiff_tags(data)
        if any(tags.count(tag) > 1 for tag in TILE):  # Pillow believes the last, libtiff the first
            raise Rejected("corrupt", "two sizes of tiles")
        width, height = (image.tag_v2.get(tag, 0) for tag in TILE)
        if width * height > limit:  # libtiff's buffer is one tile, however small the image
            raise Rejected("too_large", f"a tile of {width}x{height} is more than {limit} pixels")


def _scans(jpeg: bytes) -> int:
    """The scans of a JPEG's first image, counted to one more than MAX_SCANS."""
    scans, found = 0, MARKER.search(jpeg, 2)
    while found and found[0][-1] != 0xD9 and scans <= MAX_SCANS:
        scans += found[0][-1] == 0xDA
        at = found.end()
        found = MARKER.search(jpeg, at + int.from_bytes(jpeg[at : at + 2], "big"))
    return scans


def _tiff_tags(data: bytes) -> list[int]:
    """The tags in a TIFF's first directory."""
    order = "<" if data[:1] == b"I" else ">"
    big = data[2:4] in (b"+\0", b"\0+")  # BigTIFF, where offsets and counts have 8 bytes
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (n,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    first, size = (at + 8, 20) if big else (at + 2, 12)
    entries = data[first : first + size * min(n, 65535)]
    return [struct.unpack_from(order + "H", entries, i)[0] for i in range(0, len(entries) - 1, size)]


def _upright(image: PIL.Image) -> PIL.Image:
    """EXIF orientation applied; EXIF that can't be read turns nothing (ImageOps.exif_transpose would raise)."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except BROKEN:
        return image
    return image if turn is None else image.transpose(turn)


def _rgb(image: PIL.Image, background: tuple[int, int, int]) -> PIL.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        if image.mode == "F" or not (values.min() >= 0 and values.max() <= 65535):
            raise Rejected("corrupt", f"mode {image.mode} has no stated range to show as 8-bit")
        return PIL.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        over = PIL.new("RGBA", image.size, (*background, 255))
        return PIL.alpha_composite(over, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _reason(e: Exception) -> str:
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
