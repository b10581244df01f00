"""Results that are no numbers: the images are rejects, and others are not."""

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from palindrome.model.families.unet2d import UNet2D
from palindrome.model.process import VP
from palindrome.model.unet import UNetConfig
from palindrome.pipeline.base.errors import RunError
from palindrome.pipeline.runs.encoded import EncodeRun
from palindrome.pipeline.runs.plan import read_plan
from palindrome.pipeline.runs.selection import Selection
from palindrome.pipeline.runs.summary import edited_summary
from palindrome.pipeline.runtime.device import Model
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.edit import Change, Edit


@dataclass(frozen=True)
class Overflowing(UNet2D):
    """The output is infinite for states with a mean above a limit; else a part of x."""

    above: float = 0.0

    def denoiser(self, device="cpu", execution=None):
        def network(x, timestep):
            return torch.where((x.flatten(1).mean(1) > self.above)[:, None, None, None], torch.inf, 0.1 * x)

        return network


@pytest.fixture(scope="module")
def encoded(palindrome, pictures, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "run"
    assert palindrome("encode", "--images", pictures, "--model", model, "--out", out, "--steps", 2).code == 0
    return EncodeRun.open(Folder(str(out)))


def edit(encoded, folder, above):
    [shard], levels = read_plan(encoded.folder), encoded.inversion.levels
    change, reader = Change(levels, told=None), Reader(encoded.collection, encoded.preprocess, 5, False)
    work = Edit(Folder(str(folder)), encoded.folder, Selection(), reader, change, {})
    return work.process(Model(Overflowing(UNetConfig(sample_size=16), {}, VP(), above=above)), shard)


def test_an_image_whose_result_is_not_finite_is_a_reject(encoded, tmp_path):
    [latents] = (path for path in (Folder(f"{encoded.folder.uri}/latents")).files("") if path.endswith(".parquet"))
    stored = pq.read_table(f"{encoded.folder.uri}/latents/{latents}")
    means = stored["latent"].combine_chunks().to_numpy_ndarray().astype(np.float64).mean((1, 2, 3))
    limit = float(np.median(means))
    receipt = edit(encoded, tmp_path, limit)
    [file], [rejects] = (list((tmp_path / below).iterdir()) for below in ("images", "rejects"))
    rows, refused = pq.read_table(file), pq.read_table(rejects)
    names = np.array(stored["image_id"].to_pylist())
    assert set(refused["reason"].to_pylist()) == {"not_finite"}
    assert set(names[means > limit]) <= set(refused["image_id"].to_pylist())
    assert sorted([*rows["image_id"].to_pylist(), *refused["image_id"].to_pylist()]) == sorted(names)
    assert (receipt.images, receipt.rejects) == (len(rows), len(refused)) and len(rows) > 3
    assert np.isfinite(rows["own_mse"].to_numpy()).all() and np.isfinite(rows["change"].to_numpy()).all()
    summary = edited_summary(Folder(str(tmp_path)), encoded.folder, (1.0,))
    assert summary["rejects_by_reason"] == {"not_finite": len(refused)} and summary["own"]["not_finite"] == 0


def test_a_model_without_a_finite_output_ends_the_run(encoded, tmp_path):
    with pytest.raises(RunError, match="not finite"):
        edit(encoded, tmp_path, -1e9)
    assert not list(tmp_path.glob("images/*.parquet"))
