"""Jobs on a cluster of separate processes with a token, from and to S3: submitted, followed, killed at, stopped."""

import json
import os
import pty
import re
import runpy
import signal
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palindrome.infra.package import ENVIRONMENT, PackageError, build
from palindrome.model.families import unet2d
from palindrome.pipeline.storage.folder import Folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    clusters = runpy.run_path(str(ROOT / "tests/clusters.py"))
    with clusters["ray_cluster"](2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def bucket(moto, sample, tiny):
    folder = Folder(moto.bucket(), moto.options)
    folder.put("images/sample.parquet", Path(sample).read_bytes())
    unet2d.save(tiny, f"{folder.uri}/model", moto.options)
    return folder


@pytest.fixture(scope="module")
def clients(commands, cluster):
    with commands({**os.environ, **cluster.environment}) as commands:
        yield commands


@pytest.fixture
def client(clients, cluster, tmp_path):
    """client("jobs", ...) -> the process of `palindrome jobs ...` in an empty folder, with the cluster's token."""
    started = []

    def client(*arguments, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, **environment):
        env = {**os.environ, **cluster.environment, **environment}
        started.append(clients.start(arguments, env, tmp_path, stdin, stderr))
        return started[-1]

    yield client
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def said(client):
    """said("jobs", ...) -> exit code, output, errors."""

    def said(*arguments, **environment):
        process = client(*arguments, **environment)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    return said


def aws(store):
    """The environment that opens a store."""
    options = store.options["s3"]
    found = {"AWS_ACCESS_KEY_ID": options["key"], "AWS_SECRET_ACCESS_KEY": options["secret"]}
    return {**found, "AWS_ENDPOINT_URL": options["endpoint_url"], "AWS_REGION": "us-east-1"}


def waits(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.1)


def files(bucket, below):
    bucket.fs.invalidate_cache()
    return bucket.files(below)


def encode(bucket, out, *flags):
    places = ["--images", f"{bucket.uri}/images", "--model", f"{bucket.uri}/model", "--out", f"{bucket.uri}/{out}"]
    return ["encode", *places, "--batch-size", 4, *flags]


def test_a_killed_node_costs_no_row_and_no_secret_is_shown(cluster, client, bucket, moto):
    flags = ["--shard-size", 8, "--workers", 2, "--steps", 20, "--corrections", 0, "--decode", "actor"]
    command = encode(bucket, "a", *flags)
    process = client("submit", "--address", cluster.address, "--env", "AWS_*", "--", *command, **aws(moto))
    waits(lambda: len(files(bucket, "a/latents")) > 2, process)
    cluster.kill(1)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert "encode: 32/32 shards, 256 images" in out
    tables = [pq.read_table(pa.BufferReader(bucket.read(f"a/latents/{name}"))) for name in files(bucket, "a/latents")]
    ids = [name for table in tables for name in table["image_id"].to_pylist()]
    assert len(ids) == len(set(ids)) == 256
    cluster.join()

    until = time.monotonic() + 30
    while not (metered := cluster.metrics())["ray_palindrome_shards_total"] and time.monotonic() < until:
        time.sleep(1)
    assert 0 < metered["ray_palindrome_images_total"] <= 256 and metered["ray_palindrome_shards_total"] > 0
    assert metered["ray_palindrome_device_seconds_total"] > 0 and metered["ray_palindrome_bytes_total"] > 0
    panels = json.loads((ROOT / "infra/grafana.json").read_text())["panels"]
    asked = {name for panel in panels for name in re.findall(r"ray_palindrome_\w+", json.dumps(panel))}
    assert asked - {"ray_palindrome_rejects_total"} <= metered.keys()

    shown = cluster.get("/api/jobs/") + out + err
    logs = b"".join(path.read_bytes() for path in Path(cluster.folder).rglob("logs/**/*") if path.is_file())
    assert "palindrome.infra.entrypoint encode" in shown and b"palindrome.infra.entrypoint encode" in logs
    for secret in (moto.options["s3"]["secret"], cluster.token):
        assert secret not in shown and secret.encode() not in logs


def test_a_job_that_fails_has_its_own_exit_code_and_its_reason_last(cluster, said, moto, bucket):
    options = json.dumps(moto.options)
    command = [*encode(bucket, "b", "--steps", 3), "--image-column", "nosuch", "--storage-options", options]
    code, out, err = said("submit", "--address", cluster.address, "--code", "image", "--", *command)
    assert code == 2
    assert "palindrome encode: error: --image-column: column 'nosuch' does not exist" in out.splitlines()[-1]
    assert err.endswith("failed, exit code 2\n")
    assert moto.options["s3"]["secret"] not in cluster.get("/api/jobs/") + out + err

    code, out, _ = said("jobs", "--address", cluster.address, "--json")
    newest = json.loads(out)[0]
    assert code == 0 and (newest["status"], newest["exit_code"]) == ("FAILED", 2)
    assert newest["command"].startswith("encode --images s3://") and "storage" not in newest["command"]
    code, out, _ = said("jobs", "--address", cluster.address)
    assert code == 0 and out.splitlines()[0].split() == ["job", "status", "exit", "started", "took", "command"]
    assert newest["id"] in out
    code, out, _ = said("logs", "--address", cluster.address, newest["id"])
    assert code == 0 and "column 'nosuch' does not exist" in out and '"event"' not in out
    code, out, _ = said("logs", "--address", cluster.address, "--log", "json", newest["id"])
    *_, failed, end = [json.loads(line) for line in out.splitlines()]  # `end` is of logs itself
    assert code == end["exit_code"] == 0 and end["job"] == "logs"
    assert (failed["event"], failed["job"], failed["exit_code"]) == ("end", "encode", 2)
    code, out, _ = said("stop", "--address", cluster.address, newest["id"])
    assert code == 0 and "had ended: failed" in out


def running(said, cluster):
    return [job for job in json.loads(said("jobs", "--address", cluster.address, "--json")[1]) if not job["ended"]]


def test_an_interrupted_client_leaves_the_job_and_stop_ends_it(cluster, client, said, bucket, moto):
    flags = ["--shard-size", 4, "--steps", 900, "--decode", "actor"]
    command = encode(bucket, "c", *flags)
    process = client("submit", "--address", cluster.address, "--env", "AWS_*", "--", *command, **aws(moto))
    waits(lambda: files(bucket, "c/plan"), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "keeps running; palindrome logs --follow" in err
    [job] = running(said, cluster)
    assert job["status"] == "RUNNING"
    code, out, _ = said("stop", "--address", cluster.address, job["id"])
    assert code == 0 and "is stopping" in out
    code, out, _ = said("logs", "--follow", "--address", cluster.address, job["id"])
    assert code == 0 and f"interrupted; the same command resumes {bucket.uri}/c" in out


def test_on_a_terminal_it_asks_whether_to_stop(cluster, client, said, bucket, moto):
    flags = ["--address", cluster.address, "--env", "AWS_*", "--"]
    command = encode(bucket, "d", "--shard-size", 4, "--steps", 900, "--decode", "actor")
    ours, theirs = pty.openpty()
    process = client("submit", *flags, *command, stdin=theirs, stderr=theirs, **aws(moto))
    waits(lambda: files(bucket, "d/plan"), process)
    process.send_signal(signal.SIGINT)
    shown = b""
    while b"or leave it running? [s/L]" not in shown:
        shown += os.read(ours, 1024)
    os.write(ours, b"s\n")
    assert process.wait(60) == 130
    assert b"is stopping" in os.read(ours, 4096)
    until = time.monotonic() + 60
    while running(said, cluster):
        assert time.monotonic() < until


def test_a_cluster_that_can_t_be_used_is_named(cluster, said):
    _, _, err = said("jobs", "--address", cluster.address, RAY_AUTH_TOKEN="f" * 64)
    assert f"--address: {cluster.address} refuses the token of $RAY_AUTH_TOKEN" in err and "ffff" not in err
    code, _, err = said("jobs", "--address", cluster.address, RAY_AUTH_MODE="", RAY_AUTH_TOKEN="")
    assert code == 2 and f"--address: {cluster.address} requires a token: set RAY_AUTH_MODE=token" in err
    code, _, err = said("jobs", "--address", "127.0.0.1:1")
    assert code == 2 and "--address: no Ray dashboard answers at http://127.0.0.1:1" in err
    code, _, err = said("logs", "--address", cluster.address, "nosuch")
    assert code == 2 and f"JOB_ID: {cluster.address} has no job nosuch" in err


def test_what_can_t_be_sent_is_named(cluster, said, palindrome, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "big").mkdir()
    with open(tmp_path / "big/weights.bin", "wb") as file:
        file.truncate(101 << 20)
    (tmp_path / "ids.txt").write_text("a\n")
    places = ["--images", "s3://b/x", "--out", "s3://b/y"]
    wrong = {
        "and Ray's limit is 100; largest: big/weights.bin (101.0 MiB)": (
            ["--ship", "big"],
            ["encode", *places, "--model", "big"],
        ),
        "COMMAND: --model big is a path on this machine": ([], ["encode", *places, "--model", "big"]),
        "COMMAND: --ids ids.txt is a path": ([], ["regenerate", "--latents", "/a", "--ids", "ids.txt", "--out", "/b"]),
        "--ship: nosuch does not exist": (["--ship", "nosuch"], ["encode", *places, "--model", "s3://b/m"]),
        "--env: NOSUCH_* is not set": (["--env", "NOSUCH_*"], ["encode", *places, "--model", "s3://b/m"]),
        "COMMAND: status does not run on a cluster": ([], ["status", "s3://b/x"]),
        "--address belongs before --": ([], ["encode", *places, "--model", "s3://b/m", "--address", "x:1"]),
        "palindrome encode: error: the following arguments are required": ([], ["encode"]),
    }
    for words, (flags, command) in wrong.items():
        submit = ["submit", "--address", cluster.address, *flags, "--", *command]
        if "--ship" in flags:  # which the cluster is asked before
            code, _, err = said(*submit)
        else:
            ended = palindrome(*submit)
            code, err = ended.code, ended.err
        assert code == 2 and words in err, err


def test_the_package_is_the_code_and_what_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "model/a.bin", "ladder.json"):
        path = tmp_path / "here" / name
        path.mkdir(parents=True) if "." not in name else path.write_text("x")
    monkeypatch.chdir(tmp_path / "here")
    into = tmp_path / "package"
    into.mkdir()
    build(into, ["ladder.json"], {"A": "b"})
    found = {str(path.relative_to(into)) for path in into.rglob("*") if path.is_file()}
    assert {"ladder.json", "palindrome/notebook.py", "palindrome/pipeline/images/sources/tars.py", ENVIRONMENT} <= found
    templates = {f"palindrome/pipeline/reports/templates/{name}" for name in ("page.html", "sweep.html", "style.css")}
    assert templates <= found
    others = {name for name in found if not name.startswith("palindrome/pipeline/reports/templates/")}
    assert all(name.endswith(".py") for name in others - {"ladder.json", ENVIRONMENT})
    assert (into / ENVIRONMENT).stat().st_mode & 0o077 == 0
    for name in ("palindrome", "../here", str(tmp_path), "."):
        with pytest.raises(PackageError):
            build(into, [name], {}, code=False)
    (tmp_path / "here" / ENVIRONMENT).write_text("mine")
    with pytest.raises(PackageError, match="name is reserved"):
        build(into, [ENVIRONMENT], {"A": "secret"}, code=False)
    assert (tmp_path / "here" / ENVIRONMENT).read_text() == "mine"
