"""Student, adapters and normaliser of a run, checked against the store."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch_geometric.data import Data

from kd_train.config.recipe import apply_recipe
from kd_train.config.sections import LossConfig
from kd_train.config.strategy_names import BUILT_IN
from kd_train.config.train_config import TrainConfig
from kd_train.loader.choose_split import choose_split, stored_widths
from kd_train.loader.data import CachedSamples
from kd_train.loader.split import Split
from kd_train.strategies import Strategy, load_strategy, term_weight
from kd_train.strategies.base import Setting
from kd_train.strategies.losses import (
    Labels,
    OutputError,
    complete_labels,
    reference_labels,
)
from kd_train.trainer.contents import check_contents
from kd_train.trainer.labels import (
    FIRST_SAMPLES,
    has_labels,
    require_measured,
    require_predictions,
)
from kd_train.trainer.numerics import require_exact_differences
from kd_train.trainer.students import find_student
from kd_train.trainer.untrained import (
    count_labels,
    labelled_splits,
    require_trained_outputs,
)
from kd_train.trainer.virials import (
    has_direct_forces,
    require_virials,
    with_virial_weight,
)
from pipeline.datasets.label_statistics import KIND_DIFFERENCE
from pipeline.errors import SpecError
from pipeline.fields import FIELDS, PREDICTION_FIELDS
from pipeline.models.network import Network
from pipeline.models.normalizer import Normalizer
from pipeline.models.zoo import build_model, model_names, student_names
from pipeline.spec.sections import PER_ELEMENT
from pipeline.store.reader import FeatureStore

log = logging.getLogger("kd_train")
# Samples on which a fresh student sets its scale factors.
_FITTING_SAMPLES = 32
# Recipe for periodic structures; presets with this suffix have no recipe.
_PERIODIC_RECIPE = "oc20"
_DEMO = "-demo"


@dataclass(frozen=True)
class Learner:
    """The plain student, its training-only adapters, and the units it works in.

    ``fields`` are what training reads from the store besides structures and labels;
    ``supervised`` is L0, ``training_data`` (JSON-able) what later uses of the student
    are checked against.
    """

    model_name: str
    student: Network
    strategies: tuple[Strategy, ...]
    adapters: nn.ModuleDict
    normalizer: Normalizer
    fields: tuple[str, ...]
    supervised: OutputError
    initial_digest: str
    training_data: dict[str, Any]


def make_learner(config: TrainConfig, store: FeatureStore) -> Learner:
    """Build the student from its seed, and adapters from a separate random stream.

    Raises
    ------
    SpecError
        The preset is unknown, the student predicts no forces, a strategy needs what
        store or student lack, or nothing would train an output of the student.
    """
    name, hyperparameters = find_student(config.student)
    fields = required_fields(config)
    split = choose_split(store, config.train_split, fields)
    if config.loss.pseudo_label_weight:
        require_predictions(split)
    torch.manual_seed(config.seed)
    student = build_model(name, hyperparameters)
    _require_forces(student)
    require_virials(config, split, student)
    normalizer = run_normalizer(config, store)
    setting = Setting(
        student_name=config.student.name,
        student_widths=student.widths,
        teacher_widths=stored_widths(split),
        normalizer=normalizer,
        loss=config.loss,
        seed=config.seed,
        jacobian=config.jacobian,
    )
    strategies = tuple(load_strategy(s)(setting) for s in config.strategies)
    require_measured(config, choose_split(store, config.val_split))
    known = count_labels(store, config.train_split)
    require_trained_outputs(config, known, has_direct_forces(student))
    tests = config.test_split.split("+") if config.test_split else []
    training_data = check_contents(
        split,
        [
            ("val_split", choose_split(store, config.val_split)),
            *(
                ("test_split", choose_split(store, name))
                for name in tests
                if name != config.val_split
            ),
        ],
        student.graph_rule,
        normalizer,
        _reference_split(config, store, normalizer),
    )
    if not student.is_fitted:
        student.fit(_fitting_batch(student, choose_fitting_split(config, store)))
    adapters = {s.name: s.adapter for s in strategies if s.adapter is not None}
    return Learner(
        name,
        student,
        strategies,
        nn.ModuleDict(adapters),
        normalizer,
        fields,
        OutputError("l0", supervised_labels(config.loss), normalizer, config.loss),
        weights_digest(student),
        training_data,
    )


def _reference_split(
    config: TrainConfig, store: FeatureStore, normalizer: Normalizer
) -> Split | None:
    """Return the split whose labels gave the reference energies, if any."""
    statistics = store.attributes["label_statistics"]
    for name in config.train_split.split("+"):
        choice = store.attributes["splits"][name].get("reference_energies")
        same = Normalizer.from_dict(statistics[name]) == normalizer
        if choice == PER_ELEMENT and same:
            return store.splits[name]
    return None


def required_fields(config: TrainConfig) -> tuple[str, ...]:
    """Store fields that the terms of the loss read, without repetition."""
    names = [field for s in config.strategies for field in load_strategy(s).fields]
    if config.loss.pseudo_label_weight:
        names += PREDICTION_FIELDS
    return tuple(dict.fromkeys(names))


def supervised_labels(config: LossConfig) -> Callable[[Data], Labels]:
    """Return the function that gives the labels of L0."""
    if not config.pseudo_label_weight:
        return reference_labels
    return partial(complete_labels, weight=config.pseudo_label_weight)


def _require_forces(student: Network) -> None:
    """Refuse a student that neither L0 nor its validation could be computed of."""
    if not student.hyperparameters.get("regress_forces", True):
        raise SpecError(
            "student.hyperparameters.regress_forces is false, but losses and metrics "
            "need forces; omit it, and set loss.force_weight=0 to learn from "
            "energies alone."
        )


def resolve_config(
    config: TrainConfig, store: FeatureStore, processes: int = 1
) -> TrainConfig:
    """Return ``config`` with the student and the recipe that the store suggests.

    Unset values come from the recipe for a run of ``processes``, see
    ``kd_train.config.recipe``.

    Raises
    ------
    SpecError
        The store has no such split, or lacks a field of the strategies; the precision
        is too low for one of them; the recipe has no such student, or its batch cannot
        be shared by the processes.
    """
    config = choose_student(config, store)
    split = choose_split(store, config.train_split)
    stored = stored_widths(split)
    for strategy in config.strategies:
        load_strategy(strategy).require_fields(stored)
    require_exact_differences(config)
    if "normalizer" not in config.model_fields_set and _has_units(store, config):
        config = config.model_copy(update={"normalizer": "store"})
    chosen = apply_recipe(config, _teacher_model(store), processes)
    chosen = _with_plugin_weights(chosen)
    chosen = _with_pseudo_label_weight(chosen, store)
    chosen = with_virial_weight(chosen, split)
    if config.recipe == "auto":
        _warn_of_recipe(chosen, split)
    return chosen


def _with_plugin_weights(config: TrainConfig) -> TrainConfig:
    """``config`` with the default weights of strategies that are plug-ins."""
    names = [name for name in config.strategies if name not in BUILT_IN]
    if not names:
        return config
    weights = {name: term_weight(config.distill, name) for name in names}
    weights = {**config.distill.weights, **weights}
    distill = config.distill.model_copy(update={"weights": weights})
    return config.model_copy(update={"distill": distill})


def _with_pseudo_label_weight(config: TrainConfig, store: FeatureStore) -> TrainConfig:
    """``config`` with a weight of pseudo-labels: 1 if they are what a split is for."""
    if config.loss.pseudo_label_weight is not None:
        return config
    names = config.train_split.split("+")
    weight = float(any(_is_unlabelled(store, name) for name in names))
    loss = config.loss.model_copy(update={"pseudo_label_weight": weight})
    return config.model_copy(update={"loss": loss})


def _is_unlabelled(store: FeatureStore, name: str) -> bool:
    """Return whether the spec leaves the samples of a split to the teacher."""
    if store.attributes["teacher"] is None:
        return False
    spec = store.attributes.get("provenance", {}).get("spec", {})
    split = spec.get("splits", {}).get(name, {})
    return split.get("labels") == "none" or any(
        split.get(key) is not None for key in ("generate", "rattle")
    )


def _has_units(store: FeatureStore, config: TrainConfig) -> bool:
    """Return whether units of the store replace units of a recipe.

    Students need the units of their teacher, and energies that the store has reference
    energies for are total energies, which no student learns as they are.
    """
    if store.attributes["teacher"] is not None:
        return True
    return any(store_normalizer(store, config.train_split).element_references)


def _warn_of_recipe(config: TrainConfig, split: Split) -> None:
    """Warn where the recipe that the student's name chose is not of such data."""
    preset, recipe = config.student.name, config.recipe
    if recipe == "none":
        known = {*student_names(), *model_names()}
        if preset in known and not preset.endswith(_DEMO):
            log.warning(
                "no recipe contains the student %s, so unset values are the built-in "
                "defaults, such as steps=%d; see docs/training.md",
                preset,
                config.steps,
            )
    elif (recipe == _PERIODIC_RECIPE) != _is_periodic(split):
        log.warning(
            "the student %s selects the recipe %s, but the structures of %r %s; "
            "choose another student, or set recipe to confirm the choice",
            preset,
            recipe,
            split.name,
            "are not periodic" if recipe == _PERIODIC_RECIPE else "are periodic",
        )


