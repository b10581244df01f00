"""Models written as folders: the same model, with which runs go on."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from palindrome.model import families

FIXTURES = Path(__file__).parents[1] / "fixtures"
MADE = runpy.run_path(str(FIXTURES / "make_openai_fixtures.py"))
CASES = json.loads((FIXTURES / "openai" / "cases.json").read_text())


@pytest.fixture(params=["scale_shift", "improved"])
def file(request, tmp_path):
    """A .pt file as OpenAI's, and its flags beside it; the second is none that diffusers can express."""
    case = CASES[request.param]
    torch.save(MADE["weights_for"](case["shapes"], case["seed"]), tmp_path / "model.pt")
    (tmp_path / "model.json").write_text(json.dumps({"use_new_attention_order": False, **case["flags"]}))
    return tmp_path / "model.pt"


def test_a_run_goes_on_with_the_folder(file, pictures, palindrome, tmp_path, times):
    flags = ["--steps", 2, "--corrections", 1, "--limit", 4, "--out", tmp_path / "run"]
    said = palindrome("encode", "--images", pictures, "--model", file, *flags, "--allow-pickle")
    assert said.code == 0, said.err
    said = palindrome("convert", "--model", file, "--out", tmp_path / "folder")
    assert said.code == 2 and "--allow-pickle" in said.err
    dry = palindrome("convert", "--model", file, "--out", tmp_path / "folder", "--allow-pickle", "--dry-run")
    assert dry.code == 0 and not (tmp_path / "folder").exists()
    said = palindrome("convert", "--model", file, "--out", tmp_path / "folder", "--allow-pickle")
    assert said.code == 0, said.err
    assert dry.out == f"{said.out}dry run: nothing was done\n"
    model = families.load(str(file), allow_pickle=True)
    assert f"digest {model.digest[:16]}" in said.out
    assert ("diffusers can't open it" in said.out) == bool(model.config.beyond_diffusers)
    assert families.load(str(tmp_path / "folder")).digest == model.digest
    assert not list((tmp_path / "folder").rglob("*.pt"))

    before = times(tmp_path / "folder")
    again = palindrome("convert", "--model", file, "--out", tmp_path / "folder", "--allow-pickle")
    assert (again.code, again.out) == (0, said.out)
    assert times(tmp_path / "folder") == before
    flags = ["--model", tmp_path / "folder", "--latents", tmp_path / "run", "--out", tmp_path / "out"]
    assert palindrome("reconstruct", *flags).code == 0


def test_a_folder_with_something_else_is_left_alone(file, model, palindrome, tmp_path, times):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    for folder in (model, tmp_path / "mine"):
        before = times(folder)
        said = palindrome("convert", "--model", file, "--out", folder, "--allow-pickle")
        assert said.code == 2 and f"--out: {folder} is not empty, and is not this model" in said.err
        assert times(folder) == before


def test_a_killed_command_is_repeated(file, palindrome, tmp_path):
    """The index is written last: without it there is no model, and the files are written again."""
    flags = ["--model", file, "--out", tmp_path / "folder", "--allow-pickle"]
    assert palindrome("convert", *flags).code == 0
    (tmp_path / "folder/model_index.json").unlink()
    [weights] = (tmp_path / "folder/unet").glob("*.safetensors")
    weights.write_bytes(b"half")
    assert palindrome("convert", *flags).code == 0
    assert families.load(str(tmp_path / "folder")).digest == families.load(str(file), allow_pickle=True).digest
