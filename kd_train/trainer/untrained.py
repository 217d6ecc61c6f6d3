"""Refuses runs after which a student's energies or forces would still be random."""

import logging
from dataclasses import dataclass

from kd_train.config.train_config import TrainConfig
from kd_train.trainer.labels import has_energies, has_forces
from pipeline.errors import SpecError
from pipeline.store.reader import FeatureStore

log = logging.getLogger("kd_train")
OUTPUTS = ("energy", "forces")
_JOIN = "join a split with labels to train_split"
_KEYS = (
    "set energy_key and forces_key of the split where the file has labels under other "
    "names"
)


@dataclass(frozen=True)
class LabelCounts:
    """Number of samples of the training split that have a reference energy and forces.

    ``exact`` is False for stores that do not count; a kind that occurs then counts for
    all samples.
    """

    name: str
    samples: int
    energy: int
    forces: int
    exact: bool = True

    def count(self, output: str) -> int:
        """Samples that have labels of ``output``."""
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
    """Refuse a run that trains neither output, or not the one that is wished for.

    ``direct`` says that the student's forces are no gradient of its energy, so that
    each output needs labels of its own. Warns of samples that L0 leaves out.

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
    """Distillation terms that have a weight."""
    return {name for name in config.strategies if getattr(config.distill, name) > 0}


def _weight(config: TrainConfig, output: str) -> float:
    loss = config.loss
    return loss.energy_weight if output == "energy" else loss.force_weight


def _is_trained(config: TrainConfig, counts: LabelCounts, output: str) -> bool:
    terms = _terms(config)
    if output == "energy" and "vanilla2" in terms:
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
    remedies = (
        f"{_JOIN}, set loss.pseudo_label_weight=1, add vanilla1 to the strategy, or"
    )
    if config.strategy == "none":
        return (
            f"{cause}, so the strategy 'none' has nothing to learn from; {remedies} "
            f"{_KEYS}."
        )
    return (
        f"{cause}, and {config.strategy} trains no energies or forces, so those of the "
        f"student would stay random; {remedies} {_KEYS}."
    )


def _require_l0(config: TrainConfig, counts: LabelCounts) -> None:
    """Refuse to balance terms against an L0 that is always zero."""
    loss = config.loss
    labels = any(counts.count(o) and _weight(config, o) for o in OUTPUTS)
    if config.distill.target_ratio and config.strategies:
        if labels or loss.pseudo_label_weight:
            return
        raise SpecError(
            "distill.target_ratio keeps the terms at a fraction of L0, which is always "
            f"0 because train_split {counts.name!r} has no labels for it; leave "
            "distill.target_ratio out or set loss.pseudo_label_weight=1."
        )


def _check_untrained(
    config: TrainConfig, counts: LabelCounts, output: str, direct: bool
) -> None:
    name, weight = counts.name, _weight(config, output)
    plural = {"energy": "energies", "forces": "forces"}[output]
    if not direct:
        if output == "forces":
            log.warning(
                "train_split: %r has no reference forces; those of the student follow "
                "from its energy alone",
                name,
            )
        else:
            log.warning(
                "train_split: %r has no reference energies, so those of the student "
                "are known up to a constant only",
                name,
            )
        return
    if not weight:
        log.warning(
            "loss.%s_weight is 0, so the %s of the student stay random; do not use "
            "them",
            output.removesuffix("s"),
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
        f"loss.{output.removesuffix('s')}_weight=0 if you do not need them."
    )


def _warn_of_gaps(config: TrainConfig, counts: LabelCounts) -> None:
    """Say how many samples L0 leaves out."""
    if config.loss.pseudo_label_weight or not counts.exact:
        return
    gaps = [
        f"{counts.samples - counts.count(output)} have no reference {noun}"
        for output, noun in (("energy", "energy"), ("forces", "forces"))
        if 0 < counts.count(output) < counts.samples and _weight(config, output)
    ]
    if gaps:
        log.warning(
            "train_split: of the %d samples of %r, %s; L0 leaves these out, and "
            "loss.pseudo_label_weight=1 takes the teacher's labels for them",
            counts.samples,
            counts.name,
            " and ".join(gaps),
        )
