"""Palindrome as it is installed, run where a user's own modules have the names of ours and of libraries."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("workers_as_started")
HOSTILE = ["model.py", "jobs.py", "infra.py", "api.py", "pipeline/__init__.py", "palindrome/pipeline/base/errors.py"]
LIBRARIES = ["torch.py", "numpy.py", "pyarrow.py", "queue.py"]


@pytest.fixture
def hostile(tmp_path):
    """A working directory in which every module raises."""
    for name in (*HOSTILE, *LIBRARIES):
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"raise ImportError('the user's own {name}')\n")
    return tmp_path / "project"


@pytest.mark.parametrize("where", [["--decode", "tasks", "--workers", "1"], ["--inline"]], ids=["ray", "inline"])
def test_a_command_imports_nothing_from_the_working_directory(where, hostile, pictures, model, tmp_path):
    command = [str(Path(sys.executable).with_name("palindrome")), "encode", "--images", str(pictures), "--limit", "4"]
    command += ["--model", str(model), "--steps", "2", "--out", "../run", *where]
    said = subprocess.run(command, cwd=hostile, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["latents"] == 4


def test_a_notebook_imports_ours_beside_a_user_s_model_py(hostile):
    for name in ("palindrome/pipeline/base/errors.py", *LIBRARIES):  # Python itself searches a notebook's folder first
        (hostile / name).unlink()
    for folder in ("palindrome/pipeline/base", "palindrome/pipeline", "palindrome"):
        (hostile / folder).rmdir()
    script = "import palindrome; print(palindrome.open.__module__, palindrome.Run.__name__)"
    said = subprocess.run([sys.executable, "-c", script], cwd=hostile, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["palindrome.notebook", "Run"]


def test_nothing_else_is_importable():
    """The distribution puts one name into site-packages."""
    script = "from importlib.metadata import distribution as d; print(d('palindrome').read_text('top_level.txt'))"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["palindrome"]
