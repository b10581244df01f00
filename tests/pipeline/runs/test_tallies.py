"""What is read again of a run whose shards were summarised before: the blocks that changed, and nothing else."""

import gzip
import json
import os
import uuid

import numpy as np
import pytest

from palindrome.pipeline.images.records import Image, Piece, Reject, Shard
from palindrome.pipeline.runs import tallies
from palindrome.pipeline.runs.schemas import latent_schema, shards_table
from palindrome.pipeline.runs.shards import latent_rows, latent_writer
from palindrome.pipeline.runs.summary import latents_summary
from palindrome.pipeline.runs.tallies import TALLIES, committed_shards
from palindrome.pipeline.storage.folder import Folder

SCHEMA = latent_schema((1, 2, 2), "float16")
BLOCK, SHARDS = 10, 35  # in these tests


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    monkeypatch.setattr(tallies, "BLOCK", BLOCK)


PLANNED = [Shard.of("files", [Piece(f"file:///{i}.png", f"{i}.png", 1, "v")]) for i in range(SHARDS + 5)]


def plan(run, count):
    run.put_parquet("plan/000000.parquet", shards_table(PLANNED[:count]))
    run.put("plan/complete.json", json.dumps({"shards": count, "images": count, "files": 1}).encode())


def commit(run, place, mse=(1e-3, 2e-3), refused=0):
    """A shard of the plan, with these errors."""
    name = PLANNED[place].name
    images = [Image(f"{place}-{row}.png", "s", 2, 2, "0" * 64, {}, None) for row in range(len(mse))]
    measured = {"mse": mse, "psnr": mse, "identical": [1.0] * len(mse), "nfe": [1] * len(mse)}
    with latent_writer(run, name, SCHEMA, {}) as out:
        rows = latent_rows(SCHEMA, images, np.zeros((len(mse), 1, 2, 2), np.float16), measured)
        out.add(rows, [Reject(f"{place}-{i}", "s", "empty", "") for i in range(refused)])
        out.commit({"seconds": 1.0})
    return f"latents/{name}.parquet"


def filled(folder):
    plan(folder, SHARDS)
    for place in range(SHARDS):
        commit(folder, place, (10.0 ** -(place % 5), 0.5), refused=place % 2)
    return folder


@pytest.fixture
def run(tmp_path):
    return filled(Folder(str(tmp_path / "run")))


@pytest.fixture
def summarised(monkeypatch):
    """summarised(run) -> its summary, and the places of the shards that were read for it."""
    read, several, names = Folder.parquet_file, Folder.small_parquet_files, []

    def noting(folder, name, *arguments):
        names.append(name)
        return read(folder, name, *arguments)

    def noting_several(folder, read):
        names.extend(read)
        return several(folder, read)

    monkeypatch.setattr(Folder, "parquet_file", noting)
    monkeypatch.setattr(Folder, "small_parquet_files", noting_several)
    places = {f"latents/{shard.name}.parquet": place for place, shard in enumerate(PLANNED)}

    def summarised(run):
        names.clear()
        summary = latents_summary(run, True)
        return summary, sorted(places[name] for name in names if name.startswith("latents/"))

    return summarised


def assert_right(run, found):
    """Against the summary without tallies, of all shards in one block, which rounds sums in another order."""
    for name in run.files(TALLIES):
        run.remove(f"{TALLIES}/{name}")
    tallies.BLOCK = 10**9
    expected = latents_summary(run, True)
    rounded = {name: expected["round_trip"].pop(name) for name in ("mean", "psnr")}
    assert {name: found["round_trip"][name] for name in rounded} == pytest.approx(rounded, rel=1e-12)
    assert {**found, "round_trip": {k: v for k, v in found["round_trip"].items() if k not in rounded}} == expected


def test_the_same_again_reads_nothing(run, summarised):
    first, read = summarised(run)
    assert (
        read == list(range(SHARDS)) and first["latents"] == 2 * SHARDS and first["rejects_by_reason"] == {"empty": 17}
    )
    kept = run.files(TALLIES)
    assert len(kept) == 5  # four blocks, and all of them
    assert summarised(run) == (first, [])
    assert run.files(TALLIES) == kept
    assert_right(run, first)


