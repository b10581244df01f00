"""S3 over HTTP: whole objects or none, whatever is killed; retries; words for what is wrong; credentials travel."""

import errno
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem

from palindrome.pipeline.base.errors import SourceError, StoreError
from palindrome.pipeline.storage.folder import (
    FOOTER_BYTES,
    Folder,
    TableWriter,
    current_options,
    is_outage,
    options_for,
    using,
)

ROOT = Path(__file__).parents[3]
MIB = 1 << 20
BARE = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}  # an environment in which no credentials are found
TABLE = pa.table({"n": list(range(1000)), "bytes": [bytes([i % 256]) * 500 for i in range(1000)]})


def folder(store, **options):
    """A folder in a new bucket, opened with these options more."""
    return Folder(f"{store.bucket()}/run", {"s3": {**store.options["s3"], **options}})


@pytest.fixture
def proxy(stores, store):
    with stores.Proxy(store.endpoint) as proxy:
        yield proxy


def start(script, folder, *arguments):
    """A process that runs the script with the folder, and prints `ready` where the script says so."""
    program = f"import pickle, sys, time\nfolder = pickle.load(sys.stdin.buffer)\n{script}"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, env=BARE, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(pickle.dumps(folder))
    process.stdin.close()
    return process


def test_a_writer_killed_in_the_middle_of_a_put_leaves_what_was_there(store, proxy):
    run = folder(store)
    run.put("latents/a.bin", b"before")
    behind = Folder(run.uri, store.through(proxy).options)
    for name in ("latents/a.bin", "latents/b.bin"):
        proxy.held.clear()
        proxy.hold = 2 * MIB
        writer = start(f"folder.put({name!r}, bytes({6 * MIB}))", behind)
        assert proxy.held.wait(30)
        time.sleep(0.2)  # so that the store has what was sent
        assert run.files("latents") == {"a.bin": 6}
        writer.kill()
        writer.wait()
        time.sleep(0.2)
        assert run.files("latents") == {"a.bin": 6}
        assert run.read("latents/a.bin") == b"before"
    run.put("latents/b.bin", bytes(6 * MIB))
    assert run.files("latents") == {"a.bin": 6, "b.bin": 6 * MIB}


PARTS = """
with folder.create("latents/a.bin") as new:
    for i in range(3):
        new.file.write(bytes([i]) * (17 << 20))
    print("ready", flush=True)
    if len(sys.argv) > 1:
        time.sleep(600)
    new.commit()
"""


def test_a_writer_killed_in_the_middle_of_an_upload_in_parts_leaves_nothing(store):
    run = folder(store)
    writer = start(PARTS, run, "stay")
    assert writer.stdout.readline() == b"ready\n"
    assert run.files("latents") == {} and not run.exists("latents/a.bin")
    writer.kill()
    writer.wait()
    assert run.files("latents") == {} and not run.exists("latents/a.bin")
    bucket = run.path().split("/")[0]
    assert len(run.fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])) == 1
    run.clear_unfinished()
    assert not run.fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads")
    assert start(PARTS, run).wait() == 0
    content = run.read("latents/a.bin")
    assert content == b"".join(bytes([i]) * (17 << 20) for i in range(3))


def test_an_upload_that_fails_leaves_nothing(store):
    run = folder(store)
    with pytest.raises(RuntimeError), run.create("a.bin") as new:
        new.file.write(bytes(40 * MIB))
        raise RuntimeError
    assert run.files("") == {}
    assert not run.fs.call_s3("list_multipart_uploads", Bucket=run.path().split("/")[0]).get("Uploads")


def commit(run, size, once):
    """Bytes that say who wrote them, in parts where there are enough."""
    with run.create("a.bin", once) as new:
        new.file.write(bytes([size % 251]) * size)
        new.commit()


@pytest.mark.parametrize("size", [1000, 20 * MIB])
def test_a_commit_that_comes_second_changes_nothing_where_the_store_can_tell(store, size):
    run = folder(store)
    commit(run, size, once=True)
    commit(run, size + 1, once=True)
    assert run.files("") == {"a.bin": size if store.kind == "moto" else size + 1}
    commit(run, size + 2, once=False)
    assert run.files("") == {"a.bin": size + 2}
    assert run.read("a.bin") == bytes([(size + 2) % 251]) * (size + 2)


def test_a_store_without_conditions_takes_a_commit_all_the_same(moto, stores):
    with stores.Proxy(moto.endpoint, rate=1, faults=["no conditions"]) as proxy:
        run = folder(moto.through(proxy))
        commit(run, 1000, once=True)
        assert run.files("") == {"a.bin": 1000}
        assert proxy.counts["no conditions"] == 1


