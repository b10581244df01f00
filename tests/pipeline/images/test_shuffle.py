"""Which images a rank of a training draws, in which order."""

import io
from itertools import islice

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.shuffle import shuffled_batches
from palindrome.pipeline.images.sources import open_collection
from palindrome.pipeline.runs.plan import read_plan, write_plan
from palindrome.pipeline.storage.folder import Folder


def batches(images, run, rank, workers, seed=0):
    """Of 16 images over all workers."""
    shards = list(read_plan(run))
    collection = open_collection(str(images))
    drawn = shuffled_batches(collection, shards, Preprocess(16), 16 // workers, seed, rank, workers)
    return (pixels for pixels, classes in drawn)


@pytest.fixture
def planned(pictures, tmp_path):
    """An empty run folder with a plan of the 24 pictures, so many to a shard."""

    def planned(shard_size):
        run = Folder(str(tmp_path / f"run-{shard_size}"))
        write_plan(run, open_collection(str(pictures)), shard_size)
        return run

    return planned


def kinds(batch):
    return {image.tobytes() for image in batch}


def test_an_epoch_has_every_image_once(pictures, planned):
    drawn = list(islice(batches(pictures, planned(8), 0, 1), 3))  # 48 images, two epochs
    assert {batch.shape for batch in drawn} == {(16, 16, 16, 3)}
    counts = {}
    for image in np.concatenate(drawn):
        counts[image.tobytes()] = counts.get(image.tobytes(), 0) + 1
    assert set(counts.values()) == {2} and len(counts) == 24


def test_ranks_share_the_shards_of_an_epoch(pictures, planned):
    run = planned(8)
    assert len(list(read_plan(run))) == 3
    first, second = (next(batches(pictures, run, rank, 2)) for rank in (0, 1))
    assert len(first) == len(second) == 8
    assert not kinds(first) & kinds(second)


def test_ranks_that_share_one_shard_draw_differently(pictures, planned):
    run = planned(24)
    first, second = (next(batches(pictures, run, rank, 2)) for rank in (0, 1))
    assert not np.array_equal(first, second)


def test_the_seed_gives_the_order(pictures, planned):
    run = planned(8)
    first, same, other = (next(batches(pictures, run, 0, 1, seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_classes_stay_with_their_images(sample, tmp_path):
    """Of the sample's first 64 images, drawn in another order."""
    table, run = pq.read_table(sample).slice(0, 64), Folder(str(tmp_path / "run"))
    pq.write_table(table, tmp_path / "images.parquet")
    collection = open_collection(str(tmp_path / "images.parquet"), keep=["label"])
    write_plan(run, collection, 24)
    shards = list(read_plan(run))
    drawn = shuffled_batches(collection, shards, Preprocess(32), 32, 0, class_of=lambda image: image.kept["label"])
    pictures = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["img"].to_pylist()]
    label_of = {picture.tobytes(): label for picture, label in zip(pictures, table["label"].to_pylist(), strict=True)}
    found = [pair for pixels, classes in islice(drawn, 2) for pair in zip(pixels, classes, strict=True)]
    assert len({picture.tobytes() for picture, _ in found}) == 64
    assert all(label_of[picture.tobytes()] == label for picture, label in found)
