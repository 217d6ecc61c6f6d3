"""What a step does with the gradients: clip them, move weights and their average."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_train.trainer.average import MovingAverage
from kd_train.trainer.optimizer import clip_gradients
from pipeline.native.library import Library, addresses, sizes, wanted_library

# What the optimiser keeps for a weight, in the order of the C function.
_STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")


@dataclass(frozen=True)
class _Group:
    """Weights of one group of the optimiser by number, and where their numbers lie."""

    options: dict[str, Any]
    members: list[int]
    arrays: tuple[Any, ...]  # sizes, addresses of weights
    state: tuple[Any, ...]  # addresses of what _STATE names, None if it is not kept


class WeightUpdate:
    """Clips gradients to the norm ``clip_norm``, steps, and moves the average.

    With native kernels, C code does to the same tensors what torch does.
    """

    def __init__(
        self,
        modules: nn.Module,
        optimizer: torch.optim.AdamW,
        average: MovingAverage,
        clip_norm: float | None,
    ) -> None:
        self._modules = modules
        self._optimizer = optimizer
        self._average = average
        self._clip_norm = clip_norm
        self._trained = [p for p in modules.parameters() if p.requires_grad]
        self._groups: list[_Group] = []
        self._grouped: list[bool] = []
        optimizer.register_load_state_dict_post_hook(lambda _: self._grouped.clear())

    def clear_gradients(self) -> None:
        """Forget the gradients of the last step."""
        for parameter in self._trained:
            parameter.grad = None

    def __call__(self) -> None:
        """Use the gradients of this step."""
        gradients = [parameter.grad for parameter in self._trained]
        present = [gradient for gradient in gradients if gradient is not None]
        library = wanted_library(*present) if present else None
        if library is None or not self._find_groups(gradients):
            if self._clip_norm is not None and present:
                clip_gradients(present, self._clip_norm)
            self._optimizer.step()
        else:
            factor = self._clip_factor(library, present)
            for group in self._groups:
                _step(library, group, gradients, factor)
        self._average.update_parameters(self._modules)

    def _find_groups(self, gradients: Sequence[Tensor | None]) -> bool:
        """Find the weights to step; False if the optimiser keeps nothing for one yet.

        Torch makes in its first step what it keeps.
        """
        moved = [gradient is not None for gradient in gradients]
        if moved == self._grouped:
            return True
        state = self._optimizer.state
        pairs = zip(self._trained, moved, strict=True)
        if not all(
            p.is_contiguous() and state.get(p) for p, is_moved in pairs if is_moved
        ):
            return False
        number = {id(p): i for i, p in enumerate(self._trained)}
        self._groups = []
        for options in self._optimizer.param_groups:
            members = [number[id(p)] for p in options["params"] if moved[number[id(p)]]]
            weights = [self._trained[i] for i in members]
            states = [state[weight] for weight in weights]
            kept = tuple(_column(states, name) for name in _STATE)
            arrays = (sizes(weights), addresses(weights))
            self._groups.append(_Group(options, members, arrays, kept))
        self._grouped = moved
        return True

    def _clip_factor(self, library: Library, gradients: Sequence[Tensor]) -> float:
        if self._clip_norm is None:
            return 1.0
        total = torch.zeros(1, dtype=torch.float64)
        arrays = (sizes(gradients), addresses(gradients))
        library.call("sum_squares", len(gradients), *arrays, total)
        return min(self._clip_norm / (math.sqrt(total.item()) + 1e-6), 1.0)


def _column(states: Sequence[dict[str, Any]], name: str) -> Any:
    """Addresses of one entry of all states, None if they lack it."""
    return (
        addresses([s[name] for s in states]) if states and name in states[0] else None
    )


def _step(
    library: Library, group: _Group, gradients: Sequence[Tensor | None], factor: float
) -> None:
    """Step the weights of a group, whose gradients are multiplied by ``factor``."""
    present = [g for i in group.members if (g := gradients[i]) is not None]
    options = group.options
    library.call(
        *("adamw", len(present), *group.arrays, addresses(present), *group.state),
        *(factor, float(options["lr"]), float(options["weight_decay"])),
        *(*map(float, options["betas"]), float(options["eps"])),
    )
