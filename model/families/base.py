"""The interface of a model family: all that the pipeline asks of a model, whatever its network is."""

import dataclasses
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from palindrome.model.autoencoder import Autoencoder, Identity
from palindrome.model.condition import EMPTY, ClassOf, Condition, Guidance, TextEncoder, TextOf
from palindrome.model.ddim import Network
from palindrome.model.diffusers_folder import CheckpointError as CheckpointError
from palindrome.model.execution import FLOAT32, Execution
from palindrome.model.ladder import Ladder
from palindrome.model.process import Process

Module = TypeVar("Module", bound=nn.Module)


class Checkpoint(ABC):
    """A model as it was loaded, on the CPU. It is sent to workers by Ray, which makes a `denoiser` of it there.

    `process` is the noise process that its network was trained on, and says how the outputs are read.
    """

    process: Process
    REFUSED: ClassVar[str] = "no_class"
    """The reason of an image for which `refusal` has one, a key of pipeline.images.records.REASONS."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """sha256 over configs and weights, 64 hex digits: the same however the folder was written."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of the images that go in and come out."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of the state that the network denoises, and so of x_T: of a pixel model that of its images."""
        return self.image_shape

    @abstractmethod
    def denoiser(self, device: torch.device | str = "cpu", execution: Execution = FLOAT32) -> Network:
        """The network on a device, ready to be evaluated often."""

    @property
    def autoencoded(self) -> bool:
        """Whether an autoencoder makes the states, with an error of its own."""
        return False

    def autoencoder(self, device: torch.device | str = "cpu") -> Autoencoder:
        """What makes states of images on a device: of a pixel model they are the images."""
        return Identity()

    def text_encoder(self, device: torch.device | str = "cpu") -> TextEncoder | None:
        """What `condition` needs on a device to tell a network of texts; None for a model that is told none."""
        return None

    def with_size(self, size: int) -> Self:
        """The same model for images of size x size pixels. Raises ValueError for a size that it can't have."""
        if size == self.image_shape[-1]:
            return self
        raise ValueError(f"the model is one of {self.image_shape[-1]} pixels, not of {size}")

    def with_autoencoder(self, tiled: bool = False, refinements: int = 0) -> Self:
        """The same model, whose autoencoder works on tiles of large images, and whose states are refined in that many
        steps so that they decode to the image. Raises ValueError where it has no autoencoder, or not such a one."""
        if not (tiled or refinements):
            return self
        raise ValueError("the model has no autoencoder")

    @property
    def class_conditional(self) -> bool:
        """Whether the network is told the class of each image."""
        return False

    @property
    def text_conditional(self) -> bool:
        """Whether the network is told a text of each image."""
        return False

    def with_classes(self, classes: ClassOf) -> Self:
        """The same model, told these classes. Raises ValueError for a model that knows none, or not that one."""
        raise ValueError("the model is not class-conditional")

    def with_texts(self, texts: TextOf) -> Self:
        """The same model, told these texts. Raises ValueError for a model that knows none."""
        raise ValueError("the model is told no texts")

    def with_any_condition(self) -> Self:
        """The same model, told the same of all images: to measure speed and rounding."""
        if self.text_conditional:
            return self.with_texts(EMPTY)
        return self.with_classes(ClassOf(value=0)) if self.class_conditional else self

    @property
    def guidance(self) -> Guidance | None:
        """None without guidance."""
        return None

    def with_guidance(self, weight: float, null_class: int | None = None, negative_prompt: str | None = None) -> Self:
        """The same model, guided by that weight; 1 is no guidance. Without `null_class` or `negative_prompt`, away from
        the model's own. Raises ValueError for a weight that is negative or not finite, and for a model that can't be
        guided so."""
        raise ValueError("the model is told neither classes nor texts")

    def told(self) -> dict[str, Any]:
        """What run.json records of the conditions: `classes` of a class-conditional model, `prompts` of one of texts,
        and `guidance`."""
        return {}

    def as_told(self, found: Mapping[str, Any]) -> Self:
        """The same model, told what `told` recorded, which `found` has among other keys."""
        model = self
        if (classes := found.get("classes")) is not None:
            model = model.with_classes(ClassOf.of(classes))
        if (texts := found.get("prompts")) is not None:
            model = model.with_texts(TextOf.of(texts))
        if self.class_conditional or self.text_conditional:
            model = model.with_guidance(**(found.get("guidance") or {"weight": 1.0}))
        return model

    def refusal(self, row: Mapping[str, Any]) -> str:
        """Why the network can't be told of an image with these columns; "" if it can."""
        return ""

    def condition(self, rows: Sequence[Mapping[str, Any]], encoder: TextEncoder | None = None) -> Condition | None:
        """What the network is told of images, from the columns kept with them, by name; None for an unconditional
        model. `encoder` is a `text_encoder` of this model. Raises ValueError where `refusal` has a reason."""
        return None

    def own_ladder(self, steps: int) -> Ladder:
        """The levels that the scheduler of the model's folder visits. Raises ValueError where that can't be said."""
        raise ValueError("the ladder diffusers is known of latent diffusion pipelines alone")

    @abstractmethod
    def with_process(self, process: Process) -> Self:
        """The same network on another process."""

    def describe(self) -> dict[str, Any]:
        """What another program needs besides the weights to walk a ladder with this network, as JSON's types."""
        return {**self.process.describe(), **self.told()}

    def as_described(self, found: Mapping[str, Any]) -> Self:
        """The same network on the process that a run was made on, whose run.json is `found`."""
        return self.with_process(self.process.as_described(found))


