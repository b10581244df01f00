import base64
import html
import io
import math
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image as PIL

from palindrome.pipeline.reports.reconstruction import (
    Example,
    Series,
    amplified_difference,
    histogram,
    reconstruction_report,
)
from palindrome.pipeline.runs.errors import Errors

NASTY = "<script>alert('1')</script>&\"/" + "long" * 40 + ".png"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a report holds: start tags with their attributes, the table's cells, words by element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[list[str]]] = []
        self.words: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append([])

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not data.strip():
            return
        self.words.append((self.open[-1] if self.open else "", data))
        if "tr" in self.open:
            self.rows[-1][-1].append(data.strip())

    def attributes(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def said(self, tag: str) -> list[str]:
        return [words for name, words in self.words if name == tag]

    def drawn(self, style: str) -> list[list[tuple[float, float]]]:
        """The corners of every path whose style is matched."""
        paths = [path["d"] for path in self.attributes("path") if re.match(style, path["style"])]
        return [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)] for path in paths]

    def curves(self) -> list[list[tuple[float, float]]]:
        return [line for line in self.drawn(r"fill: none; .*stroke: var\(--(mean|p99)\)") if len(line) > 1]


def images(count: int = 3, shape: tuple[int, int, int] = (32, 32, 3)) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8))


def example(image_id: str, original: np.ndarray, reconstruction: np.ndarray, **more: Any) -> Example:
    return Example(**{"image_id": image_id, "steps": 50, "mse": 1.234e-4, "psnr": 39.087, **more}, original=original,
                   reconstruction=reconstruction)  # fmt: skip


def errors(count: int = 1000, centre: float = -4.0, seed: int = 0) -> np.ndarray:
    return 10 ** np.random.default_rng(seed).normal(centre, 0.4, count)


def of(mse: np.ndarray) -> Errors:
    found = Errors()
    found.add("shard", np.arange(len(mse)), pa.array([f"{i}.png" for i in range(len(mse))]), mse)
    return found


def series(steps: int, mse: np.ndarray, uncompared: Mapping[str, int] | None = None, identical: float = 0.25) -> Series:
    return Series(steps, 2 * steps, of(mse), identical, uncompared or {})


def full() -> str:
    first, second, third = images()
    small = first[:, :, :1]
    listed = {
        "A sample": [example(NASTY, first, second), example("b.png", second, third)],
        "Gray": [example("gray.png", small, small, mse=0.0, psnr=math.inf)],
        "Worst": [],
    }
    runs = [series(s, errors(centre=-3 - i)) for i, s in enumerate((10, 50, 1000))]
    return reconstruction_report("Test & <b>title</b>", {"model <i>": "0f" * 32, "ladder": NASTY}, runs, listed)


def test_amplified_difference_is_exact() -> None:
    original = np.array([[[0], [10], [10], [100], [255], [0]]], np.uint8)
    reconstruction = np.array([[[0], [11], [9], [116], [0], [255]]], np.uint8)
    assert amplified_difference(original, reconstruction).tolist() == [[[128], [136], [120], [255], [0], [255]]]
    assert amplified_difference(original, reconstruction, gain=1)[0, :4, 0].tolist() == [128, 129, 127, 144]
    assert amplified_difference(original, reconstruction).dtype == np.uint8


def test_what_users_wrote_is_escaped() -> None:
    page = Page(full())
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    assert NASTY in page.said("div") and NASTY in page.said("dd") and "model <i>" in page.said("dt")
    assert {"class": "id", "title": NASTY} in page.attributes("div")
    assert page.said("h1") == page.said("title")[:1] == ["Test & <b>title</b>"]
    odd = Page(reconstruction_report("{css}", {"{0}": "{"}, [series(5, errors(), {"<u>gone": 3})], {"<u>{x}": []}))
    assert "u" not in {tag for tag, _ in odd.tags} and odd.rows[1][-1] == ["3 <u>gone"] and "<u>{x}" in odd.said("h2")


def test_one_file_and_nothing_from_outside() -> None:
    page = Page(full())
    assert not {"link", "script", "iframe", "image", "use"} & {tag for tag, _ in page.tags}
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.attributes("img"))
    assert not re.search(r"https?:|@import|url\(", full())


