"""Progress of a run: step, best validation, early stopping."""

import math
from dataclasses import dataclass

from kd_train.config.train_config import TrainConfig

_LARGER_IS_BETTER = ("forces_cos", "efwt")


@dataclass
class TrainingState:
    """Saved in every checkpoint.

    The next batch is number ``offset`` of ``epoch``, in the order of ``world_size``
    processes. ``best`` is NaN until a validation gave a number; ``since_best``
    validations have passed since.
    """

    step: int = 0
    epoch: int = 0
    offset: int = 0
    world_size: int = 1
    seconds: float = 0.0
    best: float = math.nan
    since_best: int = 0

    def note(self, value: float, monitor: str) -> bool:
        """Record a validation and return whether to save its weights.

        They are saved if the validation is the best, or if none gave a number
        yet.

        NaN is never better than a number.
        """
        improved = is_better(value, self.best, monitor)
        self.since_best = 0 if improved else self.since_best + 1
        if improved:
            self.best = value
        return improved or math.isnan(self.best)

    def is_done(self, config: TrainConfig) -> bool:
        """Return whether training has reached its last step or was stopped early."""
        return self.step >= config.steps or self.stopped_early(config)

    def stopped_early(self, config: TrainConfig) -> bool:
        """Return whether ``patience`` validations have passed without a better one."""
        return config.patience is not None and self.since_best >= config.patience


def is_better(value: float, best: float, monitor: str) -> bool:
    """Return whether ``value`` of metric ``monitor`` beats ``best``."""
    if math.isnan(value) or math.isnan(best):
        return not math.isnan(value)
    return value > best if monitor in _LARGER_IS_BETTER else value < best
