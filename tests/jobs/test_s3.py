"""Runs on S3, of two kinds of server over HTTP: from it, to it, through faults, with secrets that stay secret."""

import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palindrome.model.families import unet2d
from palindrome.pipeline.storage.folder import Folder

SETTINGS = ["--steps", 2, "--corrections", 1, "--shard-size", 8, "--batch-size", 4]


@pytest.fixture(scope="session")
def table(pngs, tmp_path_factory):
    """The first 24 pictures of the sample as Parquet."""
    path = tmp_path_factory.mktemp("table") / "a.parquet"
    images = [{"bytes": png, "path": None} for png in pngs[:24]]
    pq.write_table(pa.table({"img": images, "label": list(range(24))}), path, row_group_size=6)
    return path


@pytest.fixture
def bucket(store, table, pictures, tiny):
    """A bucket with the table, the pictures and the model."""
    folder = Folder(store.bucket(), store.options)
    folder.put("table/a.parquet", table.read_bytes())
    for path in pictures.iterdir():
        folder.put(f"pictures/{path.name}", path.read_bytes())
    unet2d.save(tiny, f"{folder.uri}/model", store.options)
    return folder


@pytest.fixture
def options(tmp_path):
    """options(store, ...) -> the flag that opens it, by a file."""

    def options(store, **others):
        path = tmp_path / f"options-{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({"s3": {**store.options["s3"], **others}}))
        return ["--storage-options", path]

    return options


@pytest.fixture(scope="session")
def expected(palindrome, pictures, table, model, tmp_path_factory, read_run):
    """By collection, the latents by content hash, of runs on this machine's disk: of batches put together otherwise,
    some CPUs' kernels round otherwise."""

    def latents(images):
        out = tmp_path_factory.mktemp("expected") / "run"
        said = palindrome("encode", "--images", images, "--model", model, "--out", out, *SETTINGS)
        assert said.code == 0, said.err
        return by_content(read_run(out))

    return {"pictures": latents(pictures), "table": latents(table)}


def by_content(run):
    return {row["content_hash"]: latent for row, latent in zip(run.rows, run.latents, strict=True)}


def fetched(bucket, name, read_run, folder):
    """A run of a bucket, as read from a copy on the disk."""
    for below in bucket.files(f"{name}/latents"):
        (folder / "latents").mkdir(exist_ok=True, parents=True)
        (folder / "latents" / below).write_bytes(bucket.read(f"{name}/latents/{below}"))
    return read_run(folder)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def versions(bucket, name):
    bucket.fs.invalidate_cache()
    found = bucket.fs.find(bucket.path(name), detail=True).values()
    return {info["name"]: (info["ETag"], info["LastModified"]) for info in found if "/latents/" in info["name"]}


def test_encode_resume_and_reconstruct(palindrome, store, bucket, options, expected, read_run, stores, tmp_path):
    flag, run = options(store), f"{bucket.uri}/run"
    command = ["encode", "--images", f"{bucket.uri}/table", "--model", f"{bucket.uri}/model", "--out", run, *flag]
    said = [palindrome(*command, *SETTINGS, "--keep", "label")]
    assert said[-1].code == 0, said[-1].err
    assert "24 latents and 0 rejects" in said[-1].out
    latents = fetched(bucket, "run", read_run, tmp_path / "first")
    assert_equal(by_content(latents), expected["table"])
    assert sorted(row["label"] for row in latents.rows) == list(range(24))

    before = versions(bucket, "run")
    said.append(palindrome(*command, *SETTINGS, "--keep", "label"))
    assert said[-1].code == 0 and ", 0 to encode" in said[-1].out, said[-1]
    assert versions(bucket, "run") == before
    gone = min(before)
    bucket.fs.rm_file(gone)
    said.append(palindrome(*command, *SETTINGS, "--keep", "label"))
    assert said[-1].code == 0 and ", 1 to encode" in said[-1].out, said[-1]
    after = versions(bucket, "run")
    assert {name for name in after if after[name] != before[name]} <= {gone} and after.keys() == before.keys()

    said.append(palindrome("status", run, "--json", *flag))
    state = json.loads(said[-1].out)
    assert said[-1].code == 0 and state["latents"] == 24, state
    said.append(palindrome("verify", run, "--deep", 3, *flag))
    assert said[-1].code == 0 and "all well" in said[-1].out, said[-1]
    said.append(palindrome("rejects", run, *flag))
    assert said[-1].code == 0 and "0 rejects" in said[-1].err
    said.append(palindrome("reconstruct", "--latents", run, "--out", f"{bucket.uri}/back", *flag))
    assert said[-1].code == 0, said[-1].err
    summary = json.loads(bucket.read("back/summary.json"))
    assert summary["by_steps"][0]["count"] == 24
    said.append(palindrome("verify", f"{bucket.uri}/back", *flag))
    assert said[-1].code == 0 and "all well" in said[-1].out, said[-1]

    contents = bucket.fs.cat(bucket.fs.find(bucket.path()))
    assert any(path.endswith("run.json") for path in contents)
    for secret in (stores.SECRET, stores.KEY):
        assert not [path for path, content in contents.items() if secret.encode() in content]
        assert not [command for command in said if secret in command.out + command.err]


