"""Names of the models, their sizes in the literature, and building by name."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from pipeline.errors import SpecError
from pipeline.models.network import Network
from pipeline.models.painn import PaiNN, PaiNNOptions
from pipeline.models.schnet import SchNet, SchNetOptions


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


MODELS: dict[str, ModelKind] = {
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

# Sizes of the distillation paper: for molecules (COLL) and, "-oc20", for catalysts;
# "-demo" are sizes that two CPU cores train in minutes.
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
    "painn-big-oc20": ("painn", {"hidden_channels": 512, "num_layers": 6}),
    "painn-small-oc20": ("painn", {"hidden_channels": 256, "num_layers": 4}),
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
}


def build_model(name: str, hyperparameters: Mapping[str, Any]) -> Network:
    """Freshly initialised model ``name``; keys left out take the model's defaults."""
    if name not in MODELS:
        raise SpecError(f"No model is called {name!r}; known are {', '.join(MODELS)}.")
    kind = MODELS[name]
    defaults = vars(kind.options())
    for key, value in hyperparameters.items():
        _check(name, key, value, defaults)
    return kind.network(**hyperparameters)


def known_hyperparameters(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of ``values`` that model ``name`` has; None and unknown ones are left."""
    known = {field.name for field in fields(MODELS[name].options)}
    return {
        key: value
        for key, value in values.items()
        if key in known and value is not None
    }


def _check(name: str, key: str, value: object, defaults: Mapping[str, Any]) -> None:
    """Refuse a key the model does not have and a value of the wrong kind."""
    if key not in defaults:
        near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.0)[0]
        raise SpecError(
            f"{name} has no hyperparameter {key!r}; the nearest known one is {near!r}."
        )
    expected = type(defaults[key])
    allowed = (int, float) if expected is float else expected
    wrong = not isinstance(value, allowed)
    if isinstance(value, bool) != (expected is bool):
        wrong = True
    if isinstance(value, int | float) and not isinstance(value, bool):
        wrong = wrong or not 0 < value <= _LARGEST
    if wrong:
        kind = {dict: "mapping", float: "positive float", int: "positive int"}
        raise SpecError(
            f"{name}.{key} is {value!r}, but a "
            f"{kind.get(expected, expected.__name__)} is needed."
        )
