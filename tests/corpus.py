"""An image folder as people have them, from real pictures: good ones in many encodings, and bad ones of ten kinds;
and one as nobody should: damaged files by the thousand, and files made to hurt."""

import io
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageCms, PngImagePlugin, features

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


def seeds() -> dict[str, bytes]:
    """One real picture in every encoding that the fuzz starts from: name -> bytes."""
    image = Image.open(io.BytesIO(sample_pngs()[0])).resize((60, 44))
    other = image.transpose(Image.Transpose.ROTATE_180)
    gray, flat, clear = image.convert("L"), image.quantize(32), image.copy()
    clear.putalpha(gray)
    deep = Image.frombytes("I;16", image.size, b"".join(struct.pack("<H", v * 257) for v in gray.tobytes()))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "plain " * 20)
    info.add_text("Long", "zipped " * 400, zip=True)
    info.add_itxt("Said", "ünïcode " * 50, "de", zip=True)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile[:24] + bytes(12) + profile[36:]  # without the time at which it was made
    frames = {"save_all": True, "append_images": [other, image], "duration": 30}
    made = {
        "rgb.png": encoded(image, "PNG", pnginfo=info, exif=exif, icc_profile=profile),
        "palette.png": encoded(flat, "PNG", transparency=3),
        "alpha.png": encoded(clear, "PNG"),
        "bits.png": encoded(image.convert("1"), "PNG"),
        "deep.png": encoded(deep, "PNG"),
        "interlaced.png": interlaced(gray),
        "animated.png": encoded(image, "PNG", **frames),
        "baseline.jpg": encoded(image, "JPEG", exif=exif, icc_profile=profile, comment=b"hello"),
        "progressive.jpg": encoded(image, "JPEG", progressive=True, exif=exif),
        "restarts.jpg": encoded(gray, "JPEG", restart_marker_blocks=2),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "two.mpo.jpg": encoded(image, "MPO", save_all=True, append_images=[other.copy()]),
        "lossy.webp": encoded(image, "WEBP", exif=exif),
        "lossless.webp": encoded(clear, "WEBP", lossless=True),
        "animated.webp": encoded(image, "WEBP", **frames),
        "still.gif": encoded(flat, "GIF", transparency=3, comment=b"hello"),
        "animated.gif": encoded(image, "GIF", disposal=2, **frames),
        "rgb.bmp": encoded(image, "BMP"),
        "palette.bmp": encoded(flat, "BMP"),
        "runs.bmp": run_length_bmp(gray),
        "pages.tif": encoded(image.copy(), "TIFF", save_all=True, append_images=[other], exif=exif),
        "deep.tif": encoded(deep, "TIFF"),
        "float.tif": encoded(gray.convert("F"), "TIFF"),
        "fax.tif": encoded(image.convert("1"), "TIFF", compression="group4"),
        "rgb.jp2": encoded(image, "JPEG2000"),
        "gray.j2k": encoded(gray, "JPEG2000", no_jp2=True, irreversible=True),
        "rgb.ppm": encoded(image, "PPM"),
        "deep.pgm": encoded(deep, "PPM"),
        "odd.ppm": b"P6 20 20 100\n" + image.crop((0, 0, 20, 20)).tobytes(),
        "plain.ppm": b"P3\n# plain\n20 20 255\n" + b" ".join(b"%d" % v for v in image.tobytes()[:1200]),
        "plain.pbm": b"P1 20 20\n" + b"01101" * 80,
        "icon.ico": encoded(image, "ICO"),
        "rgb.tga": encoded(image, "TGA"),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma"):
        made[f"{compression}.tif"] = encoded(image, "TIFF", compression=compression)
    if features.check("avif"):
        made["rgb.avif"] = encoded(clear, "AVIF", exif=exif)
    return made


def interlaced(gray: Image.Image) -> bytes:
    """An 8-bit PNG in Adam7's seven passes, which Pillow reads and does not write."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    (width, height), rows = gray.size, []
    for x, y, dx, dy in passes:
        rows += [b"\0" + bytes(gray.getpixel((i, j)) for i in range(x, width, dx)) for j in range(y, height, dy)]
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)
    return png_of((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b""))


def run_length_bmp(gray: Image.Image) -> bytes:
    """An 8-bit BMP with run-length compression, which Pillow reads and does not write."""
    (width, height), shades = gray.size, gray.tobytes()
    rows = [shades[i * width :][:width] for i in reversed(range(height))]
    body = b"".join(b"".join(bytes([1, v]) for v in row) + b"\0\0" for row in rows) + b"\0\1"
    palette = b"".join(bytes([v, v, v, 0]) for v in range(256))
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 2835, 2835, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + info + palette + body


def png_of(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks, each with its length and checksum."""
    packed = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def resummed(png: bytes) -> bytes:
    """A damaged PNG whose checksums are right again, so that decoders look at what is in the chunks."""
    at, data = 8, bytearray(png)
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end])) if end + 4 <= len(data) else data[end:]
        at = end + 4
    return bytes(data)