def test_a_shard_that_is_encoded_again_is_written_over(palindrome, moto, pictures, model, options):
    """Where other late commits change nothing."""
    bucket = Folder(moto.bucket(), moto.options)
    whole = [path.read_bytes() for path in sorted(pictures.iterdir())[:3]]
    for i, content in enumerate([*whole[:2], b"no picture"]):
        bucket.put(f"pictures/{i}.png", content)
    command = ["encode", "--images", f"{bucket.uri}/pictures", "--model", model, "--out", f"{bucket.uri}/run"]
    said = palindrome(*command, *SETTINGS, *options(moto))
    assert said.code == 0 and "2 latents and 1 rejects" in said.out, said
    bucket.put("pictures/2.png", whole[2])
    said = palindrome(*command, *SETTINGS, "--retry-rejects", *options(moto))
    assert said.code == 0 and "3 latents and 0 rejects" in said.out, said


@pytest.fixture
def proxy(stores, store):
    with stores.Proxy(store.endpoint) as proxy:
        yield proxy


def test_faults_on_the_way_cost_time_and_no_row(
    palindrome, store, stores, bucket, options, expected, proxy, read_run, tmp_path
):
    proxy.rate, proxy.stall = 0.15, 3
    flag = options(store.through(proxy), config_kwargs=eager(store, total_max_attempts=10))
    images, out = f"{bucket.uri}/pictures", f"{bucket.uri}/run"
    said = palindrome("encode", "--images", images, "--model", f"{bucket.uri}/model", "--out", out, *flag, *SETTINGS)
    assert said.code == 0, said.err
    assert "24 latents and 0 rejects" in said.out and "failed" not in said.err
    assert proxy.counts.total() - proxy.counts["none"] > 5
    assert_equal(by_content(fetched(bucket, "run", read_run, tmp_path / "run")), expected["pictures"])


def eager(store, **retries):
    """A Config of botocore's that gives up soon."""
    return {**store.options["s3"]["config_kwargs"], "read_timeout": 0.8, "retries": retries}


@pytest.mark.parametrize("fault", ["503", "reset"])
def test_a_store_that_is_gone_ends_the_run_with_its_words(
    palindrome, moto, stores, table, model, options, tmp_path, fault
):
    bucket = Folder(moto.bucket(), moto.options)
    bucket.put("table/a.parquet", table.read_bytes())
    with stores.Proxy(moto.endpoint, faults=[fault]) as proxy:

        def break_down():
            while not bucket.exists("run/plan/complete.json"):
                time.sleep(0.01)
            proxy.rate = 1

        flag = options(moto.through(proxy), config_kwargs=eager(moto, total_max_attempts=2))
        thread = threading.Thread(target=break_down)
        thread.start()
        said = palindrome(
            "encode",
            "--images",
            f"{bucket.uri}/table",
            "--model",
            model,
            "--out",
            f"{bucket.uri}/run",
            *flag,
            *SETTINGS,
        )
        thread.join()
        assert said.code == 1, said
        words = "the store asks for fewer requests (SlowDown)" if fault == "503" else "closes the connection"
        assert words in said.err and bucket.uri in said.err, said.err
        assert 0 < proxy.counts[fault] < 100, "it gives up"
    assert not bucket.files("run/rejects")  # an outage is no image's fault


