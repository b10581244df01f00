"""palindrome calibrate, and --ladder with the file that it writes."""

import json
from pathlib import Path

BUNDLED = Path(__file__).parents[2] / "checkpoints/cifar10-32"


def test_a_calibrated_ladder_is_the_best_there_and_encode_takes_it(palindrome, sample, tmp_path, read_run):
    out = tmp_path / "ladders" / "five.json"
    flags = ["--steps", 5, "--corrections", 2, "--limit", 2]
    said = palindrome("calibrate", "--images", sample, "--model", BUNDLED, "--out", out, *flags)
    assert said.code == 0, said.err
    found = json.loads(out.read_text())
    assert found["nfe"] == [11, 5]
    assert found["images"] == 2
    assert found["round_trip"].keys() == {"linear", "quadratic", "logsnr", "fitted"}
    errors = {kind: figures["mean"] for kind, figures in found["round_trip"].items()}
    assert errors[found["kind"]] == min(errors.values()) < errors["quadratic"]
    flags = ["--ladder", out, "--corrections", 2, "--limit", 2, "--measure"]
    said = palindrome("encode", "--images", sample, "--model", BUNDLED, "--out", tmp_path / "run", *flags)
    assert said.code == 0, said.err
    rows = read_run(tmp_path / "run").rows
    mean = sum(row["mse"] for row in rows) / 2
    assert abs(mean / errors[found["kind"]] - 1) < 0.05
    assert json.loads((tmp_path / "run/run.json").read_text())["levels"] == found["levels"]