def test_images_come_back_pixel_for_pixel() -> None:
    first, second, third = images()
    expected = [first, second, amplified_difference(first, second), second, third, amplified_difference(second, third)]
    expected += [first[:, :, :1], first[:, :, :1], np.full((32, 32, 1), 128, np.uint8)]
    found = Page(full()).attributes("img")
    assert len(found) == len(expected)
    for image, pixels in zip(found, expected, strict=True):
        content = base64.b64decode(image["src"].split(",")[1], validate=True)
        assert content.startswith(b"\x89PNG")
        assert np.array_equal(np.asarray(PIL.open(io.BytesIO(content))).reshape(pixels.shape), pixels)
        assert image["class"] == "small" and image["width"] == image["height"] == "96"
    assert [image["alt"] for image in found[:3]] == ["original", "reconstruction", "difference × 8"]


@pytest.mark.parametrize("height, width, shown", [(28, 28, (84, 84)), (64, 64, (128, 128)), (200, 10, (192, 10)),
                                                  (256, 512, (96, 192)), (1, 1, (96, 96))])  # fmt: skip
def test_images_of_any_shape(height: int, width: int, shown: tuple[int, int]) -> None:
    pixels = np.zeros((height, width, 3), np.uint8)
    for image in Page(reconstruction_report("t", {}, [], {"A": [example("a", pixels, pixels)]})).attributes("img"):
        assert (int(image["height"]), int(image["width"])) == shown
        assert ("class" in image) == (shown >= (height, width))


def test_cards_tell_steps_and_errors() -> None:
    spans = Page(full()).said("span")
    assert spans[:3] == ["50 steps", "MSE 1.23e-4", "PSNR 39.09 dB"] and spans[-2:] == ["MSE 0", "PSNR ∞"]


def test_table_is_numpys() -> None:
    mse = errors(1234)
    run = series(50, mse, {"missing": 1200, "changed": 1, "truncated": 0}, 0.98765)
    _, (steps, nfe, count, *figures, psnr, identical, uncompared) = Page(reconstruction_report("t", {}, [run], {})).rows
    assert (steps, nfe, count) == (["50"], ["100"], ["1,234"])
    expected = [np.mean(mse), np.median(mse), np.percentile(mse, 99), np.max(mse)]
    assert [float(f[0]) for f in figures] == [float(f"{v:.2e}") for v in expected]
    assert psnr == [f"{np.mean(10 * np.log10(1 / mse)):.2f}"]
    assert (identical, uncompared) == (["98.77%"], ["1,200 missing, 1 changed"])


def test_exact_and_strange_errors_are_counted_apart() -> None:
    mse = np.concatenate([errors(100), np.zeros(3), [np.nan, np.inf]])
    text = reconstruction_report("t", {}, [series(50, mse, identical=0.99999)], {})
    page = Page(text)
    finite, positive = mse[:103], mse[:100]
    _, _, count, mean, _, _, _, psnr, identical, uncompared = page.rows[1]
    assert count == ["105", "2 not finite"] and float(mean[0]) == float(f"{finite.mean():.2e}")
    assert psnr == [f"{-10 * np.log10(positive).mean():.2f}", "+ 3 exact"]
    assert identical == ["99.99%"] and uncompared == ["none"]
    assert "100 images + 3 exact + 2 not finite" in text and "counted, not drawn" in text


@pytest.mark.parametrize("parts", [
    [errors(5000)], [errors(1)], [errors(300), errors(40, -7, 1), np.zeros(0)], [np.full(9, 1e-3)],
    [10.0 ** np.arange(-12, 1)], [np.array([5e-324, 1.0])], [np.array([0.1, 0.1 + 1e-16])],
])  # fmt: skip
def test_histogram_holds_every_error(parts: Sequence[np.ndarray]) -> None:
    edges, counts = histogram([of(part) for part in parts])
    assert counts.shape == (len(parts), len(edges) - 1) and len(edges) <= 51
    assert counts.sum(1).tolist() == [len(p) for p in parts]
    logs = np.log10(np.concatenate(parts))
    assert edges[0] - 1e-9 <= logs.min() and logs.max() <= edges[-1] + 1e-9
    drawn = Page(reconstruction_report("t", {}, [series(5, p) for p in parts], {})).said("title")
    bars = [words for words in drawn if " from " in words]
    assert sum(int(words.split()[0].replace(",", "")) for words in bars) == counts.sum()