@dataclass(frozen=True, kw_only=True)
class OfClasses(Checkpoint):
    """A model whose network is told the number of each image's class, if it is class-conditional: of the class that
    `classes` says, and of none by `null_class`, where it was trained with that."""

    classes: ClassOf | None = None
    null_class: int | None = None
    guidance: Guidance | None = None

    @abstractmethod
    def refusal_of(self, value: Any) -> str:
        """Why the network can't be told that class; "" if it can."""

    @property
    def class_dtype(self) -> torch.dtype:
        """Of what the network is told of the classes."""
        return torch.int64

    def with_classes(self, classes: ClassOf) -> Self:
        if not self.class_conditional:
            return super().with_classes(classes)
        told = dataclasses.replace(self, classes=classes)
        if classes.value is not None and (why := told.refusal({})):
            raise ValueError(why)
        return told

    def with_guidance(self, weight: float, null_class: int | None = None, negative_prompt: str | None = None) -> Self:
        if not self.class_conditional:
            raise ValueError("the model is not class-conditional")
        if negative_prompt is not None:
            raise ValueError("the model is told classes, not texts")
        if weight == 1:
            return dataclasses.replace(self, guidance=None)
        before = None if self.guidance is None else self.guidance.null_class
        known = (number for number in (null_class, before, self.null_class) if number is not None)
        if (null := next(known, None)) is None:
            raise ValueError("guidance needs the class that stands for none, and the model does not say which it is")
        if null != self.null_class and (why := self.refusal_of(null)):
            raise ValueError(f"the class that stands for none: {why}")
        return dataclasses.replace(self, guidance=Guidance(weight, null))

    def told(self) -> dict[str, Any]:
        told = {"classes": self.classes, "guidance": self.guidance}
        return {name: value.record() for name, value in told.items() if value is not None}

    def refusal(self, row: Mapping[str, Any]) -> str:
        if not self.class_conditional:
            return ""
        value = None if self.classes is None else self.classes(row)
        if value is None:
            return "the model is class-conditional, and the image has no class"
        return self.refusal_of(value)

    def condition(self, rows: Sequence[Mapping[str, Any]], encoder: TextEncoder | None = None) -> Condition | None:
        """`class`: [B] or [B, E], of `class_dtype`."""
        if not self.class_conditional:
            return None
        for why in filter(None, map(self.refusal, rows)):
            raise ValueError(why)
        assert self.classes is not None  # else refused
        classes = torch.tensor([self.classes(row) for row in rows], dtype=self.class_dtype)
        if self.guidance is None:
            return Condition({"class": classes})
        assert self.guidance.null_class is not None  # else refused
        return Condition(
            {"class": classes},
            dropped={"class": torch.full_like(classes, self.guidance.null_class)},
            weight=self.guidance.weight,
        )


