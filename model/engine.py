"""A checkpoint's network, made ready to be evaluated often: in a precision, compiled or not, each timestep embedded
once."""

from collections.abc import Iterator
from functools import cache
from shutil import which
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from palindrome.model.condition import Condition
from palindrome.model.execution import HALVES, Execution

KEPT = 8  # of what the network was told last of timesteps and classes: batches in flight, and corrections of a step


class Told(Protocol):
    """What an Engine needs of a network, an nn.Module: all that it is told of a timestep and of classes can be computed
    ahead of its evaluation. `model.unet.UNet` documents the methods."""

    def biases(self, t: Tensor, classes: Tensor | None, dtype: torch.dtype | None) -> list[Tensor]: ...
    def evaluate(self, x: Tensor, biases: list[Tensor]) -> Tensor: ...
    def lower(self, dtype: torch.dtype) -> Any: ...
    def to(self, *args: Any, **kwargs: Any) -> Any: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


def set_precision(device: torch.device, execution: Execution) -> torch.dtype:
    """The dtype that a network is to have. Whether a GPU may use TF32 becomes a setting of the process. Raises
    RuntimeError where a network is to be compiled for a CPU and there is no C++ compiler."""
    allowed = execution.precision == "tf32"  # torch allows it to convolutions unless told otherwise
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    if execution.compiled and device.type == "cpu" and not any(map(which, ("c++", "g++", "clang++"))):
        raise RuntimeError("to compile a network for a CPU takes a C++ compiler, and there is none")
    return HALVES.get(execution.precision, torch.float32)


class Engine:
    """A `model.ddim.Network`: x float [B, C, H, W] and a timestep -> its output, float32 [B, C, H, W]. The state stays
    in float32 with the caller; the precision is the network's alone, which is changed to it. A class-conditional
    network takes a condition too, whose `class` is int [B]; ValueError where it is missing, or is one too many.

    Use one at a time in a process: whether a GPU may use TF32 is a setting of the process. Raises RuntimeError where a
    network is to be compiled for a CPU and there is no C++ compiler.
    """

    def __init__(self, network: Told, execution: Execution) -> None:
        device = next(network.parameters()).device
        self.compiled, self.dtype = execution.compiled, set_precision(device, execution)
        network.lower(self.dtype)
        if self.dtype in HALVES.values():  # the layout of tensor cores; on CPUs it is that already
            network.to(memory_format=torch.channels_last)
        self._evaluate = torch.compile(network.evaluate) if self.compiled else network.evaluate
        self._network, self._device = network, device
        self._biases = cache(lambda timestep: self._embed(timestep, None))
        self._recent: tuple[tuple[float, Tensor, int, list[Tensor]], ...] = ()

    @torch.no_grad()
    def __call__(self, x: Tensor, timestep: float, condition: Condition | None = None) -> Tensor:
        batch = x.to(self.dtype)
        told = self._biases(timestep) if condition is None else self._of_classes(timestep, condition.values["class"])
        if self.compiled:
            if len(x) == 1:  # for which there would be kernels of their own
                batch = batch.expand(2, -1, -1, -1).contiguous()
            torch._dynamo.mark_dynamic(batch, 0)
        return self._evaluate(batch, told)[: len(x)].float()

    def _embed(self, timestep: float, classes: Tensor | None) -> list[Tensor]:
        return self._network.biases(torch.tensor([timestep], device=self._device), classes, self.dtype)

    def _of_classes(self, timestep: float, classes: Tensor) -> list[Tensor]:
        """A row for each sample. To look for equal classes would have a GPU waited for; the corrections of a step pass
        the very tensor of the last call."""
        version = 0 if classes.is_inference() else classes._version  # counts the changes in place
        for before, its_classes, its_version, found in self._recent:
            if its_classes is classes and (before, its_version) == (timestep, version):
                return found
        found = self._embed(timestep, classes)
        if self.compiled:
            if len(classes) == 1:
                found = [bias.expand(2, -1).contiguous() if bias.dim() == 2 else bias for bias in found]
            for bias in found:
                if bias.dim() == 2:
                    torch._dynamo.mark_dynamic(bias, 0)
        self._recent = ((timestep, classes, version, found), *self._recent[: KEPT - 1])
        return found
