"""A strategy: the fields it reads from the store, its adapter, its loss."""

from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from kd_train.config.sections import JacobianConfig, LossConfig
from kd_train.strategies.displaced import Displacements
from kd_train.strategies.losses import joint_mean
from pipeline.errors import SpecError
from pipeline.fields import PREDICTION_FIELDS
from pipeline.models.normalizer import Normalizer
from pipeline.models.output import ModelOutput

JACOBIAN_DEFAULTS = JacobianConfig()


@dataclass(frozen=True)
class Setting:
    """Input of a strategy: widths of student and teacher, units, loss weights."""

    student_name: str
    student_widths: Mapping[str, int]
    teacher_widths: Mapping[str, int]
    normalizer: Normalizer
    loss: LossConfig
    seed: int
    jacobian: JacobianConfig = JACOBIAN_DEFAULTS


class Strategy(ABC):
    """A distillation term, with an ``adapter`` if it has trainable parameters.

    A term as in :mod:`kd_train.strategies.losses`: it returns sums and counts, which
    batches and processes add up before they divide. ``default_weight`` is the weight
    of the term if neither the user nor a recipe sets one. ``trains`` names the outputs
    (``energy``, ``forces``) that the term trains without labels.
    """

    name: str
    fields: tuple[str, ...]
    default_weight: float = 1.0
    trains: tuple[str, ...] = ()
    student_field: str | None = None
    part_weights: tuple[float, ...] = (1.0,)

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._check()
        self.adapter: nn.Module | None = self.build_adapter()

    def build_adapter(self) -> nn.Module | None:
        """Build the map from student to teacher width, or return None without one."""
        return None

    @abstractmethod
    def counts(self, batch: Data) -> Tensor:
        """Return the divisors of the totals, (P,) float64.

        The fields of ``batch`` need no decoding for it.
        """

    @abstractmethod
    def totals(self, output: ModelOutput, batch: Data) -> Tensor:
        """Return the summed errors, (P,).

        The store's fields are attributes of ``batch``.
        """

    def prepare(self, batch: Data, draw: Sequence[int]) -> None:
        """Add what the term needs to ``batch``, in the loader's thread, on the CPU.

        ``draw`` are numbers that identify the batch in its run, for random choices
        that a resumed run repeats: epoch, number in the epoch, process. By default,
        nothing is added.
        """
        return

    def displacements(self, batch: Data) -> Displacements | None:
        """Return displaced copies that the student's pass is to contain, or None.

        With copies, the objective calls `displaced_totals` instead of `totals`.
        """
        return None

    def displaced_totals(
        self, output: ModelOutput, displaced: ModelOutput, batch: Data
    ) -> Tensor:
        """Return the summed errors (P,) of a term with displaced copies.

        ``displaced`` is the output of the copies, in the order of `displacements`.
        """
        raise NotImplementedError

    def loss(self, output: ModelOutput, batch: Data) -> Tensor:
        """Return the scalar loss of one batch alone."""
        totals = self.totals(output, batch)
        return joint_mean(self.part_weights, totals, self.counts(batch))

    @classmethod
    def require_fields(cls, stored: Container[str]) -> None:
        """Raise SpecError unless all fields of the strategy are ``stored``."""
        for field in cls.fields:
            if field not in stored:
                raise SpecError(
                    f"Strategy {cls.name!r} needs the field {field!r}, which this "
                    f"store lacks; {_remedy(field)} and build the store again."
                )

    def _check(self) -> None:
        self.require_fields(self.setting.teacher_widths)
        own = self.student_field
        if own is not None and own not in self.setting.student_widths:
            raise SpecError(
                f"Strategy {self.name!r} needs {own!r} of the student, but "
                f"{self.setting.student_name!r} does not have it; choose another "
                "student or strategy."
            )


def _remedy(field: str) -> str:
    if field in PREDICTION_FIELDS:
        return "add a teacher: section to the spec"
    field = "force_jacobian" if field.startswith("force_jacobian") else field
    value = "{columns: 4}" if field == "force_jacobian" else "{}"
    return f"add the line '{field}: {value}' under features: of the spec"


def square_total(difference: Tensor) -> Tensor:
    """Sum squares over atoms, axes and channels, fixed atoms included; shape (1,)."""
    return difference.square().sum().reshape(1)


def count_values(values: Tensor) -> Tensor:
    """Count the entries of ``values`` on their device; shape (1,), float64."""
    # Filled on the device, because a copy to a GPU would wait for it.
    return torch.full((1,), values.numel(), dtype=torch.float64, device=values.device)
