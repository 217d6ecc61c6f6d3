"""Understands ``.pt`` checkpoints of OCP and fairchem-core 1.x in all their layouts."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import CheckpointError, SpecError
from pipeline.models.contents import ModelContents, Weights, empty_model
from pipeline.models.normalizer import NUM_REFERENCES, Normalizer
from pipeline.models.scale_factors import (
    SUFFIX,
    as_factors,
    merge_scale_factors,
    read_scale_file,
)
from pipeline.models.torch_file import read_torch_file, unwrap_tensors
from pipeline.models.zoo import MODELS, known_hyperparameters

# Centres of basis functions and atomic masses: stored, but not trained.
_BUFFER = re.compile(r"(.*\.)?(offset|atomic_mass)")
# Where models made of a backbone and heads keep the latter.
_HEAD = re.compile(r"^output_heads\.\w+\.")
# Projections that distillation adds for training; inference does without them.
_ADAPTER = re.compile(r"[a-z]2[a-z]_mapping\..*")


def read_released(
    path: Path, *, scale_file: Path | None, weights: Weights
) -> ModelContents:
    """Contents of the checkpoint at ``path``: model, sizes, weights, normaliser."""
    checkpoint = read_torch_file(path)
    state = _state_dict(checkpoint, path)
    name, attributes = _model_and_attributes(checkpoint, path)
    kind = MODELS[name]
    try:
        hyperparameters = known_hyperparameters(name, kind.from_released(attributes))
    except SpecError as error:
        raise CheckpointError(
            f"The model in {path} cannot be built: {error}"
        ) from error
    average = checkpoint.get("ema") if weights == "ema" else None
    ignored = re.compile(kind.ignored_entries)
    tensors = {k: v for k, v in state.items() if not ignored.fullmatch(k)}
    if average is not None:
        tensors |= _average_weights(tensors, average, path)
    tensors = {k: v for k, v in tensors.items() if not _ADAPTER.fullmatch(k)}
    sources = _scale_sources(checkpoint, state, attributes, path, scale_file)
    parameters = empty_model(name, hyperparameters, path).state_dict()
    names = [k.removesuffix(SUFFIX) for k in parameters if k.endswith(SUFFIX)]
    factors = merge_scale_factors(names, sources, path)
    # Factors that the model does not have stay, to be refused like other entries.
    tensors = {k: v for k, v in tensors.items() if k.removesuffix(SUFFIX) not in names}
    tensors |= {k + SUFFIX: torch.tensor(value) for k, value in factors.items()}
    return ModelContents(
        name=name,
        hyperparameters=hyperparameters,
        tensors=tensors,
        normalizer=_normalizer(checkpoint, path),
        provenance={
            "format": "ocp",
            "file": path.name,
            "weights": "raw" if average is None else "ema",
            "scale_factors": factors,
            "scale_factor_sources": list(sources) if factors else [],
        },
    )


def _state_dict(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Tensors by name, in the file's order, without the prefixes of wrappers."""
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise CheckpointError(
            f"{path} has no state_dict of tensors, so it is no OCP or fairchem-core "
            "1.x checkpoint."
        )
    plain = unwrap_tensors({str(key): value for key, value in state.items()}, path)
    return {_plain_name(key): value for key, value in plain.items()}


def _plain_name(key: str) -> str:
    """Name of an entry without the parts of backbones and heads."""
    return _HEAD.sub("", key.removeprefix("backbone."))


def _model_and_attributes(
    checkpoint: Mapping[str, Any], path: Path
) -> tuple[str, dict[str, Any]]:
    """Model name and its attributes from an old or a new configuration."""
    config = _mapping(checkpoint.get("config"))
    model = config.get("model")
    if not isinstance(model, Mapping):
        name, attributes = model, dict(_mapping(config.get("model_attributes")))
    elif "backbone" in model:
        attributes = _mapping(model["backbone"]) | _attributes_of_heads(model)
        name = str(attributes.pop("model", None)).removesuffix("_backbone")
    else:
        attributes = dict(model)
        name = attributes.pop("name", None)
    if not isinstance(name, str) or name not in MODELS:
        raise CheckpointError(
            f"{path} is a checkpoint of the model {name!r}; known are "
            f"{', '.join(MODELS)}."
        )
    return name, attributes


def _attributes_of_heads(model: Mapping[str, Any]) -> dict[str, Any]:
    """Depth of the output layers, which counts in the heads, not in the backbone."""
    heads = map(_mapping, _mapping(model.get("heads")).values())
    names = ("num_global_out_layers",)
    return {name: head[name] for head in heads for name in names if name in head}


