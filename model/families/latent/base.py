"""What all pipelines of latent diffusion share: their parts, the states of an autoencoder, evaluations of a network."""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from palindrome.model.autoencoder import Autoencoder
from palindrome.model.condition import Condition
from palindrome.model.ddim import Network
from palindrome.model.diffusers_folder import INDEX, CheckpointError, DiffusersFolder
from palindrome.model.engine import set_precision
from palindrome.model.execution import FLOAT32, Execution
from palindrome.model.families.base import Checkpoint, digest_of
from palindrome.model.families.latent.parts import (
    Part,
    Tokenizer,
    check_installed,
    imported,
    quiet,
    read_part,
    read_tokenizer,
)
from palindrome.model.families.latent.vae import Vae, factor
from palindrome.model.ladder import Ladder, check_ladder
from palindrome.model.process import CLEAN, Flow, Process
from palindrome.model.scheduler_config import parse_scheduler, scheduler_config

SCHEDULER = "scheduler/scheduler_config.json"
UNUSED = ("scheduler", "safety_checker", "feature_extractor", "image_encoder")  # components without effect here


@dataclass(frozen=True, kw_only=True)
class Latent(Checkpoint):
    """A pipeline's parts by the names of their folders, its process, and the `size` of its images, in pixels.

    `settings` are the other keys of model_index.json that its subclass reads.
    """

    PIPELINE: ClassVar[str]
    """The `_class_name` of model_index.json."""
    NETWORK: ClassVar[tuple[str, str]]
    """The folder and the class of the network; those of the autoencoder are in AUTOENCODERS."""
    AUTOENCODER: ClassVar[str] = "vae"
    AUTOENCODERS: ClassVar[tuple[str, ...]] = ("AutoencoderKL", "AutoencoderTiny")
    TEXTS: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Folders of text encoders and tokenizers, and the classes that they may be of."""
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    """Those that a pipeline may lack."""
    SETTINGS: ClassVar[tuple[str, ...]] = ()

    parts: Mapping[str, Part | Tokenizer]
    process: Process
    scheduler: Mapping[str, Any]
    """Its config, for `own_ladder`."""
    size: int
    settings: Mapping[str, Any]
    tiled: bool = False
    refinements: int = 0
    """Of the autoencoder, as `with_autoencoder` says."""

    @classmethod
    def load(cls, folder: DiffusersFolder, allow_pickle: bool) -> Self:
        """Reads what the network, the autoencoder and the texts need of the folder. Raises CheckpointError for what is
        missing, unreadable, or not known to be like this pipeline, and where palindrome[latent] is not installed."""
        check_installed()
        index = folder.read_json(INDEX)
        where = f"{folder.uri}/{INDEX}"
        found = {name: of for name, of in index.items() if isinstance(of, list) and len(of) == 2 and any(of)}
        known = {cls.NETWORK[0]: (cls.NETWORK[1],), cls.AUTOENCODER: cls.AUTOENCODERS, **cls.TEXTS}
        if others := sorted(found.keys() - known.keys() - set(UNUSED)):
            raise CheckpointError(f"{where}: the pipeline has a {others[0]}, which {cls.PIPELINE} has not")
        parts: dict[str, Part | Tokenizer] = {}
        for part, classes in known.items():
            if part not in found and part in cls.OPTIONAL:
                continue
            library, name = found.get(part, (None, None))
            if name not in classes or library != ("transformers" if part in cls.TEXTS else "diffusers"):
                raise CheckpointError(f"{where}: {part} is {name!r} of {library}; known: {', '.join(classes)}")
            if part.startswith("tokenizer"):
                parts[part] = read_tokenizer(folder, part, name)
            else:
                parts[part] = read_part(folder, part, library, name, allow_pickle)
        scheduler = folder.read_json(SCHEDULER)
        try:
            process = parse_scheduler(scheduler)
        except (ValueError, TypeError) as e:
            raise CheckpointError(f"{folder.uri}/{SCHEDULER}: {e}") from e
        settings = {name: index[name] for name in cls.SETTINGS if name in index}
        model = cls(parts=parts, process=process, scheduler=scheduler, size=0, settings=settings)
        try:
            model.check()
            model = model.with_size(model.own_size)
        except KeyError as e:
            raise CheckpointError(f"{folder.uri}: a config lacks {e}") from e
        except (ValueError, TypeError) as e:
            raise CheckpointError(f"{folder.uri}: {e}") from e
        return model

    def check(self) -> None:
        """Raises ValueError, naming the key of a config, where the network is not one that `evaluate` evaluates."""
        self.only(self.NETWORK[0], in_channels=self.channels)
        self.only(self.AUTOENCODER, latents_mean=None, latents_std=None)

    def only(self, part: str, **wanted: Any) -> None:
        """Raises ValueError where the config of a part has another value than the one `wanted`."""
        for key, value in wanted.items():
            if (found := self._part(part).config.get(key)) != value:
                raise ValueError(f"{part}: {key} is {found!r}; only {value!r} is supported")

    @property
    def own_size(self) -> int:
        """Of the images that the network was trained on, in pixels."""
        return int(self.config["sample_size"]) * factor(self._part(self.AUTOENCODER))

    @abstractmethod
    def evaluate(self, network: nn.Module, x: Tensor, t: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """The network's output [B, C, H, W] for x [B, C, H, W], t [B] and the condition's tensors."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The network's."""
        return self._part(self.NETWORK[0]).config

    @property
    def channels(self) -> int:
        """Of the autoencoder's states."""
        return int(self._part(self.AUTOENCODER).config["latent_channels"])

    def _part(self, name: str) -> Part:
        part = self.parts[name]
        assert isinstance(part, Part)
        return part

    @cached_property
    def digest(self) -> str:
        described = {name: part.described() for name, part in self.parts.items()}
        # The clean end is a matter of the path that is walked, and recorded with the run: not of the model.
        configs = [self.PIPELINE, described, scheduler_config(self.process.as_described({})), dict(self.settings)]
        modules = {name: part for name, part in self.parts.items() if isinstance(part, Part)}
        return digest_of(configs, {f"{name}.{k}": v for name, part in modules.items() for k, v in part.weights.items()})

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.size, self.size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.size // factor(self._part(self.AUTOENCODER))
        return self.channels, side, side

    @property
    def multiple(self) -> int:
        """Sizes are multiples of it, in pixels."""
        return factor(self._part(self.AUTOENCODER))

    def with_size(self, size: int) -> Self:
        if size % self.multiple:
            raise ValueError(f"the model's images have a multiple of {self.multiple} pixels, not {size}")
        return dataclasses.replace(self, size=size)

    @property
    def autoencoded(self) -> bool:
        return True

    def autoencoder(self, device: torch.device | str = "cpu") -> Autoencoder:
        return Vae.of(self._part(self.AUTOENCODER), device, self.tiled, self.refinements)

    def with_autoencoder(self, tiled: bool = False, refinements: int = 0) -> Self:
        if tiled and (name := self._part(self.AUTOENCODER).name) == "VQModel":
            raise ValueError(f"{name} does not work on tiles")
        return dataclasses.replace(self, tiled=tiled, refinements=refinements)

    def as_described(self, found: Mapping[str, Any]) -> Self:
        vae = found.get("autoencoder", {})
        return super().as_described(found).with_autoencoder(vae.get("tiled", False), vae.get("refinements", 0))

    def denoiser(self, device: torch.device | str = "cpu", execution: Execution = FLOAT32) -> Network:
        """Raises RuntimeError as Engine does."""
        network, dtype = self._part(self.NETWORK[0]).module(device), set_precision(torch.device(device), execution)
        nn.Module.to(network, dtype)  # diffusers' own warns of modules to be kept in float32, also where it has none
        if execution.compiled:
            network.compile(dynamic=True)

        @torch.no_grad()
        def evaluated(x: Tensor, told: float, condition: Condition | None = None) -> Tensor:
            values = {} if condition is None else condition.values
            cast = {name: v.to(dtype) if v.is_floating_point() else v for name, v in values.items()}
            t = torch.full((len(x),), told, dtype=torch.float32, device=x.device)
            return self.evaluate(network, x.to(dtype), t, cast).float()

        return evaluated

    def own_ladder(self, steps: int) -> Ladder:
        with quiet():  # diffusers warns of keys of other schedulers' configs
            scheduler = imported("diffusers", self.scheduler["_class_name"]).from_config(dict(self.scheduler))
        scheduler.set_timesteps(steps, **self.spacing(steps))
        if isinstance(self.process, Flow):
            levels = [self.process.level_of(t) for t in scheduler.sigmas.tolist() if t > 0]
        else:
            levels = scheduler.timesteps.tolist()  # solvers of second order visit some twice
        return check_ladder([CLEAN, *sorted(set(levels))], self.process.num_train_timesteps)

    def spacing(self, steps: int) -> dict[str, Any]:
        """What the pipeline tells its scheduler besides the number of steps."""
        return {}

    def with_process(self, process: Process) -> Self:
        return dataclasses.replace(self, process=process)

    def describe(self) -> dict[str, Any]:
        """Also the shape of the latents, and how the autoencoder makes them."""
        vae = {"class": self._part(self.AUTOENCODER).name, **Vae.convention(self._part(self.AUTOENCODER))}
        vae |= {"tiled": True} if self.tiled else {}
        vae |= {"refinements": self.refinements} if self.refinements else {}
        return {**super().describe(), "latent_shape": list(self.latent_shape), "autoencoder": vae}
