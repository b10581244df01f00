"""Results that are no numbers: of which images, in which variations, and what the run says of them."""

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from palindrome.model.ddim import noise_index, sample_noise
from palindrome.model.families.unet2d import UNet2D
from palindrome.model.process import VP
from palindrome.model.unet import UNetConfig
from palindrome.pipeline.base.errors import RunError
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.masks import Masks
from palindrome.pipeline.images.sources import open_collection
from palindrome.pipeline.runs.plan import read_plan, write_plan
from palindrome.pipeline.runs.summary import restored_summary
from palindrome.pipeline.runtime.device import Model
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.restore import Degradation, Restore

TOP, SHAPE, VARIATIONS, SEED = 800, (3, 32, 32), 2, 0


@dataclass(frozen=True)
class Overflowing(UNet2D):
    """The output at the top is infinite for noise with a mean above 0, or for all; else a part of x."""

    everywhere: bool = False

    def denoiser(self, device="cpu", execution=None):
        def network(x, timestep):
            bright = (x.flatten(1).mean(1) > 0) | self.everywhere
            return torch.where((bright & (timestep == TOP))[:, None, None, None], torch.inf, 0.1 * x)

        return network


def restore(pictures, folder, **about):
    collection, run = open_collection(str(pictures)), Folder(str(folder))
    write_plan(run, collection, 1024)
    [shard] = read_plan(run)
    reader = Reader(collection, Preprocess(32), 5, False)
    degradation = Degradation(SHAPE, Masks.of("box:0.25", 32))
    work = Restore(run, reader, degradation, (), (-1, 100, TOP), 0.5, VARIATIONS, SEED, {})
    return work.process(Model(Overflowing(UNetConfig(sample_size=32), {}, VP(), **about)), shard)


def test_an_image_with_a_result_that_is_not_finite_is_a_reject_of_all_its_variations(pictures, tmp_path):
    receipt = restore(pictures, tmp_path)
    [file], [rejects] = (list((tmp_path / below).iterdir()) for below in ("images", "rejects"))
    rows, refused = pq.read_table(file), pq.read_table(rejects)
    expected = {
        name
        for name in (path.name for path in pictures.iterdir())
        if any(sample_noise(SEED, noise_index(f"{v}/{name}"), SHAPE).mean() > 0 for v in range(VARIATIONS))
    }
    assert set(refused["image_id"].to_pylist()) == expected and len(expected) > 5
    assert set(refused["reason"].to_pylist()) == {"not_finite"}
    assert (receipt.images, receipt.rejects) == (len(rows) // VARIATIONS, len(refused)) and receipt.images > 2
    assert set(rows["image_id"].to_pylist()) == {path.name for path in pictures.iterdir()} - expected
    assert np.isfinite(rows["mse"].to_numpy()).all()
    summary = restored_summary(Folder(str(tmp_path)))
    assert summary["rejects_by_reason"] == {"not_finite": len(expected)} and summary["results"]["not_finite"] == 0


def test_a_model_without_a_finite_output_ends_the_run(pictures, tmp_path):
    with pytest.raises(RunError, match="not finite"):
        restore(pictures, tmp_path, everywhere=True)
    assert not list(tmp_path.glob("images/*.parquet"))
