"""Stage two: train students against a store of teacher features.

What users import is here: ``from kd_train import TrainConfig, Trainer``. A name is
imported when it is first used, so that ``import kd_train`` stays fast.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_train.config.train_config import TrainConfig, load_config
    from kd_train.evaluation.calculator import StudentCalculator
    from kd_train.evaluation.evaluate_student import evaluate_student
    from kd_train.evaluation.load_student import load_student
    from kd_train.loader.data import CachedSamples
    from kd_train.report.report import write_report
    from kd_train.strategies.base import Strategy
    from kd_train.trainer.trainer import Trainer

__all__ = [
    "CachedSamples",
    "Strategy",
    "StudentCalculator",
    "TrainConfig",
    "Trainer",
    "evaluate_student",
    "load_config",
    "load_student",
    "write_report",
]

_MODULES = {
    "CachedSamples": "kd_train.loader.data",
    "Strategy": "kd_train.strategies.base",
    "StudentCalculator": "kd_train.evaluation.calculator",
    "TrainConfig": "kd_train.config.train_config",
    "Trainer": "kd_train.trainer.trainer",
    "evaluate_student": "kd_train.evaluation.evaluate_student",
    "load_config": "kd_train.config.train_config",
    "load_student": "kd_train.evaluation.load_student",
    "write_report": "kd_train.report.report",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "__version__":
        return version("kd-train")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'kd_train' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*__all__, "__version__"])
