"""Refusal of runs after which a student's energies or forces would still be random."""

import logging
from dataclasses import dataclass

from kd_train.config.train_config import TrainConfig
from kd_train.strategies import load_strategy, term_weight
from kd_train.trainer.labels import has_energies, has_forces
from pipeline.errors import SpecError
from pipeline.store.reader import FeatureStore

log = logging.getLogger("kd_train")
OUTPUTS = ("energy", "forces")
_JOIN = "join a split with labels to train_split"
_KEYS = (
    "if the file has labels under other names, set energy_key and forces_key of the "
    "split"
)


@dataclass(frozen=True)
class LabelCounts:
    """Number of samples of the training split that have a reference energy and forces.

    ``exact`` is False for stores without counts; a kind that occurs then counts for all
    samples.
    """

    name: str
    samples: int
    energy: int
    forces: int
    exact: bool = True

    def count(self, output: str) -> int:
        """Return the number of samples with labels of ``output``."""
        return self.energy if output == "energy" else self.forces


def count_labels(store: FeatureStore, choice: str) -> LabelCounts:
    """Count the labels of split ``choice``, or of several joined with +."""
    counted = store.attributes.get("provenance", {}).get("labelled", {})
    parts = [
        _count_in_split(store, name, counted.get(name)) for name in choice.split("+")
    ]
    return LabelCounts(
        choice,
        sum(part.samples for part in parts),
        sum(part.energy for part in parts),
        sum(part.forces for part in parts),
        all(part.exact for part in parts),
    )


def labelled_splits(store: FeatureStore, choice: str) -> tuple[str, ...]:
    """Return those of the splits of ``choice`` that have reference labels."""
    counts = [count_labels(store, name) for name in choice.split("+")]
    return tuple(one.name for one in counts if one.energy or one.forces)


def _count_in_split(
    store: FeatureStore, name: str, counts: dict[str, int] | None
) -> LabelCounts:
    split = store.splits[name]
    size = len(split)
    if counts is not None:
        return LabelCounts(name, size, counts["energy"], counts["forces"])
    energies, forces = size * has_energies(split), size * has_forces(split)
    return LabelCounts(name, size, energies, forces, exact=False)


def require_trained_outputs(
    config: TrainConfig, counts: LabelCounts, direct: bool
) -> None:
    """Refuse a run that leaves an output untrained although its weight is not 0.

    ``direct``: the student's forces are not a gradient of its energy, so each output
    needs its own labels. Warns of samples that L0 skips.

    Raises
    ------
    SpecError
        Energies or forces of the student would stay untrained although their weight
        is not 0, or a target ratio refers to an L0 that is always 0.
    """
    trained = {output: _is_trained(config, counts, output) for output in OUTPUTS}
    if not any(trained.values()):
        raise SpecError(_nothing_trained(config, counts))
    _require_l0(config, counts)
    for output in OUTPUTS:
        if not trained[output]:
            _check_untrained(config, counts, output, direct)
    _warn_of_gaps(config, counts)


def _terms(config: TrainConfig) -> set[str]:
    """Distillation terms that have a weight in some step."""
    if _never_distils(config):
        return set()
    return {name for name in config.strategies if term_weight(config.distill, name) > 0}


def _never_distils(config: TrainConfig) -> bool:
    """Whether the factor of all distillation terms is 0 in every step."""
    fading = config.distill.schedule
    changes = fading.kind != "constant" and fading.first_step + 1 < config.steps
    return fading.start == 0 and not (changes and fading.end > 0)


def _weight(config: TrainConfig, output: str) -> float:
    loss = config.loss
    return loss.energy_weight if output == "energy" else loss.force_weight


def _is_trained(config: TrainConfig, counts: LabelCounts, output: str) -> bool:
    terms = _terms(config)
    if any(output in load_strategy(name).trains for name in terms):
        return True
    targets = (
        counts.count(output) or config.loss.pseudo_label_weight or "vanilla1" in terms
    )
    return bool(targets and _weight(config, output))


