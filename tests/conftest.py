"""For every test: real pictures, which are the bundled sample and the corpus of odd files made from it; stores; a small
model; and commands as a person gives them, run in this process on the tests' Ray."""

import gc
import io
import os
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import settings

settings.register_profile("palindrome", deadline=None, derandomize=True)  # no failure by a busy machine or by chance
settings.load_profile("palindrome")

# `make test` has a process for each core, and on networks as small as the tests' a second thread only waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray starts workers as they are needed, not one a CPU ahead, of which each takes more than a second of a core.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# Ray gives its workers the lowest priority but one: on a busy machine they would hardly run beside other tests.
os.environ.setdefault("RAY_worker_niceness", "0")
# Ray Train looks every two seconds how its workers are, and so whether they are done.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


# The files that take longest, first: else one process works through them while the others are done. Those that start
# clusters, whose processes use more than a core and wait for one another, are apart: others run beside them.
SLOW = [
    *("jobs/test_train.py", "model/test_engine.py", "pipeline/storage/test_s3.py"),
    *("jobs/test_faults.py", "jobs/test_s3.py", "jobs/test_export.py", "pipeline/images/sources/test_files.py"),
    *("pipeline/runtime/test_scheduler.py", "model/families/test_latent.py", "jobs/test_collections.py"),
    *("test_notebook.py", "pipeline/images/test_fuzz.py"),
    *("jobs/test_submit.py", "pipeline/images/sources/test_lists.py", "jobs/test_verify.py"),
    *("pipeline/images/sources/test_tars.py", "jobs/test_cli.py"),
    *("jobs/test_kinds.py", "pipeline/runtime/test_precision.py", "pipeline/images/sources/test_tables.py"),
    *("pipeline/runs/test_lease.py", "pipeline/images/sources/test_listing.py"),
    *(
        "jobs/test_encode.py",
        "model/families/test_edm.py",
        "jobs/test_latent.py",
        "jobs/test_score.py",
        "jobs/test_sweep.py",
        "jobs/test_precision.py",
    ),
    *("jobs/test_hosts.py", "pipeline/runs/test_tallies.py", "jobs/test_estimate.py", "model/test_unet.py"),
    *("jobs/test_generate.py", "jobs/test_on_ray.py", "infra/test_two_nodes.py", "jobs/test_autoscaling.py"),
    *("jobs/test_earlier_runs.py", "infra/test_installed.py", "jobs/test_log.py", "jobs/test_two_drivers.py"),
]


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    order = {here / name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path, len(SLOW)))


def pytest_unconfigure():
    """Commands freeze their process's garbage (pipeline/base/frozen_gc.py), which the tests' libraries would report as
    leaks."""
    gc.unfreeze()


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


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """tests/pipelines.py: a function from the name of a latent diffusion pipeline there to its folder and to diffusers'
    object."""
    made, found = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("pipelines.py")))), {}

    def saved(name, **how):
        key = name, *sorted(how.items())
        if key not in found:
            folder = tmp_path_factory.mktemp(name) / "model"
            found[key] = str(folder), made.saved(folder, name, **how)
        return found[key]

    return saved


@pytest.fixture(scope="session")
def stores():
    """tests/stores.py: S3 servers, and a proxy that injects faults."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("stores.py"))))


@pytest.fixture(scope="session")
def moto(stores):
    with stores.moto() as store:
        yield store


@pytest.fixture(scope="session")
def rclone(stores, tmp_path_factory):
    with stores.rclone(tmp_path_factory.mktemp("rclone")) as store:
        yield store


@pytest.fixture(scope="session", params=["moto", "rclone"])
def store(request):
    """An S3 server of each kind."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def forked_workers():
    """The workers of each Ray that is started from now on by these tests have their imports done: tests/commands.py."""
    commands = runpy.run_path(str(Path(__file__).with_name("commands.py")))
    with commands["Workers"](dict(os.environ)) as workers, pytest.MonkeyPatch.context() as patch:
        for name, value in workers.environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def workers_as_started(monkeypatch):
    """A Ray that is started in the test starts its workers by itself, whatever tests came before."""
    for name in ("PYTHONPATH", "PALINDROME_TEST_WORKERS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def ray_here(forked_workers):
    """The address of one Ray on this machine for all tests, without GPUs; a job called in this process runs on it. It
    leaves the port that Ray's agent wants to those that commands start beside it, which would lose seconds in trying
    for it."""
    import ray
    from ray.cluster_utils import Cluster

    import palindrome.infra.cluster  # noqa: F401, sets Ray up before it is started

    head = {"num_cpus": 3, "num_gpus": 0, "object_store_memory": 2**30, "include_dashboard": False}
    head["include_log_monitor"] = False  # it takes 4 % of a core, and nobody reads what it finds
    cluster = Cluster(initialize_head=True, head_node_args={**head, "dashboard_agent_listen_port": 0})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="session")
