"""Whatever is killed, at whatever moment: the same command again, and every input is one latent or one reject.

A Ray of three nodes on this machine; SIGKILL to drivers, actors, workers that read, and whole nodes.
"""

import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import duckdb
import pytest
from ray.cluster_utils import Cluster

import palindrome.infra.cluster  # noqa: F401, sets Ray up before it is started

ROOT = Path(__file__).parents[2]
GOOD, SHARD, KILLS = 120, 3, 20


@pytest.fixture(scope="module")
def cluster(forked_workers):
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "include_log_monitor": False}
    )
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    """Good images, and bad ones in nearly every shard."""
    folder = tmp_path_factory.mktemp("faults")
    corpus.good_images(folder, GOOD)
    for i, path in enumerate(sorted(folder.rglob("*"))[::7]):
        if path.is_file():
            (path.parent / f"{path.stem}-bad-{i}.png").write_bytes(b"no image")
    return folder


def children(cluster, name):
    """Pids of the cluster's Ray workers that are at work on what is named so, by the folder of their logs."""
    session, found = cluster.head_node.get_session_dir_path(), []
    for entry in Path("/proc").iterdir():
        try:
            at_work = entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(f"ray::{name}".encode())
            if at_work and (entry / "fd/1").readlink().is_relative_to(session):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


class Run:
    """The command, started again whenever its driver is gone."""

    def __init__(self, commands, cluster, folder, model, out, *flags):
        self.commands, self.cluster, self.out, self.driver = commands, cluster, out, None
        self.command = ["encode", "--images", folder, "--model", model, "--out", out]
        self.command += ["--steps", 12, "--corrections", 0, "--shard-size", SHARD, "--batch-size", 3]
        self.command += ["--address", cluster.address, "--decode", "tasks", *flags]
        self.ends = []

    def start(self):
        if self.driver is None or self.driver.poll() is not None:
            self.driver = self.commands.start(
                self.command, {**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.STDOUT
            )

    def end(self):
        out, _ = self.driver.communicate()
        self.ends.append((self.driver.returncode, out))
        self.driver = None

    def done(self):
        return len(list(self.out.glob("latents/*.parquet")))


def wait(condition, process, pause=0.001, seconds=180):
    """Looks every millisecond: what is waited for may soon be gone. False if the process ends first."""
    until = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < until
        time.sleep(pause)
    return True


def assert_whole(run, folder, palindrome):
    """Every input is one latent or one reject, in files that others read."""
    inputs = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    latents = [name for (name,) in duckdb.sql(f"select image_id from '{run.out}/latents/*.parquet'").fetchall()]
    rejects = [name for (name,) in duckdb.sql(f"select image_id from '{run.out}/rejects/*.parquet'").fetchall()]
    assert sorted(latents + rejects) == inputs
    assert all("-bad-" in name for name in rejects)
    assert not any("-bad-" in name for name in latents)
    summary = json.loads((run.out / "summary.json").read_text())
    assert (summary["latents"], summary["rejects"]) == (len(latents), len(rejects))
    assert not [path for path in run.out.rglob("*") if path.name.startswith(".tmp-")]
    said = palindrome("verify", run.out)
    assert said.code == 0 and "all well" in said.out, said.out


def test_kills_at_every_stage_of_the_driver(here, cluster, folder, model, palindrome, tmp_path):
    run = Run(here, cluster, folder, model, tmp_path / "run", "--workers", 1, "--decode", "actor")
    complete, summary = run.out / "plan/complete.json", run.out / "summary.json"

    def kill(moment, too_late):
        """The driver, at a moment that may be short: False where it was missed."""
        run.start()
        wait(moment, run.driver)
        run.driver.kill()
        run.end()
        return not too_late.exists()

    while not kill((run.out / "run.json").exists, complete):  # while it plans
        shutil.rmtree(run.out, ignore_errors=True)  # an actor that is ending may still write
    assert kill(lambda: run.done() > 5, summary)  # while shards are under way
    shards = json.loads(complete.read_text())["shards"]
    assert 5 < run.done() < shards
    while not kill(lambda: run.done() == shards, summary):  # before it has written the summary
        summary.unlink()
        min(run.out.glob("latents/*.parquet")).unlink()
    run.start()
    run.end()
    assert run.ends[-1][0] == 0, run.ends[-1][1]
    assert ", 0 to encode" in run.ends[-1][1]
    assert_whole(run, folder, palindrome)


def test_twenty_kills_at_random_moments(here, cluster, folder, model, palindrome, tmp_path):
    """Of drivers, actors, workers that read, an actor between its rejects and its commit, and whole nodes."""
    dice, run, kills = random.Random(0), Run(here, cluster, folder, model, tmp_path / "run", "--workers", 1, 2), []
    rejects, latents = run.out / "rejects", run.out / "latents"
    while len(kills) < KILLS:
        run.start()
        time.sleep(dice.uniform(0, 1))
        if run.driver.poll() is not None:
            run.end()
            if ", 0 to encode" in run.ends[-1][1]:
                # All was done before all was killed. The other half each time: one may have no rejects.
                for path in sorted(latents.glob("*.parquet"))[len(run.ends) % 2 :: 2]:
                    path.unlink()
                    (rejects / path.name).unlink(missing_ok=True)  # or none is new, and no commit to be killed before
            continue
        victim = ["driver", "actor", "reader", "commit", "node"][len(kills) % 5]
        if victim == "driver":
            run.driver.kill()
            run.end()
        elif victim == "node":
            node = cluster.worker_nodes and dice.choice(sorted(cluster.worker_nodes, key=lambda n: n.unique_id))
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=2)
        else:
            before, pids = set(rejects.glob("*.parquet")), []

            def is_there(victim=victim, before=before, pids=pids):
                if victim == "commit" and not set(rejects.glob("*.parquet")) - before:
                    return False
                pids[:] = children(cluster, "read " if victim == "reader" else "ShardActor")
                return bool(pids)

            if not wait(is_there, run.driver, pause=0.001 if victim == "commit" else 0.02):
                continue
            for pid in pids if victim == "commit" else [dice.choice(pids)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        kills.append(victim)
    for _ in range(5):
        run.start()
        run.end()
        if run.ends[-1][0] == 0:
            break
    assert run.ends[-1][0] == 0, run.ends[-1][1]
    assert_whole(run, folder, palindrome)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 400 KiB, and a function that sets its size."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", tmp_path]).returncode:
        pytest.skip("no file system can be mounted here: a full disk is not tried")
    yield tmp_path, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", tmp_path], check=True)
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_full_disk_ends_the_run_and_room_on_it_completes_it(palindrome, pictures, model, small_disk):
    disk, resize = small_disk
    command = ["encode", "--images", pictures, "--model", model, "--out", disk / "run", "--steps", 2, "--shard-size", 4]
    said = palindrome(*command, "--dtype", "float32")
    assert said.code == 0, said.err
    for path in (disk / "run/latents").iterdir():
        path.unlink()
    (disk / "ballast").write_bytes(bytes(300 << 10))
    said = palindrome(*command)
    assert said.code == 1
    assert "No space left on device" in said.err
    committed = list((disk / "run/latents").iterdir())
    assert len(committed) < 6
    assert duckdb.sql(f"select count(*) from '{disk}/run/plan/*.parquet'").fetchall() == [(6,)]
    resize("4m")
    said = palindrome(*command)
    assert said.code == 0, said.err
    assert duckdb.sql(f"select count(distinct image_id) from '{disk}/run/latents/*.parquet'").fetchall() == [(24,)]


