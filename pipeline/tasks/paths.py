"""The paths of an interpolation: choosing their images, and the pieces of the plan.

A *path* is a list of images, a *leg* is the part between two consecutive ones. A piece is a leg, or a row of a grid:
`name` is the path's number, `start` and `stop` are its range of the path's frames, and `kept` is a Leg as JSON.
"""

import csv
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import NamedTuple

import fsspec
import numpy as np

from palindrome.pipeline.base.threads import in_threads
from palindrome.pipeline.images.records import Piece
from palindrome.pipeline.runs.plan import PATHS
from palindrome.pipeline.runs.selection import Selection
from palindrome.pipeline.runs.shards import count_rows, read_ids, read_latents
from palindrome.pipeline.storage.folder import Folder, options_for

KIND = PATHS
NUMBERED = re.compile(r"(.*?)(\d+)(\D*(?:\.[A-Za-z]\w{0,4})?)", re.DOTALL)  # the last number before the extension
MAX_NAMED = 5  # ids named in an error
BATCH = 1024  # latents compared at once


class At(NamedTuple):
    """An image and the shard with its latent, None if there is none."""

    image_id: str
    shard: str | None


@dataclass(frozen=True)
class Leg:
    """A leg from the first of two images to the second; or row number `row` of a grid with `rows` rows between four
    images: upper left, upper right, lower left, lower right."""

    ids: tuple[str, ...]
    shards: tuple[str | None, ...]
    row: int = 0
    rows: int = 0

    @classmethod
    def of(cls, piece: Piece) -> "Leg":
        found = json.loads(piece.kept)
        return cls(tuple(found["ids"]), tuple(found["shards"]), found["row"], found["rows"])


def path_pieces(paths: Iterable[Sequence[At]], frames: int) -> Iterator[Piece]:
    """The pieces of paths through at least two images, with `frames` frames per leg, both ends included. The frame
    where two legs meet belongs to the second."""
    for number, path in enumerate(paths):
        for leg, (a, b) in enumerate(pairwise(path)):
            last = leg == len(path) - 2
            start = leg * (frames - 1)
            yield _piece(number, start, start + frames - 1 + last, Leg((a.image_id, b.image_id), (a.shard, b.shard)))


def grid_pieces(grids: Iterable[Sequence[At]], frames: int) -> Iterator[Piece]:
    """The pieces of grids of `frames` by `frames` frames between four images each, row by row."""
    for number, corners in enumerate(grids):
        ids, shards = tuple(at.image_id for at in corners), tuple(at.shard for at in corners)
        for row in range(frames):
            yield _piece(number, row * frames, (row + 1) * frames, Leg(ids, shards, row, frames))


def _piece(number: int, start: int, stop: int, leg: Leg) -> Piece:
    return Piece("", f"{number:06d}", 0, "", start, stop, kept=json.dumps(asdict(leg)))


def ids_of(text: str, at_least: int, at_most: float = float("inf")) -> list[str]:
    """The ids in one line of CSV; ids with commas are in double quotes. Raises ValueError."""
    [ids] = csv.reader([text], strict=True, skipinitialspace=True)
    if not at_least <= len(ids) <= at_most or not all(ids):
        wanted = f"{at_least}" if at_least == at_most else f"{at_least} or more"
        raise ValueError(f"{text!r} is not {wanted} ids separated by commas")
    return ids


def read_pairs(uri: str) -> list[list[str]]:
    """The pairs of a CSV file with two ids per line. Raises ValueError naming the line, and OSError."""
    with fsspec.open(uri, "rb", **options_for(uri)) as file:
        lines = file.read().decode("utf-8-sig").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found += [ids_of(line, 2, 2)] if line.strip() else []
        except (ValueError, csv.Error) as e:
            raise ValueError(f"line {number}: {e}") from e
    if not found:
        raise ValueError("the file has no pairs")
    return found


def digest_of(pairs: Sequence[Sequence[str]]) -> str:
    """A digest of the pairs of a file."""
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def located(run: Folder, shards: Iterable[str], paths: Sequence[Sequence[str]], must: bool = False) -> list[list[At]]:
    """The paths with the shards of their images. With `must`, raises ValueError naming images without a latent."""
    wanted = Selection(tuple({image_id for path in paths for image_id in path}))
    shard_of = {image.image_id: image.shard for image in every(run, shards, wanted)}
    if must and (missing := [i for i in wanted.ids or () if i not in shard_of]):
        raise ValueError(f"there is no latent of {', '.join(map(repr, sorted(missing)[:MAX_NAMED]))}")
    return [[At(image_id, shard_of.get(image_id)) for image_id in path] for path in paths]


def every(run: Folder, shards: Iterable[str], which: Selection) -> Iterator[At]:
    """The selected images of a run, shard by shard."""
    shards = list(shards)
    for shard, ids in zip(shards, in_threads(lambda shard: read_ids(run, shard, which), shards), strict=True):
        yield from (At(image_id, shard) for image_id in ids)


