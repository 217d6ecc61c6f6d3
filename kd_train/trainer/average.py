"""Moving average of all weights of a run."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class MovingAverage(AveragedModel):
    """The average of torch, without its search for parameters in every step.

    The first update copies the weights. ``model`` must be the one of the constructor.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self._decay = decay
        self._averages: list[Tensor] = list(self.module.parameters())
        self._weights: list[Tensor] = list(model.parameters())

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the weights of ``model``; buffers are copied."""
        if self.n_averaged == 0:
            super().update_parameters(model)
            return
        torch._foreach_lerp_(self._averages, self._weights, 1 - self._decay)
        for own, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(buffer)
        self.n_averaged += 1
