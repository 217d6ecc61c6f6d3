"""What a method of generation does: it proposes structures for copies of samples."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.generate.randomness import Floats, make_generator
from pipeline.generate.teacher import CountedTeacher
from pipeline.spec.generate_spec import GenerateSpec
from pipeline.structure import Sample, Structure


class Copy(NamedTuple):
    """The copy ``number`` of the sample at place ``parent``, both counted from 0."""

    parent: int
    number: int


@dataclass(frozen=True)
class PassEstimate:
    """Teacher passes for one sample: ``once`` and then ``per_copy``.

    Screening needs one more pass for each copy.
    """

    once: int
    per_copy: float

    def total(self, copies: int) -> int:
        """Return the passes of a sample with all ``copies``, screening included."""
        return self.once + round((self.per_copy + 1) * copies)


class Method(ABC):
    """A way to displace atoms, made for a few samples (``parents``) at a time."""

    letter: ClassVar[str]

    def __init__(
        self, spec: GenerateSpec, parents: Sequence[Sample], teacher: CountedTeacher
    ) -> None:
        self.spec = spec
        self.parents = parents
        self.teacher = teacher

    @abstractmethod
    def propose(self, copies: Sequence[Copy], attempt: int) -> list[Structure]:
        """Return a structure for each of ``copies``; ``attempt`` counts from 0.

        Parameters
        ----------
        copies
            Copies without an accepted structure: all copies at attempt 0.
        attempt
            Each attempt has random numbers of its own.
        """

    @classmethod
    @abstractmethod
    def estimate_passes(cls, spec: GenerateSpec, n_atoms: int) -> PassEstimate:
        """Return the price for a sample of ``n_atoms`` free atoms."""

    def generator(self, copy: Copy, attempt: int, kind: str) -> np.random.RandomState:
        """Return the random numbers of an attempt at ``copy``."""
        name = self.parents[copy.parent].sample_id
        return make_generator(self.spec.seed, name, copy.number, attempt, kind)

    def normals(self, copy: Copy, attempt: int) -> Floats:
        """Draw standard normals (N, 3); copies 2k and 2k + 1 have opposite signs.

        Pairs of opposite displacements cancel the odd terms of the energy, so that
        means over few copies vary less.
        """
        pair = Copy(copy.parent, copy.number // 2)
        shape = self.parents[copy.parent].structure.positions.shape
        drawn: Floats = self.generator(pair, attempt, "pair").standard_normal(shape)
        return -drawn if copy.number % 2 else drawn


def free_atoms(structure: Structure) -> npt.NDArray[np.intp]:
    """Return the numbers of the atoms that may move."""
    return np.flatnonzero(~structure.fixed)
