"""Names of the models, their sizes in the literature, and building by name."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from pipeline.errors import SpecError
from pipeline.models.gemnet.model import GemNetOC
from pipeline.models.gemnet.options import GemNetOCOptions
from pipeline.models.network import Network
from pipeline.models.painn import PaiNN, PaiNNOptions
from pipeline.models.schnet import SchNet, SchNetOptions
from pipeline.models.students import GROUP, build_student, load_student
from pipeline.plugins import PlugIns


@dataclass(frozen=True)
class ModelKind:
    """A network class, its hyperparameters, and what released files add to them.

    ``ignored_entries`` is a pattern of names in released state dicts that hold copies
    or constants; ``from_released`` turns released attributes into hyperparameters.
    """

    network: type[Network]
    options: type
    ignored_entries: str = r"(?!)"
    from_released: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict


def _released_schnet(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``attributes`` with the limit that the released code fixes."""
    limit = 50 if attributes.get("use_pbc", True) else 32
    return {**attributes, "max_neighbors": limit}


def _released_gemnet_oc(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``attributes`` with the basis that the released code takes if unsaid.

    Refuses choices that change numbers without leaving a trace in names and shapes.
    """
    if attributes.get("scale_basis"):
        raise SpecError("gemnet_oc.scale_basis is on; supported is false.")
    for key in ("rbf", "rbf_spherical"):
        basis = attributes.get(key)
        if isinstance(basis, Mapping) and basis.get("trainable"):
            raise SpecError(f"gemnet_oc.{key} is trainable; supported is a fixed one.")
    if attributes.get("quad_interaction") and not attributes.get("sbf"):
        return {**attributes, "sbf": {"name": "spherical_harmonics"}}
    return attributes


MODELS: dict[str, ModelKind] = {
    "gemnet_oc": ModelKind(
        GemNetOC,
        GemNetOCOptions,
        # Second names of other entries, and copies of the centres of radial_basis.
        ignored_entries=r"out_blocks\.\d+\.seq_energy_pre\..*"
        r"|(cbf_basis_(tint|aeint|eaint)|sbf_basis_qint)\.radial_basis\.rbf\.offset",
        from_released=_released_gemnet_oc,
    ),
    "painn": ModelKind(PaiNN, PaiNNOptions),
    "schnet": ModelKind(
        SchNet,
        SchNetOptions,
        ignored_entries=r"atomic_mass|interactions\.\d+\.conv\.nn\..*",
        from_released=_released_schnet,
    ),
}

# Sizes beyond this are mistakes, and building them would take all memory.
_LARGEST = 10_000

# What all GemNet-OC models of the distillation paper share.
_GEMNET_OC: dict[str, Any] = {
    "num_atom_emb_layers": 2,
    "cutoff": 12.0,
    "cutoff_aint": 12.0,
    "max_neighbors": 30,
    "max_neighbors_qint": 8,
    "max_neighbors_aeaint": 20,
    "max_neighbors_aint": 1000,
    "direct_forces": True,
    "quad_interaction": True,
    "atom_edge_interaction": True,
    "edge_atom_interaction": True,
    "atom_interaction": True,
    "qint_tags": [1, 2],
}

# Of the file that both PaiNN of the distillation paper take on OC20, the small one
# without the last two; on COLL there are none.
_PAINN_OC20_FACTORS = [1.03644, 0.89514, 0.89348, 0.88993, 0.88861, 0.88223]

# What makes the energy of a student continuous, for molecular dynamics.
_CONTINUOUS: dict[str, Any] = {"cutoff": 5.0, "max_neighbors": None}
_PAINN_MD: dict[str, Any] = {**_CONTINUOUS, "smooth": True, "direct_forces": False}

# Sizes of the distillation paper: for molecules (COLL) and, "-oc20", for catalysts;
# "-demo" are sizes that two CPU cores train in minutes. "-md" are for dynamics.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "painn-big": ("painn", {"hidden_channels": 256, "num_layers": 6}),
    "painn-small": ("painn", {"hidden_channels": 128, "num_layers": 4}),
    "schnet": ("schnet", {"cutoff": 12.0}),
    "painn-big-demo": (
        "painn",
        {"hidden_channels": 128, "num_layers": 4, "num_rbf": 64, "cutoff": 6.0},
    ),
    "painn-small-demo": (
        "painn",
        {"hidden_channels": 32, "num_layers": 3, "num_rbf": 32, "cutoff": 6.0},
    ),
    "schnet-demo": (
        "schnet",
        {
            "hidden_channels": 64,
            "num_filters": 64,
            "num_interactions": 3,
            "num_gaussians": 32,
            "cutoff": 6.0,
        },
    ),
    "gemnet-oc": (
        "gemnet_oc",
        {
            **_GEMNET_OC,
            "emb_size_atom": 128,
            "emb_size_edge": 256,
            "use_pbc": False,
        },
    ),
    "gemnet-oc-small": (
        "gemnet_oc",
        {
            **_GEMNET_OC,
            "num_blocks": 3,
            "emb_size_atom": 128,
            "emb_size_edge": 256,
            "use_pbc": False,
        },
    ),
    "gemnet-oc-demo": (
        "gemnet_oc",
        {
            **_GEMNET_OC,
            "num_spherical": 5,
            "num_radial": 64,
            "num_blocks": 3,
            "emb_size_atom": 64,
            "emb_size_edge": 64,
            "emb_size_trip_in": 32,
            "emb_size_trip_out": 32,
            "emb_size_quad_in": 16,
            "emb_size_quad_out": 16,
            "emb_size_aint_in": 32,
            "emb_size_aint_out": 32,
            "num_before_skip": 1,
            "num_after_skip": 1,
            "num_atom": 2,
            "num_output_afteratom": 2,
            "cutoff": 6.0,
            "cutoff_qint": 3.0,
            "cutoff_aint": 6.0,
            "use_pbc": False,
        },
    ),
    "gemnet-oc-oc20": ("gemnet_oc", _GEMNET_OC),
    "gemnet-oc-small-oc20": (
        "gemnet_oc",
        {**_GEMNET_OC, "num_blocks": 3, "emb_size_atom": 128, "emb_size_edge": 256},
    ),
    "painn-big-oc20": (
        "painn",
        {
            "hidden_channels": 512,
            "num_layers": 6,
            "scale_factors": _PAINN_OC20_FACTORS,
        },
    ),
    "painn-small-oc20": (
        "painn",
        {
            "hidden_channels": 256,
            "num_layers": 4,
            "scale_factors": _PAINN_OC20_FACTORS[:4],
        },
    ),
    "schnet-oc20": (
        "schnet",
        {
            "hidden_channels": 1024,
            "num_filters": 256,
            "num_interactions": 5,
            "num_gaussians": 200,
            "cutoff": 6.0,
        },
    ),
    "painn-md": (
        "painn",
        {"hidden_channels": 256, "num_layers": 6, **_PAINN_MD},
    ),
    "painn-small-md": (
        "painn",
        {"hidden_channels": 128, "num_layers": 4, **_PAINN_MD},
    ),
    "schnet-md": ("schnet", _CONTINUOUS),
    "painn-small-demo-md": (
        "painn",
        {"hidden_channels": 32, "num_layers": 3, "num_rbf": 32, **_PAINN_MD},
    ),
    "schnet-demo-md": (
        "schnet",
        {
            "hidden_channels": 64,
            "num_filters": 64,
            "num_interactions": 3,
            "num_gaussians": 32,
            **_CONTINUOUS,
        },
    ),
}


STUDENTS = PlugIns(GROUP, "student", (*PRESETS, *MODELS))


def student_names() -> tuple[str, ...]:
    """Names that ``student.preset`` can have: presets and installed plug-ins."""
    return (*PRESETS, *STUDENTS.installed())


def model_names() -> tuple[str, ...]:
    """Names that ``student.model`` can have: networks and installed plug-ins."""
    return (*MODELS, *STUDENTS.installed())


def find_preset(name: str) -> tuple[str, dict[str, Any]]:
    """Return network and hyperparameters of the student ``name``.

    Raises
    ------
    SpecError
        There is no such student, or its plug-in is broken.
    """
    STUDENTS.check(name)
    if name in PRESETS:
        return PRESETS[name]
    return name, dict(load_student(STUDENTS, name).hyperparameters)


def build_model(name: str, hyperparameters: Mapping[str, Any]) -> Network:
    """Freshly initialised model ``name``; keys left out take the model's defaults.

    Raises
    ------
    SpecError
        There is no such model, its plug-in is broken, or a hyperparameter is wrong.
    """
    if name not in MODELS:
        if name in STUDENTS.installed():
            return build_student(STUDENTS, name, hyperparameters)
        raise SpecError(
            f"No model is called {name!r}; known are {', '.join(model_names())}, and "
            "the model of a plug-in if its package is installed."
        )
    kind = MODELS[name]
    for key, value in hyperparameters.items():
        _check(name, key, value, kind.options)
    return kind.network(**hyperparameters)


def known_hyperparameters(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of ``values`` that model ``name`` has; None and unknown ones are left."""
    known = {field.name for field in fields(MODELS[name].options)}
    return {
        key: value
        for key, value in values.items()
        if key in known and value is not None
    }


def _check(name: str, key: str, value: object, options: type) -> None:
    """Refuse a key the model does not have and a value of the wrong kind."""
    known = {field.name: field for field in fields(options)}
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise SpecError(
            f"{name} has no hyperparameter {key!r}; the nearest known one is {near!r}."
        )
    hint = get_type_hints(options)[key]
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    least = known[key].metadata.get("least", None)
    if not any(_fits(value, kind, least) for kind in kinds):
        most = f" of at most {_LARGEST}" if {int, float} & set(kinds) else ""
        raise SpecError(
            f"{name}.{key} is {value!r:.200}, but {_describe_needed(kinds)} is "
            f"needed{most}."
        )


def _fits(value: object, kind: Any, least: int | None) -> bool:
    """Whether ``value`` is of ``kind`` and in the range of sensible sizes."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind in (int, float):
        allowed = int if kind is int else (int, float)
        if not isinstance(value, allowed):
            return False
        above = value > 0 if least is None else value >= least
        return above and value <= _LARGEST
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        return isinstance(value, list | tuple) and all(type(v) is item for v in value)
    return isinstance(value, get_origin(kind) or kind)


def _describe_needed(kinds: tuple[Any, ...]) -> str:
    """Name of the first of ``kinds`` for an error message."""
    kind = get_origin(kinds[0]) or kinds[0]
    names = {dict: "mapping", float: "positive float", int: "positive int"}
    if kind is list:
        return f"a list of {get_args(kinds[0])[0].__name__}s"
    return f"a {names.get(kind, kind.__name__)}"
