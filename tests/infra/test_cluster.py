"""A Ray of one's own: there within the `with`, and gone after it with all its processes."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OWN = """
import os, signal
from pathlib import Path
from palindrome.infra.cluster import connect

def below():
    parents, states = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)], states[int(stat.parent.name)] = int(words[1]), words[0]
    def ours(process):
        return process is not None and (process == os.getpid() or ours(parents.get(process)))
    return [p for p in parents if p != os.getpid() and states[p] != "Z" and ours(p)]

signal.signal(signal.SIGTERM, mine := lambda *_: None)
with connect():
    import ray
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
    assert len(below()) > 5
    assert signal.getsignal(signal.SIGTERM) is mine
print(len(below()), ray.is_initialized())
"""


def test_it_ends_with_all_its_processes():
    done = subprocess.run([sys.executable, "-c", OWN], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "False"]
