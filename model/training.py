"""The training of a network on the DDPM objective: its steps, and the state from which it resumes."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palindrome.model.condition import Condition
from palindrome.model.ddim import sample, sample_noise
from palindrome.model.ema import EMA
from palindrome.model.families.unet2d import UNet2D
from palindrome.model.ladder import ladder
from palindrome.model.loss import DiffusionLoss
from palindrome.model.process import VP
from palindrome.model.unet import UNet, UNetConfig


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What a training is: `steps` of AdamW. The learning rate rises from 0 to `lr` in `lr_warmup` steps, and with
    `lr_decay` "cosine" falls to 0 at the last step; "none" keeps it. `ema` is the decay of the average of the weights,
    `grad_clip` the largest norm of a gradient, 0 for any; `flip` mirrors half of the images, at random.
    `class_dropout` of the images of a class-conditional network are told as of the null class (Ho & Salimans,
    arXiv 2207.12598, algorithm 1)."""

    steps: int
    lr: float
    lr_warmup: int
    lr_decay: str
    weight_decay: float
    ema: float
    grad_clip: float
    flip: bool
    prediction: str
    seed: int
    class_dropout: float = 0.0

    def learning_rate(self, step: int) -> float:
        """Of the step that follows `step` steps."""
        if step < self.lr_warmup:
            return self.lr * ((step + 1) / self.lr_warmup)
        if self.lr_decay == "none":
            return self.lr
        done = (step - self.lr_warmup) / max(1, self.steps - self.lr_warmup)
        return self.lr * (0.5 * (1 + math.cos(math.pi * done)))


class Training:
    """A network on `device`, the average of its weights, and its optimizer, after `step` steps: 0, or those of `state`.

    With `ranks` above 1, each holds one, and torch.distributed is set up: gradients are averaged over all. With class
    dropout, the last class that the network knows is the null class.
    """

    def __init__(
        self,
        unet: UNetConfig,
        process: VP,
        how: Hyperparameters,
        device: torch.device,
        bfloat16: bool = False,
        rank: int = 0,
        ranks: int = 1,
        state: dict[str, Any] | None = None,
    ) -> None:
        torch.manual_seed(how.seed)
        self.how, self.process, self.device, self.bfloat16 = how, process, device, bfloat16
        self.network = UNet(unet).to(device)
        self.average = EMA(self.network, how.ema)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=how.lr, weight_decay=how.weight_decay)
        self.step, seconds = 0, 0.0
        self.history: list[dict[str, float]] = []  # of the saved states: step, mean loss since the last, seconds so far
        self._losses: list[Tensor] = []  # since the last saved state
        if state is not None:
            self.network.load_state_dict(state["network"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, seconds, self.history = state["step"], state["seconds"], state["history"]
        self._trained = torch.nn.parallel.DistributedDataParallel(self.network) if ranks > 1 else self.network
        self._loss = DiffusionLoss(process, device)
        self.null_class = unet.num_class_embeds - 1 if unet.num_class_embeds and how.class_dropout else None
        self._generator = torch.Generator(device).manual_seed(hash((how.seed, rank, self.step)) % 2**63)
        self._started = time.monotonic() - seconds

    def steps(self, batches: Iterator[tuple[Tensor, Tensor | None]]) -> Iterator[int]:
        """Trains up to the last step, and yields behind each how many are done. A batch is pixels, uint8 [B, H, W, C],
        and for a class-conditional network their classes, int64 [B]."""
        while self.step < self.how.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.how.learning_rate(self.step)
            pixels, classes = next(batches)
            x0 = pixels.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            if self.how.flip:
                mirrored = torch.rand(len(x0), device=self.device, generator=self._generator) < 0.5
                x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
            if classes is not None:
                classes = classes.to(self.device)
                if self.null_class is not None:
                    drawn = torch.rand(len(x0), device=self.device, generator=self._generator)
                    classes = classes.masked_fill(drawn < self.how.class_dropout, self.null_class)
            with torch.autocast(self.device.type, torch.bfloat16) if self.bfloat16 else nullcontext():
                loss = self._loss(self._trained, x0, self._generator, classes)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.how.grad_clip or math.inf)
            self.optimizer.step()
            self.average.update_parameters(self.network)
            self._losses.append(loss.detach())
            self.step += 1
            yield self.step

    def recent_loss(self) -> float:
        """Mean of the last 100 steps, or of those since the last saved state."""
        return float(torch.stack(self._losses[-100:]).mean())

    def state(self) -> dict[str, Any]:
        """What `state` resumes from, and a new entry of the history."""
        loss, seconds = float(torch.stack(self._losses).mean()), time.monotonic() - self._started
        self.history.append({"step": self.step, "loss": loss, "seconds": seconds})
        self._losses.clear()
        return {
            "step": self.step,
            "seconds": seconds,
            "history": self.history,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def checkpoint(self, dtype: torch.dtype) -> UNet2D:
        """The averaged weights."""
        weights = {k: v.to(dtype) for k, v in self.average.module.state_dict().items()}
        return UNet2D(self.network.config, weights, self.process, null_class=self.null_class)

    def samples(self, count: int) -> Tensor:
        """[count, C, H, W] about [-1, 1]: of the averaged weights, DDIM with 50 steps, from the same noise always; of a
        class-conditional network, of one class after the other."""
        c, average = self.network.config, self.average.module
        shape = (c.in_channels, c.sample_size, c.sample_size)
        x = torch.cat([sample_noise(self.how.seed, i, shape) for i in range(count)]).to(self.device)
        levels = ladder("linear", 50, self.process.num_train_timesteps)
        if not c.num_class_embeds:
            return sample(average, x, levels, self.process)
        known = c.num_class_embeds - (self.null_class is not None)
        classes = Condition({"class": torch.arange(count, device=self.device) % known})
        return sample(
            lambda x, t, told: average(x, t, told.values["class"]), x, levels, self.process, condition=classes
        )


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether it does so in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
