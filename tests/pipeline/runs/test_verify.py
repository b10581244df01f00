"""Plans that are wrong, in folders made by hand. What is wrong with a run's files is in tests/jobs/test_verify.py."""

import json
from dataclasses import replace

import pytest

from palindrome.pipeline.base.errors import RunError
from palindrome.pipeline.images.records import Piece, Shard
from palindrome.pipeline.images.sources import list_pieces, open_collection, read_raw
from palindrome.pipeline.runs.kinds import KINDS
from palindrome.pipeline.runs.manifest import Manifest
from palindrome.pipeline.runs.plan import PATHS, SAMPLES, ids_of
from palindrome.pipeline.runs.schemas import shards_table
from palindrome.pipeline.runs.verify import Account, plans, verify
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.generate import ranges
from palindrome.pipeline.tasks.paths import At, path_pieces

MANIFEST = {
    "job": "encode",
    "config": {"dtype": "float32", "keep": [], "measure": False},
    "model_digest": "x",
    "levels": [-1, 5],
    "inversion": {"nfe": 1, "corrections": 0},
    "preprocess": {"channels": 3, "size": 4},
    "collection": {},
}


def plan(folder, shards, total=None):
    run = Folder(str(folder))
    run.put_parquet("plan/000000.parquet", shards_table(shards))
    found = {"shards": total or len(shards), "images": sum(s.images for s in shards), "files": 1, "generations": [1]}
    run.put("plan/complete.json", json.dumps(found).encode())
    return run


def said(run, manifest=MANIFEST):
    return [f"{f.where}: {f.what}" for f in verify(run, Manifest(manifest), Account()) if "is missing" not in f.what]


def files(*names):
    return Shard.of("files", [Piece(f"file:///x/{name}", name, 1, "1") for name in names])


def test_a_good_plan(tmp_path):
    assert said(plan(tmp_path, [files("a", "b"), files("c")])) == []


@pytest.mark.parametrize("part", [1, 2, 1000])
def test_an_id_in_two_shards_is_named_however_many_passes_it_takes(tmp_path, monkeypatch, part):
    monkeypatch.setattr(plans, "MAX_HASHES", part)
    run = plan(tmp_path, [files("a", "b"), files("c", "b", "d"), files("e", "a")])
    assert sorted(said(run)) == ["plan: a occurs 2 times", "plan: b occurs 2 times"]


def test_row_ranges_that_overlap(tmp_path):
    piece = Piece("file:///x/p.parquet", "p.parquet", 1, "1", 0, 10)
    run = plan(tmp_path, [Shard.of("parquet", [piece]), Shard.of("parquet", [replace(piece, start=9, stop=12)])])
    assert said(run) == ["plan: p.parquet#9 occurs 2 times"]


def test_a_shard_twice(tmp_path):
    shard = files("a")
    assert said(plan(tmp_path, [shard, shard])) == [f"plan: shard {shard.name} occurs twice"]


def test_a_shard_that_is_named_wrongly(tmp_path):
    assert said(plan(tmp_path, [replace(files("a"), name="0" * 24)])) == [
        f"plan: shard {'0' * 24} is not named by its content"
    ]


def test_totals_that_are_wrong(tmp_path):
    run = plan(tmp_path, [files("a")], total=2)
    assert said(run) == ["plan/complete.json: says 2 shards and 1 images, and there are 1 and 1"]


def test_plan_files_that_are_gone_or_damaged(tmp_path):
    run = plan(tmp_path, [files("a")])
    (tmp_path / "plan/000000.parquet").write_bytes(b"PAR1")
    assert [line.split(":")[0] for line in said(run)] == ["plan/000000.parquet"]
    (tmp_path / "plan/000000.parquet").unlink()
    [line] = [f.what for f in verify(run, Manifest(MANIFEST), Account())]
    assert "plan/000000.parquet is missing" in line
    (tmp_path / "plan/complete.json").write_text("{")
    assert [line.split(":")[0] for line in said(run)] == ["plan/complete.json"]
    (tmp_path / "plan/complete.json").unlink()
    assert said(run) == ["plan: is not complete: the run was interrupted while it listed the images"]


@pytest.mark.parametrize("lacking", ["levels", "preprocess", "inversion"])
def test_a_manifest_that_lacks_something(tmp_path, lacking):
    manifest = {k: v for k, v in MANIFEST.items() if k != lacking}
    with pytest.raises(RunError, match=f"run.json lacks {lacking}"):
        list(verify(plan(tmp_path, [files("a")]), Manifest(manifest), Account()))


