"""The files of an export, by format."""

from palindrome.pipeline.runs.kinds import DATA, IMAGES, INDEX
from palindrome.pipeline.storage.folder import Folder

PICTURES = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}  # extensions of the formats with one file per image
TABLES = {"webdataset": ".tar", "parquet": ".parquet"}  # extensions of the formats with one file per shard


def commits_of(form: str) -> tuple[str, str]:
    """The folder and the extension of the files whose existence means that their shard is exported."""
    return (DATA, TABLES[form]) if form in TABLES else (INDEX, ".parquet")


def merged_index(form: str) -> str | None:
    """The table that describes every image; None if the shards' files do. For image files it is where Hugging Face's
    datasets library looks for it."""
    return {"webdataset": "index.parquet", "parquet": None}.get(form, f"{IMAGES}/metadata.parquet")


def exported(out: Folder, form: str) -> set[str]:
    """The names of the exported shards."""
    below, end = commits_of(form)
    return {name.removesuffix(end) for name in out.files(below) if name.endswith(end)}
