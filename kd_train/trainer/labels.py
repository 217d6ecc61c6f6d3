"""Refuses what cannot be learned from, or validated against, for want of labels."""

import logging
from collections.abc import Sequence

import numpy as np

from kd_train.config.train_config import TrainConfig
from kd_train.loader.concat import shared_structures
from kd_train.loader.split import Split
from pipeline.errors import SpecError
from pipeline.fields import FIELDS, PREDICTION_FIELDS

log = logging.getLogger("kd_train")
# First samples of a split that are looked at where all would take long.
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
    """Refuse, or warn, where nothing can be validated against."""
    _require_measure(config, val)
    if not has_labels(val):
        log.warning(
            "val_split: %r has no reference labels, so errors stay unknown; choose "
            "another split",
            val.name,
        )


def warn_of_training_samples(train: Split, val: Split, tests: Sequence[Split]) -> None:
    """Warn where splits that errors are measured on have structures of training."""
    held_out = [("val_split", val)]
    held_out += [("test_split", test) for test in tests if test is not val]
    for key, split in held_out:
        count, first = shared_structures(split, train)
        if count:
            log.warning(
                "%s: %d of the %d samples of %r have structures that train_split %r "
                "has too, the first is %r; errors on them are too low",
                key,
                count,
                len(split),
                split.name,
                train.name,
                first,
            )


def _require_measure(config: TrainConfig, val: Split) -> None:
    """Refuse to stop, or to choose weights as asked for, by what is never a number."""
    if config.patience is not None:
        wish, instead = f"patience={config.patience}", "leave patience out"
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
            f"which {wish} goes by; choose another split or monitor, or {instead}."
        )


def has_labels(split: Split) -> bool:
    """Whether a sample has a reference energy, or one of the first has forces."""
    return has_energies(split) or has_forces(split)


def has_energies(split: Split) -> bool:
    """Whether a sample has a reference energy."""
    path = FIELDS["energy"].path
    # Where any sample has one, a sample of the first block does.
    blocks = map(split.block_positions, range(split.n_blocks))
    return any(np.isfinite(split.read(block, [path])[path]).any() for block in blocks)


def has_forces(split: Split) -> bool:
    """Whether one of the first samples has reference forces."""
    path = FIELDS["forces"].path
    first = np.arange(min(FIRST_SAMPLES, len(split)))
    return bool(np.isfinite(split.read(first, [path])[path]).any())


def is_measured(split: Split, metric: str) -> bool:
    """Whether any sample has the labels that ``metric`` (of ``monitor``) needs."""
    return any(_measured(split, block)[metric] for block in range(split.n_blocks))


def _measured(split: Split, block: int) -> dict[str, bool]:
    """For every metric whether a sample of ``block`` has its labels."""
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
