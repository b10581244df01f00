"""Models by the names that people give them: folders here, and repositories of the Hugging Face hub, as its library
keeps them in its cache."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from palindrome.model.families import CheckpointError
from palindrome.pipeline.runs.models import locate

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(model, tmp_path):
    """A cache with one repository, in the layout of huggingface_hub, and the environment of a process without a net."""
    repository = tmp_path / "hub/models--someone--tiny"
    shutil.copytree(model, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(REVISION)
    return {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}


def in_process(hub, *names):
    """What `load_model` finds, in a process of its own: the library reads its environment when it is imported."""
    code = (
        "import json, sys\n"
        "from palindrome.pipeline.runs.models import load_model\n"
        "found = []\n"
        "for name in sys.argv[1:]:\n"
        "    try: uri, model = load_model(name); found.append([uri, model.digest])\n"
        "    except ValueError as e: found.append(str(e))\n"
        "print(json.dumps(found))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, *names], env={**os.environ, **hub}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_a_repository_of_the_hub_is_found_in_its_cache(hub, tiny, tmp_path):
    named, at, other = in_process(hub, "someone/tiny", f"someone/tiny@{REVISION}", "someone/else")
    assert named == at
    assert named[0].endswith(f"snapshots/{REVISION}") and named[1] == tiny.digest
    assert other.startswith("someone/else is no folder, and can't be had from the Hugging Face hub")


def test_a_folder_of_that_name_comes_first(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / "someone/tiny")
    assert locate("someone/tiny") == str(tmp_path / "someone/tiny")


@pytest.mark.parametrize("name", ["model", "./model", "s3://bucket/model", "/somewhere/model", "a/b/c"])
def test_what_is_no_name_of_the_hub_is_a_path(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    try:
        assert "model" in locate(name) or name == "a/b/c"
    except CheckpointError:
        pytest.fail("the hub was asked")