WRITER = """
size = int(sys.argv[1])
for i in range(15):
    with folder.create("latents/a.bin", True) as new:
        new.file.write(bytes([size % 251]) * size)
        new.commit()
    print(i, flush=True)
"""


def test_two_writers_of_one_object_leave_one_whole_one(store):
    run, lengths = folder(store), {700_000, 900_001}
    writers = [start(WRITER, run, n) for n in lengths]
    while any(writer.poll() is None for writer in writers):
        if found := run.files("latents"):
            assert found.keys() == {"a.bin"} and found["a.bin"] in lengths
            content = run.read("latents/a.bin")
            if store.kind == "moto":  # rclone's server may send a new object's bytes at an old one's length
                assert len(content) in lengths and content == bytes([len(content) % 251]) * len(content)
    content = run.read("latents/a.bin")
    assert len(content) in lengths and content == bytes([len(content) % 251]) * len(content)
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(run.files("latents")) == 1


def test_a_table_written_bit_by_bit_is_read_by_ranges(store):
    run = folder(store)
    with TableWriter(run, "t.parquet", TABLE.schema) as writer:
        for _ in range(3):
            writer.add(TABLE)
        size = writer.commit({b"k": "v"})
    assert run.files("") == {"t.parquet": size}
    assert run.read_parquet("t.parquet", ["n"]).equals(pa.concat_tables([TABLE.select(["n"])] * 3))
    with run.parquet_file("t.parquet") as file:
        assert file.metadata.metadata[b"k"] == b"v"


def test_small_objects_take_one_request_and_footers_few_bytes(store, proxy):
    run = folder(store)
    run.put("a", b"1")
    run.put_parquet("t.parquet", TABLE, compression="none")
    behind = Folder(run.uri, store.through(proxy).options)
    assert behind.read("a") == b"1"
    assert [method for method, _ in proxy.requests] == ["GET"]
    proxy.requests.clear()
    with behind.parquet_file("t.parquet") as file:
        assert file.metadata.num_rows == 1000
    assert [method for method, _ in proxy.requests] == ["HEAD", "GET"]


def test_a_listing_s_size_saves_a_request_and_a_small_file_takes_one(store, proxy):
    run = folder(store)
    large = pa.concat_tables([TABLE] * 20).combine_chunks()
    for name, table in (("small", TABLE.slice(0, 9)), ("large", large)):
        run.put_parquet(name, table, compression="none", use_dictionary=False)
    sizes = run.files("")
    assert sizes["small"] < FOOTER_BYTES < sizes["large"]
    behind = Folder(run.uri, store.through(proxy).options)
    for name, table, requests in (("small", TABLE.slice(0, 9), 1), ("large", large, 2)):
        proxy.requests.clear()
        assert behind.read_parquet(name, ["n"], sizes[name]).select(["n"]).equals(table.select(["n"]))
        assert [method for method, _ in proxy.requests] == ["GET"] * requests


def test_faults_are_ridden_out(store, proxy):
    """Every kind of fault, at three requests in ten."""
    run = folder(store)
    proxy.rate, proxy.stall = 0.3, 2.5
    config = {**store.options["s3"]["config_kwargs"], "read_timeout": 0.7, "retries": {"total_max_attempts": 12}}
    behind = Folder(run.uri, {"s3": {**store.through(proxy).options["s3"], "config_kwargs": config}})
    expected = {f"{i:03d}.bin": i * 1000 for i in range(16)}
    for name, size in expected.items():
        behind.put(f"x/{name}", os.urandom(1) * size)
    assert behind.files("x") == expected
    contents = behind.fs.cat([behind.path(f"x/{name}") for name in expected], batch_size=16)
    assert {path.rsplit("/", 1)[1]: len(content) for path, content in contents.items()} == expected
    behind.put_parquet("t.parquet", TABLE)
    assert behind.read_parquet("t.parquet", ["n"]).equals(TABLE.select(["n"]))
    assert set(proxy.counts) >= {"none", "500", "503", "reset", "lost", "stall", "slow", "truncated"}, proxy.counts


