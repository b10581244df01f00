"""What an evaluate run knows of its shards: the moments of each one's features, and the features if they are stored."""

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from palindrome.pipeline.base.text import one_line
from palindrome.pipeline.images.distances import Labels, Moments
from palindrome.pipeline.images.records import Shard
from palindrome.pipeline.runs.kinds import FEATURES, MOMENTS
from palindrome.pipeline.runs.plan import read_plan
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.storage.folder import Folder, file_at

SETS = ("real", "generated")


def set_of(shard: Shard) -> str:
    """Which of SETS a shard is of: its image ids begin with that."""
    return shard.pieces[0].name.partition("/")[0]


def put_moments(run: Folder, shard: str, moments: Moments, labels: Labels | None) -> None:
    """Writes `moments/<shard>.npz`, before the shard is committed."""
    lower = moments.scatter[np.tril_indices(len(moments.mean))]  # of a symmetric matrix
    its = {} if labels is None else vars(labels)
    content = _npz(count=moments.count, mean=moments.mean, scatter=lower, **its)
    run.put(f"{MOMENTS}/{shard}.npz", content)


def _npz(**arrays: Any) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def read_moments(run: Folder, shard: str) -> tuple[Moments, Labels | None]:
    """What `put_moments` wrote of a shard. Raises OSError and ValueError."""
    with np.load(io.BytesIO(run.read(f"{MOMENTS}/{shard}.npz")), allow_pickle=False) as found:
        mean = found["mean"]
        scatter = np.zeros((len(mean), len(mean)))
        scatter[np.tril_indices(len(mean))] = found["scatter"]
        scatter += np.tril(scatter, -1).T
        names = Labels.__dataclass_fields__
        labels = Labels(**{name: found[name] for name in names}) if "counts" in found else None
        return Moments(int(found["count"]), mean, scatter), labels


def moments_of(run: Folder, which: str, dimensions: int) -> tuple[Moments, Labels | None]:
    """Of all committed shards of one of SETS, merged in the plan's order: whichever worker was first, the sums are the
    same to the last bit."""
    moments, labels = Moments.none(dimensions), None
    for shard in done(run, which):
        more, its = read_moments(run, shard)
        moments = moments.merge(more)
        labels = its if labels is None or its is None else labels.merge(its)
    return moments, labels


def features_of(run: Folder, which: str) -> tuple[list[str], np.ndarray]:
    """The ids and the features, float32 [N, D], of the committed shards of one of SETS, in the plan's order."""
    ids, found = list[str](), []
    for shard in done(run, which):
        rows = run.read_parquet(f"{FEATURES}/{shard}.parquet", ["image_id", "features"])
        ids += rows["image_id"].to_pylist()
        if len(rows):
            found.append(rows["features"].combine_chunks().to_numpy_ndarray())
    return ids, np.concatenate(found) if found else np.zeros((0, 0), np.float32)


def done(run: Folder, which: str) -> Iterator[str]:
    """The committed shards of one of SETS, in the plan's order."""
    there = committed(run, FEATURES)
    return (shard.name for shard in read_plan(run) if set_of(shard) == which and shard.name in there)


def write_statistics(run: Folder, name: str, moments: Moments, about: Mapping[str, Any]) -> None:
    """Writes reference statistics as pytorch-fid and EDM read them, `mu` and `sigma`, with the number of images as `n`,
    and as JSON, in `palindrome`, the network and the resizing that they are of."""
    run.put(name, _npz(mu=moments.mean, sigma=moments.covariance, n=moments.count, palindrome=json.dumps(about)))


def read_statistics(uri: str) -> tuple[np.ndarray, np.ndarray, int | None, dict[str, Any]]:
    """Mean [D], covariance [D, D], the number of images and what `write_statistics` said of them, where it was that: of
    a .npz with `mu` and `sigma`, such as pytorch-fid's, EDM's and guided-diffusion's. Raises OSError and ValueError."""
    folder, name = file_at(uri)
    try:
        with np.load(io.BytesIO(folder.read(name)), allow_pickle=False) as found:
            if not {"mu", "sigma"} <= {*found.files}:
                raise ValueError(f"it has {', '.join(found.files)}, and not mu and sigma")
            mu, sigma = (found[name].astype(np.float64) for name in ("mu", "sigma"))
            count = int(found["n"]) if "n" in found else None
            about = json.loads(str(found["palindrome"])) if "palindrome" in found else {}
    except OSError:
        raise
    except Exception as e:  # damaged files raise errors of many types
        raise ValueError(f"{uri} holds no statistics: {one_line(e)}") from e
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{uri} holds no statistics: mu is {mu.shape} and sigma {sigma.shape}, or not finite")
    return mu, sigma, count, about
