"""One atomistic structure with its labels, and the hash that identifies it."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

# The virial of a sample without this label; shared, so nobody may write to it.
NO_VIRIAL: npt.NDArray[np.float64] = np.full((3, 3), np.nan)
NO_VIRIAL.flags.writeable = False


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """Atoms in a cell; the order of atoms is part of the identity.

    ``atomic_numbers`` (N,) uint8, ``positions`` (N, 3) float64 in Å, ``cell`` (3, 3)
    float64 in Å with rows as vectors, ``pbc`` (3,) bool, ``tags`` (N,) int8 (OC20: 0
    below the surface, 1 surface, 2 adsorbate), ``fixed`` (N,) bool.
    """

    atomic_numbers: npt.NDArray[np.uint8]
    positions: npt.NDArray[np.float64]
    cell: npt.NDArray[np.float64]
    pbc: npt.NDArray[np.bool_]
    tags: npt.NDArray[np.int8]
    fixed: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.atomic_numbers)

    @property
    def checksum(self) -> int:
        """64-bit hash of (atomic_numbers, positions, cell) in atom order."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(np.ascontiguousarray(self.atomic_numbers, np.uint8).tobytes())
        digest.update(np.ascontiguousarray(self.positions, "<f8").tobytes())
        digest.update(np.ascontiguousarray(self.cell, "<f8").tobytes())
        return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A structure under its id, with reference labels where the source has them.

    ``energy`` in eV, ``forces`` (N, 3) float32 in eV/Å, ``virial`` (3, 3) float64 in eV
    and symmetric: minus volume times stress, which is positive in tension. Missing
    labels are NaN.
    """

    sample_id: str
    structure: Structure
    energy: float
    forces: npt.NDArray[np.float32]
    virial: npt.NDArray[np.float64] = field(default_factory=lambda: NO_VIRIAL)

    @classmethod
    def without_labels(cls, sample_id: str, structure: Structure) -> "Sample":
        """``structure`` under its id, all labels NaN."""
        forces = np.full((len(structure), 3), np.nan, np.float32)
        return cls(sample_id, structure, float("nan"), forces)
