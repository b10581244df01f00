"""Numbers that are none: a latent that is not finite is a reject, and a model that has no other ends the run."""

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from palindrome.model.families.unet2d import UNet2D
from palindrome.model.ladder import ladder
from palindrome.model.process import VP
from palindrome.model.unet import UNetConfig
from palindrome.pipeline.base.errors import RunError
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.metrics import to_model
from palindrome.pipeline.images.read import first_images
from palindrome.pipeline.images.sources import open_collection
from palindrome.pipeline.runs.inversion import Inversion
from palindrome.pipeline.runs.plan import read_plan, write_plan
from palindrome.pipeline.runs.summary import latents_summary
from palindrome.pipeline.runtime.device import Model
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.encode import Encode, measure

LEVELS = ladder("linear", 4)
OVERFLOWS = [(np.nan, "float32"), (np.inf, "float32"), (3e38, "float32"), (9e4, "float16")]  # beyond the dtype's range


@dataclass(frozen=True)
class Overflowing(UNet2D):
    """The output for bright images is `value`: those whose mean, in standard deviations, is above a limit. Else it is
    a part of x, so that all the way up an image is as bright as it was."""

    limit: float = 0.0
    value: float = float("nan")

    def denoiser(self, device="cpu", execution=None):
        def network(x, timestep):
            bright = brightness(x) > self.limit
            return torch.where(bright[:, None, None, None], self.value, 0.1 * x)

        return network


def encode(pictures, folder, limit, value=float("nan"), batch_size=5, dtype="float32", measured=False):
    collection, run = open_collection(str(pictures)), Folder(str(folder))
    write_plan(run, collection, 1024)
    [shard] = read_plan(run)
    model = Model(Overflowing(UNetConfig(sample_size=32), {}, VP(), limit=limit, value=value))
    reader = Reader(collection, Preprocess(32), batch_size, False)
    receipt = Encode(run, reader, Inversion(LEVELS, 2, dtype=dtype), measured, {}).process(model, shard)
    return run, receipt


def brightness(x):
    return x.flatten(1).mean(1) / x.flatten(1).std(1)


def of_pictures(pictures):
    pixels = first_images(open_collection(str(pictures)), Preprocess(32), 24)
    return brightness(to_model(pixels)).numpy()


def above(bright, rank):
    """A limit between two neighbours."""
    return float(np.sort(bright)[rank : rank + 2].mean())


@pytest.mark.parametrize(("value", "dtype"), OVERFLOWS)
def test_each_image_whose_latent_is_not_finite_is_a_reject(pictures, tmp_path, value, dtype):
    bright = of_pictures(pictures)
    limit = above(bright, 15)
    run, receipt = encode(pictures, tmp_path, limit, value, dtype=dtype, measured=True)
    names = np.array(sorted(path.name for path in pictures.iterdir()))
    [file], [rejects] = (list((tmp_path / below).iterdir()) for below in ("latents", "rejects"))
    rows, refused = pq.read_table(file), pq.read_table(rejects)
    assert rows["image_id"].to_pylist() == names[bright <= limit].tolist()
    assert refused["image_id"].to_pylist() == names[bright > limit].tolist()
    assert set(refused["reason"].to_pylist()) == {"not_finite"}
    assert np.isfinite(rows["latent"].combine_chunks().to_numpy_ndarray().astype(np.float32)).all()
    assert (receipt.images, receipt.rejects) == (16, 8)
    summary = latents_summary(run, True)
    assert summary["rejects_by_reason"] == {"not_finite": 8}
    assert summary["round_trip"]["count"] == 16 and summary["round_trip"]["not_finite"] == 0


def test_a_model_whose_first_outputs_are_all_not_finite_ends_the_run(pictures, tmp_path):
    with pytest.raises(RunError, match="not finite"):
        encode(pictures, tmp_path, -1e9)
    assert not (tmp_path / "latents").exists() or not list((tmp_path / "latents").glob("*.parquet"))


def test_a_later_batch_of_rejects_alone_does_not(pictures, tmp_path):
    bright = of_pictures(pictures)
    limit = above(bright, int((bright < bright[0]).sum()))  # of batches of one, the first is good
    _, receipt = encode(pictures, tmp_path, limit, batch_size=1)
    assert (receipt.images, receipt.rejects) == (int((bright <= limit).sum()), int((bright > limit).sum()))


def test_what_decodes_to_no_numbers_is_not_identical():
    x = torch.full((3, 3, 4, 4), -1.0)
    decoded = torch.stack([x[0], x[1] * float("nan"), x[2] * float("inf")])
    found = measure(x, decoded)
    assert found["identical"].tolist() == [1.0, 0.0, 0.0]
    assert found["mse"][0] == 0 and not np.isfinite(found["mse"][1:]).any()
    assert np.isnan(found["psnr"][1]) and found["psnr"][2] == -np.inf
