"""The kinds of runs, as data: commands that read run folders look here instead of comparing job names."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from palindrome.pipeline.runs.schemas import (
    EDITED_SCHEMA,
    EVALUATED_SCHEMA,
    FRAME_SCHEMA,
    REGENERATED_SCHEMA,
    RESTORED_SCHEMA,
    SWEEP_SCHEMA,
    error_schema,
    latent_schema,
    sample_schema,
)
from palindrome.pipeline.runs.scores import METHODS, score_schema

LATENTS, REJECTS, RECONSTRUCTIONS, IMAGES, SWEPT = "latents", "rejects", "reconstructions", "images", "sweep"
SCORES = "scores"
DATA, INDEX = "data", "index"  # folders of export: tars or Parquet files; tables that describe the image files
PATHS = "paths"  # the folder of animate
FEATURES, MOMENTS = "features", "moments"  # folders of evaluate


class Plan(Enum):
    """Where a run's list of shards comes from."""

    OWN = "plan/ of the run"
    ENCODE = "the committed shards of the encode run that config.latents names"
    EXPORTED = "the committed shards of the run that config.run names"
    NONE = "nowhere: the run has no shards"


@dataclass(frozen=True)
class Kind:
    """One kind of run: what its folder contains and how to read it."""

    name: str
    """The command that writes it, and what it does if that is several things: `job` in run.json."""
    folders: tuple[str, ...]
    """Subfolders with one file per finished unit of work. The first has the shards, if the run has its own plan or
    follows an encode run's."""
    plan: Plan
    source: tuple[str, str]
    """The two nested keys of run.json with the URI of the run's input."""
    manifest_keys: tuple[str, ...] = ()
    """The keys that run.json must have besides `job` and `config`. Empty if `verify` does not support the kind."""
    noun: str = "images"
    """What is counted, in the plural: the rows, or the latents that they were made from."""
    schema: Callable[[Mapping[str, Any]], pa.Schema] | None = None
    """The columns of every shard, given the content of run.json. Raises KeyError or TypeError if that is not what the
    job writes."""
    shard_keys: tuple[str, ...] = ("model_digest",)
    """Keys that every shard has in its schema's metadata, equal to those of run.json if it has them too."""
    row_count: str = "images"
    """The key of the footer's counts with the number of rows, per variant if there are several."""
    variants: tuple[str, ...] = ()
    """Columns that distinguish rows with the same image_id."""
    rejects: bool = False
    """Whether a shard may have a rejects/SHARD.parquet."""
    pictures: bool = False
    """Whether the rows have PNGs in a column `image`, which `export` can read."""
    paths: bool = False
    """Whether the rows are frames of paths, which `animate` can read."""
    per_setting: bool = False
    """Whether each shard of the plan is processed once per setting, into files named SHARD-SETTING."""
    state_files: tuple[str, ...] = ()
    """Files with the progress of a run, if no folder shows it."""

    @property
    def folder(self) -> str:
        """The folder of the shards."""
        return self.folders[0]

    def planned(self, file: str) -> str:
        """The plan's shard to which a file belongs, by its name without extension."""
        return file.partition("-")[0] if self.per_setting else file


def setting_name(levels: Sequence[float], corrections: int, tolerance: float, dtype: str) -> str:
    """SETTING in the names of a sweep's files: a hash of the values, so two names of a ladder are one setting."""
    content = [list(levels), corrections, tolerance, dtype]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _latents(manifest: Mapping[str, Any]) -> pa.Schema:
    how = manifest["preprocess"]
    pixels = (how["channels"], how["size"], how["size"])  # of a pixel model, the shape of its latents
    shape = manifest.get("latent_shape", pixels)
    config, autoencoded = manifest["config"], "autoencoder" in manifest
    return latent_schema(shape, config["dtype"], autoencoded=autoencoded, states=config.get("vae_latent", False))


def _scores(manifest: Mapping[str, Any]) -> pa.Schema:
    how, config = manifest["preprocess"], manifest["config"]
    shape = manifest.get("latent_shape", (how["channels"], how["size"], how["size"]))
    methods = [METHODS[name] for name in manifest["methods"]]
    return score_schema(methods, shape if config["latents"] else None, config["maps"])


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
                schema=lambda manifest: error_schema("autoencoder" in manifest),
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
                "score",
                (SCORES,),
                Plan.OWN,
                ("collection", "uri"),
                manifest_keys=("model_digest", "methods", "scores", "preprocess", "collection"),
                schema=_scores,
                shard_keys=("model_digest", "methods"),
                row_count="scored",
                rejects=True,
            ),
            Kind(
                "generate",
                (IMAGES,),
                Plan.OWN,
                ("config", "model"),
                manifest_keys=("model_digest", "levels"),
                # run.json has no shape of the optional latents
                schema=lambda manifest: sample_schema((), None, "watermark" in manifest),
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
                "edit",
                (IMAGES,),
                Plan.ENCODE,
                ("config", "latents"),
                manifest_keys=("model_digest", "levels", "edit"),
                noun="latents",
                schema=lambda _: EDITED_SCHEMA,
                shard_keys=("model_digest", "levels", "edit"),
                row_count="latents",
                variants=("strength",),
                rejects=True,
                pictures=True,
            ),
            Kind(
                "restore",
                (IMAGES,),
                Plan.OWN,
                ("collection", "uri"),
                manifest_keys=("model_digest", "levels", "restoration", "image_shape", "preprocess", "collection"),
                schema=lambda _: RESTORED_SCHEMA,
                shard_keys=("model_digest", "levels", "restoration"),
                row_count="restored",
                variants=("variation",),
                rejects=True,
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
                "evaluate",
                (FEATURES,),
                Plan.OWN,
                ("config", "generated"),
                manifest_keys=("model_digest", "features", "resize"),
                schema=lambda _: EVALUATED_SCHEMA,
                shard_keys=("model_digest", "features", "resize"),
                row_count="rows",
                rejects=True,
            ),
            Kind("evaluate scores", (), Plan.NONE, ("config", "positive")),
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


def _names(condition: Callable[[Kind], object]) -> tuple[str, ...]:
    return tuple(name for name, kind in KINDS.items() if condition(kind))


SHARDED = _names(lambda kind: kind.plan in (Plan.OWN, Plan.ENCODE))  # supported by `status`
VERIFIED = _names(lambda kind: kind.manifest_keys)
WITH_REJECTS = _names(lambda kind: kind.rejects)
WITH_PICTURES = _names(lambda kind: kind.pictures)
WITH_ROWS = _names(lambda kind: kind.schema)
WITH_PATHS = _names(lambda kind: kind.paths)
