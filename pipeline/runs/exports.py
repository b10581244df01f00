"""Where an export's files are, by its format."""

from palindrome.pipeline.runs.kinds import DATA, IMAGES, INDEX
from palindrome.pipeline.storage.folder import Folder

PICTURES = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}  # formats with one file per image, and its extension
TABLES = {"webdataset": ".tar", "parquet": ".parquet"}  # formats with one file per shard


def commits_of(form: str) -> tuple[str, str]:
    """The folder and the extension of the files whose presence means that a shard is exported."""
    return (DATA, TABLES[form]) if form in TABLES else (INDEX, ".parquet")


def merged_index(form: str) -> str | None:
    """The one table that says what each image is; None where the shards' files do. Pictures have theirs where Hugging
    Face's datasets looks for it."""
    return {"webdataset": "index.parquet", "parquet": None}.get(form, f"{IMAGES}/metadata.parquet")


def exported(out: Folder, form: str) -> set[str]:
    """The names of the shards that are done."""
    below, end = commits_of(form)
    return {name.removesuffix(end) for name in out.files(below) if name.endswith(end)}
