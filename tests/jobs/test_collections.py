"""The same images in every form that people hold them in, on a disk and on S3: the same latents, to the bit."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palindrome.pipeline.storage.folder import Folder

COUNT, SHARD = 400, 100  # more than the sample has: images of every format are among them
FORMS = {
    "folder": (["pictures"], {}),
    "glob": (["pictures/**/*.*"], {}),
    "Parquet": (["table/*.parquet", "--keep", "label"], {"label": int}),
    "Arrow": (["arrow", "--keep", "label"], {"label": int}),
    "ZIP": (["x.zip"], {}),
    "WebDataset": (["tars/{0..3}.tar", "--keep", "cls", "__key__"], {"cls": int, "__key__": "{:05d}".format}),
    "list": (["list.csv", "--keep", "label"], {"label": int}),
}


@pytest.fixture(scope="session")
def forms(corpus, tmp_path_factory):
    """The folder with all forms, and the images' numbers by content hash of their bytes."""
    root = tmp_path_factory.mktemp("forms")
    names = sorted(corpus.good_images(root / "pictures", COUNT))
    contents = [(root / "pictures" / name).read_bytes() for name in names]
    images = pa.array([{"bytes": content, "path": name} for content, name in zip(contents, names, strict=True)])
    table = pa.table({"image": images, "label": list(range(COUNT))})
    for below in ("table", "arrow", "tars"):
        (root / below).mkdir()
    for k in range(COUNT // SHARD):
        part = range(k * SHARD, (k + 1) * SHARD)
        pq.write_table(table.slice(part.start, SHARD), root / f"table/{k}.parquet", row_group_size=40)
        with pa.ipc.new_stream(str(root / f"arrow/data-{k}.arrow"), table.schema) as writer:
            writer.write_table(table.slice(part.start, SHARD), max_chunksize=40)
        with tarfile.open(root / f"tars/{k}.tar", "w") as tar:
            for i in part:
                suffix = names[i].rpartition(".")[2]
                for extension, content in ((suffix, contents[i]), ("cls", str(i).encode())):
                    member = tarfile.TarInfo(f"{i:05d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    with zipfile.ZipFile(root / "x.zip", "w") as archive:
        for name, content in zip(names, contents, strict=True):
            archive.writestr(f"in/{name}", content)
    lines = [f"pictures/{name},{i}\n" for i, name in reversed(list(enumerate(names)))]
    (root / "list.csv").write_text("path,label\n" + "".join(lines))
    return root


@pytest.fixture(scope="session")
def expected(forms, palindrome, model, tmp_path_factory, read_run):
    """Content hash -> (number, latent), of a run on the folder."""
    run = encode(palindrome, model, forms / "pictures", tmp_path_factory.mktemp("expected") / "run")
    found = read_run(run)
    return {row["content_hash"]: (i, found.latents[i]) for i, row in enumerate(found.rows)}


def encode(palindrome, model, images, out, *flags):
    how = ["--steps", 2, "--corrections", 1, "--precision", "float32"]  # `auto` would take what is faster at the moment
    settings = [*how, "--shard-size", SHARD, "--batch-size", 50]
    said = palindrome("encode", "--images", images, "--model", model, "--out", out, *settings, *flags)
    assert said.code == 0, said.err
    assert f"{COUNT} latents and 0 rejects" in said.out
    return out


def assert_same(found, expected, kept):
    assert len(found.rows) == len({row["image_id"] for row in found.rows}) == COUNT
    assert {row["content_hash"] for row in found.rows} == expected.keys()
    for row, latent in zip(found.rows, found.latents, strict=True):
        number, of_folder = expected[row["content_hash"]]
        assert np.array_equal(latent, of_folder), row["image_id"]
        assert {column: row[column] for column in kept} == {column: value(number) for column, value in kept.items()}


@pytest.mark.parametrize("form", FORMS)
def test_on_a_disk(form, forms, expected, palindrome, model, tmp_path, read_run):
    (images, *flags), kept = FORMS[form]
    run = encode(palindrome, model, f"{forms}/{images}", tmp_path / "run", *flags)
    assert_same(read_run(run), expected, kept)
    assert palindrome("verify", run, "--deep", 3).code == 0


@pytest.fixture(scope="session")
def bucket(forms, moto):
    """The URI of a bucket with all forms."""
    bucket = Folder(moto.bucket(), moto.options)
    paths = [path for path in forms.rglob("*") if path.is_file()]
    bucket.fs.pipe({bucket.path(str(path.relative_to(forms))): path.read_bytes() for path in paths})
    return bucket.uri


@pytest.mark.parametrize("form", FORMS)
def test_on_s3(form, bucket, moto, expected, palindrome, model, tmp_path, read_run):
    (images, *flags), kept = FORMS[form]
    (tmp_path / "options.json").write_text(json.dumps(moto.options))
    flags += ["--storage-options", tmp_path / "options.json"]
    run = encode(palindrome, model, f"{bucket}/{images}", tmp_path / "run", *flags)
    assert_same(read_run(run), expected, kept)
