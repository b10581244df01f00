"""Two commands on one run folder, as of two machines: one is killed, and the other takes the run over."""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest

from palindrome.pipeline.runs.lease import NAME
from palindrome.pipeline.storage.folder import TEMPORARY, Folder

ROUNDS = 1  # 20 were run by hand
STALE = 1.5  # seconds, for tests that wait until a lease is
COMMAND = f"""
import sys
from palindrome.pipeline.runs import lease
lease.RENEWAL, lease.STALE = 0.2, {STALE}
from palindrome.jobs.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
RENEWED = """
import itertools, json, sys, time
for n in itertools.count():
    open(sys.argv[1], "w").write(json.dumps({"id": "x", "renewed": n}))
    time.sleep(0.1)
"""


def other_host(name):
    """What a command begins with to find itself on a machine of that name: a UTS namespace of its own."""
    command = ["unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$0" "$@"']
    if os.geteuid() or not shutil.which("unshare") or subprocess.run([*command, "true"]).returncode:
        pytest.skip("no namespace can be made here: two machines are not tried")
    return command


class Driver:
    def __init__(self, host, arguments, environment):
        command = [*other_host(host), sys.executable, "-c", COMMAND, *map(str, arguments)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, env={**os.environ, **environment}, **streams)

    def end(self):
        output, _ = self.process.communicate()
        return self.process.returncode, output


@pytest.mark.parametrize("where", ["disk", "moto"])
def test_one_is_killed_and_the_other_takes_over(request, tmp_path, pictures, model, palindrome, where):
    dice = random.Random(0)
    options, environment = {}, {}
    if where == "moto":
        store = request.getfixturevalue("moto")
        options, environment = store.options, {"PALINDROME_STORAGE_OPTIONS": json.dumps(store.options)}
    for _ in range(ROUNDS):
        out = f"{store.bucket()}/run" if where == "moto" else str(tmp_path / f"run-{dice.random()}")
        run = Folder(out, options)
        encode = ["encode", "--images", pictures, "--model", model, "--out", out, "--shard-size", 1, "--inline"]
        encode += ["--steps", 2, "--corrections", 1]
        drivers = {host: Driver(host, encode, environment) for host in ("one", "two")}
        while not run.exists(NAME):
            assert all(driver.process.poll() in (None, 0, 2) for driver in drivers.values())
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 1.5))
        victim = dice.choice(["one", "two"])
        drivers.pop(victim).process.kill()
        ends = [drivers[host].end() for host in drivers]
        while ends[-1][0] != 0:  # it was refused while the other was alive
            assert ends[-1][0] == 2 and "is being written by encode" in ends[-1][1], ends[-1]
            ends.append(Driver("two" if victim == "one" else "one", encode, environment).end())
        assert not run.exists(NAME)
        storage = ["--storage-options", json.dumps(options)] if options else []
        said = palindrome("verify", out, *storage)
        assert said.code == 0 and "24 shards, 24 latents, 0 rejects: all well" in said.out, said


def test_a_command_that_is_refused_leaves_a_live_run_alone(pictures, model, palindrome, tmp_path):
    """Neither another command nor the same one a second time removes what the first is writing."""
    out = tmp_path / "run"
    encode = ["--images", pictures, "--model", model, "--out", out, "--shard-size", 4, "--steps", 2]
    assert palindrome("encode", *encode, "--limit", 4).code == 0
    unfinished = out / f"latents/{TEMPORARY}0123"
    unfinished.write_bytes(b"of a writer that is at work")
    assert "belongs to another command" in palindrome("encode", *encode, "--limit", 8).err
    assert unfinished.exists()
    alive = subprocess.Popen([sys.executable, "-c", RENEWED, out / NAME])
    try:
        while not (out / NAME).exists():
            time.sleep(0.01)
        said = palindrome("encode", *encode, "--limit", 4)
        assert said.code == 2 and "is being written by" in said.err
        assert unfinished.exists()
    finally:
        alive.kill()
        alive.wait()
    said = palindrome("encode", *encode, "--limit", 4, "--take-over")
    assert said.code == 0 and not unfinished.exists() and not (out / NAME).exists()
