"""Refusal of splits without the labels that training or validation needs."""

import logging
from collections.abc import Sequence

import numpy as np

from kd_train.config.train_config import TrainConfig
from kd_train.loader.concat import shared_structures
from kd_train.loader.split import Split
from pipeline.errors import SpecError
from pipeline.fields import FIELDS, PREDICTION_FIELDS

log = logging.getLogger("kd_train")
# First samples of a split, which are read if all would take long.
FIRST_SAMPLES = 256


def require_predictions(split: Split) -> None:
    """Refuse to take missing labels from a teacher that never ran."""
    for name in PREDICTION_FIELDS:
        if FIELDS[name].path not in split.arrays:
            raise SpecError(
                f"loss.pseudo_label_weight needs the field {name!r}, which split "
                f"{split.name!r} of this store lacks; add a teacher: section to the "
                "spec and build the store again, or set loss.pseudo_label_weight=0."
            )


def require_measured(config: TrainConfig, val: Split) -> None:
    """Refuse, or warn of, a validation split without labels."""
    _require_measure(config, val)
    if not has_labels(val):
        log.warning(
            "val_split: %r has no reference labels, so validation errors are "
            "unknown; choose another split",
            val.name,
        )


def warn_of_training_samples(train: Split, val: Split, tests: Sequence[Split]) -> None:
    """Warn if validation or test splits have structures of the training split."""
    held_out = [("val_split", val)]
    held_out += [("test_split", test) for test in tests if test is not val]
    for key, split in held_out:
        count, first = shared_structures(split, train)
        if count:
            log.warning(
                "%s: %d of the %d samples of %r have structures that are also in "
                "train_split %r (first: %r); errors on them are too low",
                key,
                count,
                len(split),
                split.name,
                train.name,
                first,
            )


def _require_measure(config: TrainConfig, val: Split) -> None:
    """Refuse early stopping, or a choice of weights, by a metric without labels."""
    if config.patience is not None:
        wish, instead = f"patience={config.patience}", "omit patience"
    elif config.export_weights == "best" and config.model_fields_set & {
        "export_weights",
        "monitor",
    }:
        wish, instead = "export_weights=best", "set export_weights=last"
    else:
        return
    if not is_measured(val, config.monitor):
        raise SpecError(
            f"val_split: {val.name!r} has no labels for monitor={config.monitor}, "
            f"which {wish} needs; choose another split or monitor, or {instead}."
        )


def has_labels(split: Split) -> bool:
    """Return whether a sample has a reference energy, or an early one has forces."""
    return has_energies(split) or has_forces(split)


def has_energies(split: Split) -> bool:
    """Return whether a sample has a reference energy."""
    path = FIELDS["energy"].path
    # If any sample has an energy, a sample of the first block has one.
    blocks = map(split.block_positions, range(split.n_blocks))
    return any(np.isfinite(split.read(block, [path])[path]).any() for block in blocks)


def has_forces(split: Split) -> bool:
    """Return whether one of the first samples has reference forces."""
    path = FIELDS["forces"].path
    first = np.arange(min(FIRST_SAMPLES, len(split)))
    return bool(np.isfinite(split.read(first, [path])[path]).any())


def is_measured(split: Split, metric: str) -> bool:
    """Return whether any sample has the labels of ``metric`` (of ``monitor``)."""
    return any(_measured(split, block)[metric] for block in range(split.n_blocks))


def _measured(split: Split, block: int) -> dict[str, bool]:
    """Return for every metric whether a sample of ``block`` has its labels."""
    positions = np.asarray(split.block_positions(block))
    paths = [FIELDS[name].path for name in ("energy", "forces", "fixed")]
    values = split.read(positions, paths)
    energy, forces, fixed = (values[path] for path in paths)
    known = np.isfinite(energy)
    usable = np.isfinite(forces).all(axis=1) & (fixed == 0)
    sample = np.repeat(np.arange(len(positions)), split.n_atoms[positions])
    forced = np.isin(np.arange(len(positions)), sample[usable])
    return {
        "loss": bool((known | forced).any()),
        "energy_mae": bool(known.any()),
        "forces_mae": bool(forced.any()),
        "forces_cos": bool(forced.any()),
        "efwt": bool((known & forced).any()),
    }
