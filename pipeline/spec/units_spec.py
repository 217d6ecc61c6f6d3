"""The part of a spec that names units."""

from pydantic import Field as Key
from pydantic import ValidationInfo, field_validator

from pipeline.spec.units import Units
from pipeline.spec.yaml_model import ClosedModel


class UnitsSpec(ClosedModel):
    """Units of a file; names as eV, meV, Hartree, Ry, kcal/mol, kJ/mol; Å, nm, Bohr."""

    energy: str | None = Key(
        None, description="Unit of energies (default: the unit in the file, or eV)."
    )
    length: str | None = Key(
        None,
        description="Unit of positions and cell (default: the unit in the file, or Å).",
    )
    forces: str | None = Key(
        None,
        description="Unit of forces, such as Hartree/Bohr (default: energy / length).",
    )

    stress: str | None = Key(
        None,
        description="Unit of stresses: eV/Å³, Hartree/Bohr³, GPa, MPa, kbar, bar "
        "(default: energy / length³).",
    )

    @field_validator("energy", "length", "forces", "stress")
    @classmethod
    def _known(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.field_name is not None:
            _ = Units(**{info.field_name: value}).factors
        return value

    @property
    def names(self) -> Units:
        """The same, as readers take them."""
        return Units(self.energy, self.length, self.forces, self.stress)