def test_what_is_wrong_is_said_of_the_flag(palindrome, rclone, moto, sample, model, options, tmp_path):
    there = Folder(rclone.bucket(), rclone.options).uri
    flags = {"--images": sample, "--model": model, "--out": tmp_path / "run"}
    for wrong, words in [
        ({"secret": "wrong"}, "the secret access key is wrong (SignatureDoesNotMatch)"),
        ({"key": "wrong"}, "the store does not know the access key id (InvalidAccessKeyId)"),
    ]:
        for name in flags:
            given = {**flags, name: f"{there}/x"}
            said = palindrome("encode", *sum(given.items(), ()), *options(rclone, **wrong))
            assert said.code == 2, said
            assert said.err.startswith(f"palindrome encode: error: {name}: {there}/x") and words in said.err, said.err
            assert len(said.err.splitlines()) == 1
        said = palindrome("status", f"{there}/x", *options(rclone, **wrong))
        assert said.code == 2 and said.err.startswith(f"palindrome status: error: RUN: {there}/x") and words in said.err
    for name in flags:
        given = {**flags, name: "s3://no-such-bucket-of-ours/x"}
        for store in (rclone, moto):
            said = palindrome("encode", *sum(given.items(), ()), *options(store))
            assert said.code == 2
            assert said.err.startswith(f"palindrome encode: error: {name}: s3://no-such-bucket-of-ours"), said.err
            assert "there is no such bucket (NoSuchBucket)" in said.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('{"s3": {"secret": "hush"', "invalid JSON at line 1 column 25"),
        ('{"secret": "hush"}', "must map protocols to options"),
        ('{"s3": "hush"}', "must map protocols to options"),
        ('{"nosuch": {"secret": "hush"}}', "must map protocols to options"),
        ("hush", "neither a JSON object nor a readable file: No such file or directory"),
        ("", "must not be empty"),
    ],
)
def test_options_that_are_wrong_are_refused_and_not_repeated(palindrome, value, words):
    said = palindrome("status", "s3://b/x", "--storage-options", value)
    assert said.code == 2
    assert said.err.startswith("palindrome status: error: --storage-options: ") and words in said.err, said.err
    assert "hush" not in said.err + said.out


def test_options_that_the_shell_took_apart_are_not_repeated(palindrome):
    said = palindrome("status", "s3://b/x", "--storage-options", "{s3:", "{secret:", "hush}}")
    assert said.code == 2 and "unrecognized arguments" in said.err and "hush" not in said.err


def test_credentials_of_the_drivers_environment_reach_its_workers(
    palindrome, rclone, stores, table, model, monkeypatch
):
    """The tests' Ray was started without them."""
    bucket = Folder(rclone.bucket(), rclone.options)
    bucket.put("table/a.parquet", table.read_bytes())
    for name, value in {
        "AWS_ACCESS_KEY_ID": stores.KEY,
        "AWS_SECRET_ACCESS_KEY": stores.SECRET,
        "AWS_ENDPOINT_URL": rclone.endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }.items():
        monkeypatch.setenv(name, value)
    out = f"{bucket.uri}/run"
    said = palindrome("encode", "--images", f"{bucket.uri}/table", "--model", model, "--out", out, *SETTINGS)
    assert said.code == 0, said.err
    assert len(bucket.files("run/latents")) == 4


def test_secrets_on_the_command_line_leave_it_and_come_to_no_log(start, moto, stores, table, model):
    """Ray writes the command line of a driver into its table of jobs; it keeps its logs below RAY_TMPDIR."""
    bucket = Folder(moto.bucket(), moto.options)
    bucket.put("table/a.parquet", table.read_bytes())
    command = ["encode", "--images", f"{bucket.uri}/table", "--model", model, "--out", f"{bucket.uri}/run", *SETTINGS]
    # Ray's sockets lie there, whose names must be short.
    with tempfile.TemporaryDirectory(prefix="p", ignore_cleanup_errors=True) as logs:
        process, last = start(*command, "--storage-options", json.dumps(moto.options), RAY_TMPDIR=logs), b""
        while process.poll() is None:
            last = Path(f"/proc/{process.pid}/cmdline").read_bytes() or last  # none of a process that is going
            time.sleep(0.05)
        out, err = process.communicate()
        assert process.returncode == 0, err
        files = [path for path in Path(logs).rglob("*") if path.is_file() and not path.is_symlink()]
        assert any(path.name.startswith("gcs_server") for path in files)
        assert not [path for path in files if stores.SECRET.encode() in path.read_bytes()]
    assert b"/dev/fd/" in last and stores.SECRET.encode() not in last
    assert stores.SECRET not in out + err
    assert len(bucket.files("run/latents")) == 4
