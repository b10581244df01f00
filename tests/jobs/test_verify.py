"""A run of each kind that is well, and the same run with one thing after another damaged by hand: each is named."""

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from palindrome.pipeline.runs.kinds import INDEX, KINDS, VERIFIED

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


def latent_with(value, name="latent"):
    def change(table):
        latents = table[name].combine_chunks().to_numpy_ndarray().copy()
        latents[(1, 2, 3, 4)[: latents.ndim]] = value
        return with_column(table, name, pa.FixedShapeTensorArray.from_numpy_ndarray(latents))

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
    "a doubled row": (lambda p: rewrite(p, lambda t: pa.concat_tables([t, t[:1]])), "{}: ID0 occurs 2 times"),
    "a foreign id": (lambda p: rewrite(p, changed("image_id", 0, "x\x1b[2Jy")), r"{}: x\x1b[2Jy is not in the plan"),
    "an id short": (lambda p: rewrite(p, changed("image_id", 0, "x")), "{}: lacks ID0: it is neither a latent nor"),
    "latents of NaN": (lambda p: rewrite(p, latent_with(np.nan)), "{}: ID1 has a latent that is not finite"),
    "infinite latents": (lambda p: rewrite(p, latent_with(-np.inf)), "{}: ID1 has a latent that is not finite"),
    "a count": (lambda p: rewrite(p, footer=lambda c: c | {"latents": 99}), "latents, and its footer says 99"),
    "a count of images": (lambda p: rewrite(p, footer=lambda c: c | {"images": 15}), "has 15 images according to"),
    "a count of rejects": (lambda p: rewrite(p, footer=lambda c: c | {"rejects": 0}), "rejects, and {} says 0"),
    "no footer of ours": (lambda p: pq.write_table(pq.read_table(p), p), "{}: can't be read: KeyError"),
    "a foreign digest": (lambda p: rewrite(p, schema_says(model_digest="ab" * 32)), "{}: says model_digest abab"),
    "other levels": (lambda p: rewrite(p, schema_says(levels=[-1, 7])), "{}: says levels [-1, 7], and run.json [-1,"),
    "other preprocessing": (lambda p: rewrite(p, schema_says(preprocess={})), "{}: says preprocess {{}}, and run.json"),
    "no metadata": (lambda p: rewrite(p, lambda t: t.replace_schema_metadata()), "{}: has no model_digest in"),
    "no column": (lambda p: rewrite(p, lambda t: t.drop_columns(["nfe"])), "{}: has no column nfe"),
    "no ids": (lambda p: rewrite(p, lambda t: t.drop_columns(["image_id"])), "{}: has no column image_id"),
    "other types": (lambda p: rewrite(p, lambda t: t.set_column(t.schema.get_field_index("nfe"), "nfe",
                                                               t["nfe"].cast("int64"))), "column nfe is int64, not"),
    "an nfe": (lambda p: rewrite(p, changed("nfe", 0, 3)), "{}: ID0 has an nfe other than 2"),
    "no nfe": (lambda p: rewrite(p, changed("nfe", 0, None)), "{}: ID0 has an nfe below 2"),
    "a residual": (lambda p: rewrite(p, changed("residual", 0, 0.5)), "{}: ID0 has a residual, though"),
    "no mse": (lambda p: rewrite(p, changed("mse", 0, None)), "{}: ID0 has an mse that is not a number of 0 or more"),
    "a psnr": (lambda p: rewrite(p, changed("psnr", 0, 7.0)), "{}: ID0 has a psnr that does not match its mse"),
    "a share": (lambda p: rewrite(p, changed("identical", 0, 1.5)), "{}: ID0 has an `identical` outside of 0 to 1"),
    "a width": (lambda p: rewrite(p, changed("width", 0, 0)), "{}: ID0 has a width or height below 1"),
    "a hash": (lambda p: rewrite(p, changed("content_hash", 0, "beef")), "{}: ID0 has a content_hash that is"),
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
        ("no reason", "is rejected as ennui, which is not a reason"),
        ("other columns", "rejects/{0}: has columns"),
        ("a latent", "occurs 2 times"),
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
        "latents/stray.parquet: belongs to no shard of the plan",
        "rejects/lost.parquet: belongs to no shard of the plan",
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
    assert "1.png: its original has changed: content_hash differs" in said.out
    assert "2.png: its original can't be read again: missing: no such file" in said.out
    assert "2 latents decoded" in said.out


