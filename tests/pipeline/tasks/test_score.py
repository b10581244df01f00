"""What a method can't do with a model, and scores that are no numbers."""

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from palindrome.model.families.unet2d import UNet2D
from palindrome.model.process import EDM, VP, Flow
from palindrome.model.unet import UNetConfig
from palindrome.model.watermarks import KINDS, Keys
from palindrome.pipeline.base.errors import RunError
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.sources import open_collection
from palindrome.pipeline.runs.plan import read_plan, write_plan
from palindrome.pipeline.runs.scores import METHODS, score_schema, scores_of
from palindrome.pipeline.runtime.device import Model
from palindrome.pipeline.runtime.reader import Reader
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.score import Measure, Score


@dataclass(frozen=True)
class Overflowing(UNet2D):
    """The output for bright images, as the network sees them at `at`, is infinite; else a part of x."""

    at: float = 0.0
    everywhere: bool = False

    def denoiser(self, device="cpu", execution=None):
        def network(x, timestep):
            bright = (x.flatten(1).mean(1) > 0) | self.everywhere
            return torch.where((bright & (timestep == self.at))[:, None, None, None], torch.inf, 0.1 * x)

        return network


@dataclass(frozen=True)
class Encoded(UNet2D):
    """Says of itself that it is one of latent diffusion."""

    autoencoded = True


def score(pictures, folder, methods, **about):
    collection, run = open_collection(str(pictures)), Folder(str(folder))
    write_plan(run, collection, 1024)
    [shard] = read_plan(run)
    model = Overflowing(UNetConfig(sample_size=32), {}, VP(), **about)
    measures = tuple(Measure.of(METHODS[name], model) for name in methods)
    reader = Reader(collection, Preprocess(32), 5, False)
    return Score(run, reader, measures, False, True, {}).process(Model(model), shard)


def test_each_image_with_a_score_that_is_not_finite_is_a_reject_that_names_the_method(pictures, tmp_path):
    receipt = score(pictures, tmp_path, ["invad", "secmi", "dire"], at=90)  # which secmi alone visits
    [file], [rejects] = (list((tmp_path / below).iterdir()) for below in ("scores", "rejects"))
    rows, refused = pq.read_table(file), pq.read_table(rejects)
    assert (receipt.images, receipt.rejects) == (len(rows), len(refused)) and len(rows) > 5 and len(refused) > 5
    names = sorted(path.name for path in pictures.iterdir())
    assert sorted(rows["image_id"].to_pylist() + refused["image_id"].to_pylist()) == names
    assert set(refused["reason"].to_pylist()) == {"not_finite"}
    assert set(refused["detail"].to_pylist()) == {"secmi: the score is no number, or is infinite"}
    assert all(np.isfinite(rows[name].to_numpy()).all() for name in scores_of([METHODS["secmi"], METHODS["dire"]]))


def test_a_model_without_a_finite_output_ends_the_run(pictures, tmp_path):
    with pytest.raises(RunError, match="not finite"):
        score(pictures, tmp_path, ["diffpath"], everywhere=True)
    assert not list(tmp_path.glob("scores/*.parquet"))


@pytest.mark.parametrize("method", ["diffpath", "dire"])
def test_what_clips_pixels_is_refused_a_latent_model(method):
    with pytest.raises(ValueError, match=f"{method}: it clips x0 to the range of pixels"):
        Measure.of(METHODS[method], Encoded(UNetConfig(), {}, VP()))


@pytest.mark.parametrize("process", [Flow(), EDM()], ids=["flow", "edm"])
def test_secmi_s_timesteps_need_a_variance_preserving_process(process):
    with pytest.raises(ValueError, match="secmi: its timesteps are those of a variance-preserving process"):
        Measure.of(METHODS["secmi"], UNet2D(UNetConfig(), {}, process))


@pytest.mark.parametrize("process", [VP(prediction_type="v_prediction"), Flow(), EDM()], ids=["vp", "flow", "edm"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "secmi"])
def test_other_methods_measure_models_of_any_process(name, process):
    kind = KINDS.get(name)
    keys = kind and Keys(kind((3, 32, 32)), {"a": b"1", "b": b"2"})
    measure = Measure.of(METHODS[name], Overflowing(UNetConfig(sample_size=32), {}, process, at=-1), keys=keys)
    calls = []

    @dataclass(frozen=True)
    class Counting(Overflowing):
        def denoiser(self, device="cpu", execution=None):
            inner = super().denoiser()
            return lambda x, told: calls.append(len(x)) or inner(x, told)

    model = Model(Counting(UNetConfig(sample_size=32), {}, process, at=-1))
    found = measure(model, torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32), None)
    assert sum(calls) == 2 * measure.evaluations, "as run.json and --dry-run say"
    method = METHODS[name]
    columns = score_schema([method], (3, 32, 32), True).names[7:]
    assert {*columns} == found.keys()
    assert all(found[f"{method.prefix}{column}"].dtype == torch.float64 for column in method.columns)
