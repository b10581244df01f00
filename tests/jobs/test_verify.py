"""A run that is well, and the same run with one thing after another damaged by hand: each is named."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

GOOD, BAD = 40, 40
SHARD = b"palindrome.shard"


@pytest.fixture(scope="module")
def mixed(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    corpus.good_images(folder, GOOD)
    corpus.bad_images(folder)
    return folder


@pytest.fixture(scope="module")
def whole(palindrome, model, mixed, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    flags = ["--steps", 2, "--corrections", 0, "--ladder", "quadratic", "--shard-size", 16, "--measure"]
    assert palindrome("encode", "--images", mixed, "--model", model, "--out", run, *flags).code == 0
    return run


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def shard_file(run):
    """One that has latents and rejects."""
    return next(path for path in sorted((run / "latents").iterdir()) if (run / "rejects" / path.name).exists()
                and pq.read_metadata(path).num_rows > 3)  # fmt: skip


def rewrite(path, change=lambda table: table, footer=lambda counts: counts, **writer):
    """Writes the file again, with other rows or other counts."""
    with pq.ParquetFile(path) as file:
        table, said = change(file.read()), json.loads(file.metadata.metadata[SHARD])
    said["counts"] = footer(said["counts"])
    with pq.ParquetWriter(path, table.schema, compression="zstd", **writer) as out:
        out.write_table(table)
        out.add_key_value_metadata({SHARD: json.dumps(said)})


def with_column(table, name, values):
    i = table.schema.get_field_index(name)
    return table.set_column(i, table.schema.field(name), values)


def changed(name, row, value):
    """A change of one value of a column."""

    def change(table):
        values = table[name].to_pylist()
        values[row] = value
        return with_column(table, name, pa.array(values, table.schema.field(name).type))

    return change


def latent_with(value):
    def change(table):
        latents = table["latent"].combine_chunks().to_numpy_ndarray().copy()
        latents[1, 2, 3, 4] = value
        return with_column(table, "latent", pa.FixedShapeTensorArray.from_numpy_ndarray(latents))

    return change


def schema_says(**facts):
    def change(table):
        about = json.loads(table.schema.metadata[b"palindrome"]) | facts
        return table.replace_schema_metadata({b"palindrome": json.dumps(about)})

    return change


def image_id(path, row):
    return pq.read_table(path, columns=["image_id"])["image_id"][row].as_py()


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def test_a_whole_run_is_well(palindrome, whole, times):
    before = times(whole)
    said = palindrome("verify", whole)
    assert (said.code, said.err) == (0, "")
    assert said.out == f"5 shards, {GOOD} latents, {BAD} rejects: all well\n"
    assert times(whole) == before


def remove(path):
    path.unlink()
    (path.parent.parent / "rejects" / path.name).unlink()


# What is done to a shard's file -> what is said of it; {} stands for the file's name below the run folder.
DAMAGE = {
    "removed": (remove, "{}: is missing: the shard's 16 images are not done"),
    "empty": (lambda p: p.write_bytes(b""), "{}: can't be read: ArrowInvalid: "),
    "cut at its end": (lambda p: p.write_bytes(p.read_bytes()[:-20]), "{}: can't be read: ArrowInvalid: "),
    "cut at its beginning": (lambda p: p.write_bytes(p.read_bytes()[1000:]), "{}: can't be read: "),
    "text": (lambda p: p.write_text("no Parquet"), "{}: can't be read: "),
    "a bit of its data": (lambda p: (rewrite(p, write_page_checksum=True), flip(p, 9_000)), "{}: can't be read: "),
    "a latent short": (lambda p: rewrite(p, lambda t: t[1:]), "{}: lacks ID0: it is neither a latent nor a reject"),
    "a doubled row": (lambda p: rewrite(p, lambda t: pa.concat_tables([t, t[:1]])), "{}: ID0 is there 2 times"),
    "a foreign id": (lambda p: rewrite(p, changed("image_id", 0, "x\x1b[2Jy")), r"{}: x\x1b[2Jy is not in the plan"),
    "an id short": (lambda p: rewrite(p, changed("image_id", 0, "x")), "{}: lacks ID0: it is neither a latent nor"),
    "latents of NaN": (lambda p: rewrite(p, latent_with(np.nan)), "{}: ID1 has a latent that is not finite"),
    "infinite latents": (lambda p: rewrite(p, latent_with(-np.inf)), "{}: ID1 has a latent that is not finite"),
    "a count": (lambda p: rewrite(p, footer=lambda c: c | {"latents": 99}), "latents, and its footer says 99"),
    "a count of images": (lambda p: rewrite(p, footer=lambda c: c | {"images": 15}), "{}: is of 15 images by its"),
    "a count of rejects": (lambda p: rewrite(p, footer=lambda c: c | {"rejects": 0}), "rejects, and {} says 0"),
    "no footer of ours": (lambda p: pq.write_table(pq.read_table(p), p), "{}: can't be read: KeyError"),
    "a foreign digest": (lambda p: rewrite(p, schema_says(model_digest="ab" * 32)), "{}: says model_digest abab"),
    "other levels": (lambda p: rewrite(p, schema_says(levels=[-1, 7])), "{}: says levels [-1, 7], and run.json [-1,"),
    "other preprocessing": (lambda p: rewrite(p, schema_says(preprocess={})), "{}: says preprocess {{}}, and run.json"),
    "no metadata": (lambda p: rewrite(p, lambda t: t.replace_schema_metadata()), "{}: does not say its model_digest"),
    "no column": (lambda p: rewrite(p, lambda t: t.drop_columns(["nfe"])), "{}: has no column nfe"),
    "no ids": (lambda p: rewrite(p, lambda t: t.drop_columns(["image_id"])), "{}: has no column image_id"),
    "other types": (lambda p: rewrite(p, lambda t: t.set_column(t.schema.get_field_index("nfe"), "nfe",
                                                               t["nfe"].cast("int64"))), "column nfe is int64, not"),
    "an nfe": (lambda p: rewrite(p, changed("nfe", 0, 3)), "{}: ID0 has an nfe other than 2"),
    "no nfe": (lambda p: rewrite(p, changed("nfe", 0, None)), "{}: ID0 has an nfe below 2"),
    "a residual": (lambda p: rewrite(p, changed("residual", 0, 0.5)), "{}: ID0 has a residual, of an inversion that"),
    "no mse": (lambda p: rewrite(p, changed("mse", 0, None)), "{}: ID0 has an mse that is no number of 0 or more"),
    "a psnr": (lambda p: rewrite(p, changed("psnr", 0, 7.0)), "{}: ID0 has a psnr that is not that of its mse"),
    "a share": (lambda p: rewrite(p, changed("identical", 0, 1.5)), "{}: ID0 has an `identical` that is no share"),
    "a width": (lambda p: rewrite(p, changed("width", 0, 0)), "{}: ID0 has a width or height below 1"),
    "a hash": (lambda p: rewrite(p, changed("content_hash", 0, "beef")), "{}: ID0 has no sha256"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_shard_is_named(palindrome, run, what):
    damage, words = DAMAGE[what]
    path = shard_file(run)
    ids = [image_id(path, 0), image_id(path, 1)]
    damage(path)
    said = palindrome("verify", run)
    assert said.code == 1, said.out
    words = words.format(f"latents/{path.name}").replace("ID0", ids[0]).replace("ID1", ids[1])
    assert words in said.out
    assert re.search(r"\n5 shards, \d+ latents, \d+ rejects: (1 thing is|\d+ things are) wrong\n$", said.out)
    others = {line.split(":")[0] for line in said.out.splitlines()[:-1]}
    assert {Path(name).stem for name in others} == {path.stem}, "no other shard is blamed"


def change_rejects(run, what):
    path = run / "rejects" / shard_file(run).name
    table = pq.read_table(path)
    if what == "removed":
        path.unlink()
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    elif what == "short":
        pq.write_table(table[1:], path)
    elif what == "no reason":
        pq.write_table(changed("reason", 0, "ennui")(table), path)
    elif what == "other columns":
        pq.write_table(table.drop_columns(["detail"]), path)
    elif what == "a latent":
        pq.write_table(changed("image_id", 0, image_id(shard_file(run), 0))(table), path)
    return path


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("removed", "rejects/{0}: is missing: latents/{0} says that"),
        ("cut", "rejects/{0}: can't be read: ArrowInvalid"),
        ("short", "rejects, and latents/{0} says"),
        ("no reason", "is rejected as ennui, which is no reason"),
        ("other columns", "rejects/{0}: has columns"),
        ("a latent", "is there 2 times"),
    ],
)
def test_damaged_rejects_are_named(palindrome, run, what, words):
    path = change_rejects(run, what)
    said = palindrome("verify", run)
    assert said.code == 1
    assert words.format(path.name) in said.out
    assert {Path(line.split(":")[0]).stem for line in said.out.splitlines()[:-1]} == {path.stem}


def test_a_file_of_no_shard_is_wrong_and_others_are_warned_of(palindrome, run):
    shutil.copyfile(shard_file(run), run / "latents/stray.parquet")
    shutil.copyfile(next((run / "rejects").iterdir()), run / "rejects/lost.parquet")
    for name in (".tmp-1", "latents/.tmp-2", "latents/notes.txt"):
        (run / name).touch()
    (run / "rejects/folder.parquet").mkdir()
    said = palindrome("verify", run)
    assert said.code == 1
    assert said.out.splitlines()[:2] == [
        "latents/stray.parquet: is of no shard of the plan",
        "rejects/lost.parquet: is of no shard of the plan",
    ]
    assert said.err.count("warning: ") == 4
    assert "warning: latents/.tmp-2: is a temporary file" in said.err
    for name in ("latents/stray.parquet", "rejects/lost.parquet"):
        (run / name).unlink()
    assert palindrome("verify", run).code == 0, "warnings alone are no failure"


def test_a_hundred_are_named_and_the_rest_counted(palindrome, run):
    for i in range(150):
        (run / f"latents/stray-{i:03d}.parquet").touch()
    lines = palindrome("verify", run).out.splitlines()
    assert len(lines) == 102
    assert lines[-2:] == ["and 50 more", f"5 shards, {GOOD} latents, {BAD} rejects: 150 things are wrong"]


def test_damage_everywhere_and_it_lives(palindrome, run):
    """Every file in turn, flipped here and there."""
    generator = np.random.default_rng(0)
    for path in [p for below in ("plan", "latents", "rejects") for p in sorted((run / below).iterdir())]:
        before = path.read_bytes()
        for at in generator.integers(0, len(before), 3):
            flip(path, int(at))
        flip(path, len(before) - 1)
        said = palindrome("verify", run)
        assert said.code == 1 and said.err == ""
        assert f"{path.parent.name}/{path.name}: " in said.out
        path.write_bytes(before)


@pytest.mark.parametrize("rows", [False, True])
def test_deep_finds_the_stored_errors_again(palindrome, whole, sample, model, tmp_path, rows):
    run = whole
    if rows:
        run = tmp_path / "rows"
        flags = ["--steps", 2, "--corrections", 0, "--shard-size", 16, "--limit", 40, "--measure", "--keep", "label"]
        assert palindrome("encode", "--images", sample, "--model", model, "--out", run, *flags).code == 0
    said = palindrome("verify", run, "--deep", 10)
    assert (said.code, said.err) == (0, "")
    assert re.match(r"10 latents decoded, round-trip error: mean [\d.e+-]+, largest [\d.e+-]+\n", said.out)
    everything = palindrome("verify", run, "--deep", 1000).out
    errors = pa.concat_tables([pq.read_table(p, columns=["mse"]) for p in (run / "latents").iterdir()])["mse"]
    assert everything.startswith(f"40 latents decoded, round-trip error: mean {pc.mean(errors).as_py():.3g}")


def test_deep_sees_a_latent_that_is_another_image_s(palindrome, run):
    path = shard_file(run)

    def swap(table):
        latents = table["latent"].combine_chunks().to_numpy_ndarray().copy()
        return with_column(table, "latent", pa.FixedShapeTensorArray.from_numpy_ndarray(latents[::-1].copy()))

    first = image_id(path, 0)
    rewrite(path, swap)
    assert palindrome("verify", run).code == 0
    said = palindrome("verify", run, "--deep", 1000)
    assert said.code == 1
    assert re.search(rf"latents/{path.name}: {re.escape(first)}: round-trip error \S+, and \S+ is stored", said.out)


def test_deep_sees_an_original_that_changed_or_is_gone(palindrome, model, pngs, tmp_path):
    images, run = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    for i in range(4):
        (images / f"{i}.png").write_bytes(pngs[i])
    command = ["encode", "--images", images, "--model", model, "--out", run, "--steps", 2, "--corrections", 0]
    assert palindrome(*command).code == 0
    (images / "1.png").write_bytes(pngs[9])
    (images / "2.png").unlink()
    said = palindrome("verify", run, "--deep", 4)
    assert said.code == 1
    assert "1.png: its original is not what was encoded: content_hash differs" in said.out
    assert "2.png: its original can't be read again: missing: no such file" in said.out
    assert "2 latents decoded" in said.out


def test_deep_with_a_model_that_is_gone_or_another(palindrome, run, tiny, tmp_path):
    from palindrome.model import checkpoint

    manifest = json.loads((run / "run.json").read_text())
    weights = {name: value * 2 for name, value in tiny.weights.items()}
    checkpoint.save(checkpoint.Checkpoint(tiny.config, weights, tiny.schedule), str(tmp_path / "other"))
    for place, words in {"none": "can't be loaded", "other": "is another than the run's"}.items():
        manifest["config"]["model"] = str(tmp_path / place)
        (run / "run.json").write_text(json.dumps(manifest))
        said = palindrome("verify", run, "--deep", 1)
        assert said.code == 1
        assert f"--deep: the model {tmp_path / place} {words}" in said.out


def test_a_run_that_is_corrected_and_of_half_precision(palindrome, model, pictures, tmp_path):
    command = ["encode", "--images", pictures, "--model", model, "--steps", 2, "--dtype", "float16", "--limit", 4]
    for name, flags in {"fixed": [], "tolerance": ["--tolerance", "1e-2"], "exact": ["--tolerance", "exact"]}.items():
        assert palindrome(*command, "--out", tmp_path / name, "--corrections", 2, *flags).code == 0
        said = palindrome("verify", tmp_path / name, "--deep", 2)
        assert said.code == 0, said.out
    path = next((tmp_path / "fixed/latents").iterdir())
    rewrite(path, changed("residual", 0, None))
    assert "000.png has a residual that is no number" in palindrome("verify", tmp_path / "fixed").out


def test_a_reconstruction(palindrome, run, tmp_path):
    out = tmp_path / "reconstruction"
    assert palindrome("reconstruct", "--latents", run, "--out", out, "--steps", 1, 2).code == 0
    said = palindrome("verify", out)
    assert (said.code, said.out) == (0, f"5 shards, {GOOD} latents, 0 rejects: all well\n")
    assert palindrome("verify", out, "--deep", 1).code == 2
    first, second, third, *_ = sorted(p for p in (out / "reconstructions").iterdir() if pq.read_metadata(p).num_rows)
    rewrite(first, lambda t: t[1:])
    second.write_bytes(second.read_bytes()[:100])
    third.unlink()
    shutil.copyfile(first, first.with_name("stray.parquet"))
    said = palindrome("verify", out)
    assert said.code == 1
    assert re.search(rf"reconstructions/{first.name}: has \d+ rows at \d steps, and its footer says", said.out)
    assert re.search(rf"reconstructions/{first.name}: has other ids at \d steps than its latents", said.out)
    assert f"reconstructions/{second.name}: can't be read" in said.out
    assert f"reconstructions/{third.name}: is missing" in said.out
    assert "reconstructions/stray.parquet: is of no shard of" in said.out


def test_what_is_no_run(palindrome, tmp_path):
    said = palindrome("verify", tmp_path)
    assert (said.code, said.out) == (1, "")
    assert said.err == f"palindrome verify: {tmp_path} is no run folder (it has no run.json)\n"
