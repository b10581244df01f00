"""Real pictures for every test: the bundled sample, and the corpus of odd files made from it."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def corpus():
    """tests/corpus.py: `good_images(folder, n)`, `bad_images(folder)` and what they are made with."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("corpus.py"))))


@pytest.fixture(scope="session")
def sample(corpus):
    """The path of the bundled Parquet file: 256 CIFAR-10 test images, `img` struct<bytes, path>, and `label`."""
    return corpus.SAMPLE


@pytest.fixture(scope="session")
def pngs(corpus):
    """The bytes of its images."""
    return corpus.sample_pngs()