def test_deep_with_a_model_that_is_gone_or_another(palindrome, run, tiny, tmp_path):
    from palindrome.model.families import unet2d

    manifest = json.loads((run / "run.json").read_text())
    weights = {name: value * 2 for name, value in tiny.weights.items()}
    unet2d.save(unet2d.UNet2D(tiny.config, weights, tiny.process), str(tmp_path / "other"))
    for place, words in {"none": "can't be loaded", "other": "is not the run's"}.items():
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
    assert "000.png has a residual that is not a number" in palindrome("verify", tmp_path / "fixed").out


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
    assert "reconstructions/stray.parquet: belongs to no shard of" in said.out


@pytest.fixture(scope="module")
def made(palindrome, model, mixed, whole, read_run, scripted, tmp_path_factory):
    """One run of each kind that is sharded, by the name of the job."""
    folder = tmp_path_factory.mktemp("made")
    ids = read_run(whole).ids
    (folder / "ids.txt").write_text("\n".join(ids[: GOOD // 2]))
    masks = folder / "masks"
    masks.mkdir()
    half = PIL.Image.fromarray(np.repeat(np.uint8([[0, 255]]), 16, 0).repeat(8, 1))
    for image_id in ids[1 : GOOD // 2]:  # the first one has none
        path = masks / (image_id if image_id.endswith(".png") else f"{image_id}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        half.save(path)
    (folder / "pairs.csv").write_text(f"{ids[0]},{ids[1]}\n{ids[2]},{ids[3]}\n{ids[4]},none\n{ids[5]},{ids[6]}\n")
    commands = {
        "reconstruct": ["--latents", whole, "--steps", 1, 2],
        "sweep": ["--images", mixed, "--model", model, "--steps", 1, 2, "--corrections", 0, "--shard-size", 32],
        "score": ["--images", mixed, "--model", model, "--method", "invad", "--steps", 1, "--shard-size", 32],
        "restore": [
            *("--images", mixed, "--model", model, "--task", "upscale", "--factor", 2),
            *("--steps", 1, "--shard-size", 32),
        ],
        "generate": ["--model", model, "--count", 20, "--steps", 1, "--shard-size", 8, "--latents", "float16"],
        "regenerate": [
            "--latents",
            whole,
            "--steps",
            1,
            2,
            "--eta",
            0.5,
            "--variations",
            2,
            "--ids",
            folder / "ids.txt",
        ],
        "edit": [
            *("--latents", whole, "--towards", ids[0], "--strength", 0.3, 0.6, "--mask", f"file:{masks}"),
            *("--ids", folder / "ids.txt"),
        ],
        "interpolate": ["--latents", whole, "--pairs", folder / "pairs.csv", "--frames", 5, "--shard-size", 10],
        "evaluate": [
            *("--real", mixed, "--generated", folder / "generate", "--features", "tiny", "--input-size", 32),
            *("--weights", scripted, "--store-features", "--shard-size", 32),
        ],
    }
    for job, flags in commands.items():
        said = palindrome(job, *flags, "--out", folder / job)
        assert said.code == 0, said.err
    return folder


WELL = {
    "reconstruct": f"5 shards, {GOOD} latents, 0 rejects: all well\n",
    "sweep": f"6 shards, {2 * GOOD} images, {2 * BAD} rejects: all well\n",
    "score": f"3 shards, {GOOD} images, {BAD} rejects: all well\n",
    "restore": f"3 shards, {GOOD} images, {BAD} rejects: all well\n",
    "generate": "3 shards, 20 images, 0 rejects: all well\n",
    "regenerate": f"5 shards, {GOOD // 2} latents, 0 rejects: all well\n",
    "edit": f"5 shards, {GOOD // 2 - 1} latents, 1 rejects: all well\n",
    "interpolate": "2 shards, 15 frames, 1 rejects: all well\n",
    "evaluate": f"4 shards, {GOOD + 20} images, {BAD} rejects: all well\n",
}


def test_every_kind_that_verify_takes_is_tested():
    assert {"encode", "export", *WELL} == set(VERIFIED)


def with_rows(run, job):
    """The file of a shard that has most rows, and its folder and name."""
    files = (run / KINDS[job].folder).iterdir()
    return max(sorted(files), key=lambda path: pq.read_metadata(path).num_rows)


def flip_in_a_page(path):
    """Right before the end of the largest column."""
    group = pq.read_metadata(path).row_group(0)
    column = max((group.column(i) for i in range(group.num_columns)), key=lambda c: c.total_compressed_size)
    flip(path, (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 5)


def count_is(value):
    return lambda counts: dict.fromkeys(counts, value)


def picture(content):
    def change(table):
        images = table["image"].to_pylist()
        images[0] = {**images[0], "bytes": content}
        return with_column(table, "image", pa.array(images, table.schema.field("image").type))

    return change


def png_of(*size):
    content = io.BytesIO()
    PIL.Image.new("RGB", size).save(content, "PNG")
    return content.getvalue()


# What is done to a shard's file of each kind -> what is said of it; {} stands for the file's name below the run folder.
DAMAGE_OF_ALL = {
    "removed": (Path.unlink, "^{}: is missing"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-20]), "^{}: can't be read: ArrowInvalid: "),
    "a bit of a page": (flip_in_a_page, "^{}: can't be read: .*CRC"),
    "a row twice": (lambda p: rewrite(p, lambda t: pa.concat_tables([t, t[:1]])), "^{}: .*(2 times|other ids)"),
    "a row short": (lambda p: rewrite(p, lambda t: t[1:]), "^{}: (lacks .*: |has other ids at)"),
    "a foreign id": (lambda p: rewrite(p, changed("image_id", 0, "x")), "^{}: (x is not in|has other ids at)"),
    "counts": (lambda p: rewrite(p, footer=count_is(99)), "^{}: has .* and its footer says 99"),
    "a foreign digest": (lambda p: rewrite(p, schema_says(model_digest="ab" * 32)), "^{}: says model_digest abab"),
    "no column": (lambda p: rewrite(p, lambda t: t.drop_columns([t.schema.names[1]])), "^{}: has no column "),
}  # fmt: skip
DAMAGE_OF_PICTURES = {
    "no picture": (lambda p: rewrite(p, picture(b"")), "^{}: .* has no image$"),
    "a picture that breaks off": (lambda p: rewrite(p, picture(png_of(16, 16)[:-20])), "^{}: .* not a whole PNG"),
    "a picture of another size": (lambda p: rewrite(p, picture(png_of(8, 8))), "^{}: .* pixels and 3 channels, not "),
}
DAMAGE_OF_ONE = [
    ("sweep", lambda p: rewrite(p, schema_says(setting={})), "^{}: has a setting that does not match"),
    ("sweep", lambda p: rewrite(p, changed("nfe", 0, 0)), "^{}: .* has an nfe below 1"),
    ("generate", lambda p: rewrite(p, changed("index", 0, 19)), "^{}: 00000000. has the index of another sample"),
    ("generate", lambda p: rewrite(p, schema_says(seed=7)), "^{}: says seed 7, and run.json 0"),
    ("regenerate", lambda p: rewrite(p, changed("variation", 0, 2)), "^{}: has rows at . steps in variation 2"),
    ("regenerate", lambda p: rewrite(p, schema_says(eta=1)), "^{}: says eta 1, and run.json 0.5"),
    ("edit", lambda p: rewrite(p, changed("strength", 0, 0.9)), "^{}: has rows at strength 0.9, which the run does"),
    ("edit", lambda p: rewrite(p, changed("changed_outside", 0, -1)), "^{}: .* has a changed_outside that is not from"),
    ("edit", lambda p: rewrite(p, changed("change", 0, None)), "^{}: .* has a change that does not match its status"),
    ("edit", lambda p: rewrite(p, changed("status", 0, "lost")), "^{}: .* has a status that is none"),
    ("edit", lambda p: rewrite(p, changed("mask_hash", 0, "x")), "^{}: .* has a mask_hash that is not a sha256"),
    ("interpolate", lambda p: rewrite(p, changed("frame", 0, 3)), "^{}: .* has the path or the frame of another"),
    ("evaluate", lambda p: rewrite(p, changed("entropy", 0, 2.4)), "^{}: .* has an entropy that no such network has"),
    ("evaluate", lambda p: rewrite(p, latent_with(np.nan, "features")), "^{}: .* features that are not finite"),
    ("evaluate", lambda p: (p.parents[1] / f"moments/{p.stem}.npz").unlink(), "^{}: its moments can't be read: FileN"),
]  # fmt: skip


@pytest.mark.parametrize("job", WELL)
def test_a_run_of_each_kind_is_well(palindrome, made, times, job):
    before = times(made / job)
    said = palindrome("verify", made / job)
    assert (said.code, said.out, said.err) == (0, WELL[job], "")
    assert times(made / job) == before


def check_damage(palindrome, run, job, damage, words):
    path = with_rows(run, job)
    damage(path)
    said = palindrome("verify", run)
    assert said.code == 1, said.out
    file = re.escape(f"{KINDS[job].folder}/{path.name}")
    assert re.search(words.replace("{}", file), said.out, re.M), said.out
    others = {line.split(":")[0] for line in said.out.splitlines()[:-1]}
    assert {Path(name).stem for name in others} == {path.stem}, "no other shard is blamed"


@pytest.mark.parametrize("what", DAMAGE_OF_ALL)
@pytest.mark.parametrize("job", WELL)
def test_a_damaged_shard_of_each_kind_is_named(palindrome, made, tmp_path, job, what):
    check_damage(palindrome, shutil.copytree(made / job, tmp_path / "run"), job, *DAMAGE_OF_ALL[what])


@pytest.mark.parametrize("what", DAMAGE_OF_PICTURES)
@pytest.mark.parametrize("job", [job for job in WELL if KINDS[job].pictures])
def test_a_picture_that_is_none_is_named(palindrome, made, tmp_path, job, what):
    check_damage(palindrome, shutil.copytree(made / job, tmp_path / "run"), job, *DAMAGE_OF_PICTURES[what])


@pytest.mark.parametrize(("job", "damage", "words"), DAMAGE_OF_ONE)
def test_what_one_kind_alone_has_is_checked(palindrome, made, tmp_path, job, damage, words):
    check_damage(palindrome, shutil.copytree(made / job, tmp_path / "run"), job, damage, words)


@pytest.mark.parametrize("job", WELL)
def test_orphans_and_temporary_files_of_each_kind_are_named(palindrome, made, tmp_path, job):
    run = shutil.copytree(made / job, tmp_path / "run")
    path = with_rows(run, job)
    shutil.copyfile(path, path.with_name("stray.parquet"))
    path.with_name(".tmp-1").touch()
    said = palindrome("verify", run)
    assert said.code == 1
    assert re.match(rf"{KINDS[job].folder}/stray.parquet: belongs to no shard of ", said.out)
    assert said.err == (f"warning: {KINDS[job].folder}/.tmp-1: is a temporary file of an active or killed writer\n")


def test_a_way_that_is_neither_made_nor_rejected(palindrome, made, tmp_path):
    run = shutil.copytree(made / "interpolate", tmp_path / "run")
    [rejects] = (run / "rejects").iterdir()
    rejects.unlink()
    rewrite(run / "images" / rejects.name, footer=lambda counts: counts | {"rejects": 0})
    said = palindrome("verify", run)
    assert said.code == 1
    assert re.search(r"lacks 000002/000000: there is neither the frame nor a reject", said.out), said.out


def test_rejects_of_a_sweep_that_are_gone(palindrome, made, tmp_path):
    run = shutil.copytree(made / "sweep", tmp_path / "run")
    rejects = min((run / "rejects").iterdir())
    rejects.unlink()
    said = palindrome("verify", run)
    assert said.code == 1 and said.out.startswith(f"rejects/{rejects.name}: is missing: sweep/{rejects.name} says that")


@pytest.mark.parametrize("job", ["reconstruct", "regenerate", "interpolate"])
def test_a_run_whose_latents_are_out_of_reach_is_checked_alone(palindrome, made, tmp_path, job):
    run = shutil.copytree(made / job, tmp_path / "run")
    manifest = json.loads((run / "run.json").read_text())
    manifest["config"]["latents"] = str(tmp_path / "gone")
    (run / "run.json").write_text(json.dumps(manifest))
    said = palindrome("verify", run)
    assert (said.code, said.out) == (0, WELL[job])
    assert said.err.startswith(f"warning: {tmp_path}/gone: can't be read, so the run is checked without it")
    assert said.err.count("\n") == 1
    path = with_rows(run, job)
    flip_in_a_page(path)
    assert f"images/{path.name}: can't be read" in palindrome("verify", run).out.replace("reconstructions", "images")


def test_latents_of_another_model_and_ids_that_are_others(palindrome, made, tmp_path):
    run = shutil.copytree(made / "regenerate", tmp_path / "run")
    manifest = json.loads((run / "run.json").read_text())
    (tmp_path / "ids.txt").write_text("other\n")
    manifest["config"]["ids"] = str(tmp_path / "ids.txt")
    (run / "run.json").write_text(json.dumps(manifest))
    said = palindrome("verify", run)
    assert said.code == 0 and "warning: " in said.err and "has other ids than when the run was made" in said.err
    path = with_rows(run, "regenerate")
    rewrite(path, changed("image_id", 0, "x"))
    assert re.search(
        rf"images/{path.name}: has other ids at . steps in variation . than its latents", palindrome("verify", run).out
    )
    (run / "run.json").write_text(json.dumps({**manifest, "model_digest": "ab" * 32}))
    assert "run.json: names another model than the latents in " in palindrome("verify", run).out


FORMATS = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}


@pytest.fixture(scope="module")
def exports(palindrome, made, tmp_path_factory):
    """An export in each format."""
    folder = tmp_path_factory.mktemp("exports")
    for form in (*FORMATS, "webdataset", "parquet"):
        said = palindrome("export", made / "regenerate", "--out", folder / form, "--format", form)
        assert said.code == 0, said.err
    return folder


@pytest.mark.parametrize("form", [*FORMATS, "webdataset", "parquet"])
def test_an_export_is_well(palindrome, exports, form):
    said = palindrome("verify", exports / form)
    assert (said.code, said.err) == (0, "")
    assert said.out == f"5 shards, {2 * GOOD} images, 0 rejects: all well\n"


def test_an_export_of_some_steps_is_well(palindrome, made, tmp_path):
    command = ["export", made / "regenerate", "--out", tmp_path / "one", "--format", "png", "--steps", 2]
    assert palindrome(*command).code == 0
    assert palindrome("verify", tmp_path / "one").out == f"5 shards, {GOOD} images, 0 rejects: all well\n"


def a_picture(run):
    return min(path for path in (run / "images").rglob("*.*") if path.suffix in FORMATS.values())


def largest(run, below):
    return max(sorted((run / below).iterdir()), key=lambda path: path.stat().st_size)


def cut(path, at):
    path.write_bytes(path.read_bytes()[:at])


def broken_in_tar(path):
    """A byte of the first picture, past its header."""
    with tarfile.open(path) as tar:
        at = tar.getmembers()[0].offset_data + 60
    flip(path, at)


def again_in_index(run):
    path = largest(run, INDEX)
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table[:1]]), path)
    return path


