"""What a kind of run is, as data: a command that reads run folders asks here instead of comparing names of jobs."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from palindrome.pipeline.runs.schemas import (
    ERROR_SCHEMA,
    FRAME_SCHEMA,
    REGENERATED_SCHEMA,
    SWEEP_SCHEMA,
    latent_schema,
    sample_schema,
)

LATENTS, REJECTS, RECONSTRUCTIONS, IMAGES, SWEPT = "latents", "rejects", "reconstructions", "images", "sweep"
DATA, INDEX, PATHS = "data", "index", "paths"  # of export: tars or tables, what each picture is; of animate: its files


class Plan(Enum):
    """Where the list of a run's shards is."""

    OWN = "plan/ of the run"
    ENCODE = "the committed shards of the encode run that config.latents names"
    EXPORTED = "the committed shards of the run that config.run names"
    NONE = "nowhere: the run has no shards"


@dataclass(frozen=True)
class Kind:
    """One kind of run: what its folder holds and how it is read."""

    name: str
    """The command that writes it, as `job` in run.json."""
    folders: tuple[str, ...]
    """Folders below the run's with one file per finished unit of work. The shards of a run that has a plan of its own
    or an encode run's are in the first of them."""
    plan: Plan
    source: tuple[str, str]
    """The two keys of run.json under which the URI of what the run reads is found."""
    manifest_keys: tuple[str, ...] = ()
    """What run.json must have besides `job` and `config`. None: `verify` does not know this kind."""
    noun: str = "images"
    """What is counted, plural: the rows, or the latents that they were made of."""
    schema: Callable[[Mapping[str, Any]], pa.Schema] | None = None
    """The columns that every shard has, by the content of run.json. Raises KeyError or TypeError where that is not as
    the job writes it."""
    shard_keys: tuple[str, ...] = ("model_digest",)
    """What every shard must say of itself in its schema's metadata, equal to run.json where that has it too."""
    row_count: str = "images"
    """The key of the footer's counts that says how many rows there are, of each variant where there are several."""
    variants: tuple[str, ...] = ()
    """Columns that tell rows with the same image_id apart."""
    rejects: bool = False
    """Whether there may be a rejects/SHARD.parquet for each shard."""
    pictures: bool = False
    """Whether the rows have PNGs in a column `image`, which `export` takes."""
    paths: bool = False
    """Whether the rows are frames of paths, which `animate` takes."""
    per_setting: bool = False
    """Whether a shard of the plan is done once for each of several settings, in files named SHARD-SETTING."""
    state_files: tuple[str, ...] = ()
    """Files that say how far a run is, where no folder does."""

    @property
    def folder(self) -> str:
        """Where the shards are."""
        return self.folders[0]

    def planned(self, file: str) -> str:
        """The plan's shard that a file's name without its extension is of."""
        return file.partition("-")[0] if self.per_setting else file


def setting_name(levels: Sequence[int], corrections: int, tolerance: float, dtype: str) -> str:
    """SETTING in a sweep's files: by what it does, so that two names of one ladder are one setting."""
    does = [list(levels), corrections, tolerance, dtype]
    return hashlib.sha256(json.dumps(does).encode()).hexdigest()[:12]


def _latents(manifest: Mapping[str, Any]) -> pa.Schema:
    how = manifest["preprocess"]
    return latent_schema((how["channels"], how["size"], how["size"]), manifest["config"]["dtype"])


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            Kind(
                "encode",
                (LATENTS,),
                Plan.OWN,
                ("collection", "uri"),
                manifest_keys=("model_digest", "levels", "inversion", "preprocess", "collection"),
                noun="latents",
                schema=_latents,
                shard_keys=("model_digest", "levels"),
                row_count="latents",
                rejects=True,
            ),
            Kind(
                "reconstruct",
                (RECONSTRUCTIONS,),
                Plan.ENCODE,
                ("config", "latents"),
                manifest_keys=("model_digest", "ladders"),
                noun="latents",
                schema=lambda _: ERROR_SCHEMA,
                variants=("steps",),
                pictures=True,
            ),
            Kind(
                "sweep",
                (SWEPT,),
                Plan.OWN,
                ("collection", "uri"),
                manifest_keys=("model_digest", "preprocess", "collection"),
                schema=lambda _: SWEEP_SCHEMA,
                shard_keys=("model_digest", "setting"),
                row_count="latents",
                rejects=True,
                per_setting=True,
            ),
            Kind(
                "generate",
                (IMAGES,),
                Plan.OWN,
                ("config", "model"),
                manifest_keys=("model_digest", "levels"),
                schema=lambda _: sample_schema(
                    (), None
                ),  # run.json does not say the shape of latents, where it has some
                shard_keys=("model_digest", "levels"),
                pictures=True,
            ),
            Kind(
                "regenerate",
                (IMAGES,),
                Plan.ENCODE,
                ("config", "latents"),
                manifest_keys=("model_digest", "ladders"),
                noun="latents",
                schema=lambda _: REGENERATED_SCHEMA,
                shard_keys=("model_digest", "ladders"),
                row_count="latents",
                variants=("steps", "variation"),
                pictures=True,
            ),
            Kind(
                "interpolate",
                (IMAGES,),
                Plan.OWN,
                ("config", "latents"),
                manifest_keys=("model_digest", "levels"),
                noun="frames",
                schema=lambda _: FRAME_SCHEMA,
                shard_keys=("model_digest", "levels"),
                rejects=True,
                pictures=True,
                paths=True,
            ),
            Kind(
                "export",
                (DATA, INDEX),
                Plan.EXPORTED,
                ("config", "run"),
                manifest_keys=("source", "source_config"),
            ),
            Kind("animate", (PATHS,), Plan.EXPORTED, ("config", "run")),
            Kind(
                "train",
                (),
                Plan.NONE,
                ("config", "images"),
                state_files=("training.json", "train/checkpoint_manager_snapshot.json"),
            ),
        )
    }
)


def _names(of: Callable[[Kind], object]) -> tuple[str, ...]:
    return tuple(name for name, kind in KINDS.items() if of(kind))


SHARDED = _names(lambda kind: kind.plan in (Plan.OWN, Plan.ENCODE))  # what `status` takes
VERIFIED = _names(lambda kind: kind.manifest_keys)
WITH_REJECTS = _names(lambda kind: kind.rejects)
WITH_PICTURES = _names(lambda kind: kind.pictures)
WITH_PATHS = _names(lambda kind: kind.paths)
