"""A checkpoint's network, made ready to be evaluated often: in a precision, compiled or not, each timestep embedded
once."""

from functools import cache
from shutil import which

import torch
from torch import Tensor

from palindrome.model.execution import HALVES, Execution
from palindrome.model.unet import UNet


class Engine:
    """A `model.ddim.Network`: x float [B, C, H, W] and a timestep -> its output, float32 [B, C, H, W]. The state stays
    in float32 with the caller; the precision is the network's alone, which is changed to it.

    Use one at a time in a process: whether a GPU may use TF32 is a setting of the process. Raises RuntimeError where a
    network is to be compiled for a CPU and there is no C++ compiler.
    """

    def __init__(self, network: UNet, execution: Execution) -> None:
        device = network.conv_in.weight.device
        self.compiled, self.dtype = execution.compiled, HALVES.get(execution.precision, torch.float32)
        network.lower(self.dtype)
        if self.dtype in HALVES.values():  # the layout of tensor cores; on CPUs it is that already
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        allowed = execution.precision == "tf32"  # torch allows it to convolutions unless told otherwise
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
        if self.compiled and device.type == "cpu" and not any(map(which, ("c++", "g++", "clang++"))):
            raise RuntimeError("to compile a network for a CPU takes a C++ compiler, and there is none")
        self._evaluate = torch.compile(network.evaluate) if self.compiled else network.evaluate
        self._biases = cache(
            lambda timestep: [b.to(self.dtype) for b in network.biases(torch.tensor([timestep], device=device))]
        )

    @torch.no_grad()
    def __call__(self, x: Tensor, timestep: int) -> Tensor:
        batch = x.to(self.dtype)
        if self.compiled:
            if len(x) == 1:  # for which there would be kernels of their own
                batch = batch.expand(2, -1, -1, -1).contiguous()
            torch._dynamo.mark_dynamic(batch, 0)
        return self._evaluate(batch, self._biases(timestep))[: len(x)].float()