@dataclass(frozen=True, kw_only=True)
class OfTexts(Checkpoint):
    """A model whose network is told a text of each image: of the one that `texts` says."""

    REFUSED: ClassVar[str] = "no_prompt"

    texts: TextOf = EMPTY
    guidance: Guidance | None = None

    @abstractmethod
    def text_encoder(self, device: torch.device | str = "cpu") -> TextEncoder: ...

    @property
    def text_conditional(self) -> bool:
        return True

    def with_texts(self, texts: TextOf) -> Self:
        return dataclasses.replace(self, texts=texts)

    def with_guidance(self, weight: float, null_class: int | None = None, negative_prompt: str | None = None) -> Self:
        if null_class is not None:
            raise ValueError("the model is told texts, not classes")
        return dataclasses.replace(
            self, guidance=None if weight == 1 else Guidance(weight, negative_prompt=negative_prompt)
        )

    def told(self) -> dict[str, Any]:
        guidance = {} if self.guidance is None else {"guidance": self.guidance.record()}
        return {"prompts": self.texts.record(), **guidance}

    def refusal(self, row: Mapping[str, Any]) -> str:
        found = self.texts(row)
        if found is None:
            return "the model is told a text, and the image has none"
        return "" if isinstance(found, str) else f"the prompt is {found!r}, not a text"

    def condition(self, rows: Sequence[Mapping[str, Any]], encoder: TextEncoder | None = None) -> Condition | None:
        encoder = encoder or self.text_encoder()
        values = self.of_texts(rows, encoder)
        if self.guidance is None:
            return Condition(values)
        return Condition(
            values,
            dropped=encoder([self.guidance.negative_prompt] * len(rows)),
            weight=self.guidance.weight,
        )

    def of_texts(self, rows: Sequence[Mapping[str, Any]], encoder: TextEncoder) -> Mapping[str, Tensor]:
        """The encoded text of each image. Raises ValueError where `refusal` has a reason."""
        for why in filter(None, map(self.refusal, rows)):
            raise ValueError(why)
        return encoder([self.texts(row) for row in rows])


def refusal_of_number(value: Any, known: int | None) -> str:
    """Why that is no class of a network that knows the numbers below `known`, or all; "" if it is one."""
    if isinstance(value, Integral) and 0 <= int(value) < (known or math.inf):
        return ""
    return f"the class is {value!r}, not a number{f' below {known}' if known else ''}"


def digest_of(configs: Any, weights: Mapping[str, Tensor]) -> str:
    """sha256 over configs, of JSON's types, and the weights as stored, 64 hex digits."""
    h = hashlib.sha256()
    h.update(json.dumps(configs, sort_keys=True).encode())
    for name, value in sorted(weights.items()):
        h.update(f"\0{name} {value.dtype} {tuple(value.shape)}\0".encode())
        h.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def placed(network: Module, device: torch.device | str) -> Module:
    """The network in float32 on a device, in evaluation mode, without gradients.

    On CPU its weights lie channels last, and the activations follow: oneDNN's convolutions need no reordering then.
    """
    if torch.device(device).type == "cpu":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.to(device, torch.float32).eval().requires_grad_(False)


def check_weights(network: Callable[[], nn.Module], weights: Mapping[str, Tensor], where: str) -> None:
    """Raises CheckpointError, which begins with `where`, unless they are those of what `network` makes, and finite."""
    with torch.device("meta"):
        expected = {k: v.shape for k, v in network().state_dict().items()}
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or name not in expected or weights[name].shape != expected[name]:
            found = tuple(weights[name].shape) if name in weights else "nothing"
            wanted = tuple(expected[name]) if name in expected else "nothing"
            raise CheckpointError(f"{where}: {name} is {found}, and the config asks for {wanted}")
        if not weights[name].isfinite().all():
            raise CheckpointError(f"{where}: {name} holds values that are not finite (NaN or infinite)")