# What is done to an export, in which format -> the file that is named, and what is said of it.
DAMAGE_OF_EXPORTS = {
    "a picture removed": ("png", a_picture, Path.unlink, "is missing"),
    "a picture cut": ("webp", a_picture, lambda p: cut(p, -20), "that is not a whole WEBP"),
    "a picture of text": ("jpeg", a_picture, lambda p: p.write_text("text"), "has an image that is not a whole JPEG"),
    "a bit of a picture": ("png", a_picture, lambda p: flip(p, 60), "has an image that is not a whole PNG"),
    "a picture of another size": ("png", a_picture, lambda p: p.write_bytes(png_of(8, 8)), "and 3 channels, not "),
    "an index removed": ("png", lambda r: largest(r, INDEX), Path.unlink, "is missing: the shard is not exported"),
    "an index damaged": ("jpeg", lambda r: largest(r, INDEX), flip_in_a_page, "can't be read"),
    "a row twice": ("png", again_in_index, lambda p: None, "occurs 2 times"),
    "a picture too many": ("png", lambda r: r / "images/more.png", Path.touch, "is in no shard's index"),
    "the whole index removed": ("png", lambda r: r / "images/metadata.parquet", Path.unlink, "is missing"),
    "a tar removed": ("webdataset", lambda r: largest(r, "data"), Path.unlink, "is missing: the shard is not exported"),
    "a tar cut": ("webdataset", lambda r: largest(r, "data"), lambda p: cut(p, 9_000), "can't be read"),
    "a bit of a tar": ("webdataset", lambda r: largest(r, "data"), broken_in_tar, "png has an image that is no"),
    "a tar's index removed": ("webdataset", lambda r: largest(r, INDEX), Path.unlink, "can't be read: FileNotFound"),
    "a table cut": ("parquet", lambda r: largest(r, "data"), lambda p: cut(p, -9), "can't be read"),
    "a bit of a table": ("parquet", lambda r: largest(r, "data"), flip_in_a_page, "can't be read"),
    "a row short": ("parquet", lambda r: largest(r, "data"),
                    lambda p: pq.write_table(pq.read_table(p)[1:], p), "has other images than "),
    "a table too many": ("parquet", lambda r: r / "data/stray.parquet", Path.touch, "belongs to no shard of "),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE_OF_EXPORTS)
