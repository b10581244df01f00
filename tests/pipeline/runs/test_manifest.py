"""A run folder goes on with the command that began it, and refuses any other by the name of what differs."""

import json
import uuid

import pytest

from palindrome.pipeline.base.errors import ManifestError
from palindrome.pipeline.runs.manifest import claim, read_manifest
from palindrome.pipeline.storage.folder import TEMPORARY, Folder

CONFIG = {"images": "in", "shard_size": 100, "keep": ("label", "id"), "limit": None, "measure": False, "workers": 2}
MUTABLE = frozenset({"workers", "address"})
FACTS = {"model_digest": "abc123", "levels": [-1, 0, 50], "collection": {"kind": "files", "column": None}}


@pytest.fixture(params=["disk", "memory"])
def run(request, tmp_path):
    return Folder(str(tmp_path / "run") if request.param == "disk" else f"memory://{uuid.uuid4().hex}/run")


def begin(run, job="encode", facts=FACTS, mutable=MUTABLE, **changes):
    """Claims the folder and does a first piece of work in it."""
    resumed = claim(run, job, {**CONFIG, **changes}, mutable, facts)
    run.put("plan/complete.json", b"{}")
    return resumed


def refused(run, *args, **kwargs):
    before = run.read("run.json") if run.exists("run.json") else None
    with pytest.raises(ManifestError) as info:
        begin(run, *args, **kwargs)
    assert before == (run.read("run.json") if run.exists("run.json") else None)
    assert run.uri in str(info.value)
    return str(info.value)


def test_first_claim_writes_and_the_same_command_goes_on(run):
    assert begin(run) is False
    assert begin(run) is True
    assert begin(run) is True


def test_run_json_says_what_it_was_made_with(run):
    begin(run)
    content = json.loads(run.read("run.json"))
    assert content["job"] == "encode"
    assert content["config"] == {**CONFIG, "keep": ["label", "id"]}
    assert content["model_digest"] == "abc123"
    assert content["fields"].keys() == CONFIG.keys()
    assert content["fields"]["workers"] == "may change"
    assert content["fields"]["images"] == "must be the same to resume"
    assert {"torch", "pyarrow", "pillow"} <= content["versions"].keys()
    assert read_manifest(run).content == content


def test_folder_in_which_nothing_was_done_goes_to_the_next_command(run):
    claim(run, "encode", {**CONFIG, "images": "a wrong one"}, MUTABLE, FACTS)
    run.put("plan/000000.parquet", b"cut short")
    assert begin(run) is False
    assert read_manifest(run).config["images"] == "in"
    assert "--images was in" in refused(run, images="a wrong one")


def test_resume_writes_nothing(run):
    begin(run)
    before = run.read("run.json")
    begin(run, workers=7)
    assert run.read("run.json") == before


def test_free_fields_may_change(run):
    begin(run)
    assert begin(run, workers=16, address="ray://elsewhere")
    assert "--workers was 2, now 16" in refused(run, mutable=(), workers=16)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"images": "other"}, "--images was in, now other"),
        ({"shard_size": 10}, "--shard-size was 100, now 10"),
        ({"keep": ("label",)}, "--keep was ['label', 'id'], now ['label']"),
        ({"limit": 5}, "--limit was None, now 5"),
        ({"measure": True}, "--measure was False, now True"),
        ({"brand_new": 1}, "--brand-new was None, now 1"),
    ],
)
def test_other_flag_is_refused_by_name_with_both_values(run, change, words):
    begin(run)
    assert words in refused(run, **change)


def test_a_flag_that_is_new_was_its_default(run):
    begin(run)
    defaults = {"background": (255, 255, 255), "limit": 7}
    again = {**CONFIG, "background": (255, 255, 255)}
    before = run.read("run.json")
    assert claim(run, "encode", again, MUTABLE, FACTS, defaults) is True
    assert run.read("run.json") == before
    with pytest.raises(ManifestError, match=r"--background was \[255, 255, 255\], now \[0, 0, 0\]"):
        claim(run, "encode", {**again, "background": (0, 0, 0)}, MUTABLE, FACTS, defaults)
    with pytest.raises(ManifestError, match="--limit was None, now 7"):  # what is there counts
        claim(run, "encode", {**again, "limit": 7}, MUTABLE, FACTS, defaults)


def test_missing_flag_is_refused(run):
    begin(run, extra=3)
    assert "--extra was 3, now None" in refused(run)


def test_other_command_is_refused_by_name(run):
    begin(run)
    assert "encode, not generate" in refused(run, job="generate")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_digest": "def456"}, "model_digest was abc123, now def456"),
        ({"levels": [-1, 0]}, "levels was [-1, 0, 50], now [-1, 0]"),
        ({"collection": {"kind": "parquet", "column": None}}, "collection kind was files, now parquet"),
    ],
)
def test_other_fact_is_refused_by_name(run, change, words):
    begin(run)
    assert words in refused(run, facts={**FACTS, **change})


def test_new_fact_is_refused(run):
    begin(run)
    assert "vae_digest" in refused(run, facts={**FACTS, "vae_digest": "1"})


def test_foreign_folder_is_refused_and_left_alone(run):
    run.put("notes.txt", b"mine")
    assert "not empty" in refused(run)
    assert run.files("") == {"notes.txt": 4}


def test_folder_with_a_folder_in_it_is_foreign(run):
    run.put("latents/a.parquet", b"mine")
    assert "not empty" in refused(run)


def test_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    assert begin(Folder(str(tmp_path / "run"))) is False


def test_folder_of_a_run_killed_at_its_first_put_is_taken(tmp_path):
    (tmp_path / f"{TEMPORARY}0123-run.json").write_text('{"job":')
    assert begin(Folder(str(tmp_path))) is False
    assert begin(Folder(str(tmp_path))) is True


def test_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("a file")
    assert "is a file" in refused(Folder(str(tmp_path / "run")))
    assert (tmp_path / "run").read_text() == "a file"


@pytest.mark.parametrize(
    "content", [b"", b'{"job": "encode", ', b"\xff\xfe\x00", b"[]", b"3", b'{"job": "encode"}', b"{}"]
)
def test_broken_run_json_is_refused_and_left_alone(run, content):
    run.put("run.json", content)
    assert "run.json" in refused(run)


def test_no_manifest_is_none(run):
    assert read_manifest(run) is None
