"""The actor's process: what it imports when. Its work on shards is in tests/pipeline/test_run.py and tests/jobs."""

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
from palindrome.pipeline.runtime.device import SWITCH

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Frozen:
    """Says with its receipt's images how much of the actor's process the collector leaves alone, and with its seconds
    for how long a thread keeps the interpreter."""

    def process(self, model, shard):
        return Receipt(shard, gc.get_freeze_count(), int(gc.isenabled()), sys.getswitchinterval(), 0.0, 0)


def test_the_class_is_imported_without_torch():
    script = "import sys, palindrome.pipeline.runtime.actor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


@pytest.mark.usefixtures("ray_here")
def test_the_constructor_tunes_the_process_and_its_imports_are_frozen(tiny):
    actor = ray.remote(ShardActor).remote([ray.put((Frozen(), tiny, 1, FLOAT32))])
    receipt = ray.get(actor.process.remote(Shard("a", "files", 0, ())))
    assert receipt.images > 50_000  # of which torch makes most
    assert receipt.rejects == 1  # it works again
    assert receipt.seconds == pytest.approx(SWITCH)
    ray.kill(actor)
