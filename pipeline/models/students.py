"""Students of other packages, each an entry point that is a ``StudentPreset``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.models.network import Network
from pipeline.plugins import PlugIns

GROUP = "kd_train.students"
# Attributes that every network sets.
_NEEDED = ("graph_rule", "hyperparameters", "widths", "elements")


@dataclass(frozen=True)
class StudentPreset:
    """A network class and the hyperparameters of one size of it.

    The entry point's name is that of the student, and of the network in saved files.
    ``hyperparameters`` are JSON-able keyword arguments of ``model``.
    """

    model: type[Network]
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)


def load_student(plugins: PlugIns, name: str) -> StudentPreset:
    """Import the student ``name`` of a plug-in.

    Raises
    ------
    SpecError
        There is no such plug-in, it cannot be imported, or it is no ``StudentPreset``
        of a ``Network``.
    """
    found = plugins.load(name)
    if not isinstance(found, StudentPreset):
        raise plugins.refuse(name, "is not a pipeline.models.students.StudentPreset")
    if not (isinstance(found.model, type) and issubclass(found.model, Network)):
        raise plugins.refuse(name, "has a model that is not a subclass of Network")
    return found


def build_student(
    plugins: PlugIns, name: str, hyperparameters: Mapping[str, Any]
) -> Network:
    """Freshly initialised network of the plug-in ``name``.

    Raises
    ------
    SpecError
        Errors of `load_student`; the network refuses a hyperparameter, or lacks an
        attribute that every network has.
    """
    preset = load_student(plugins, name)
    try:
        network = preset.model(**hyperparameters)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise plugins.refuse(name, f"refuses its hyperparameters ({reason})") from error
    missing = [key for key in _NEEDED if not hasattr(network, key)]
    if missing:
        raise plugins.refuse(name, f"does not set the attribute {missing[0]!r}")
    return network
