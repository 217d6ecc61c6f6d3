"""Distillation strategies, one file each; ``registry`` finds them by name."""

from kd_train.strategies.base import Strategy
from kd_train.strategies.registry import load_strategy, term_weight

__all__ = ["Strategy", "load_strategy", "term_weight"]