def choose_student(config: TrainConfig, store: FeatureStore) -> TrainConfig:
    """Return ``config`` with a student; the default is the paper's for the store.

    PaiNN-big for GemNet-OC as teacher, else PaiNN-small, in the sizes for OC20 if
    structures are periodic.

    Raises
    ------
    SpecError
        The store has no such split.
    """
    if config.student.name:
        return config
    preset = "painn-big" if _teacher_model(store) == "gemnet_oc" else "painn-small"
    if _is_periodic(choose_split(store, config.train_split)):
        preset += "-oc20"
    student = config.student.model_copy(update={"preset": preset})
    return config.model_copy(update={"student": student})


def _teacher_model(store: FeatureStore) -> str | None:
    """Return the kind of the store's teacher, None if no teacher ran."""
    teacher = store.attributes["teacher"]
    return None if teacher is None else teacher["model"]


def _is_periodic(split: Split) -> bool:
    """Return whether any of the first samples is periodic."""
    path = FIELDS["pbc"].path
    positions = np.arange(min(FIRST_SAMPLES, len(split)))
    return bool(split.read(positions, [path])[path].any())


def choose_fitting_split(config: TrainConfig, store: FeatureStore) -> Split:
    """Return the training splits that have labels, or all of them if none has.

    A baseline on the labelled splits then starts alike.
    """
    named = labelled_splits(store, config.train_split)
    return choose_split(store, "+".join(named) or config.train_split)


