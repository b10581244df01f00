"""Pairs, grids and sequences: what is drawn, found and counted."""

import string
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palindrome.pipeline.images.records import Image
from palindrome.pipeline.runs.schemas import latent_schema
from palindrome.pipeline.runs.selection import Selection
from palindrome.pipeline.runs.shards import latent_rows, latent_writer, read_latents
from palindrome.pipeline.storage.folder import Folder
from palindrome.pipeline.tasks.paths import (
    At,
    Leg,
    every,
    grid_pieces,
    ids_of,
    located,
    nearest_pairs,
    path_pieces,
    random_pairs,
    read_pairs,
    sequences,
)

ALL = Selection()
SHARDS = {"a": 7, "b": 1, "c": 12}
IDS = [f"{shard}{i:02d}" for shard, count in SHARDS.items() for i in range(count)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """20 latents in three shards; those of one letter's numbers have a direction in common."""
    folder = Folder(str(tmp_path_factory.mktemp("run")))
    schema = latent_schema((3, 4, 4), "float32")
    draw = np.random.default_rng(0)
    for shard, count in SHARDS.items():
        with latent_writer(folder, shard, schema, {}) as out:
            images = [Image(f"{shard}{i:02d}", "s", i, i, "0" * 64, {}, None) for i in range(count)]
            out.add(latent_rows(schema, images, draw.standard_normal((count, 3, 4, 4), np.float32), {}))
            out.commit({})
    return folder


@given(lengths=st.lists(st.integers(2, 6), min_size=1, max_size=4), frames=st.integers(2, 7))
def test_the_legs_of_a_path_meet_in_one_frame(lengths, frames):
    paths = [[At(f"{p}-{i}", "shard") for i in range(length)] for p, length in enumerate(lengths)]
    pieces = list(path_pieces(paths, frames))
    for number, path in enumerate(paths):
        mine = [piece for piece in pieces if piece.name == f"{number:06d}"]
        assert [i for piece in mine for i in range(piece.start, piece.stop)] == list(
            range((len(path) - 1) * (frames - 1) + 1)
        )
        legs = [Leg.of(piece) for piece in mine]
        assert [legs[0].ids[0], *(leg.ids[1] for leg in legs)] == [image.image_id for image in path]
        assert all(piece.start == i * (frames - 1) for i, piece in enumerate(mine))  # where t is 0


def test_a_grid_goes_row_by_row():
    pieces = list(grid_pieces([[At(name, "s") for name in "abcd"]], 3))
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 3), (3, 6), (6, 9)]
    assert [Leg.of(piece) for piece in pieces] == [Leg(tuple("abcd"), tuple("ssss"), row, 3) for row in range(3)]


def test_ids_with_commas_and_quotes_stand_in_quotes():
    assert ids_of('a,"b, ""c""", d', 2) == ["a", 'b, "c"', "d"]
    for text in ("a", "a,", ",", "a,b,c"):
        with pytest.raises(ValueError, match="is not 2 ids"):
            ids_of(text, 2, 2)


def test_a_file_of_pairs_names_the_line_that_is_none(tmp_path):
    (tmp_path / "pairs.csv").write_text('\ufeffa,b\r\n\n"c,d",e\n')
    assert read_pairs(str(tmp_path / "pairs.csv")) == [["a", "b"], ["c,d", "e"]]
    for content, words in {"a,b\nc\n": "line 2: 'c' is not 2 ids", 'a,"b\n': "line 1", "\n": "has no pairs"}.items():
        (tmp_path / "bad.csv").write_text(content)
        with pytest.raises(ValueError, match=words):
            read_pairs(str(tmp_path / "bad.csv"))


def test_images_are_found_where_their_latents_are(run):
    assert [(image.image_id, image.shard) for image in every(run, SHARDS, ALL)] == [(name, name[0]) for name in IDS]
    found = located(run, SHARDS, [["c03", "a01"], ["b00", "none"]])
    assert found == [[At("c03", "c"), At("a01", "a")], [At("b00", "b"), At("none", None)]]
    with pytest.raises(ValueError, match="no latent of 'none', 'x'"):
        located(run, SHARDS, [["c03", "x"], ["b00", "none"]], must=True)


def test_random_pairs_are_two_images_and_all_alike_probable(run):
    shards = list(SHARDS)
    pairs = random_pairs(run, shards, ALL, 8000, 1)
    assert all(a != b and image.image_id[0] == image.shard for a, b in pairs for image in (a, b))
    for side in (0, 1):
        counts = Counter(pair[side].image_id for pair in pairs)
        assert sorted(counts) == sorted(IDS)
        expected = len(pairs) / len(IDS)
        assert sum((n - expected) ** 2 / expected for n in counts.values()) < 43.8  # chi-squared, 19, p = 0.001
    assert pairs[:50] == random_pairs(run, shards, ALL, 8000, 1)[:50]
    assert pairs[:50] != random_pairs(run, shards, ALL, 8000, 2)[:50]
    some = Selection(where="width in (3, 4)")
    assert {image.image_id for pair in random_pairs(run, shards, some, 99, 0) for image in pair} == {
        "a03", "a04", "c03", "c04",
    }  # fmt: skip
    with pytest.raises(ValueError, match="has 1 selected latents, fewer than 2"):
        random_pairs(run, shards, Selection(("b00", "x")), 1, 0)


@pytest.mark.parametrize("which", [ALL, Selection(where="width > 2")])
def test_the_nearest_has_the_greatest_cosine(run, which):
    batches = [batch for shard in SHARDS for batch in read_latents(run, shard, 5, which)]
    ids = [row["image_id"] for rows, _ in batches for row in rows]
    latents = np.concatenate([x.reshape(len(x), -1) for _, x in batches]).astype(np.float64)
    unit = latents / np.linalg.norm(latents, axis=1, keepdims=True)
    cosines = unit @ unit.T - 9 * np.eye(len(ids))
    pairs = nearest_pairs(run, list(SHARDS), which, len(ids), 0)
    assert {a.image_id: b.image_id for a, b in pairs} == {ids[i]: ids[n] for i, n in enumerate(cosines.argmax(1))}
    with pytest.raises(ValueError, match="fewer than 99"):
        nearest_pairs(run, list(SHARDS), which, 99, 0)


@given(
    series=st.dictionaries(
        st.tuples(
            st.text(string.ascii_letters + "/_-. #", max_size=5), st.sampled_from(["", ".png", ".mp4", "_left.jpg"])
        ),
        st.sets(st.integers(0, 300), min_size=1, max_size=8),
        max_size=4,
    ),
    digits=st.integers(1, 4),
    seed=st.randoms(),
)
def test_sequences_are_what_differs_in_the_last_number_alone(series, digits, seed):
    images = [At(f"{a}{n:0{digits}d}{b}", "s") for (a, b), numbers in series.items() for n in numbers]
    seed.shuffle(images)
    paths, _ = sequences(images)
    expected = [[f"{a}{n:0{digits}d}{b}" for n in sorted(ns)] for (a, b), ns in series.items() if len(ns) > 1]
    assert sorted([image.image_id for image in path] for path in paths) == sorted(expected)


def test_missing_numbers_are_counted_by_the_usual_step():
    def missing(*numbers):
        return sequences([At(f"{n}.png", "s") for n in numbers])[1]

    assert missing(1, 2, 3) == 0
    assert missing(1, 2, 3, 6, 7) == 2
    assert missing(0, 10, 20, 30) == 0
    assert missing(0, 10, 20, 40) == 1
    assert sequences([At(name, "s") for name in ("cat.png", "dog.png")]) == ([], 0)
