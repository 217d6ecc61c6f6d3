"""Learning rate as a pure function of the step, so that resuming needs no state."""

import bisect
import math

from kd_train.config.train_config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of step ``step`` (from 0): linear warm-up times decay.

    Warm-up: from ``warmup_start`` to 1 in ``warmup_steps``, so that step
    ``warmup_steps - 1`` is the first at the full rate. Milestones: a step that is one
    already has the lower rate.
    """
    schedule = config.schedule
    done = min((1 + step) / max(schedule.warmup_steps, 1), 1.0)
    warmup = schedule.warmup_start + (1 - schedule.warmup_start) * done
    decay = 1.0
    if schedule.kind == "exponential":
        decay = schedule.decay_rate ** (step / schedule.decay_steps)
    elif schedule.kind == "milestones":
        decay = schedule.decay_rate ** bisect.bisect_right(schedule.milestones, step)
    elif schedule.kind == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * min(step / config.steps, 1.0)))
    return config.optimizer.lr * warmup * decay