def test_a_manifest_of_other_types(tmp_path):
    with pytest.raises(RunError, match=r"run\.json is not what encode writes"):
        list(verify(plan(tmp_path, [files("a")]), Manifest({**MANIFEST, "preprocess": {}}), Account()))


CONFIGS = {  # what each kind's run.json has, besides the keys of MANIFEST
    "reconstruct": {"ladders": [[-1, 5]], "config": {"latents": "nowhere"}},
    "sweep": {},
    "generate": {"config": {"count": 5, "seed": 0}},
    "regenerate": {
        "ladders": [[-1, 5]],
        "config": {"latents": "nowhere", "variations": 1, "eta": 0, "sigma_hat": False, "seed": 0},
    },
    "interpolate": {"config": {"latents": "nowhere", "method": "slerp", "frames": 3}},
    "export": {"source": {"job": "generate"}, "source_config": {}, "config": {"run": "nowhere", "format": "png"}},
}


@pytest.mark.parametrize("job", CONFIGS)
@pytest.mark.parametrize("lacking", ["nothing", "a key", "settings"])
def test_a_manifest_of_each_kind_that_lacks_something(tmp_path, job, lacking):
    manifest = {**MANIFEST, "job": job, **CONFIGS[job]}
    run = plan(tmp_path, [files("a")])
    if lacking == "a key":
        manifest.pop(KINDS[job].manifest_keys[0])
        with pytest.raises(RunError, match=f"run.json lacks {KINDS[job].manifest_keys[0]}"):
            list(verify(run, Manifest(manifest), Account()))
    elif lacking == "settings" and job not in ("reconstruct", "sweep"):  # which need none
        with pytest.raises(RunError, match=rf"run\.json is not what {job} writes"):
            list(verify(run, Manifest({**manifest, "config": {}}), Account()))
    else:
        list(verify(run, Manifest(manifest), Account()))


def test_a_plan_of_samples(tmp_path):
    manifest = {**MANIFEST, "job": "generate", **CONFIGS["generate"]}
    pieces = list(ranges(5, 0, 2))
    shards = [Shard.of(SAMPLES, [piece]) for piece in pieces]
    assert said(plan(tmp_path, shards), manifest) == []
    assert said(plan(tmp_path, shards[:2]), manifest) == ["plan: has 4 images, and run.json asks for 5"]
    again = Shard.of(SAMPLES, [replace(pieces[2], start=3)])
    assert said(plan(tmp_path, [*shards[:2], again]), manifest)[-1] == "plan: 000000003 occurs 2 times"


def test_a_plan_of_paths(tmp_path):
    manifest = {**MANIFEST, "job": "interpolate", **CONFIGS["interpolate"]}
    places = [[At("a", "x"), At("b", "x"), At("c", "x")], [At("d", "x"), At("e", "x")]]
    first, second, third = path_pieces(places, 3)
    whole = Shard.of(PATHS, [first, second])
    [line] = said(plan(tmp_path, [whole, Shard.of(PATHS, [third])]), manifest)
    assert line.startswith("nowhere: can't be read")
    _, *wrong = said(plan(tmp_path, [whole, Shard.of(PATHS, [replace(second, start=3)])]), manifest)
    assert wrong == ["plan: 000000/000003 occurs 2 times", "plan: 000000/000004 occurs 2 times"]


def test_a_sweep_is_under_the_settings_that_were_begun(tmp_path):
    shards = [files("a"), files("b")]
    run = plan(tmp_path, shards)
    for name in (f"{shards[0].name}-{'a' * 12}", "stray", f"{'0' * 24}-{'b' * 12}"):
        run.put(f"sweep/{name}.parquet", b"")
    found = list(verify(run, Manifest({**MANIFEST, "job": "sweep"}), Account()))
    missing = {f"sweep/{shards[i].name}-{s * 12}.parquet" for i, s in ((1, "a"), (0, "b"), (1, "b"))}
    assert {f.where for f in found if "is missing" in f.what} == missing
    assert {f.where for f in found if "belongs to no shard" in f.what} == {
        "sweep/stray.parquet",
        f"sweep/{'0' * 24}-{'b' * 12}.parquet",
    }


def test_ids_are_those_that_are_read(sample, corpus, tmp_path):
    corpus.good_images(tmp_path, 5)
    for uri in (sample, tmp_path):
        collection = open_collection(str(uri))
        shard = Shard.of(collection.kind, list(list_pieces(collection, 100)))
        assert list(ids_of(shard)) == [raw.image_id for raw in read_raw(collection, shard)]