def test_a_damaged_export_is_named(palindrome, exports, tmp_path, what):
    form, which, damage, words = DAMAGE_OF_EXPORTS[what]
    run = shutil.copytree(exports / form, tmp_path / "run")
    path = which(run)
    damage(path)
    said = palindrome("verify", run)
    assert said.code == 1, said.out
    found = [line for line in said.out.splitlines()[:-1] if words in line]
    assert any(line.startswith(f"{path.relative_to(run)}: ") for line in found), said.out


def test_an_export_whose_source_is_out_of_reach_is_checked_alone(palindrome, exports, tmp_path):
    run = shutil.copytree(exports / "png", tmp_path / "run")
    manifest = json.loads((run / "run.json").read_text())
    manifest["config"]["run"] = str(tmp_path / "gone")
    (run / "run.json").write_text(json.dumps(manifest))
    (run / "images/.tmp-1").touch()
    said = palindrome("verify", run)
    assert (said.code, said.out) == (0, f"5 shards, {2 * GOOD} images, 0 rejects: all well\n")
    assert said.err.count("warning: ") == 2 and f"{tmp_path}/gone: can't be read" in said.err
    assert "images/.tmp-1: is a temporary file" in said.err
    a_picture(run).unlink()
    assert palindrome("verify", run).code == 1


def test_what_is_no_run(palindrome, tmp_path):
    said = palindrome("verify", tmp_path)
    assert (said.code, said.out) == (1, "")
    assert said.err == f"palindrome verify: {tmp_path} is not a run folder (it has no run.json)\n"