def random_pairs(run: Folder, shards: Sequence[str], which: Selection, count: int, seed: int) -> list[list[At]]:
    """Pairs of two different images, drawn independently and uniformly. Raises ValueError if there are fewer than two
    images."""
    counts = _counts(run, shards, which, 2)
    draw, total = np.random.default_rng(seed), int(counts.sum())
    first = draw.integers(total, size=count)
    second = (first + draw.integers(1, total, size=count)) % total
    found = _at(run, shards, which, counts, np.concatenate([first, second]))
    return [[found[a], found[b]] for a, b in zip(first.tolist(), second.tolist(), strict=True)]


def nearest_pairs(run: Folder, shards: Sequence[str], which: Selection, count: int, seed: int) -> list[list[At]]:
    """Different images, drawn at random, each paired with the image whose latent has the smallest angle to its own.
    Reads all latents once. Raises ValueError if there are fewer than `count` images, or only one."""
    counts = _counts(run, shards, which, max(2, count))
    drawn = np.random.default_rng(seed).choice(int(counts.sum()), count, replace=False)
    images = _at(run, shards, which, counts, drawn)
    firsts = [images[position] for position in drawn.tolist()]
    units: dict[str, np.ndarray] = {}
    for shard, ids in by_shard(firsts).items():
        for rows, latents in read_latents(run, shard, BATCH, Selection(ids)):
            units |= {row["image_id"]: unit for row, unit in zip(rows, _unit(latents), strict=True)}
    first_units = np.stack([units[first.image_id] for first in firsts])
    cosine, nearest = np.full(count, -np.inf), [firsts[0]] * count
    for shard in shards:
        for rows, latents in read_latents(run, shard, BATCH, which):
            found = [At(row["image_id"], shard) for row in rows]
            index = {image: i for i, image in enumerate(found)}
            cosines = np.nan_to_num(first_units @ _unit(latents).T, nan=-np.inf)  # NaN: a latent that is not finite
            for i, first in enumerate(firsts):
                if first in index:
                    cosines[i, index[first]] = -np.inf
            best = cosines.argmax(1)
            for i in np.flatnonzero(cosines.max(1) > cosine).tolist():
                cosine[i], nearest[i] = cosines[i, best[i]], found[best[i]]
    return [[first, near] for first, near in zip(firsts, nearest, strict=True)]


def sequences(images: Iterable[At]) -> tuple[list[list[At]], int]:
    """A path for each numbered sequence of at least two images: those whose ids differ only in their last number, in
    its order. Also the number of images missing within the sequences, given the usual step of each."""
    found: dict[tuple[str, str], list[tuple[int, At]]] = defaultdict(list)
    for image in images:
        if parts := NUMBERED.fullmatch(image.image_id):
            before, number, after = parts.groups()
            found[before, after].append((int(number), image))
    paths, missing = [], 0
    for _, numbered in sorted(found.items()):
        numbered.sort()
        if len(numbered) > 1:
            steps = [b - a for (a, _), (b, _) in pairwise(numbered)]
            usual = max(1, int(np.median(steps)))
            missing += sum(max(0, step // usual - 1) for step in steps)
            paths.append([image for _, image in numbered])
    return paths, missing


def by_shard(images: Iterable[At]) -> dict[str, tuple[str, ...]]:
    """The ids by shard, of images that have a latent."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for image in images:
        if image.shard is not None:
            found[image.shard][image.image_id] = None
    return {shard: tuple(ids) for shard, ids in found.items()}


def _counts(run: Folder, shards: Sequence[str], which: Selection, at_least: int) -> np.ndarray:
    counts = np.array(list(in_threads(lambda shard: count_rows(run, shard, which), shards)), np.int64)
    if counts.sum() < at_least:
        raise ValueError(f"the run has {counts.sum()} selected latents, fewer than {at_least}")
    return counts


def _at(
    run: Folder, shards: Sequence[str], which: Selection, counts: np.ndarray, positions: np.ndarray
) -> dict[int, At]:
    """The images at these positions in the list of all selected images; reads only the shards that have one."""
    ends = counts.cumsum()
    wanted: dict[int, list[int]] = defaultdict(list)
    for position in np.unique(positions).tolist():
        wanted[int(np.searchsorted(ends, position, "right"))].append(position)
    read = in_threads(lambda number: read_ids(run, shards[number], which), wanted)
    found: dict[int, At] = {}
    for (number, in_shard), ids in zip(wanted.items(), read, strict=True):
        first = int(ends[number] - counts[number])
        found |= {position: At(ids[position - first], shards[number]) for position in in_shard}
    return found


def _unit(latents: np.ndarray) -> np.ndarray:
    flat = latents.reshape(len(latents), -1)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), np.finfo(np.float32).tiny)