CHANGES = {
    "errors": lambda run: commit(run, 14, (0.9, 0.5)),
    "rejects": lambda run: commit(run, 14, (10.0**-4, 0.5), refused=3),
    "no rejects": lambda run: commit(run, 15, (1.0, 0.5)),
    "one less": lambda run: run.remove(f"latents/{PLANNED[14].name}.parquet"),
    "its rejects less": lambda run: run.remove(f"rejects/{PLANNED[15].name}.parquet"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_of_a_shard_that_changed_its_block_is_read(run, summarised, change):
    before, _ = summarised(run)
    change(run)
    after, read = summarised(run)
    assert after != before and set(read) | {14} == set(range(10, 20))
    assert len(run.files(TALLIES)) == 5  # those of before are gone
    assert summarised(run) == (after, [])
    assert_right(run, after)


def test_of_a_plan_that_grew_its_end_is_read(run, summarised):
    summarised(run)
    plan(run, SHARDS + 5)
    for place in range(SHARDS, SHARDS + 5):
        commit(run, place)
    after, read = summarised(run)
    assert read == list(range(30, 40)) and after["shards"] == SHARDS + 5
    assert_right(run, after)


def test_a_file_of_the_same_size_and_time_in_place_of_another_is_seen(run, summarised):
    before, _ = summarised(run)
    path = run.path(f"latents/{PLANNED[3].name}.parquet")
    status = os.stat(path)
    commit(run, 3, (10.0**-3 * 0.75, 0.5), refused=1)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.stat(path).st_size == status.st_size
    after, read = summarised(run)
    assert read == list(range(10)) and after != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-9],
        lambda content: content[:90] + bytes([content[90] ^ 1]) + content[91:],
        lambda content: gzip.compress(b"[]"),
        lambda content: gzip.compress(b'{"shards": 1}'),
        lambda content: gzip.compress(gzip.decompress(content).replace(b'"sketch": "', b'"sketch": "AAAA')),
    ],
)
def test_a_tally_that_can_not_be_read_is_made_again(run, summarised, damage):
    first, _ = summarised(run)
    for name in run.files(TALLIES):
        run.put(f"{TALLIES}/{name}", damage(run.read(f"{TALLIES}/{name}")))
    assert summarised(run) == (first, list(range(SHARDS)))
    assert summarised(run) == (first, [])


def test_a_summary_that_was_interrupted_goes_on(run, summarised, monkeypatch):
    kept, put = [], Folder.put

    def failing(folder, name, content):
        if name.startswith(TALLIES):
            if len(kept) == 2:
                raise KeyboardInterrupt
            kept.append(name)
        put(folder, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "put", failing)
        with pytest.raises(KeyboardInterrupt):
            summarised(run)
    assert summarised(run)[1] == list(range(20, SHARDS))


def test_without_a_plan_blocks_are_by_name(run, summarised):
    summarised(run)
    run.remove("plan/complete.json")
    again, read = summarised(run)
    assert read == list(range(SHARDS)) and summarised(run) == (again, [])
    assert_right(run, again)


def test_a_folder_that_can_not_be_written_is_no_failure(run, summarised, tmp_path):
    (tmp_path / "run" / TALLIES).write_text("a file")
    first, read = summarised(run)
    assert read == list(range(SHARDS)) and summarised(run) == (first, read)


def test_where_a_listing_has_no_versions_nothing_is_kept(summarised):
    run = filled(Folder(f"memory://{uuid.uuid4().hex}"))
    first, read = summarised(run)
    assert read == list(range(SHARDS)) and summarised(run) == (first, read)
    assert not run.files(TALLIES)


def test_on_s3_each_small_shard_takes_one_request_and_none_again(store, stores):
    run = filled(Folder(f"{store.bucket()}/run", store.options))
    assert all(shard.file.version for shard in committed_shards(run, "latents"))
    with stores.Proxy(store.endpoint) as proxy:
        behind = Folder(run.uri, store.through(proxy).options)

        def asked():
            proxy.requests.clear()
            found = latents_summary(behind, True)
            return found, sorted(request for request in proxy.requests if "/latents/" in request[1])

        first, requests = asked()
        assert [method for method, _ in requests] == ["GET"] * SHARDS
        assert asked() == (first, [])
        before = run.files("latents")
        commit(run, 3, (10.0**-3 * 0.75, 0.5), refused=1)
        assert run.files("latents") == before  # of the same sizes
        after, requests = asked()
        assert len(requests) == BLOCK and after["round_trip"]["mean"] < first["round_trip"]["mean"]
    assert_right(run, after)