def tiny():
    """A checkpoint of 16x16 images with random weights, none near zero: its outputs are of order one."""
    import torch

    from palindrome.model.families.unet2d import UNet2D
    from palindrome.model.presets import PRESETS
    from palindrome.model.process import VP
    from palindrome.model.unet import UNet

    network = UNet(PRESETS["tiny"])
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in network.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator)
        if value.dim() > 1:
            weights[name] = drawn / value[0].numel() ** 0.5
        else:  # a bias, or the scale of a group norm
            weights[name] = 0.3 * drawn + float("norm" in name and name.endswith("weight"))
    return UNet2D(network.config, weights, VP())


@dataclass(frozen=True)
class Said:
    """How a command ended: its exit code and what it printed."""

    code: int
    out: str
    err: str


def run(*arguments):
    """A command as a person gives it, in this process."""
    from palindrome.jobs.__main__ import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as e:
            code = e.code
    return Said(code, out.getvalue(), err.getvalue())


COMPUTING = {
    *("encode", "score", "evaluate", "reconstruct", "regenerate", "generate", "interpolate", "sweep", "calibrate"),
    *("restore", "edit"),
}
ON_RAY = {"--address", "--workers", "--decode", "--gpus-per-worker", "--resources", "--stall"}


@pytest.fixture(scope="session")
def palindrome(request):
    """palindrome("encode", "--images", ...) -> Said, in this process. What computes does so inline, as an actor takes
    seconds to start; and on the tests' Ray where a flag is about Ray. tests/jobs/test_on_ray.py compares the two."""

    def palindrome(command, *arguments):
        if command not in COMPUTING:
            return run(command, *arguments)
        if ON_RAY & set(arguments):
            request.getfixturevalue("ray_here")
            return run(command, *arguments)
        return run(command, *arguments, "--inline")

    return palindrome


@pytest.fixture(scope="session")
def torch_fidelity():
    """torch-fidelity, and from then on pytorch-fid. They import torchvision, whose wheel on PyPI is for a torch with
    CUDA, and transformers can't be imported beside one that fails: an empty one stands in while they are imported, as
    nothing that is called here needs it."""
    names = ("torchvision", *(f"torchvision.{name}" for name in ("datasets", "models", "transforms")))
    empty = {name: ModuleType(name) for name in (*names, "torchvision.transforms.functional")}
    for name in names[1:]:
        setattr(empty["torchvision"], name.partition(".")[2], empty[name])
    empty["torchvision.transforms"].functional = empty["torchvision.transforms.functional"]
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(empty["torchvision.datasets"], name, type(name, (), {}))
    blocks = {f"Inception{letter}": type(letter, (), {}) for letter in "ACE"}
    empty["torchvision.models"].inception = SimpleNamespace(**blocks)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in empty.items():
            patch.setitem(sys.modules, name, module)
        import pytorch_fid.fid_score  # noqa: F401
        import torch_fidelity
    return torch_fidelity


@pytest.fixture(scope="session")
def scripted(tmp_path_factory):
    """A TorchScript file with a small network of 24 features and 10 classes, for images of 32 pixels in [-1, 1]."""
    import torch

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(3, 16, 5, 2), torch.nn.Conv2d(16, 24, 3, 2)
            self.classes = torch.nn.Linear(24, 10)

        def forward(self, x: torch.Tensor):
            features = torch.relu(self.second(torch.relu(self.first(x)))).mean([2, 3])
            return features, self.classes(features)

    network, generator = Tiny().eval().requires_grad_(False), torch.Generator().manual_seed(0)
    for value in network.parameters():
        scale = (2 / value[0].numel()) ** 0.5 if value.dim() > 1 else 0.1
        value.copy_(scale * torch.randn(value.shape, generator=generator))
    network.classes.weight *= 4
    path = tmp_path_factory.mktemp("features") / "tiny.pt"
    torch.jit.save(torch.jit.script(network), path)
    return path


@pytest.fixture(scope="session")
def model(tiny, tmp_path_factory):
    """The folder of the `tiny` checkpoint."""
    from palindrome.model.families import unet2d

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    unet2d.save(tiny, str(folder))
    return folder


@pytest.fixture(scope="session")
def pictures(pngs, tmp_path_factory):
    """A folder of the first 24 pictures of the sample."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, png in enumerate(pngs[:24]):
        (folder / f"{i:03d}.png").write_bytes(png)
    return folder
