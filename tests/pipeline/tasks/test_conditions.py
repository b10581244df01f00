"""What a conditional network is told travels with each image: from the column kept, through batches, lanes, halves and
the samples that go on, to the network; and back from stored rows."""

import json
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from palindrome.model.condition import Condition
from palindrome.model.ddim import sample
from palindrome.model.families.unet2d import UNet2D
from palindrome.model.inversion import invert_exactly
from palindrome.model.ladder import ladder
from palindrome.model.process import VP
from palindrome.model.unet import UNetConfig
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.metrics import to_model
from palindrome.pipeline.images.read import first_images
from palindrome.pipeline.images.sources import open_collection
from palindrome.pipeline.runs.inversion import Inversion
from palindrome.pipeline.runs.plan import read_plan, write_plan
from palindrome.pipeline.runtime.device import Model
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.encode import Encode
from palindrome.pipeline.tasks.reconstruct import Reconstruct

LEVELS = ladder("linear", 4)
IMAGES = 24


@dataclass(frozen=True)
class Labelled(UNet2D):
    """A network that is told a label, and has no room for more than `room` images."""

    room: int = 1000

    def denoiser(self, device="cpu", execution=None):
        def network(x, timestep, condition):
            if len(x) > self.room:
                raise torch.OutOfMemoryError
            labels = condition.values["label"]
            assert len(labels) == len(x)
            return (x * (1 + labels[:, None, None, None] / 10)).sin() * (1 + timestep / 1000)

        return network

    def condition(self, rows, encoder=None):
        return Condition({"label": torch.tensor([row["label"] for row in rows])})


def checkpoint(room=1000):
    return Labelled(UNetConfig(sample_size=32), {}, VP(), room=room)


@pytest.fixture(scope="module")
def labelled(sample_table):
    """The images in [-1, 1] and their labels, one at a time."""
    collection, labels = sample_table
    pixels = first_images(collection, Preprocess(32), IMAGES)
    return to_model(pixels), labels


@pytest.fixture(scope="module")
def sample_table(sample, tmp_path_factory):
    table = pq.read_table(sample).slice(0, IMAGES)
    path = tmp_path_factory.mktemp("labelled") / "images.parquet"
    pq.write_table(table, path)
    labels = table["label"].to_pylist()
    assert len(set(labels)) > 5
    return open_collection(str(path), keep=["label"]), labels


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def alone(images, labels, how):
    """Each image's latent by model.inversion, one image after the other."""
    network = checkpoint().denoiser()
    told = [Condition({"label": torch.tensor([label])}) for label in labels]
    how = {"corrections": how.corrections, "tolerance": how.tolerance}
    return torch.cat(
        [
            invert_exactly(network, image[None], LEVELS, VP(), condition=condition, **how)[0]
            for image, condition in zip(images, told, strict=True)
        ]
    )


@pytest.mark.parametrize("lanes", [None, 2])
@pytest.mark.parametrize("room", [1000, 5])
@pytest.mark.parametrize("how", [Inversion(LEVELS, 0), Inversion(LEVELS, 2), Inversion(LEVELS, 4, 0.05)], ids=repr)
def test_each_image_is_encoded_and_decoded_with_its_own_label(sample_table, labelled, tmp_path, lanes, room, how):
    collection, labels = sample_table
    images, _ = labelled
    model, reader = Model(checkpoint(room), lanes), Reader(collection, Preprocess(32), 10, False)
    encoded, decoded = Folder(str(tmp_path / "encoded")), Folder(str(tmp_path / "decoded"))
    write_plan(encoded, collection, 1024)
    [shard] = read_plan(encoded)
    facts = {"model_digest": "x", "levels": list(LEVELS), "preprocess": Preprocess(32).record()}
    Encode(encoded, reader, how, True, facts).process(model, shard)
    rows = pq.read_table(f"{encoded.path()}/latents/{shard.name}.parquet")
    latents = rows["latent"].combine_chunks().to_numpy_ndarray()
    expected = alone(images, labels, how)
    assert np.allclose(latents, expected, atol=1e-5)
    wrong = alone(images, labels[::-1], how)
    assert not np.allclose(wrong, expected, atol=1e-2), "labels make a difference"

    encoded.put("run.json", json.dumps({"job": "encode", "config": {}, **facts}).encode())
    Reconstruct(decoded, encoded, reader, (LEVELS,), {}).process(model, shard)
    again = pq.read_table(f"{decoded.path()}/reconstructions/{shard.name}.parquet")
    told = Condition({"label": torch.tensor(labels)})
    pixels = sample(checkpoint().denoiser(), torch.tensor(latents), LEVELS, VP(), condition=told)
    mse = ((pixels - images).double() / 2).square().flatten(1).mean(1)
    assert np.allclose(again["mse"].to_numpy(), mse, rtol=1e-4, atol=1e-9)
