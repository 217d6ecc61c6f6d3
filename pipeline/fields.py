"""Every array of the store, once: where it lies, its level, shape, dtype and unit.

Letters: ``N`` nodes (atoms), ``E`` edges, ``S`` samples, ``C`` feature width of the
teacher.
Writer, reader, collate, checks and documentation derive from this table.
"""

from dataclasses import dataclass
from typing import Literal

Level = Literal["node", "sample", "edge"]


@dataclass(frozen=True)
class Field:
    """One named array of a split.

    ``shape`` is what follows the node, edge or sample axis; ``None`` in it stands for
    the teacher's width, or the number of columns, and is fixed when a store is planned.
    """

    name: str
    group: str
    level: Level
    shape: tuple[int | None, ...]
    dtype: str
    unit: str
    meaning: str

    @property
    def path(self) -> str:
        """Place of the array inside a split's group, e.g. ``labels/energy``."""
        return f"{self.group}/{self.name.removeprefix('teacher_')}"


_TABLE = (
    Field("atomic_numbers", "structures", "node", (), "uint8", "1", "proton number Z"),
    Field("positions", "structures", "node", (3,), "float64", "Å", "Cartesian"),
    Field("fixed", "structures", "node", (), "uint8", "1", "1 = held in place"),
    Field(
        "tags",
        "structures",
        "node",
        (),
        "int8",
        "1",
        "0 below the surface, 1 surface, 2 adsorbate or molecule",
    ),
    Field("cell", "structures", "sample", (3, 3), "float64", "Å", "rows = vectors"),
    Field("pbc", "structures", "sample", (3,), "uint8", "1", "periodic directions"),
    Field("energy", "labels", "sample", (), "float64", "eV", "reference energy"),
    Field("forces", "labels", "node", (3,), "float32", "eV/Å", "reference forces"),
    Field(
        "virial",
        "labels",
        "sample",
        (3, 3),
        "float64",
        "eV",
        "reference virial: minus volume times stress, symmetric",
    ),
    Field("teacher_energy", "teacher", "sample", (), "float64", "eV", "of the teacher"),
    Field(
        "teacher_forces", "teacher", "node", (3,), "float32", "eV/Å", "of the teacher"
    ),
    Field(
        "teacher_virial", "teacher", "sample", (3, 3), "float64", "eV", "of the teacher"
    ),
    Field(
        "per_atom_energy",
        "teacher",
        "node",
        (),
        "float32",
        "eV",
        "teacher's energy per atom, without mean and element references",
    ),
    Field(
        "force_jacobian",
        "teacher",
        "node",
        (None, 3),
        "float32",
        "eV/Å²",
        "change of the teacher's force per Å of every chosen coordinate",
    ),
    Field(
        "force_jacobian_column",
        "teacher",
        "sample",
        (None,),
        "int32",
        "1",
        "chosen coordinates, 3 * atom + axis; -1 = no column",
    ),
    Field(
        "node_features",
        "features",
        "node",
        (None,),
        "float16",
        "1",
        "invariant state of every atom",
    ),
    Field(
        "edge_to_node_features",
        "features",
        "node",
        (None,),
        "float16",
        "1",
        "edge features summed onto their target atom",
    ),
    Field(
        "vector_features",
        "features",
        "node",
        (3, None),
        "float16",
        "1",
        "equivariant vector state of every atom, xyz first, channels last",
    ),
    Field(
        "edge_index",
        "edges",
        "edge",
        (2,),
        "uint16",
        "1",
        "source and target of every edge, numbers of atoms inside their sample",
    ),
    Field(
        "cell_offsets",
        "edges",
        "edge",
        (3,),
        "int8",
        "1",
        "lattice shift of the source: it sits at positions + cell_offsets @ cell",
    ),
    Field(
        "edge_features",
        "edges",
        "edge",
        (None,),
        "float16",
        "1",
        "state of every directed edge of the teacher's graph",
    ),
)

FIELDS: dict[str, Field] = {field.name: field for field in _TABLE}
STRUCTURE_FIELDS = tuple(f.name for f in _TABLE if f.group == "structures")
# Labels and predictions that every split has; virials are where there are some.
LABEL_FIELDS = ("energy", "forces")
PREDICTION_FIELDS = ("teacher_energy", "teacher_forces")
TEACHER_VIRIAL = "teacher_virial"
FEATURE_FIELDS = tuple(f.name for f in _TABLE if f.group == "features")
# They say which edge a row of edge features belongs to and are stored with them.
EDGE_IDENTITY_FIELDS = ("edge_index", "cell_offsets")
# Path to name of the fields with channels of the teacher's width.
CHANNEL_FIELDS = {
    f.path: f.name for f in _TABLE if None in f.shape and f.group != "teacher"
}
# Fields that a network returns in its forward pass if it is asked for them.
CACHEABLE_FIELDS = ("per_atom_energy", *FEATURE_FIELDS, "edge_features")
# Fields that passes over displaced atoms give, of any teacher with forces.
DERIVED_FIELDS = ("force_jacobian",)
# Fields that a row of another field means nothing without, by that field.
COMPANION_FIELDS = {"force_jacobian": ("force_jacobian_column",)}