def test_charts_are_drawn_inside_and_described() -> None:
    curve, bars = Page(full()).attributes("svg")
    assert curve["role"] == bars["role"] == "img"
    assert "2,000: mean" in curve["aria-label"] and "1,000 steps: 1,000 images" in bars["aria-label"]
    page = Page(full())
    assert len(page.curves()) == 2
    for points in page.curves():
        assert len(points) == 3 and points == sorted(points) and all(0 < x < 400 and 0 < y < 400 for x, y in points)
    rects = page.drawn(r"fill: var\(--mean\)$")
    assert len(rects) == sum(" from " in words for words in page.said("title"))
    for rect in rects:
        (left, bottom), (right, _), (_, top), _ = rect
        assert 0 < left < right < 400 and 0 < top < bottom < 400
    labels = page.said("text")
    assert {"20", "50", "200", "2,000", "10⁻⁴", "mean", "p99", "network evaluations an image", "images"} <= set(labels)


def test_a_curve_needs_two_points() -> None:
    assert not Page(reconstruction_report("t", {}, [series(5, errors())], {})).curves()
    runs = [series(5, errors()), series(10, errors()), series(20, np.zeros(4)), series(30, np.zeros(0))]
    text = reconstruction_report("t", {}, runs, {})
    assert len(Page(text).curves()) == 2 and "no error above 0: 20 steps, 30 steps." in text
    assert not Page(reconstruction_report("t", {}, runs[1:], {})).curves()
    rare = np.concatenate([np.zeros(999), [1e-2]])  # p99 is 0, the mean is not
    points = Page(reconstruction_report("t", {}, [series(5, rare), series(5, rare)], {})).said("title")
    assert sum(" evaluations: " in words for words in points) == 2


def test_names_of_lines_that_end_together_stand_apart() -> None:
    runs = [series(s, np.full(10, 10.0**-i)) for i, s in enumerate((5, 10))]
    page = Page(reconstruction_report("t", {}, runs, {}))
    texts = zip(page.said("text"), page.attributes("text"), strict=True)
    p99, mean = (float(attributes["y"]) for words, attributes in texts if words in ("p99", "mean"))
    assert mean - p99 == pytest.approx(13)


def test_same_input_same_bytes() -> None:
    assert full() == full()


@pytest.mark.parametrize("mse", [np.zeros(0), np.full(3, np.nan)])
def test_nothing_to_show(mse: np.ndarray) -> None:
    text = reconstruction_report("t", {}, [series(50, mse, {"missing": 256}, math.nan)], {"A sample": []})
    assert Page(text).rows[1][-7:] == [["–"]] * 6 + [["256 missing"]]
    assert ("No image could be compared" in text) == (not len(mse)) and "No images." in text and "<svg" not in text
    assert "No image could be compared" in reconstruction_report("t", {}, [], {})
    strange = example("a", *images(2), mse=math.nan, psnr=math.nan)
    assert Page(reconstruction_report("t", {}, [], {"A": [strange]})).said("span")[1:] == ["MSE –", "PSNR –"]


def test_all_exact() -> None:
    text = reconstruction_report("t", {}, [series(50, np.zeros(4), identical=1.0)], {})
    assert [c[0] for c in Page(text).rows[1][3:9]] == ["0", "0", "0", "0", "∞", "100%"]
    assert "Every compared image came back exactly" in text and "<svg" not in text


def test_a_phone_need_not_scroll_sideways(tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed: the page's width on a phone is not checked")
    wrapper = tmp_path / "wrapper.html"
    frame = f'<iframe id="phone" width="360" height="640" style="border: 0" srcdoc="{html.escape(full())}"></iframe>'
    measure = (
        "onload = () => { const w = phone.contentWindow, e = w.document.documentElement;"
        " document.title = `${e.scrollWidth} of ${w.innerWidth}, ${w.document.images.length} images`; }"
    )
    wrapper.write_text(
        f'<!doctype html><meta charset="utf-8"><title></title>{frame}<script>{measure}</script>', "utf-8"
    )
    quiet = ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *quiet, profile]
    dom = subprocess.run(
        [*command, "--dump-dom", wrapper.as_uri()], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    found = re.search(r"<title>(\d+) of (\d+), (\d+) images</title>", dom)
    assert found, dom[:500]
    width, inner, drawn = map(int, found.groups())
    assert inner == 360 and width <= inner and drawn == 9