def _fitting_batch(student: Network, split: Split) -> Data:
    """Read the first samples of a split; its random order makes a fair mixture."""
    count = min(_FITTING_SAMPLES, len(split))
    samples = CachedSamples(split, student.graph_rule, student.elements)
    return samples.batch(np.arange(count))


def run_normalizer(config: TrainConfig, store: FeatureStore) -> Normalizer:
    """Return the units of student and losses.

    Raises
    ------
    SpecError
        ``normalizer: none`` on a store whose teacher has other units.
    """
    if config.normalizer == "store":
        return store_normalizer(store, config.train_split)
    unit, teacher = Normalizer(), store.attributes["teacher"]
    if teacher is not None and Normalizer.from_dict(teacher["normalizer"]) != unit:
        raise SpecError(
            "normalizer: none needs a teacher that works in eV and eV/Å, but the "
            "teacher of this store has its own scale; set normalizer: store."
        )
    return unit


def store_normalizer(store: FeatureStore, choice: str) -> Normalizer:
    """Return the teacher's normaliser, or the labels' if the teacher's does not fit.

    It does not fit if no teacher ran, or if its energies are of another kind than the
    labels. Baseline and distilled students of one store have the same units. Of joined
    splits, the first split with labels decides, because the stored statistics are fits
    and cannot be combined.
    """
    names = choice.split("+")
    teacher = store.attributes["teacher"]
    if teacher is not None and all(_energies_agree(store.splits[n]) for n in names):
        return Normalizer.from_dict(teacher["normalizer"])
    labelled = [name for name in names if has_labels(store.splits[name])]
    first = (labelled or names)[0]
    return Normalizer.from_dict(store.attributes["label_statistics"][first])


def _energies_agree(split: Split) -> bool:
    """Return whether teacher and labels agree on the kind of energy in some samples."""
    positions = np.arange(min(FIRST_SAMPLES, len(split)))
    paths = [FIELDS["energy"].path, FIELDS["teacher_energy"].path]
    values = split.read(positions, paths)
    difference = np.abs(values[paths[0]] - values[paths[1]]) / split.n_atoms[positions]
    labelled = np.isfinite(difference)
    if not labelled.any() or np.median(difference[labelled]) <= KIND_DIFFERENCE:
        return True
    log.warning(
        "the teacher's energies differ from the labels by %.3g eV per atom; the "
        "student uses units of the labels, and neither vanilla losses nor "
        "loss.pseudo_label_weight are meaningful",
        np.median(difference[labelled]),
    )
    return False


def weights_digest(model: nn.Module) -> str:
    """Compute SHA-256 of all parameters, to show that two runs started alike."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
