"""An encode run, as input of the jobs that read its latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa

from palindrome.model.condition import ClassOf, TextOf
from palindrome.model.execution import FLOAT32, Execution
from palindrome.model.families import Checkpoint
from palindrome.model.ladder import Ladder, check_ladder
from palindrome.model.process import Process
from palindrome.pipeline.base.errors import ManifestError, SourceError
from palindrome.pipeline.images.decode import Preprocess
from palindrome.pipeline.images.sources import Collection, open_collection
from palindrome.pipeline.images.sources.tables import byte_columns
from palindrome.pipeline.runs.inversion import Inversion
from palindrome.pipeline.runs.kinds import LATENTS
from palindrome.pipeline.runs.ladders import KINDS, ladder_of_kind
from palindrome.pipeline.runs.manifest import Manifest, read_manifest
from palindrome.pipeline.runs.models import load_model
from palindrome.pipeline.runs.plan import Totals, plan_totals, read_plan
from palindrome.pipeline.runs.shards import committed
from palindrome.pipeline.storage.folder import Folder

if TYPE_CHECKING:
    import pyarrow.dataset as dataset


class WrongModel(ValueError):
    """A model that did not make the run's latents, and decodes them to noise."""


@dataclass(frozen=True, eq=False)
class EncodeRun:
    """An encode run: the totals of its plan, the committed shards `done`, and what run.json records of all latents."""

    folder: Folder
    manifest: Manifest
    planned: Totals
    done: frozenset[str]
    model: str
    """The URI of the checkpoint folder that encode used."""
    ladder: str
    """The value of --ladder: one of ladders.NAMED, timesteps, or a file."""
    inversion: Inversion
    preprocess: Preprocess

    @classmethod
    def open(cls, folder: Folder) -> Self:
        """Raises ManifestError if the folder is not an encode run, or has no latents yet."""
        if not folder.exists():
            raise ManifestError(f"{folder.uri} does not exist")
        manifest = read_manifest(folder)
        if manifest is None:
            raise ManifestError(f"{folder.uri} is not a run folder (it has no run.json)")
        if manifest.job != "encode":
            raise ManifestError(f"{folder.uri} is a run of {manifest.job}, not of encode")
        check_ladder(manifest.levels, manifest.content["num_train_timesteps"])
        planned, done = plan_totals(folder), committed(folder)
        if planned is None or not done:
            raise ManifestError(f"{folder.uri} holds no latents yet")
        config, how = manifest.config, Preprocess(**manifest.content["preprocess"])
        inversion = Inversion.of(manifest)
        return cls(folder, manifest, planned, frozenset(done), config["model"], config["ladder"], inversion, how)

    @property
    def collection(self) -> Collection:
        return Collection(**self.manifest.content["collection"])

    def collection_with(self, pictures: str) -> Collection:
        """The collection, read with a further column, of pictures. Raises SourceError where it has none."""
        collection = self.collection
        kind, column = collection.kind, collection.image_column
        found = open_collection(collection.uri, kind=kind, image_column=column, keep=[pictures])
        [field] = found.kept
        if not byte_columns(pa.schema([field])):
            raise SourceError(f"column {field.name!r} has {field.type}, not pictures", "keep", field.name)
        return found

    @property
    def execution(self) -> Execution:
        """How the network was evaluated to make the latents."""
        return Execution(self.manifest.precision or FLOAT32.precision)

    def load_model(self, uri: str | None, allow_pickle: bool = False) -> tuple[str, Checkpoint]:
        """The URI of the model and the model, from `uri` or from where encode loaded it. Raises WrongModel if it is not
        the model that made the latents."""
        digest = self.manifest.model_digest
        uri, model = load_model(uri or self.model, allow_pickle)
        if model.digest != digest:
            raise WrongModel(
                f"the latents were made by another model: digest {digest[:12]}…, and this one's is {model.digest[:12]}…"
            )
        model = model.as_described(self.manifest.content)
        return uri, model.with_size(self.preprocess.size).as_told(self.manifest.content)

    @property
    def classes(self) -> ClassOf | None:
        """What a class-conditional model was told of the images; None for another."""
        found = self.manifest.content.get("classes")
        return None if found is None else ClassOf.of(found)

    @property
    def texts(self) -> TextOf | None:
        """What a model of texts was told of the images; None for another."""
        found = self.manifest.content.get("prompts")
        return None if found is None else TextOf.of(found)

    def ladders(self, steps: Sequence[int], process: Process) -> tuple[Ladder, ...]:
        """A ladder for each number of steps, of the run's kind and up to its top level. For its own number of steps, or
        without `steps`, it is the run's own ladder. Raises ValueError."""
        own = self.inversion.levels
        # A list defines no other numbers of steps, and a scheduler of diffusers begins elsewhere with them.
        kind = self.ladder if self.ladder in KINDS else "logsnr"
        if len(set(steps)) != len(steps):
            raise ValueError("a number is given twice")
        whole = int(own[-1])

        def of(count: int) -> Ladder:
            if count == len(own) - 1:
                return own
            levels = ladder_of_kind(kind, count, process, whole)
            return (*levels[:-1], own[-1]) if levels[-1] == whole else levels  # a single step ends at 0

        return tuple(map(of, steps)) or (own,)

    def rows(self) -> "dataset.Dataset":
        """The rows of the committed shards, in the plan's order."""
        import pyarrow.dataset as dataset  # imports pandas, if it is installed

        names = (shard.name for shard in read_plan(self.folder) if shard.name in self.done)
        files = [self.folder.path(f"{LATENTS}/{name}.parquet") for name in names]
        return dataset.dataset(files, filesystem=self.folder.arrow_fs, format="parquet")

    def described(self) -> dict[str, Any]:
        """How the latents were made, for a report."""
        how = self.inversion
        tolerance = "exact" if how.exact else how.tolerance or "none"
        guidance = self.manifest.content.get("guidance")
        column, text = (None, None) if self.texts is None else (self.texts.column, self.texts.text)
        return {
            **({} if column is None else {"prompts": f"column {column}"}),
            **({} if text is None else {"prompt": text or "none"}),
            **({} if guidance is None else {"guidance": f"{guidance['weight']:g}"}),
            "inversion": f"{how.method}, corrections a step: {how.corrections}, tolerance: {tolerance}",
            "ladder": f"{self.ladder}, {how.steps} steps to {how.levels[-1]}",
            "precision": f"{self.execution.precision}; stored as {how.dtype}",
        }
