"""Refusing a sweep whose runs its report could not compare, before any is trained.

What the report demands of finished runs is in :mod:`kd_train.report.comparable`.
"""

import json
from collections.abc import Callable, Hashable, Mapping
from operator import attrgetter

from kd_train.config.train_config import TrainConfig
from kd_train.report.documents import BatchSizes
from pipeline.errors import SpecError

_BATCH_KEYS = ("batch_atoms", "batch_size", "accumulate_steps")


def require_comparable(configs: Mapping[str, TrainConfig], where: str) -> None:
    """Refuse runs that are not comparable; ``configs`` are resolved, by name.

    Raises
    ------
    SpecError
        Two runs differ in a split of validation or test; two of one student in steps,
        batch or network; or one of several of a student may stop early.
    """
    require_equal(configs, where, "val_split", lambda c: c.val_split)
    require_equal(configs, where, "test_split", lambda c: c.test_split or c.val_split)
    students: dict[str, dict[str, TrainConfig]] = {}
    for name, config in configs.items():
        students.setdefault(config.student.name, {})[name] = config
    for runs in students.values():
        require_equal(runs, where, "steps", lambda c: c.steps)
        require_equal(runs, where, "student.hyperparameters", _hyperparameters)
        _require_equal_batches(runs, where)
        _require_no_patience(runs, where)


def require_equal(
    configs: Mapping[str, TrainConfig],
    where: str,
    key: str,
    value: Callable[[TrainConfig], Hashable],
) -> None:
    """Refuse two runs of unequal ``value``, which the setting ``key`` decides.

    Raises
    ------
    SpecError
        There are such runs.
    """
    names: dict[Hashable, str] = {}
    for name, config in configs.items():
        names.setdefault(value(config), name)
    if len(names) > 1:
        first, second, *_ = names.values()
        values = f"{value(configs[first])} and {value(configs[second])}"
        raise SpecError(
            f"{where}: {first} and {second} differ in {key!r} ({values}), so the "
            "report cannot compare them; set the same value for all runs, or split "
            "the sweep."
        )


def _require_equal_batches(configs: Mapping[str, TrainConfig], where: str) -> None:
    names: dict[str, str] = {}
    for name, config in configs.items():
        names.setdefault(_batch(config), name)
    if len(names) > 1:
        pair = {name: configs[name] for name in list(names.values())[:2]}
        for key in _BATCH_KEYS:
            require_equal(pair, where, key, attrgetter(key))


def _hyperparameters(config: TrainConfig) -> str:
    return json.dumps(config.student.hyperparameters, sort_keys=True, default=str)


def _batch(config: TrainConfig) -> str:
    return BatchSizes.model_validate(config.model_dump()).together(processes=1)


def _require_no_patience(configs: Mapping[str, TrainConfig], where: str) -> None:
    for name, config in configs.items():
        if config.patience is not None and len(configs) > 1:
            raise SpecError(
                f"{where}, run {name}: 'patience' can end runs after different "
                "numbers of steps, which the report cannot compare; omit it."
            )
