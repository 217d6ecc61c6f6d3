"""Facts of a run that a report compares: samples, labels and passes of the teacher."""

from typing import Any

from kd_train.config.train_config import TrainConfig
from kd_train.evaluation.evaluate import teacher_metrics
from kd_train.loader.choose_split import choose_split
from kd_train.loader.subset import SubsetSplit
from kd_train.strategies import load_strategy
from kd_train.trainer.untrained import (
    OUTPUTS,
    LabelCounts,
    count_labels,
    labelled_splits,
)
from pipeline.store.reader import FeatureStore
from pipeline.store.teacher_error import spread_labelled

# Kinds of passes in a store's provenance, besides those that generate structures.
_LABELS, _JACOBIAN = "labels", "force_jacobian"


def training_facts(config: TrainConfig, store: FeatureStore) -> dict[str, Any]:
    """Return the samples that ``config`` trains on, by split and in total.

    ``labelled`` samples have a reference label, ``pseudo_labelled`` ones get a missing
    label from the teacher. ``teacher_passes`` counts what the run uses of the splits.
    A number that the store does not record is None.
    """
    names = config.train_split.split("+")
    splits = {name: _split_facts(config, store, name) for name in names}
    return {
        "splits": splits,
        **{
            key: _total([one[key] for one in splits.values()])
            for key in ("samples", "labelled", "teacher_passes")
        },
    }


def teacher_train_metrics(
    config: TrainConfig, store: FeatureStore
) -> dict[str, float] | None:
    """Compare the stored teacher with the labels of the training split.

    Some samples are chosen, evenly over all that have labels. Returns None without a
    teacher or without labels.
    """
    names = labelled_splits(store, config.train_split)
    if store.attributes["teacher"] is None or not names:
        return None
    split = choose_split(store, "+".join(names))
    return teacher_metrics(SubsetSplit(split, spread_labelled(split)))


def _split_facts(
    config: TrainConfig, store: FeatureStore, name: str
) -> dict[str, int | None]:
    counts = count_labels(store, name)
    labelled = max(counts.energy, counts.forces)
    pseudo = _pseudo_labelled(config, counts)
    return {
        "samples": counts.samples,
        "labelled": labelled if counts.exact or not labelled else None,
        "pseudo_labelled": pseudo,
        "teacher_passes": _passes(store, name, _kinds(config, pseudo > 0)),
    }


def _pseudo_labelled(config: TrainConfig, counts: LabelCounts) -> int:
    """Count the samples of a split for which the teacher gives a missing label."""
    loss = config.loss
    if not loss.pseudo_label_weight:
        return 0
    weights = dict(zip(OUTPUTS, (loss.energy_weight, loss.force_weight), strict=True))
    used = [counts.count(output) for output in OUTPUTS if weights[output]]
    return counts.samples - min(used, default=counts.samples)


def _kinds(config: TrainConfig, pseudo: bool) -> set[str]:
    """Return the kinds of passes that the terms of the loss use."""
    fields = {f for name in config.strategies for f in load_strategy(name).fields}
    kinds = {_JACOBIAN for field in fields if field.startswith(_JACOBIAN)}
    if pseudo or any(not field.startswith(_JACOBIAN) for field in fields):
        kinds.add(_LABELS)
    return kinds


def _passes(store: FeatureStore, name: str, kinds: set[str]) -> int | None:
    """Count the passes behind a split: of its structures, and of ``kinds``."""
    recorded = store.attributes.get("provenance", {}).get("teacher_passes", {})
    if name not in recorded:
        return None if kinds else 0
    return sum(recorded[name].get(kind, 0) for kind in ("generation", *sorted(kinds)))


def _total(numbers: list[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None
