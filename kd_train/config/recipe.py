"""Recipes: the paper's settings for a teacher, a student and a dataset, as data.

The files in ``recipes/`` hold Tables 3 to 6 of arXiv:2306.14818. What the user sets
himself always comes first.
"""

import logging
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field as Key

from kd_train.config.sections import DistillConfig
from kd_train.config.strategy_names import BUILT_IN
from kd_train.config.train_config import RECIPES, TrainConfig
from pipeline.errors import SpecError
from pipeline.spec.yaml_model import ClosedModel, read_yaml, validate

log = logging.getLogger("kd_train")
_FOLDER = Path(__file__).parents[1] / "recipes"
# Keys of the schedule that mean nothing, or something else, for another kind.
_OF_ONE_KIND = ("decay_rate", "decay_steps", "milestones")


class Recipe(ClosedModel):
    """Settings of one dataset: by student, and weights by teacher and student."""

    students: dict[str, dict[str, Any]] = Key(min_length=1)
    pairs: dict[str, dict[str, dict[str, float]]]


@cache
def read_recipe(name: str) -> Recipe:
    """Read the recipe of dataset ``name``, one of ``RECIPES``."""
    path = _FOLDER / f"{name}.yaml"
    return validate(Recipe, read_yaml(path), path.name)


def apply_recipe(
    config: TrainConfig, teacher: str | None, processes: int = 1
) -> TrainConfig:
    """Return ``config`` with the paper's values for all unset keys.

    Parameters
    ----------
    config
        ``recipe: auto`` takes the recipe that has the student, if any; a dataset's
        name takes that of the dataset; ``none`` leaves the built-in defaults.
    teacher
        Model of the store's teacher, None if no teacher ran.
    processes
        How many train together. The recipe's batch is that of a whole step, so each of
        them gets its share of it as ``batch_size``.

    Raises
    ------
    SpecError
        The named recipe has no such student, its batch has no equal shares, or what
        the set values contradict other values.
    """
    student = config.student.preset
    name = _choose_recipe(config.recipe, student)
    if name == "none":
        return _check(config.model_copy(update={"recipe": name}))
    recipe = read_recipe(name)
    settings: dict[str, Any] = {
        **recipe.students[student],
        "schedule": _schedule(recipe.students[student]["schedule"], config),
        "distill": _weights(recipe, name, teacher, config),
    }
    chosen = _merge(settings, config.model_dump(exclude_unset=True))
    if "batch_size" not in config.model_fields_set and config.batch_atoms is None:
        whole = settings["batch_size"]
        chosen["batch_size"] = _share(whole, name, processes, config.accumulate_steps)
    return _check(validate(TrainConfig, {**chosen, "recipe": name}, f"recipe {name}"))


def _check(config: TrainConfig) -> TrainConfig:
    """Return ``config`` after the checks that depend on several values."""
    validate(TrainConfig, config.model_dump(), f"configuration, recipe {config.recipe}")
    return config


def _choose_recipe(wished: str, student: str) -> str:
    if wished == "none":
        return "none"
    if wished == "auto":
        having = (name for name in RECIPES if student in read_recipe(name).students)
        return next(having, "none")
    known = read_recipe(wished).students
    if student not in known:
        raise SpecError(
            f"Recipe {wished!r} has no student {student!r} (known: "
            f"{', '.join(known)}); choose a known student or set recipe: none."
        )
    return wished


def _schedule(schedule: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Return ``schedule`` without keys of a kind that the user replaced."""
    own = config.schedule
    if "kind" not in own.model_fields_set or own.kind == schedule["kind"]:
        return schedule
    return {key: value for key, value in schedule.items() if key not in _OF_ONE_KIND}


def _share(whole: int, name: str, processes: int, accumulate: int) -> int:
    """Return the samples in a batch of one process if a step takes ``whole``."""
    share, rest = divmod(whole, processes * accumulate)
    if rest:
        raise SpecError(
            f"Recipe {name!r} uses {whole} samples per step, which cannot be divided "
            f"evenly by {processes} process(es) with accumulate_steps={accumulate}; "
            "set batch_size, the samples in a batch of one process."
        )
    return share


def _weights(
    recipe: Recipe, name: str, teacher: str | None, config: TrainConfig
) -> dict[str, float]:
    """Table 6 for the pair; of another teacher where the paper has not this one."""
    student, own = config.student.preset, config.distill.set_weights
    # The paper has no weights of plug-ins, which bring a default of their own.
    unset = [name for name in config.strategies if name in BUILT_IN and name not in own]
    if teacher is None or not unset:
        return {}
    known = {t: pairs[student] for t, pairs in recipe.pairs.items() if student in pairs}
    weights = known.get(teacher)
    if weights is None:
        weights = next(iter(known.values()), {})
        source = (
            f"the weights of {next(iter(known))}" if known else "the default weights"
        )
        log.warning(
            "recipe %s has no weights for %s to %s; the run uses %s, so tune the "
            "weights (distill.*)",
            name,
            teacher,
            student,
            source,
        )
    for strategy in unset:
        if weights and strategy not in weights:
            log.warning(
                "recipe %s has no weight of %s for %s; the run uses the default %g",
                name,
                strategy,
                student,
                getattr(DistillConfig(), strategy),
            )
    return weights


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return ``below`` with the keys of ``above`` on top, section by section."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _merge(old, value)
        merged[key] = value
    return merged
