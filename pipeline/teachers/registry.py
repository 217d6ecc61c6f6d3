"""Finds the potential that a spec names: our own models, our plug-ins, others'."""

import importlib
import importlib.util
from collections.abc import Callable

from pipeline.errors import SpecError
from pipeline.plugins import PlugIns
from pipeline.spec.sections import TeacherSpec
from pipeline.spec.yaml_model import nearest
from pipeline.teachers.potential import Potential

OWN_MODELS = ("gemnet_oc", "painn", "schnet")
# Module with a ``load``, the package it needs, and the extra that brings that package.
PLUGINS = {
    "sevennet": ("pipeline.teachers.sevennet", "sevenn", "sevennet"),
    "chgnet": ("pipeline.teachers.chgnet", "chgnet", "chgnet"),
    "mace": ("pipeline.teachers.mace", "mace", "mace"),
    "fairchem": ("pipeline.teachers.fairchem", "fairchem", "fairchem"),
}
TEACHERS = PlugIns("pipeline.teachers", "teacher", (*OWN_MODELS, *PLUGINS))


def load_potential(spec: TeacherSpec) -> Potential:
    """The potential that ``spec.model`` names, on the CPU.

    Raises
    ------
    SpecError
        No teacher has this name, the package it needs is not installed, or a plug-in
        of this name is broken or is not the only one.
    CheckpointError
        The file is not what the spec says.
    """
    return _loader(spec.model)(spec)


def teacher_names() -> list[str]:
    """Names that ``teacher.model`` can have here, sorted."""
    return sorted(TEACHERS.names())


def _loader(name: str) -> Callable[[TeacherSpec], Potential]:
    TEACHERS.check(name)
    if name in OWN_MODELS:
        from pipeline.teachers.builtin import load

        return load
    if name in PLUGINS:
        return _plugin(name)
    if name not in TEACHERS.names():
        raise SpecError(
            "teacher.model: there is no teacher "
            f"{name!r}{nearest(name, teacher_names())}."
        )
    loader: Callable[[TeacherSpec], Potential] = TEACHERS.load(name)
    return loader


def _plugin(name: str) -> Callable[[TeacherSpec], Potential]:
    module, package, extra = PLUGINS[name]
    if importlib.util.find_spec(package) is None:
        raise SpecError(
            f"teacher.model: {name} needs the package {package!r}, which is not "
            f"installed; pip install 'kd-train[{extra}]'."
        )
    loader: Callable[[TeacherSpec], Potential] = importlib.import_module(module).load
    return loader