def test_an_upload_whose_last_answer_is_lost_is_there(moto, stores):
    """Told by its ETag, which rclone has another way of making."""
    with stores.Proxy(moto.endpoint) as proxy:
        run = folder(moto.through(proxy))
        for name, once in (("a.bin", False), ("b.bin", True)):
            with run.create(name, once) as new:
                new.file.write(bytes(17 * MIB))
                proxy.once = ("POST", "uploadId=", "lost")
                new.commit()
            assert proxy.counts.pop("lost") == 1
            assert run.files("")[name] == 17 * MIB


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", "the store fails ("),
        ("503", "the store asks for fewer requests ("),
        ("stall", "does not answer in time, 2 times"),
        ("reset", "closes the connection, 2 times"),
        ("truncated", "closes the connection, 2 times"),
        ("expired", "the session token has expired (ExpiredToken)"),
        ("denied", "access is denied (AccessDenied)"),
        ("archived", "the object is archived (InvalidObjectState)"),
    ],
)
def test_what_does_not_pass_is_said_with_the_uri(moto, stores, fault, words):
    with stores.Proxy(moto.endpoint, faults=[fault], stall=2) as proxy:
        config = {"read_timeout": 0.5, "retries": {"total_max_attempts": 2}}
        run = folder(moto.through(proxy), config_kwargs=config)
        run.put("a", b"content")
        proxy.rate = 1
        for act in (run.read, run.exists, lambda name: run.put(name, b"")):
            if fault == "truncated" and act != run.read:
                continue
            before = proxy.counts[fault]
            with pytest.raises(StoreError) as raised:
                act("a")
            assert 0 < proxy.counts[fault] - before <= 4, "it gives up"
            assert str(raised.value).startswith(f"{run.uri}/a: ") and words in str(raised.value)
            assert is_outage(raised.value, run.fs) == (fault not in ("denied", "archived"))
            again = pickle.loads(pickle.dumps(raised.value))
            assert str(again) == str(raised.value) and again.outage == raised.value.outage


def test_wrong_credentials_are_told_apart(rclone):
    bucket = rclone.bucket()
    for wrong, words in [
        ({"key": "wrong"}, "the store does not know the access key id (InvalidAccessKeyId)"),
        ({"secret": "wrong"}, "the secret access key is wrong (SignatureDoesNotMatch)"),
    ]:
        run = Folder(f"{bucket}/run", {"s3": {**rclone.options["s3"], **wrong}})
        for act in (run.exists, run.read, run.files, lambda name, run=run: run.put(name, b"")):
            with pytest.raises(StoreError, match=r"s3://bucket-.*: ") as raised:
                act("a")
            assert words in str(raised.value) and is_outage(raised.value, run.fs)


def test_no_credentials_at_all(rclone, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    run = Folder("s3://bucket/run", {"s3": {"endpoint_url": rclone.endpoint}})
    with pytest.raises(StoreError, match="s3://bucket/run/a: no credentials: ") as raised:
        run.read("a")
    assert is_outage(raised.value, run.fs)


def test_a_bucket_that_is_not_there_is_said_and_not_made(store, proxy):
    run = Folder("s3://no-such-bucket-of-ours/run", store.through(proxy).options)
    run.create("a").__exit__()
    for act in (run.exists, run.read, run.files, run.parquet_file, lambda name: run.put(name, b"")):
        with pytest.raises(StoreError, match=r"^s3://no-such-bucket-of-ours: there is no such bucket"):
            act("a")
    assert not [path for method, path in proxy.requests if method == "PUT" and path.count("/") == 1]


def test_an_endpoint_that_is_not_there_is_said_soon(stores):
    options = {"key": "k", "secret": "s", "endpoint_url": f"http://127.0.0.1:{stores.free_port()}"}
    run, started = Folder("s3://bucket/run", {"s3": options}), time.monotonic()
    with pytest.raises(StoreError, match=r"s3://bucket/run/a: http://127.0.0.1:\d+ can't be reached") as raised:
        run.read("a")
    assert time.monotonic() - started < 60, "botocore by itself tries for minutes"
    assert is_outage(raised.value, run.fs)


def test_what_is_an_outage(moto, tmp_path):
    remote, local = moto.fs, LocalFileSystem()
    missing, later = FileNotFoundError(errno.ENOENT, "x"), SourceError("can't be opened")
    later.__cause__ = StoreError(errno.EIO, "the store fails", "s3://b/k", outage=True)
    assert is_outage(later, remote) and is_outage(TimeoutError(), remote) and is_outage(ConnectionResetError(), remote)
    assert is_outage(aiohttp.ServerDisconnectedError(), remote)
    for other in (missing, PermissionError(), ValueError(), StoreError(errno.EACCES, "access is denied", "s3://b/k")):
        assert not is_outage(other, remote)
    outages = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EAGAIN, errno.EMFILE, errno.ENFILE)
    for number in (*outages, errno.ENOMEM, errno.EREMOTEIO):
        assert is_outage(OSError(number, os.strerror(number)), local)
    for number in outages:  # of the file that holds an archive, say
        assert is_outage(OSError(number, os.strerror(number)), fsspec.filesystem("memory"))
    assert is_outage(TimeoutError(), local) and is_outage(MemoryError(), local) and is_outage(MemoryError(), remote)
    faults = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
    for number in faults:
        assert not is_outage(OSError(number, os.strerror(number)), local)
    assert not is_outage(OSError("no such thing as a footer"), local)  # pyarrow's of bad bytes have no number
    with pytest.raises(FileNotFoundError) as raised:
        folder(moto).read("none")
    assert not is_outage(raised.value, remote)


