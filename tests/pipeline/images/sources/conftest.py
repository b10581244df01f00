"""A collection as the pipeline takes it: planned, packed, read; each listed input once."""

import io
import tarfile

import pytest

from palindrome.pipeline.base.errors import SourceError
from palindrome.pipeline.images.records import REASONS, Shard, pack
from palindrome.pipeline.images.sources import list_pieces, open_collection, read_raw


def _shards(collection, size=10):
    return [Shard.of(collection.kind, pieces) for pieces in pack(list_pieces(collection, size), size)]


def _accounted(collection, planned):
    found = [raw for shard in planned for raw in read_raw(collection, shard)]
    assert len(found) == sum(shard.images for shard in planned)
    assert len({raw.image_id for raw in found}) == len(found)
    for raw in found:
        assert (raw.data is None) == (raw.reason in REASONS) == bool(raw.detail)
        assert list(raw.kept) == [field.name for field in collection.kept]
        f"{raw.image_id}{raw.source}{raw.detail}{raw.kept}".encode()  # or Arrow could not hold it
    return found


def _rows(uri, size=10, **options):
    collection = open_collection(str(uri), **options)
    return _accounted(collection, _shards(collection, size))


@pytest.fixture(scope="session")
def shards():
    """The shards of a collection, of 10 images at most, or as said."""
    return _shards


@pytest.fixture(scope="session")
def accounted():
    """What is read of a collection's shards; each input exactly once."""
    return _accounted


@pytest.fixture(scope="session")
def rows():
    """Every input of a collection, planned and read; each exactly once."""
    return _rows


@pytest.fixture(scope="session")
def names():
    """Their ids."""
    return lambda uri, **options: [raw.image_id for raw in _rows(uri, **options)]


@pytest.fixture(scope="session")
def refused():
    """The words with which a collection is refused."""

    def words(uri, **options):
        with pytest.raises(SourceError) as info:
            _rows(uri, **options)
        return str(info.value)

    return words


@pytest.fixture(scope="session")
def fill():
    """Writes files below a folder."""

    def write(folder, contents):
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    return write


@pytest.fixture(scope="session")
def tar_of():
    """The bytes of a tar of (name, content), as tarfile writes it."""

    def make(members, **how):
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w", **how) as archive:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return sink.getvalue()

    return make
