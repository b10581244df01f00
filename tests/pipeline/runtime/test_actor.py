"""What the actor's process imports, and when. test_scheduler.py and tests/jobs test its work on shards."""

import gc
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from palindrome.model.execution import FLOAT32
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.runs.outcome import Receipt
from palindrome.pipeline.runtime.actor import ShardActor
from palindrome.pipeline.runtime.device import SWITCH_INTERVAL

ROOT = Path(__file__).parents[3]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers can't import a test module


@dataclass(frozen=True)
class Frozen:
    """Reports the actor's process in a receipt: `images` is the number of frozen objects, `rejects` whether the garbage
    collector is enabled, `seconds` the interpreter's switch interval."""

    def process(self, model, shard):
        return Receipt(shard, gc.get_freeze_count(), int(gc.isenabled()), sys.getswitchinterval(), 0.0, 0)


def test_the_class_is_imported_without_torch():
    script = "import sys, palindrome.pipeline.runtime.actor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


@pytest.mark.usefixtures("ray_here")
def test_the_constructor_tunes_the_process_and_its_imports_are_frozen(tiny):
    actor = ray.remote(ShardActor).remote([ray.put((Frozen(), tiny, 1, FLOAT32))])
    receipt = ray.get(actor.process.remote(Shard("a", "files", 0, ())))
    assert receipt.images > 50_000  # most of them from torch
    assert receipt.rejects == 1  # the collector is enabled again
    assert receipt.seconds == pytest.approx(SWITCH_INTERVAL)
    ray.kill(actor)
