"""Weights of the distillation terms as training goes: schedule and balance."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kd_train.config.sections import LambdaSchedule
from kd_train.config.train_config import TrainConfig
from kd_train.strategies import load_strategy, term_weight
from pipeline.fields import FIELDS

# Of the running means; they look back about fifty steps.
_DECAY = 0.98
# Share of the steps after which faded features have no weight.
_FADED_AT = 0.5


def schedule_factor(schedule: LambdaSchedule, step: int, steps: int) -> float:
    """Return the factor of all distillation weights in ``step`` (from 0) of ``steps``.

    ``start`` up to ``first_step``, then to ``end`` within ``schedule.steps``, or by the
    end of training, and ``end`` from there on.
    """
    if schedule.kind in ("constant", "fade"):
        return schedule.start
    length = schedule.steps or max(steps - schedule.first_step, 1)
    done = min(max((step - schedule.first_step) / length, 0.0), 1.0)
    if schedule.kind == "cosine":
        done = 0.5 * (1 - math.cos(math.pi * done))
    return schedule.start + (schedule.end - schedule.start) * done


def fade_factor(step: int, steps: int) -> float:
    """Return the factor of terms on features: from 1 to 0 at half of ``steps``."""
    return max(0.0, 1 - step / (_FADED_AT * steps))


def reads_features(name: str) -> bool:
    """Return whether the term ``name`` compares hidden states of the teacher."""
    groups = {FIELDS[field].group for field in load_strategy(name).fields}
    return bool(groups & {"features", "edges"})


class Weighting:
    """Weight in force of every distillation term.

    The configured weight times the schedule's factor. With ``target_ratio`` also times
    one common factor that brings the terms together to that fraction of L0 by running
    means of both; the first step, before there are any, is one without distillation.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._config = config
        self._fixed = {
            name: term_weight(config.distill, name) for name in config.strategies
        }
        self._balance = config.distill.target_ratio if self._fixed else None
        # L0, and the terms by their configured weights.
        self._means = torch.zeros(2, dtype=torch.float64, device=device)

    @property
    def needs_values(self) -> bool:
        """Whether :meth:`note` needs the values of every step."""
        return self._balance is not None

    def weights(self, step: int) -> dict[str, float] | dict[str, Tensor]:
        """Return the weight of every term in ``step`` (from 0), float32 if balanced."""
        factor = schedule_factor(
            self._config.distill.schedule, step, self._config.steps
        )
        fixed = {
            name: weight * self._fading(name, step)
            for name, weight in self._fixed.items()
        }
        if self._balance is None:
            return {name: factor * weight for name, weight in fixed.items()}
        l0, terms = self._means
        ratio = torch.where(terms > 0, l0 / terms.clamp(min=1e-300), 0).float()
        common = factor * self._balance * ratio
        return {name: common * weight for name, weight in fixed.items()}

    def _fading(self, name: str, step: int) -> float:
        if self._config.distill.schedule.kind != "fade" or not reads_features(name):
            return 1.0
        return fade_factor(step, self._config.steps)

    def note(self, values: Mapping[str, Tensor]) -> None:
        """Record the values of a step, detached, summed over all processes."""
        terms = sum(weight * values[name] for name, weight in self._fixed.items())
        now = torch.stack([values["l0"], torch.as_tensor(terms)]).to(self._means)
        self._means = _DECAY * self._means + (1 - _DECAY) * now

    def state_dict(self) -> dict[str, Tensor]:
        """Return the values that resuming needs."""
        return {"means": self._means}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`."""
        self._means = state["means"].to(self._means)
