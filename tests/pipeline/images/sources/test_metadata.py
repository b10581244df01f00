"""metadata.csv, .jsonl and .parquet beside pictures, as Hugging Face's image folders have them."""

import json

import polars as pl
import pytest

from palindrome.pipeline.base.errors import SourceError
from palindrome.pipeline.images.sources import FILES, listing, open_collection
from palindrome.pipeline.runs.plan import read_plan, write_plan
from palindrome.pipeline.storage.folder import Folder

WRITERS = {"csv": "write_csv", "jsonl": "write_ndjson", "parquet": "write_parquet"}


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("at_once", [1, 2, 1000])
def test_columns_of_metadata_come_along(at_once, ending, tmp_path, pngs, fill, rows, accounted, capsys, monkeypatch):
    monkeypatch.setattr(listing, "IN_MEMORY", at_once)
    pictures = {
        f"{name}.png": pngs[i] for i, name in enumerate(["train/b", "train/a", "train/sub/c", "test/a", "test/z"])
    }
    fill(tmp_path / "in", {**pictures, "notes.txt": b"no picture"})
    train = pl.DataFrame({"file_name": ["a.png", "sub/c.png", "gone.png"], "text": ["A", "C", "-"], "n": [1, 2, 3]})
    test = pl.DataFrame({"file_name": ["./a.png", "z.png"], "text": ["a", None]})
    getattr(train, WRITERS[ending])(tmp_path / "in" / "train" / f"metadata.{ending}")
    getattr(test, WRITERS[ending])(tmp_path / "in" / "test" / f"metadata.{ending}")
    found = {raw.image_id: (raw.data, raw.kept) for raw in rows(tmp_path / "in", 2, keep=["text", "n"])}
    nothing = "" if ending == "csv" else None  # of a column of texts
    kept = {
        "train/a.png": ("A", 1),
        "train/sub/c.png": ("C", 2),
        "test/a.png": ("a", None),
        "test/z.png": (nothing, None),
    }
    values = {name: kept.get(name, (None, None)) for name in [*pictures, "notes.txt"]}
    assert found == {
        name: (pictures.get(name, b"no picture"), {"text": text, "n": n}) for name, (text, n) in values.items()
    }
    assert "1 rows of metadata name pictures that are not there" in capsys.readouterr().err
    collection, run = open_collection(str(tmp_path / "in"), keep=["n"]), Folder(str(tmp_path / "run"))
    assert collection.kind == FILES
    write_plan(run, collection, 3)
    assert {raw.image_id: raw.kept["n"] for raw in accounted(collection, list(read_plan(run)))} == {
        name: n for name, (_, n) in values.items()
    }


def test_metadata_is_no_input_unless_it_names_no_pictures(tmp_path, pngs, fill, names, rows, capsys):
    fill(tmp_path, {"0.png": pngs[0], "metadata.jsonl": json.dumps({"file_name": "0.png", "text": "a"}).encode()})
    assert names(tmp_path) == ["0.png"]
    assert "files of metadata: 1" in capsys.readouterr().err
    (raw,) = rows(tmp_path, keep=["text"], extensions=["png"])
    assert raw.kept == {"text": "a"}
    fill(tmp_path, {"a/metadata.csv": b"camera,lens\nx,y\n", "a/metadata.jsonl": b"\xff"})
    assert names(tmp_path) == ["0.png", "a/metadata.csv", "a/metadata.jsonl"]


def test_what_is_not_there_is_refused(tmp_path, pngs, fill):
    fill(tmp_path, {"0.png": pngs[0]})
    for content, words in ((None, "metadata.csv"), (b"file_name,text\n0.png,a\n", "file_name, text")):
        if content:
            fill(tmp_path, {"metadata.csv": content})
        with pytest.raises(SourceError, match=words) as info:
            open_collection(str(tmp_path), keep=["label"])
        assert info.value.field == "keep"
