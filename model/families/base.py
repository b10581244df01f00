"""The interface of a model family: all that the pipeline asks of a model, whatever its network is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from palindrome.model.condition import ClassOf, Condition
from palindrome.model.ddim import Network
from palindrome.model.diffusers_folder import CheckpointError as CheckpointError
from palindrome.model.execution import FLOAT32, Execution
from palindrome.model.process import Process


class Checkpoint(ABC):
    """A model as it was loaded, on the CPU. It is sent to workers by Ray, which makes a `denoiser` of it there.

    `process` is the noise process that its network was trained on, and says how the outputs are read.
    """

    process: Process

    @property
    @abstractmethod
    def digest(self) -> str:
        """sha256 over configs and weights, 64 hex digits: the same however the folder was written."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of the images that go in and come out."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of the state that the network denoises, and so of x_T."""

    @abstractmethod
    def denoiser(self, device: torch.device | str = "cpu", execution: Execution = FLOAT32) -> Network:
        """The network on a device, ready to be evaluated often."""

    def to_state(self, images: Tensor) -> Tensor:
        """Images [B, *image_shape] in [-1, 1] -> x0 [B, *latent_shape]. Those of a pixel model are its states."""
        return images

    def to_images(self, state: Tensor) -> Tensor:
        """x0 [B, *latent_shape] -> images [B, *image_shape], about [-1, 1]."""
        return state

    @property
    def class_conditional(self) -> bool:
        """Whether the network is told the class of each image."""
        return False

    def with_classes(self, classes: ClassOf) -> Self:
        """The same model, told these classes. Raises ValueError for a model that knows none, or not that one."""
        raise ValueError("the model is not class-conditional")

    def with_any_class(self) -> Self:
        """The same model, told one class for all images: to measure speed and rounding."""
        return self.with_classes(ClassOf(value=0)) if self.class_conditional else self

    def told(self) -> dict[str, Any]:
        """What run.json records of the conditions: `classes` of a class-conditional model."""
        return {}

    def refusal(self, row: Mapping[str, Any]) -> str:
        """Why the network can't be told of an image with these columns; "" if it can."""
        return ""

    def condition(self, rows: Sequence[Mapping[str, Any]]) -> Condition | None:
        """What the network is told of images, from the columns kept with them, by name; None for an unconditional
        model. Raises ValueError where `refusal` has a reason."""
        return None

    def condition_of_all(self, count: int) -> Condition | None:
        """`condition` of images without columns: noise, or frames between images."""
        return self.condition([{}] * count)

    @abstractmethod
    def with_process(self, process: Process) -> Self:
        """The same network on another process."""

    def describe(self) -> dict[str, Any]:
        """What another program needs besides the weights to walk a ladder with this network, as JSON's types."""
        return {**self.process.describe(), **self.told()}

    def as_described(self, found: Mapping[str, Any]) -> Self:
        """The same network on the process that a run was made on, whose run.json is `found`."""
        return self.with_process(self.process.as_described(found))
