"""Weight of virials in the loss: its default, and what it needs."""

from kd_train.config.train_config import TrainConfig
from kd_train.loader.split import Split
from kd_train.trainer.students import find_student
from pipeline.errors import SpecError
from pipeline.fields import FIELDS, TEACHER_VIRIAL
from pipeline.models.network import Network
from pipeline.models.zoo import build_model

# Forces have 100: a virial per atom is a sum of few forces times a few Å, each with its
# error, and no virial is to cost accuracy of forces.
DEFAULT_WEIGHT = 10.0


def has_direct_forces(student: Network) -> bool:
    """Return whether a separate head predicts forces, not the energy's gradient."""
    return bool(student.hyperparameters.get("direct_forces", False))


def with_virial_weight(config: TrainConfig, split: Split) -> TrainConfig:
    """Return ``config`` with a weight of virials: 0 unless the split has virials."""
    if config.loss.virial_weight is not None:
        return config
    weight = 0.0
    if _has_labels(config, split):
        student = build_model(*find_student(config.student))
        weight = 0.0 if has_direct_forces(student) else DEFAULT_WEIGHT
    loss = config.loss.model_copy(update={"virial_weight": weight})
    return config.model_copy(update={"loss": loss})


def require_virials(config: TrainConfig, split: Split, student: Network) -> None:
    """Refuse a weight of virials that nothing could learn from.

    Raises
    ------
    SpecError
        The student has no virial, or neither labels nor the teacher of a term have.
    """
    weight = config.loss.virial_weight
    if not weight:
        return
    if has_direct_forces(student):
        raise SpecError(
            f"loss.virial_weight is {weight:g}, but the student "
            f"{config.student.name!r} predicts forces directly and has no virial; set "
            "student.hyperparameters.direct_forces=false or loss.virial_weight=0."
        )
    of_teacher = FIELDS[TEACHER_VIRIAL].path in split.arrays
    if _has_labels(config, split) or (of_teacher and "vanilla1" in config.strategies):
        return
    advice = "set loss.virial_weight=0, or label the samples with stress or virial"
    if of_teacher:
        advice = (
            "add vanilla1 to the strategy, set loss.pseudo_label_weight=1, or "
            "set loss.virial_weight=0"
        )
    raise SpecError(
        f"loss.virial_weight is {weight:g}, but train_split {split.name!r} has no "
        f"reference virials and no term takes those of the teacher; {advice}."
    )


def _has_labels(config: TrainConfig, split: Split) -> bool:
    """Return whether L0 has virials: of the source, or pseudo-labels."""
    if FIELDS["virial"].path in split.arrays:
        return True
    pseudo = bool(config.loss.pseudo_label_weight)
    return pseudo and FIELDS[TEACHER_VIRIAL].path in split.arrays
