"""Finds the network that a configuration names as the student."""

from typing import Any

from kd_train.config.sections import StudentConfig
from pipeline.errors import SpecError
from pipeline.models.zoo import STUDENTS, find_preset, model_names, student_names
from pipeline.spec.yaml_model import nearest


def find_student(config: StudentConfig) -> tuple[str, dict[str, Any]]:
    """Return network and hyperparameters of a student.

    Raises
    ------
    SpecError
        There is no such student or network, or its plug-in is broken.
    """
    if config.model:
        if config.model not in (known := model_names()):
            raise SpecError(
                f"Unknown network {config.model!r}{nearest(config.model, known)}."
            )
        STUDENTS.check(config.model)
        return config.model, config.hyperparameters
    if config.preset not in (known := student_names()):
        raise SpecError(
            f"Unknown student {config.preset!r}{nearest(config.preset, known)}."
        )
    name, hyperparameters = find_preset(config.preset)
    return name, hyperparameters | config.hyperparameters
