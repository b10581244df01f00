"""The classes that a training takes from a column."""

import numpy as np
import pytest

from palindrome.model.presets import PRESETS
from palindrome.model.process import VP
from palindrome.model.training import Hyperparameters
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.records import Image
from palindrome.pipeline.images.sources import Collection
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.train import Train

HOW = {"steps": 1, "lr": 1e-3, "lr_warmup": 0, "lr_decay": "none", "weight_decay": 0.0, "ema": 0.9, "grad_clip": 1.0}


@pytest.fixture
def train(tmp_path):
    def train(**classes):
        return Train(
            out=Folder(str(tmp_path)),
            collection=Collection(str(tmp_path), "files"),
            preprocess=Preprocess(16),
            unet=PRESETS["tiny"],
            process=VP(),
            how=Hyperparameters(**HOW, flip=True, prediction="epsilon", seed=0),
            batch_size=8,
            workers=1,
            precision="auto",
            save_dtype="float32",
            sample_every=1,
            save_every=1,
            **classes,
        )

    return train


def image(**kept):
    return Image("cat.png", "photos/cat.png", 16, 16, "0" * 64, kept, None)


@pytest.mark.parametrize("number", [0, 9, np.int32(4)])
def test_a_class_is_the_number_in_the_column(train, number):
    assert train(class_column="label", num_classes=10).class_of(image(label=number)) == number


@pytest.mark.parametrize("value", [10, -1, None, "cat", 1.5])
def test_an_image_of_no_class_is_named(train, value):
    with pytest.raises(ValueError, match=r"photos/cat.png: label is .*, not a class below 10"):
        train(class_column="label", num_classes=10).class_of(image(label=value))


def test_a_training_without_classes_asks_for_none(train):
    assert train().class_of is None