def _nothing_trained(config: TrainConfig, counts: LabelCounts) -> str:
    if not counts.energy and not counts.forces:
        cause = f"train_split: {counts.name!r} has no reference labels"
    else:
        cause = (
            f"train_split: {counts.name!r} has {counts.energy} energies and "
            f"{counts.forces} forces, and loss.energy_weight and loss.force_weight are "
            f"{config.loss.energy_weight:g} and {config.loss.force_weight:g}"
        )
    if config.strategy == "none":
        effect = "so the strategy 'none' has nothing to learn from"
    else:
        effect = (
            f"and {config.strategy} does not train energies or forces, so both outputs "
            "of the student would stay random"
        )
    return f"{cause}, {effect}; {_remedies(config, counts)}."


def _remedies(config: TrainConfig, counts: LabelCounts) -> str:
    """What would train an output, where nothing does."""
    loss = config.loss
    if not loss.energy_weight and not loss.force_weight:
        return "set loss.energy_weight or loss.force_weight above 0"
    silent = sorted({"vanilla1", "vanilla2"} & set(config.strategies))
    if silent and _never_distils(config):
        return "set distill.schedule.start above 0"
    if silent and silent[0] not in _terms(config):
        return f"set distill.{silent[0]} above 0"
    unused = [f"set loss.{_key(o)}_weight above 0" for o in OUTPUTS if counts.count(o)]
    return ", ".join(
        [
            *unused,
            _JOIN,
            "set loss.pseudo_label_weight=1",
            f"add vanilla1 to the strategy, or, {_KEYS}",
        ]
    )


def _key(output: str) -> str:
    """Of the loss, for weights: ``energy`` or ``force``."""
    return output.removesuffix("s")


def _require_l0(config: TrainConfig, counts: LabelCounts) -> None:
    """Refuse to balance terms against an L0 that is always zero."""
    loss = config.loss
    labels = any(counts.count(o) and _weight(config, o) for o in OUTPUTS)
    if config.distill.target_ratio and config.strategies:
        if labels or loss.pseudo_label_weight:
            return
        raise SpecError(
            "distill.target_ratio holds the terms at a fraction of L0, which is always "
            f"0 because train_split {counts.name!r} has no labels for it; omit "
            "distill.target_ratio or set loss.pseudo_label_weight=1."
        )


def _check_untrained(
    config: TrainConfig, counts: LabelCounts, output: str, direct: bool
) -> None:
    name, weight = counts.name, _weight(config, output)
    plural = {"energy": "energies", "forces": "forces"}[output]
    if not direct:
        _warn_of_gradient(config, counts, output)
        return
    if not weight:
        log.warning(
            "loss.%s_weight is 0, so the %s of the student stay random; do not use "
            "them",
            _key(output),
            plural,
        )
        return
    gradient = (
        "set student.hyperparameters.direct_forces=false to take forces as the "
        "gradient of the energy, "
    )
    raise SpecError(
        f"train_split: {name!r} has no reference {plural}, and no term of the loss "
        f"replaces them, so the {plural} of the student would stay random; set "
        f"loss.pseudo_label_weight=1, add vanilla1 to the strategy, "
        f"{gradient if output == 'forces' else ''}or set "
        f"loss.{_key(output)}_weight=0 if you do not need them."
    )


def _warn_of_gradient(config: TrainConfig, counts: LabelCounts, output: str) -> None:
    """Warn that one output of a student with gradient forces follows from the other."""
    plural = "energies" if output == "energy" else "forces"
    if counts.count(output) and not _weight(config, output):
        cause = f"loss.{_key(output)}_weight is 0, so reference {plural} are not used"
    else:
        cause = f"train_split: {counts.name!r} has no reference {plural}"
    if output == "forces":
        effect = "forces follow from its energy alone"
    else:
        effect = "energies are known only up to a constant"
    log.warning("%s; the student's %s", cause, effect)


def _warn_of_gaps(config: TrainConfig, counts: LabelCounts) -> None:
    """Warn of the number of samples that L0 skips."""
    if config.loss.pseudo_label_weight or not counts.exact:
        return
    gaps = [
        f"{counts.samples - counts.count(output)} have no reference {noun}"
        for output, noun in (("energy", "energy"), ("forces", "forces"))
        if 0 < counts.count(output) < counts.samples and _weight(config, output)
    ]
    if gaps:
        log.warning(
            "train_split: of the %d samples of %r, %s; L0 skips these samples, and "
            "loss.pseudo_label_weight=1 adds pseudo-labels from the teacher",
            counts.samples,
            counts.name,
            " and ".join(gaps),
        )
