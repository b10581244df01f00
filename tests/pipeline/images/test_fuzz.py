"""Thousands of damaged files and some made to hurt, read in processes of their own: each is one image or one reject,
the same each time, quietly, in bounded memory."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palindrome.pipeline.images.decode import Preprocess, Rejected, decode
from palindrome.pipeline.images.read import read_batches
from palindrome.pipeline.images.records import REASONS, Shard, pack
from palindrome.pipeline.images.sources import list_pieces, open_collection

ROOT = Path(__file__).parents[3]
FUZZED = 2200
MAX_PIXELS = 4_000_000
MEMORY = 128 << 20  # bytes a thread, over what was there before the first file: eight times the largest image's RGBA
THREADS = {"one by one": 1, "in batches, two threads": 2}

FOUND = []  # what the first process found

READER = """
import hashlib, json, re, resource, sys, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.records import pack
from palindrome.pipeline.images.read import read_batches, read_image
from palindrome.pipeline.images.records import Image, Shard
from palindrome.pipeline.images.sources import list_pieces, open_collection, read_raw

folder, how_read, max_pixels, out = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # a test that goes wrong shall not take the machine along
how = Preprocess(32, max_pixels=int(max_pixels))
collection = open_collection(folder)
shards = [Shard.of(collection.kind, pieces) for pieces in pack(list_pieces(collection, 100), 100)]
found, slowest, started = {}, (0, ""), open(out + ".started", "w", buffering=1)

def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]) << 10

def put(result):
    assert result.image_id not in found
    if isinstance(result, Image):
        assert (result.pixels.shape, result.pixels.dtype) == ((32, 32, 3), np.uint8)
        pixels = hashlib.sha256(result.pixels.tobytes()).hexdigest()
        found[result.image_id] = ["image", pixels, result.width, result.height]
    else:
        found[result.image_id] = [result.reason, result.detail]

def batches(shard):
    return [item for b in read_batches(collection, shard, how, 16) for item in (*b.images, *b.rejects)]

before = peak()
if how_read == "one by one":
    for shard in shards:
        for raw in read_raw(collection, shard):
            started.write(ascii(raw.image_id) + "\\n")
            began = time.thread_time()
            put(read_image(raw, how))
            slowest = max(slowest, (time.thread_time() - began, raw.image_id))
else:
    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(batches, shards):
            for result in results:
                put(result)
with open(out, "w") as file:
    json.dump({"found": found, "slowest": slowest, "peak": peak() - before}, file)
"""


@pytest.fixture(scope="module")
def hostile(corpus):
    return corpus.hostile()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus, hostile, pngs):
    """The files; and the names of the damaged, the hostile, and how many have odd names."""
    path = tmp_path_factory.mktemp("fuzz")
    fuzzed = dict(corpus.fuzzed(FUZZED, seed=4))
    made = {f"hostile-{name}": data for name, data in hostile.items()}
    for name, data in (fuzzed | made).items():
        (path / name).write_bytes(data)
    odd = path / "odd"
    odd.mkdir()
    return path, set(fuzzed), set(made), corpus.odd_names(odd, pngs[0])


@pytest.fixture(scope="module", params=THREADS)
def read(request, folder, tmp_path_factory):
    """What a process found that read all the files, which exited 0 and printed nothing."""
    out = tmp_path_factory.mktemp("read") / "found.json"
    command = [sys.executable, "-c", READER, str(folder[0]), request.param, str(MAX_PIXELS), str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        pytest.fail(f"hangs on the last of\n{Path(f'{out}.started').read_text()[-500:]}")
    last = Path(f"{out}.started").read_text()[-200:]
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", ""), f"the last file begun: {last}"
    return json.loads(out.read_text()) | {"threads": THREADS[request.param]}


def test_every_input_is_one_image_or_one_reject_with_its_reason(read, folder):
    _, fuzzed, hostile, odd = folder
    found = read["found"]
    assert len(fuzzed) == FUZZED
    assert fuzzed | hostile == {name for name in found if not name.startswith("odd/")}
    assert [values[0] for name, values in found.items() if name.startswith("odd/")] == ["image"] * odd
    counts = Counter(values[0] for values in found.values())
    print(counts, f"peak {read['peak'] / 2**20:.0f} MB more, slowest {read['slowest']}")
    assert set(counts) <= {"image", *REASONS}
    assert min(counts[reason] for reason in ("image", "not_an_image", "truncated", "corrupt", "too_large")) > 20
    for _, detail in (values for values in found.values() if values[0] != "image"):
        assert 0 < len(detail) <= 300
        assert "not enough memory" not in detail


def test_memory_stays_bounded(read):
    assert read["peak"] < MEMORY * read["threads"]


def test_no_file_takes_long(read):
    assert read["slowest"][0] < 10, read["slowest"]


def test_found_is_the_same_in_another_process_and_in_batches(read):
    FOUND.append(read["found"])
    assert read["found"] == FOUND[0]


@pytest.mark.parametrize(
    ("name", "reason", "detail"),
    [
        ("zeros.png", "too_large", "50000x50000 is more than 4000000 pixels"),
        ("frame-2.gif", "too_large", "4294836225 pixels are more than 4000000"),
        ("big-tiles-8.tif", "too_large", "a tile of 32768x32768 is more than 4000000 pixels"),
        ("two-tiles.tif", "corrupt", "two sizes of tiles"),
        ("few-tile-2000.j2k", "too_large", "62500 tiles"),
        ("scans.jpg", "corrupt", "more than 100 scans"),
        ("comments.ppm", "truncated", "ValueError: not enough image data"),
        ("page.eps", "not_an_image", "no known image format"),
    ],
)
def test_costly_file_is_rejected_for_what_it_is(name, reason, detail, hostile):
    with pytest.raises(Rejected) as info:
        decode(hostile[name], Preprocess(32, max_pixels=MAX_PIXELS))
    assert (info.value.reason, info.value.detail) == (reason, detail)


def test_files_that_only_look_costly_are_images(hostile, corpus):
    for name in ("largest.png", "deepest.png", "largest.jpg", "largest.webp", "largest.jp2"):
        assert decode(hostile[name], Preprocess(32, max_pixels=MAX_PIXELS))[1:] == (2000, 2000)
    assert decode(hostile["tiled.tif"], Preprocess(8))[1:] == (8, 8)
    for name, data in corpus.seeds().items():
        if name not in ("float.tif", "icon.ico", "rgb.tga"):
            assert decode(data, Preprocess(32))[0].std() > 0


def test_comments_in_a_plain_picture_change_nothing():
    bare, noted = b"P2 2 2 9 0 3 6 9\n", b"P2 # two\n2 2\n#\n9 0 3 # and\r6 9\n# the end"
    np.testing.assert_array_equal(decode(bare, Preprocess(2))[0], decode(noted, Preprocess(2))[0])


def test_names_of_members_lead_nowhere(tmp_path, pngs):
    names = ["../../up.png", "/etc/passwd", "a\nb.png", "n" * 100_000, "s3://bucket/a.png", ""]
    rows = [{"bytes": pngs[0], "path": name} for name in names]
    pq.write_table(pa.table({"img": rows}), tmp_path / "a.parquet")
    collection = open_collection(str(tmp_path))
    (pieces,) = pack(list_pieces(collection, 10), 10)
    (batch,) = read_batches(collection, Shard.of(collection.kind, pieces), Preprocess(32), 10)
    assert [image.image_id for image in batch.images] == [f"a.parquet#{i}" for i in range(len(names))]
