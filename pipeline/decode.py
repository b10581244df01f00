"""Bytes -> uint8 image of the model's size, or a reject with its reason."""

import io
import re
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, UnidentifiedImageError
from PIL import Image as PIL

# Formats that are pictures and whose decoders run in this process (EPS, say, would start Ghostscript).
PIL.init()
KNOWN = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
FORMATS = tuple(name for name in KNOWN if name in PIL.OPEN)  # a Pillow may be built without some
MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8[79]a|BM|II\*\0|MM\0\*|RIFF....WEBP|P[1-6]\s|....ftypavi"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    re.DOTALL,
)
PIL.MAX_IMAGE_PIXELS = None  # `Preprocess.max_pixels` is checked from the header, before a pixel is decoded
BROKEN = (  # what Pillow's plugins raise on bytes that are not as they should be
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, AttributeError, OverflowError),
    *(ZeroDivisionError, AssertionError, RuntimeError, struct.error, zlib.error),
)
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(data, how)
    except Rejected:
        raise
    except UnidentifiedImageError:
        # Pillow says the same of a text file and of a PNG that ends inside its header.
        if MAGIC.match(data):
            raise Rejected("truncated" if len(data) < 64 else "corrupt", "the header can't be read") from None
        raise Rejected("not_an_image", "no known image format") from None
    except MemoryError:
        raise Rejected("too_large", "not enough memory to decode it") from None
    except BROKEN as e:
        raise Rejected(_reason(e), _words(e)) from None


def _decode(data: bytes, how: Preprocess) -> tuple[np.ndarray, int, int]:
    with PIL.open(io.BytesIO(data), formats=FORMATS) as opened:
        width, height = opened.size
        if width * height > how.max_pixels:
            raise Rejected("too_large", f"{width}x{height} is more than {how.max_pixels} pixels")
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


def _words(e: Exception) -> str:
    """The exception's words without memory addresses, so that retries write the same reject."""
    words = re.sub(r"0x[0-9a-f]{6,}", "0x…", str(e), flags=re.IGNORECASE)
    return f"{type(e).__name__}: {words}"[:300]
