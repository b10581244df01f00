"""Damaged files through the command line: all are accounted for, and the good ones beside them are encoded."""

import json
from pathlib import Path

import pyarrow.parquet as pq


def test_encode_accounts_for_every_damaged_file(palindrome, model, read_run, corpus, tmp_path):
    images, run = tmp_path / "images", tmp_path / "run"
    good = {f"good/{name}" for name in corpus.good_images(images / "good", 20)}
    bad = dict(corpus.fuzzed(280, seed=5))
    hostile = {name: data for name, data in corpus.hostile().items() if len(data) < 2000}
    for name, data in (bad | hostile).items():
        (images / name).write_bytes(data)
    odd = corpus.odd_names(images, corpus.sample_pngs()[0])
    said = palindrome(
        *("encode", "--images", images, "--model", model, "--out", run, "--corrections", 0, "--steps", 1),
        *("--shard-size", 64, "--max-pixels", 4_000_000),
    )
    assert said.code == 0, said.err
    encoded = read_run(run).ids
    rejected = [row["image_id"] for f in Path(run, "rejects").glob("*.parquet") for row in pq.read_table(f).to_pylist()]
    assert len(encoded) + len(rejected) == len({*encoded, *rejected}) == len(good) + len(bad) + len(hostile) + odd
    assert good | bad.keys() | hostile.keys() <= {*encoded, *rejected}
    assert good <= set(encoded)
    assert json.loads((run / "summary.json").read_text())["rejects"] == len(rejected)