def _average_weights(
    tensors: Mapping[str, Tensor], average: Any, path: Path
) -> dict[str, Tensor]:
    """Moving averages by name; the file lists them by position only."""
    shadow = _mapping(average).get("shadow_params")
    names = [
        name
        for name in tensors
        if not name.endswith(SUFFIX) and not _BUFFER.fullmatch(name)
    ]
    if not isinstance(shadow, list) or len(shadow) != len(names):
        found = len(shadow) if isinstance(shadow, list) else "no list of"
        raise CheckpointError(
            f"{path} holds {found} averaged weights for {len(names)} parameters; use "
            "the option teacher.weights: raw."
        )
    for name, value in zip(names, shadow, strict=True):
        if not isinstance(value, Tensor) or value.shape != tensors[name].shape:
            raise CheckpointError(
                f"The averaged weights in {path} do not fit parameter {name}; use the "
                "option teacher.weights: raw."
            )
    return dict(zip(names, shadow, strict=True))


def _scale_sources(
    checkpoint: Mapping[str, Any],
    state: Mapping[str, Tensor],
    attributes: Mapping[str, Any],
    path: Path,
    scale_file: Path | None,
) -> dict[str, dict[str, float]]:
    """Scale factors by origin, for every place that has any."""
    sources = {
        "state_dict": as_factors(
            {k: v for k, v in state.items() if k.endswith(SUFFIX)}, str(path)
        ),
        "scale_dict": as_factors(_mapping(checkpoint.get("scale_dict")), str(path)),
    }
    beside = _find_sibling(attributes.get("scale_file"), path)
    if scale_file is not None:
        sources[scale_file.name] = read_scale_file(scale_file)
    elif beside is not None:
        sources[beside.name] = read_scale_file(beside)
    return {origin: factors for origin, factors in sources.items() if factors}


def _find_sibling(named: object, path: Path) -> Path | None:
    """Return the scale file named in the attributes if it lies with the checkpoint."""
    if not isinstance(named, str) or not named:
        return None
    # The stored path belongs to the machine of the training run; only the file's name
    # can mean anything here.
    candidate = path.parent / Path(named).name
    return candidate if candidate.is_file() else None


def _normalizer(checkpoint: Mapping[str, Any], path: Path) -> Normalizer:
    """Normaliser from the old or new entries, or from the configuration."""
    stored = _mapping(checkpoint.get("normalizers"))
    energy = _mapping(stored.get("energy", stored.get("target")))
    forces = _mapping(stored.get("forces", stored.get("grad_target")))
    if not stored:
        energy, forces = _configured_normalizers(checkpoint)
    references = _mapping(_mapping(checkpoint.get("elementrefs")).get("energy"))
    if _number(forces, ("mean",), 0.0, path) != 0:
        raise CheckpointError(
            f"{path} adds a constant to all forces, which no supported model does."
        )
    spread = ("std", "rmsd", "stdev")
    return Normalizer(
        energy_mean=_number(energy, ("mean",), 0.0, path),
        energy_std=_number(energy, spread, 1.0, path),
        force_std=_number(forces, spread, 1.0, path),
        element_references=_references(references.get("element_references"), path),
    )


def _configured_normalizers(
    checkpoint: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Energy and force constants of an old configuration that asks for them."""
    dataset = _mapping(checkpoint.get("config")).get("dataset")
    if isinstance(dataset, list | tuple) and dataset:
        dataset = dataset[0]
    dataset = _mapping(dataset)
    if not dataset.get("normalize_labels"):
        return {}, {}
    return (
        {"mean": dataset.get("target_mean"), "std": dataset.get("target_std")},
        {
            "mean": dataset.get("grad_target_mean"),
            "std": dataset.get("grad_target_std"),
        },
    )


def _number(
    values: Mapping[str, Any], keys: tuple[str, ...], default: float, path: Path
) -> float:
    """Value of the first of ``keys`` that is there, as a number."""
    for key in keys:
        value = values.get(key)
        if value is None:
            continue
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"The normaliser in {path} has no number for {key}.")
        return float(value)
    return default


def _references(values: Any, path: Path) -> tuple[float, ...]:
    """Energy per atomic number in eV, padded with zeros."""
    if values is None:
        return (0.0,) * NUM_REFERENCES
    fits = isinstance(values, Tensor) and values.numel() <= NUM_REFERENCES
    if not fits or values.is_complex():
        raise CheckpointError(
            f"The element references in {path} are not a tensor of at most "
            f"{NUM_REFERENCES} numbers."
        )
    given = values.double().flatten().tolist()
    return tuple(given) + (0.0,) * (NUM_REFERENCES - len(given))


def _mapping(value: object) -> dict[str, Any]:
    """Return ``value`` as a dict, or an empty one if it is no mapping."""
    return dict(value) if isinstance(value, Mapping) else {}