def mutated(rng: random.Random, data: bytes, other: bytes) -> tuple[str, bytes]:
    """One of ten kinds of damage to `data`, some of it with pieces of `other`: its name and the bytes."""
    out = bytearray(data)
    near = rng.choice([32, 128, 1024, len(out)])  # headers are where most decisions are made
    at, n = rng.randrange(min(near, len(out))), 1 << rng.randrange(9)
    kind = rng.choice(["flips", "bytes", "cut", "splice", "twice", "gone", "noise", "length", "head", "swap"])
    if kind == "flips":
        for _ in range(rng.randint(1, 8)):
            out[rng.randrange(min(near, len(out)))] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        for _ in range(rng.randint(1, 8)):
            out[rng.randrange(min(near, len(out)))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    elif kind == "cut":
        del out[rng.randrange(len(out)) :]
    elif kind == "splice":
        out[at:] = other[rng.randrange(len(other)) :]
    elif kind == "twice":
        out[at:at] = out[at : at + n] * rng.choice([1, 1, 2, 100])
    elif kind == "gone":
        del out[at : at + n]
    elif kind == "noise":
        out[at : at + n] = rng.randbytes(n)
    elif kind == "length":  # wherever one may be
        size = rng.choice([2, 4, 8])
        value = rng.choice([0, 1, 0x7F << 8 * (size - 1), (1 << 8 * size) - 1, 1 << (8 * size - 1), 0xFFFF, 50_000])
        out[at : at + size] = value.to_bytes(size, rng.choice(["big", "little"]))
    elif kind == "head":
        size = rng.choice([4, 12, 16, 30, 64])
        out[:size] = other[:size]
    elif kind == "swap":
        there = rng.randrange(len(out))
        out[at : at + n], out[there : there + n] = out[there : there + n], out[at : at + n]
    if out.startswith(b"\x89PNG") and rng.random() < 0.7:
        return kind, resummed(bytes(out))
    return kind, bytes(out)


def fuzzed(n: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """n damaged files, the same in each run: a name that says what was done, and the bytes."""
    rng, found = random.Random(seed), seeds()
    names = sorted(found)
    for i in range(n):
        name = names[i % len(names)]
        kinds, data = [], found[name]
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            kind, data = mutated(rng, data or b"\0", found[rng.choice(names)])
            kinds.append(kind)
        yield f"{i:05d}-{'-'.join(kinds)}-{name}", data


def tiff_of(*tags: tuple[int, int, int, int], after: int = 0, tail: bytes = b"") -> bytes:
    """A little-endian TIFF of one directory: (tag, type, count, value or offset) each; `after` is the next one's."""
    packed = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + packed + struct.pack("<I", after) + tail


def packed(values: np.ndarray, bits: int, order: str = ">") -> list[bytes]:
    """Whole numbers [H, ...] as H rows of so many bits each."""
    if bits % 8 == 0:
        return [row.astype(f"{order}u{bits // 8}").tobytes() for row in values]
    each = values.reshape(len(values), -1, 1) >> np.arange(bits)[::-1] & 1
    return [np.packbits(row.astype(np.uint8)).tobytes() for row in each]


def png_from(values: np.ndarray, bits: int, color: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of the very values [H, W, C], without an encoder that may change them. `color`: 0 gray, 2 RGB, 3 palette,
    4 gray and alpha, 6 RGBA."""
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), bits, color, 0, 0, 0)
    rows = b"".join(b"\0" + row for row in packed(values, bits))
    return png_of((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


def tiff_from(
    values: np.ndarray,
    bits: int,
    photometric: int,
    tags: dict[int, list[int]] | None = None,
    *,
    order: str = "<",
    planes: bool = False,
    deflate: bool = False,
) -> bytes:
    """Likewise a TIFF. `photometric`: 0 gray from white, 1 gray, 2 RGB, 3 palette, 5 CMYK, 6 YCbCr, 8 LAB."""
    height, width, channels = values.shape
    parts = [values[..., i : i + 1] for i in range(channels)] if planes else [values]
    strips = [b"".join(packed(part, bits, order)) for part in parts]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    wanted: dict[int, tuple[str, list[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [bits] * channels),
        259: ("H", [8 if deflate else 1]),
        262: ("H", [photometric]),
        273: ("I", [0] * len(strips)),
        277: ("H", [channels]),
        279: ("I", [len(strip) for strip in strips]),
        284: ("H", [2 if planes else 1]),
        **{tag: ("H", of_tag) for tag, of_tag in (tags or {}).items()},
    }
    first = 8 + 2 + 12 * len(wanted) + 4  # what does not fit into its entry lies behind the directory
    inside = {tag: struct.calcsize(f"={len(found)}{kind}") for tag, (kind, found) in wanted.items()}
    data = first + sum(size for size in inside.values() if size > 4)
    wanted[273][1][:] = [data + sum(map(len, strips[:i])) for i in range(len(strips))]
    entries = behind = b""
    for tag, (kind, found) in sorted(wanted.items()):
        content = struct.pack(f"{order}{len(found)}{kind}", *found)
        if len(content) > 4:
            content, behind = struct.pack(order + "I", first + len(behind)), behind + content
        entries += struct.pack(order + "HHI", tag, {"H": 3, "I": 4}[kind], len(found)) + content.ljust(4, b"\0")
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(wanted))
    return head + entries + bytes(4) + behind + b"".join(strips)


def gif_of(screen: tuple[int, int], frame: tuple[int, int], disposal: int, body: bytes = b"\2\2\x44\1\0") -> bytes:
    control = b"!\xf9\4" + bytes([disposal << 2 | 1]) + b"\0\0\0\0"
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(3) + b"\xff" * 3
    return head + control + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + body + b";"


ODD_NAMES = (
    *(b"a\nb.png", b"\xff\xfe\x80.png", b"\x1b[31mred.png", b"n" * 251 + b".png", "\u202egnp.png".encode(), b"a..png"),
    *(b"%2e%2e%2fup.png", b"a\\..\\up.png", b"-rf.png", b"$(id).png", b"a::b.png", b"[a].png", b"*.png", b"a#1?.png"),
    *(b"~.png", b" .png", b"C:up.png", b"CON", b"file:", b"s3:bucket.png", b"'\";--.png", b"{0}.png", b"%s%n.png"),
    b"nul\t.png",
)


def odd_names(folder: Path, content: bytes) -> int:
    """Writes the same file under names that are hard to quote, to print or to open; returns how many."""
    for name in ODD_NAMES:
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(content)
    return len(ODD_NAMES)


def hostile() -> dict[str, bytes]:
    """Files made to hurt: name -> bytes. Few kB each, and what they ask for is anything up to 16 EB."""
    found = seeds()
    png, jpeg, j2k, jp2 = (found[name] for name in ("rgb.png", "progressive.jpg", "gray.j2k", "rgb.jp2"))
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    header = struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0)
    rows, zeros = zlib.compress(bytes(20)), zlib.compress(bytes(50_000_000), 9)
    made: dict[str, bytes] = {}

    def png_with(name: str, *chunks: tuple[bytes, bytes], ihdr: bytes = header, idat: bytes = rows) -> None:
        made[f"{name}.png"] = png_of((b"IHDR", ihdr), *chunks, (b"IDAT", idat), (b"IEND", b""))

    made["zeros.png"] = bomb(50_000, 50_000)
    made["wide.png"], made["high.png"] = bomb(4_000_000, 1), bomb(1, 4_000_000)
    made["largest.png"] = bomb(2000, 2000)
    deep = struct.pack(">IIBBBBB", 2000, 2000, 16, 6, 0, 0, 0)
    png_with("deepest", ihdr=deep, idat=zlib.compress(bytes(2000 * 16_001)))
    png_with("more-pixels-than-it-says", idat=zeros)
    png_with("none", ihdr=bytes(8) + header[8:])
    png_with("most", ihdr=b"\xff" * 8 + header[8:])
    png_with("two-headers", (b"IHDR", deep))
    png_with("text", (b"zTXt", b"a\0\0" + zeros))
    png_with("said", (b"iTXt", b"a\0\1\0\0\0" + zeros))
    png_with("profile", (b"iCCP", b"a\0\0" + zeros))
    png_with("texts", *[(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))] * 100)
    png_with("chunks", *[(b"abcd", b"")] * 20_000)
    png_with("frames", (b"acTL", b"\xff" * 8), (b"fcTL", b"\0" * 4 + b"\xff" * 22))
    for value in (0, 9, 65_535):
        exif = Image.Exif()
        exif[0x0112] = value
        made[f"orientation-{value}.jpg"] = encoded(picture, "JPEG", exif=exif)
    for kind, count in ((2, 4), (5, 1), (7, 4), (12, 2**32 - 1), (3, 2**31), (99, 1)):
        exif_chunk = tiff_of((0x0112, kind, count, 8), after=8)
        png_with(f"orientation-{kind}-{count}", (b"eXIf", exif_chunk))
        block = b"Exif\0\0" + exif_chunk
        made[f"orientation-{kind}-{count}.jpg"] = (
            jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]
        )
    png_with("exif-in-itself", (b"eXIf", tiff_of((0x8769, 4, 1, 8), (0x8825, 4, 1, 8), after=8)))

    sof, sos = jpeg.index(b"\xff\xc2"), jpeg.rindex(b"\xff\xda")
    made["largest-header.jpg"] = jpeg[: sof + 5] + b"\xff" * 4 + jpeg[sof + 9 :]
    made["two-headers.jpg"] = jpeg[: sof + 19] + jpeg[sof : sof + 5] + b"\xff" * 4 + jpeg[sof + 9 :]
    scan = jpeg[sos:-2]
    large = encoded(picture.resize((2000, 2000)), "JPEG", progressive=True, quality=10)
    made["largest.jpg"] = large
    last = large[large.rindex(b"\xff\xda") : -2][:10]
    made["scans.jpg"] = large[:-2] + last * 20_000 + b"\xff\xd9"
    made["small-scans.jpg"] = jpeg[:-2] + scan * 2000 + jpeg[-2:]
    made["fill.jpg"] = jpeg[:2] + b"\xff" * 1_000_000 + jpeg[2:]
    made["comments.jpg"] = jpeg[:2] + b"\xff\xfe\0\2" * 200_000 + jpeg[2:]

    made["screen.gif"] = gif_of((65_535, 65_535), (1, 1), 0)
    for disposal in (1, 2, 3):
        made[f"frame-{disposal}.gif"] = gif_of((1, 1), (65_535, 65_535), disposal)
        made[f"largest-{disposal}.gif"] = gif_of((2000, 2000), (2000, 2000), disposal)
    made["comments.gif"] = gif_of((1, 1), (1, 1), 0)[:19] + b"!\xfe\1a\0" * 100_000 + b";"

    def riff(*chunks: tuple[bytes, bytes]) -> bytes:
        body = b"WEBP" + b"".join(kind + struct.pack("<I", len(c)) + c for kind, c in chunks)
        return b"RIFF" + struct.pack("<I", len(body)) + body

    lossy = found["lossy.webp"]
    made["canvas.webp"] = lossy[:24] + b"\xff\xff\xff\xff\0\0" + lossy[30:]
    made["side.webp"] = lossy[:24] + b"\xfe\x3f\0\xfe\x3f\0" + lossy[30:]
    made["vp8.webp"] = riff((b"VP8 ", b"\x10\2\0\x9d\1\x2a\xff\x3f\xff\x3f" + bytes(200)))
    made["vp8l.webp"] = riff((b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(200)))
    made["largest.webp"] = encoded(picture.resize((2000, 2000)).convert("RGBA"), "WEBP", lossless=True, method=0)

    base = [(258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1), (279, 4, 1, 60)]

    def tiff(name: str, *tags: tuple[int, int, int, int], width: int = 8, height: int = 8, after: int = 0) -> None:
        new = {256: (256, 4, 1, width), 257: (257, 4, 1, height)} | {t[0]: t for t in base} | {t[0]: t for t in tags}
        made[f"{name}.tif"] = tiff_of(*(new[tag] for tag in sorted(new)), after=after, tail=bytes(200))

    tiff("sound")
    tiff("tiled", (322, 4, 1, 16), (323, 4, 1, 16), (324, 4, 1, 8), (325, 4, 1, 256))
    tiff("loop", after=8)
    tiff("next-is-nowhere", after=2**32 - 1)
    tiff("most", width=2**32 - 1, height=2**32 - 1)
    tiff("wide", width=2**32 - 1, height=1)
    tiff("bits", (258, 3, 1, 65_535))
    tiff("samples", (277, 3, 1, 65_535))
    tiff("counts", (258, 3, 2**32 - 1, 8), (273, 4, 2**32 - 1, 8))
    tiff("strips", (273, 4, 1, 2**32 - 1), (279, 4, 1, 2**32 - 1), (278, 4, 1, 0))
    tiff("directory-in-itself", (330, 4, 1, 8), (34_665, 4, 1, 8), (34_853, 4, 1, 8))
    tiff("icc", (34_675, 7, 2**31, 8))
    for compression in (1, 4, 5, 7, 8, 34_925):
        compressed = (259, 3, 1, compression)
        tiff(f"rows-{compression}", compressed, (278, 4, 1, 2**32 - 1), width=2000, height=2000)
        tiles = ((322, 4, 1, 2**31 - 16), (323, 4, 1, 2**31 - 16), (324, 4, 1, 8), (325, 4, 1, 60))
        tiff(f"tiles-{compression}", compressed, *tiles)
        thin = ((322, 4, 1, 16), (323, 4, 1, 2**27), (324, 4, 1, 8), (325, 4, 1, 60))
        tiff(f"thin-{compression}", compressed, *thin)
        big = ((322, 4, 1, 2**15), (323, 4, 1, 2**15), (324, 4, 1, 8), (325, 4, 1, 60))
        tiff(f"big-tiles-{compression}", compressed, *big)
    sizes = [(tag, 4, 1, size) for tag in (322, 323) for size in (2**15, 16)]
    head = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    made["two-tiles.tif"] = tiff_of(*head, *sizes, (324, 4, 1, 8), (325, 4, 1, 60), tail=bytes(200))
    made["full-directory.tif"] = b"II*\0" + struct.pack("<IH", 8, 65_535) + b"\xff" * 100_000
    made["chain.tif"] = b"II*\0\x08\0\0\0" + b"".join(struct.pack("<HI", 0, 14 + 6 * i) for i in range(50_000))

    bmp = found["runs.bmp"]
    for name, width, height in (("wide", 4_000_000, 1), ("square", 2000, 2000), ("most", 2**31 - 1, -(2**31))):
        made[f"{name}.bmp"] = bmp[:18] + struct.pack("<ii", width, height) + bmp[26:]
        for command, body in (("skip", b"\0\2\xff\xff"), ("line", b"\1\1\0\0"), ("run", b"\xff\1")):
            made[f"{name}-{command}.bmp"] = made[f"{name}.bmp"][:1078] + body * 20_000

    made["comments.ppm"] = b"P1 2000 2000 " + b"#\n" * 500_000
    made["number.ppm"] = b"P6 " + b"9" * 1_000_000
    made["numbers.ppm"] = b"P6 9999999999 9999999999 255\n"
    made["negative.ppm"] = b"P5 -4 -4 255\n" + bytes(16)
    made["depth.ppm"] = b"P6 400 400 254\n" + bytes(480_000)
    made["plain.ppm"] = b"P3 2000 2000 255\n" + b"1 " * 1_000_000
    made["float.ppm"] = b"Pf 2000 2000 -1.0\n" + bytes(16_000_000)

    siz = j2k.index(b"\xff\x51")
    for name, tile in (("one", 1), ("few", 8), ("most", 2**32 - 1)):
        for side in (60, 2000):
            sizes = struct.pack(">8I", side, side, 0, 0, tile, tile, 0, 0)
            made[f"{name}-tile-{side}.j2k"] = j2k[: siz + 6] + sizes + j2k[siz + 38 :]
    inner = jp2.index(b"\xff\x51")
    made["inner.jp2"] = (
        jp2[: inner + 6] + struct.pack(">8I", 60_000, 60_000, 0, 0, 60_000, 60_000, 0, 0) + jp2[inner + 38 :]
    )
    made["largest.jp2"] = encoded(picture.resize((2000, 2000)), "JPEG2000")
    for length in (0, 1, 7, 2**31, 2**32 - 1):
        at = jp2.index(b"jp2h") - 4
        made[f"box-{length}.jp2"] = jp2[:at] + struct.pack(">I", length) + jp2[at + 4 :]
    at = jp2.index(b"jp2h") - 4
    made["box-of-boxes.jp2"] = jp2[:at] + (b"\0\0\0\1free" + b"\x7f" + b"\xff" * 7) * 10 + jp2[at:]
    if "rgb.avif" in found:
        avif = found["rgb.avif"]
        at = avif.index(b"ispe") + 8
        for side in (2**32 - 1, 65_536, 16_384, 4000, 1):
            made[f"side-{side}.avif"] = avif[:at] + struct.pack(">II", side, side) + avif[at + 8 :]

    made["icon.ico"] = b"\0\0\1\0\xff\xff" + b"\0" * 1000
    made["icon.icns"] = b"icns\xff\xff\xff\xffic10\xff\xff\xff\xff" + png
    made["layers.psd"] = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 56, 300_000, 300_000, 8, 3) + bytes(100)
    made["page.eps"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999999 99999999\n(%pipe%id) (r) file\n"
    made["page.pdf"] = b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n"
    made["entities.svg"] = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><svg>&b;</svg>'
    made["code.pickle"] = b"cos\nsystem\n(S'exit 9'\ntR."
    made["films.fli"] = b"\xff\xff\xff\xff\x12\xaf\xff\xff" + b"\xff" * 200
    made["drawing.wmf"] = b"\xd7\xcd\xc6\x9a" + b"\xff" * 100
    made["volume.hdf5"] = b"\x89HDF\r\n\x1a\n" + bytes(100)
    made["bits.xbm"] = b"#define a_width 99999\n#define a_height 99999\nstatic char a_bits[] = {\n"
    return made