READ = "sys.stdout.buffer.write(folder.read('a'))"


@pytest.fixture
def aws(rclone, monkeypatch, tmp_path):
    """A bucket with an object, and no other AWS settings than those that the test makes."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    bucket = rclone.bucket()
    Folder(bucket, rclone.options).put("run/a", b"content")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return f"{bucket}/run"


def elsewhere(folder):
    """What another machine reads, which has none of our environment."""
    return start(READ, folder).stdout.read()


def test_credentials_of_the_environment_travel(aws, rclone, stores, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", stores.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", stores.SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", rclone.endpoint)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    run = Folder(aws)
    assert elsewhere(run) == b"content"
    assert run.storage_options["s3"]["client_kwargs"] == {"region_name": "eu-central-1"}
    assert stores.SECRET not in repr(run) + str(run.fs) + str(vars(run)["uri"])
    script = "from palindrome.pipeline.storage.folder import current_options as now; print(now()['s3']['endpoint_url'])"
    env = {**os.environ, "FSSPEC_S3_ENDPOINT_URL": "http://of-fsspec"}
    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "http://of-fsspec"
    with using({"s3": {"key": "other", "secret": "x"}}):
        options = current_options()["s3"]
    assert (options["key"], options["secret"], options["endpoint_url"]) == ("other", "x", rclone.endpoint)
    assert current_options()["s3"]["key"] == stores.KEY


def test_credentials_of_a_profile_travel(aws, rclone, stores, monkeypatch, tmp_path):
    (tmp_path / ".aws").mkdir()
    keys = f"aws_access_key_id = {stores.KEY}\naws_secret_access_key = {stores.SECRET}\n"
    settings = "request_checksum_calculation = when_required\nresponse_checksum_validation = when_required\n"
    config = f"[profile ours]\nservices = local\n{settings}[services local]\ns3 =\n  endpoint_url = {rclone.endpoint}\n"
    (tmp_path / ".aws/credentials").write_text(f"[ours]\n{keys}")
    (tmp_path / ".aws/config").write_text(config)
    monkeypatch.setenv("AWS_PROFILE", "ours")
    assert elsewhere(Folder(aws)) == b"content"
    monkeypatch.delenv("AWS_PROFILE")
    with using({"s3": {"profile": "ours"}}):
        run = Folder(aws)
    assert elsewhere(run) == b"content" and "profile" not in run.storage_options["s3"]


def test_credentials_that_expire_are_left_to_each_node(aws, monkeypatch, tmp_path):
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text("[base]\naws_access_key_id = a\naws_secret_access_key = b\n")
    (tmp_path / ".aws/config").write_text(
        "[profile role]\nrole_arn = arn:aws:iam::123456789012:role/x\nsource_profile = base\nregion = eu-west-1\n"
        "[profile process]\ncredential_process = touch should-not-run\n"
    )
    monkeypatch.chdir(tmp_path)
    for profile in ("role", "process"):
        monkeypatch.setenv("AWS_PROFILE", profile)
        assert "key" not in current_options()["s3"]
    assert not (tmp_path / "should-not-run").exists()


def test_protocols_that_are_the_same_share_options(moto):
    run = folder(moto)
    run.put("a", b"1")
    assert Folder(run.uri.replace("s3://", "s3a://"), run.storage_options).read("a") == b"1"
    options = {"s3": {"key": "a"}, "gs": {"token": "b"}, "file": {"auto_mkdir": True}}
    assert options_for("zip://x.png::s3a://b/x.zip", options) == {"s3a": {"key": "a"}}
    assert options_for("gcs://b/x", options) == {"gcs": {"token": "b"}}
    assert options_for("/data/s3://x", options) == {"file": {"auto_mkdir": True}}