def test_a_disk_that_may_not_be_written_to_is_named(palindrome, pictures, model, small_disk):
    disk, _ = small_disk
    command = [
        "encode",
        "--images",
        pictures,
        "--model",
        model,
        "--out",
        disk / "run",
        "--steps",
        2,
        "--shard-size",
        12,
    ]
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    said = palindrome(*command)
    assert said.code == 2
    assert "--out: " in said.err and "Read-only file system" in said.err
    subprocess.run(["mount", "-o", "remount,rw,size=4m", disk], check=True)
    assert palindrome(*command).code == 0


def no_more_than_others():
    """Before a command starts: root is no more permitted than other users are (PR_CAPBSET_DROP, CAP_DAC_*)."""
    for capability in (1, 2) if os.getuid() == 0 else ():
        assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0


def test_permission_denied_is_a_reject_of_an_image_and_an_error_of_the_output(pictures, model, tmp_path):
    shutil.copytree(pictures, tmp_path / "images")
    (tmp_path / "images" / "001.png").chmod(0)
    (tmp_path / "closed").mkdir(mode=0o555)

    def encode(out, *more):
        flags = {"images": tmp_path / "images", "model": model, "out": tmp_path / out, "steps": 2}
        words = [*(str(word) for name, value in flags.items() for word in (f"--{name}", value)), *more]
        command = [sys.executable, "-m", "palindrome", "encode", "--inline", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=no_more_than_others)

    said = encode("run")
    assert said.returncode == 0, said.stderr
    rejects = duckdb.sql(f"select image_id, reason, detail from '{tmp_path}/run/rejects/*.parquet'").fetchall()
    assert rejects == [("001.png", "unreadable", "Permission denied")]
    assert duckdb.sql(f"select count(*) from '{tmp_path}/run/latents/*.parquet'").fetchall() == [(23,)]
    said = encode("closed/run")
    assert said.returncode == 2
    assert "--out: " in said.stderr and "Permission denied" in said.stderr
    said = encode("closed/run", "--dry-run")
    assert said.returncode == 2
    assert f"--out: {tmp_path}/closed can't be written to" in said.stderr


def test_a_disk_too_full_for_a_plan_is_not_the_images_fault(palindrome, pictures, model, small_disk):
    disk, _ = small_disk
    with open(disk / "ballast", "wb") as file, pytest.raises(OSError):
        while True:
            os.write(file.fileno(), bytes(4096))
    said = palindrome("encode", "--images", pictures, "--model", model, "--out", disk / "run", "--steps", 2)
    assert said.code in (1, 2)
    assert "No space left on device" in said.err
    assert "--images" not in said.err
