"""Ladders by name, list and file."""

import json

import pytest

from palindrome.model.ladder import default_top, ladder, logsnr_ladder
from palindrome.model.process import VP
from palindrome.pipeline.runs.ladders import DEFAULT_STEPS, ladder_of_kind, resolve

SCHEDULE = VP()


def test_a_kind_has_the_steps_asked_for():
    assert resolve("quadratic", 7, SCHEDULE) == ladder("quadratic", 7)
    assert resolve("linear", None, SCHEDULE) == ladder("linear", DEFAULT_STEPS)
    assert resolve("logsnr", 7, SCHEDULE) == logsnr_ladder(SCHEDULE, 7)
    assert ladder_of_kind("logsnr", 7, SCHEDULE, 500)[-1] == 500
    cosine = VP(beta_schedule="squaredcos_cap_v2")
    for kind in ("quadratic", "logsnr"):
        assert ladder_of_kind(kind, 7, cosine)[-1] == default_top(cosine, 7) > 950


def test_a_list_is_what_it_says():
    assert resolve("0,3,11,800", None, SCHEDULE) == (-1, 0, 3, 11, 800)
    assert resolve("5", 1, SCHEDULE) == (-1, 5)
    assert resolve("0.5,3,700.25", 3, SCHEDULE) == (-1, 0.5, 3, 700.25)  # between timesteps


def test_a_file_is_read(tmp_path):
    (tmp_path / "l.json").write_text(json.dumps({"levels": [-1, 0, 9], "kind": "fitted"}))
    assert resolve(f"{tmp_path}/l.json", None, SCHEDULE) == (-1, 0, 9)
    assert resolve(f"file://{tmp_path}/l.json", 2, SCHEDULE) == (-1, 0, 9)
    with pytest.raises(ValueError, match="has 2 steps, but --steps is 3"):
        resolve(f"{tmp_path}/l.json", 3, SCHEDULE)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"levels": 3}', '{"levels": [-1, -0.5]}', '{"levels": [-1, true]}', '{"levels": [0, 1]}'],
)
def test_a_file_that_holds_no_ladder_is_refused(tmp_path, content):
    (tmp_path / "l.json").write_text(content)
    with pytest.raises(ValueError, match="ladder"):
        resolve(str(tmp_path / "l.json"), None, SCHEDULE)


@pytest.mark.parametrize("named", ["cubic", "", "1,", "3,2", "0,1000", "-1,0,5", "1.5,1.5", "nan", "999.5"])
def test_what_names_no_ladder_is_refused(named):
    with pytest.raises(ValueError, match="not one of linear, quadratic, logsnr"):
        resolve(named, None, SCHEDULE)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        resolve(str(tmp_path / "none.json"), None, SCHEDULE)
