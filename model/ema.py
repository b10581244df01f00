"""Exponential moving average of a network's weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import PARAM_LIST, AveragedModel, get_ema_multi_avg_fn


class EMA(AveragedModel):
    """average <- d average + (1 - d) weights, d rising to `decay` as min(decay, (1 + n) / (10 + n)) over n updates, so
    that the average of a short training does not remember the initial values.

    `module` is the network, in eval mode, with the average as its weights: float32, whatever the network's are.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network, multi_avg_fn=self._update)
        self.decay = decay
        self.module.float().eval()
        self.n_averaged.fill_(1)  # at 0, AveragedModel would forget the initial values

    def _update(self, averages: PARAM_LIST, weights: PARAM_LIST, _: Tensor | int) -> None:
        n = int(self.n_averaged)  # on the CPU; the argument is a copy on the device, which would have to be waited for
        lerp = get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))
        lerp(averages, [value.float() for value in weights], n)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Also reads the states of versions without AveragedModel: `updates`, and each average as `shadow.NAME`."""
        if "updates" in state_dict:
            renamed = {k.replace("shadow.", "module.", 1): v for k, v in state_dict.items() if k != "updates"}
            state_dict = {"n_averaged": self.n_averaged.new_tensor(state_dict["updates"] + 1), **renamed}
        return super().load_state_dict(state_dict, strict, assign)
