"""An image folder as people have them, from real pictures: good ones in many encodings, and bad ones of ten kinds."""

import io
import random
import struct
import zipfile
import zlib
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

SAMPLE = Path(__file__).parents[1] / "samples" / "cifar10-test-256.parquet"

HTML = "<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body><h1>Not Found</h1></body></html>\n"
TEXT = "This was to be picture {}. The disk was full, and somebody took notes in its place.\n"
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}


def sample_pngs() -> list[bytes]:
    """The 256 bundled pictures, 32x32 RGB, as the bytes of their PNGs."""
    return pq.read_table(SAMPLE).column("img").combine_chunks().field("bytes").to_pylist()


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, image_format, **options)
    return content.getvalue()


def good_images(folder: Path, n: int) -> list[str]:
    """Writes n different images into folders below `folder`: the sample's own PNGs first, then the same pictures
    enlarged, cropped and in other modes and formats. Returns their names below it, in order."""
    pngs = sample_pngs()
    variants = [
        ("JPEG", "RGB", (48, 36)),
        ("WEBP", "RGB", (40, 40)),
        ("GIF", "P", (32, 32)),
        ("BMP", "RGB", (33, 47)),
        ("TIFF", "RGB", (64, 32)),
        ("PNG", "L", (32, 32)),
        ("PNG", "RGBA", (50, 32)),
        ("JPEG", "CMYK", (32, 32)),
        ("PNG", "1", (36, 32)),
    ]
    names = []
    for i in range(n):
        around, k = divmod(i, len(pngs))
        content, suffix = pngs[k], ".png"
        if around:
            image_format, mode, size = variants[(k + around) % len(variants)]
            suffix = SUFFIXES[image_format]
            picture = Image.open(io.BytesIO(content)).resize((size[0] + around, size[1]))
            content = encoded(picture.convert(mode), image_format)
        names.append(f"{i % 7:02d}/{i:05d}{suffix}")
        path = folder / names[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return names


def bad_images(folder: Path) -> dict[str, str]:
    """Writes forty inputs that are no usable images, four of each of ten kinds, into `folder` and one below it.

    Returns names below `folder` and the reason with which each must be rejected. The bombs have 400 million pixels in
    50 kB: more than the limit by default.
    """
    pngs = sample_pngs()
    pictures = [Image.open(io.BytesIO(png)).resize((96, 64)) for png in pngs[:4]]
    noise = random.Random(7)
    reasons: dict[str, str] = {}

    def put(name: str, reason: str, content: bytes) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        reasons[name] = reason

    for i, picture in enumerate(pictures):
        put(f"empty-{i}.jpg", "empty", b"")
        if i % 2:
            put(f"page-{i}.png", "not_an_image", HTML.encode())
        else:
            put(f"text-{i}.jpg", "not_an_image", TEXT.format(i).encode())
        put(f"noise-{i}.png", "not_an_image", noise.randbytes(1000 * i + 10))
        jpeg, png = encoded(picture, "JPEG"), encoded(picture, "PNG")
        put(f"bad/cut-{i}.jpg", "truncated", jpeg[: len(jpeg) * (i + 5) // 10])
        put(f"bad/cut-{i}.png", "truncated", png[: len(png) * (i + 1) // 5])
        put(f"bad/damaged-{i}.png", "corrupt", damaged_png(pngs[i], i))
        put(f"bad/bomb-{i}.png", "too_large", bomb(20_000, 20_000))
        put(f"archive-{i}.webp", "not_an_image", zipped(f"{i}.png", pngs[i]))
        gif = encoded(picture, "GIF")
        put(f"cut-{i}.gif", "truncated", gif[: 7 + i])  # within its header
        link = f"bad/dangling-{i}.png"
        (folder / link).symlink_to(f"nowhere/{i}.png")
        reasons[link] = "missing"
    return reasons


def damaged_png(png: bytes, i: int) -> bytes:
    """One of four ways: the compressed pixels, their chunk's length, its name, or the header's checksum."""
    idat = png.index(b"IDAT")
    at = [idat + 40, idat - 2, idat + 1, 30][i % 4]
    value = 1 if at == idat - 2 else png[at] ^ 0x5A
    return png[:at] + bytes([value]) + png[at + 1 :]


def bomb(width: int, height: int) -> bytes:
    """A sound black PNG of one bit a pixel, as small as the format allows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pack = zlib.compressobj(9)
    row = bytes(1 + -(-width // 8))
    pixels = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def zipped(name: str, content: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), content)
    return sink.getvalue()
