"""Learning rate as a pure function of the step, so that resuming needs no state."""

import math

from kd_train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of step ``step`` (from 0): linear warm-up times the configured decay."""
    schedule = config.schedule
    warmup = min((1 + step) / max(schedule.warmup_steps, 1), 1.0)
    decay = 1.0
    if schedule.kind == "exponential":
        decay = schedule.decay_rate ** (step / schedule.decay_steps)
    elif schedule.kind == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * min(step / config.steps, 1.0)))
    return config.optimizer.lr * warmup * decay
