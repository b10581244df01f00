"""The model on a device: batches that do not fit into memory, batch threads, and the clock."""

import ctypes
import os
import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest
import torch

from palindrome.model.ddim import invert, sample
from palindrome.model.families.unet2d import UNet2D
from palindrome.model.ladder import ladder
from palindrome.model.process import VP
from palindrome.pipeline.runtime.device import MAX_BATCH_THREADS, Model, use_one_torch_thread

LEVELS = ladder("linear", 4)


class Tight(torch.nn.Module):
    """A network of one multiplication, on a device whose memory holds `capacity` images."""

    def __init__(self, capacity):
        super().__init__()
        self.capacity, self.batches = capacity, []

    def forward(self, x, timestep):
        if len(x) > self.capacity:
            raise torch.OutOfMemoryError(f"{len(x)} images do not fit")
        self.batches.append(len(x))
        return x.sin() * (1 + timestep / 1000)


@dataclass(frozen=True)
class TightCheckpoint(UNet2D):
    capacity: int = 1

    def denoiser(self, device, execution):
        return Tight(self.capacity)


def model(capacity, threads=1):
    return Model(TightCheckpoint(None, {}, VP(), capacity=capacity), threads)


@pytest.fixture
def x():
    return torch.randn(13, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def threads():
    """Model sets torch's threads in the process that it is in."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("capacity", [1, 2, 3, 5, 12])
def test_a_batch_that_does_not_fit_is_halved_until_it_does(x, capacity):
    tight = model(capacity)
    latents = tight.encode(x, LEVELS)[0]
    assert torch.equal(latents, model(100).encode(x, LEVELS)[0])
    assert torch.equal(tight.decode(latents, LEVELS), model(100).decode(latents, LEVELS))
    assert max(tight.network.batches) <= capacity


def test_the_size_that_fits_is_kept(x):
    tight = model(3)
    tight.encode(x, LEVELS)[0]
    assert tight.max_batch == 3
    tight.network.batches.clear()
    tight.network.capacity = 100  # a larger batch would fit now
    tight.encode(x, LEVELS)[0]
    assert set(tight.network.batches) == {3, 1}


def test_a_batch_that_fits_is_not_cut(x):
    fitting = model(13)
    fitting.encode(x, LEVELS)[0]
    assert set(fitting.network.batches) == {13}


def test_one_image_that_does_not_fit_raises(x):
    with pytest.raises(torch.OutOfMemoryError):
        model(0).encode(x, LEVELS)[0]


def test_other_errors_are_not_taken_for_memory(x):
    broken = model(100)
    broken.network.register_forward_hook(lambda network, inputs, output: output @ torch.zeros(7, 7))
    with pytest.raises(RuntimeError, match="shape"):
        broken.encode(x, LEVELS)[0]
    assert broken.max_batch > 100


def test_a_failure_leaves_the_device_free(x):
    tight = model(0)
    with pytest.raises(torch.OutOfMemoryError):
        tight.encode(x, LEVELS)[0]
    tight.network.capacity = 100
    assert tight.encode(x[:1], LEVELS)[0].shape == (1, 3, 4, 4)


def test_encode_and_decode_are_ddim(tiny):
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    held, network = Model(tiny, threads=1), tiny.network()
    latents = held.encode(x, LEVELS)[0]
    torch.testing.assert_close(latents, invert(network, x, LEVELS, tiny.process), rtol=1e-3, atol=1e-3)
    again = sample(network, latents, LEVELS, tiny.process)
    torch.testing.assert_close(held.decode(latents, LEVELS), again, rtol=1e-3, atol=1e-3)


def test_the_prediction_type_is_the_checkpoints(x):
    as_epsilon = model(100).encode(x, LEVELS)[0]
    as_v = Model(TightCheckpoint(None, {}, VP(prediction_type="v_prediction"), capacity=100), 1).encode(x, LEVELS)[0]
    assert not torch.allclose(as_epsilon, as_v)


def test_the_device_takes_one_batch_at_a_time_from_two_threads(x):
    shared, overlap, inside = model(100), [], threading.Semaphore()
    enter = lambda *_: overlap.append(not inside.acquire(blocking=False))  # noqa: E731
    shared.network.register_forward_pre_hook(enter)
    shared.network.register_forward_hook(lambda *_: inside.release())
    expected = model(100).encode(x, LEVELS)[0]
    found = []
    threads = [threading.Thread(target=lambda: found.append(shared.encode(x, LEVELS)[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(overlap)
    assert len(found) == 8 and all(torch.equal(each, expected) for each in found)


def test_the_clock_counts_the_calling_thread(x):
    shared, seconds = model(100), []

    def work():
        shared.encode(x, LEVELS)[0]
        seconds.append(shared.clock.seconds)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seconds[0] > 0
    assert shared.clock.seconds == 0


@pytest.mark.parametrize(("threads", "images"), [(2, 13), (3, 13), (4, 2), (7, 1)])
def test_batch_threads_split_a_batch_and_change_nothing(x, threads, images):
    many = model(100, threads)
    assert torch.equal(many.encode(x[:images], LEVELS)[0], model(100).encode(x[:images], LEVELS)[0])
    slices = min(threads, MAX_BATCH_THREADS, images)
    parts = [len(part) for part in x[:images].tensor_split(slices)] * (len(LEVELS) - 1)
    assert sorted(many.network.batches) == sorted(parts)


def test_an_error_in_one_batch_thread_is_raised_once_all_have_ended(x):
    shared = model(6, threads=2)  # slices of 7 and 6 images

    def stumble(_, inputs):
        if len(inputs[0]) == 7:
            raise ValueError("stumbled")

    handle = shared.network.register_forward_pre_hook(stumble)
    with pytest.raises(ValueError, match="stumbled"):
        shared.encode(x, LEVELS)
    assert shared.network.batches == [6] * (len(LEVELS) - 1)
    handle.remove()
    shared.network.capacity = 100
    assert shared.encode(x, LEVELS)[0].shape == x.shape


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted as Linux shows them")
def test_only_the_batch_threads_and_their_openmp_threads_compute(tiny):
    """More OpenMP teams in the process would slow all of them down."""
    x = torch.rand(64, 3, 16, 16)

    def helpers():
        return len(os.listdir("/proc/self/task")) - threading.active_count()

    def work():
        use_one_torch_thread()
        assert torch.get_num_threads() == 1
        found.append(held.encode(x, LEVELS)[0].repeat(1, 1, 8, 8).exp().sum())  # large enough to be shared
        counted.append(helpers())

    before, found, counted = helpers(), [], []
    held = Model(tiny, threads=2 * MAX_BATCH_THREADS)
    for _ in range(2):  # the second comes after the batch threads have set torch's number of threads
        shard = threading.Thread(target=work)
        shard.start()
        shard.join()
    assert len(counted) == 2 and max(counted) <= before + MAX_BATCH_THREADS


PROCESS = """
import ctypes, sys
from palindrome.model.families.unet2d import UNet2D
from palindrome.model.presets import PRESETS
from palindrome.model.process import VP
from palindrome.model.unet import UNet
from palindrome.pipeline.runtime.device import Model, tune_process

class Mallinfo(ctypes.Structure):
    _fields_ = [(f"other{i}", ctypes.c_size_t) for i in range(9)] + [("keepcost", ctypes.c_size_t)]

network, before = UNet(PRESETS["tiny"]), sys.getswitchinterval()
model = Model(UNet2D(network.config, network.state_dict(), VP()), threads=2)
if sys.argv[1] == "tuned":
    tune_process(model)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.mallinfo2.restype = ctypes.c_void_p, Mallinfo
blocks = [libc.malloc(64 << 10) for _ in range(1000)]  # each too small to be a mapping of its own
for block in reversed(blocks):
    libc.free(ctypes.c_void_p(block))
print(sys.getswitchinterval() == before, libc.mallinfo2().keepcost >> 20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the allocator is asked as glibc answers")
@pytest.mark.parametrize("tuned", [False, True])
def test_a_model_leaves_its_process_alone_which_only_a_worker_tunes(tuned):
    """A notebook's malloc and interpreter stay as they are. A tuned malloc keeps 256 MiB more than it was asked for;
    otherwise no more than 64 MiB stay at the end of the heap."""
    run = [sys.executable, "-c", PROCESS, "tuned" if tuned else "plain"]
    same_interval, kept = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    assert same_interval == str(not tuned)
    assert (int(kept) > 128) == tuned
