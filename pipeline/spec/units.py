"""Units of energies, lengths, forces and stresses, by the names that people write."""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from ase import units as ase_units

_ENERGIES = {
    "eV": 1.0,
    "meV": 1e-3,
    "Hartree": ase_units.Hartree,
    "Ry": ase_units.Rydberg,
    "kcal/mol": ase_units.kcal / ase_units.mol,
    "kJ/mol": ase_units.kJ / ase_units.mol,
}
_LENGTHS = {"Å": 1.0, "nm": 10.0, "pm": 0.01, "Bohr": ase_units.Bohr}
_PRESSURES = {
    "GPa": ase_units.GPa,
    "MPa": 1e-3 * ase_units.GPa,
    "kbar": 1e3 * ase_units.bar,
    "bar": ase_units.bar,
}
_ALIASES = {
    "electronvolt": "eV",
    "ha": "Hartree",
    "eh": "Hartree",
    "hartrees": "Hartree",
    "rydberg": "Ry",
    "a": "Å",
    "ang": "Å",
    "angstrom": "Å",
    "angstroms": "Å",
    "ångström": "Å",
    "ångstrom": "Å",
    "a0": "Bohr",
}


_CUBE = re.compile(r"(.+?)(?:\^|\*\*)?3")
KINDS = ("energy", "length", "forces", "stress")


@dataclass(frozen=True)
class Factors:
    """What values of a file are multiplied with to be in eV, Å, eV/Å and eV/Å³."""

    energy: float = 1.0
    length: float = 1.0
    forces: float = 1.0
    stress: float = 1.0


@dataclass(frozen=True)
class Units:
    """Names of the units of a file; None where nothing is said of one."""

    energy: str | None = None
    length: str | None = None
    forces: str | None = None
    stress: str | None = None

    def over(self, others: "Units") -> "Units":
        """These units, and those of ``others`` where these say nothing.

        Units of forces and stress follow from energy and length if one of these is
        named here.
        """
        own = self.energy is not None or self.length is not None
        forces = self.forces if own else self.forces or others.forces
        stress = self.stress if own else self.stress or others.stress
        return Units(
            self.energy or others.energy, self.length or others.length, forces, stress
        )

    @property
    def factors(self) -> Factors:
        """Factors to eV, Å, eV/Å and eV/Å³; what is not named is in these already.

        Raises
        ------
        ValueError
            A name is unknown; the message has the known ones.
        """
        return _factors(self)


def parse_units(text: str) -> Units:
    """Units as ``energy=kcal/mol,length=Å`` names them.

    Raises
    ------
    ValueError
        A part is no unit, or no kind of one.
    """
    named: dict[str, str] = {}
    for part in text.split(","):
        kind, _, unit = (word.strip() for word in part.partition("="))
        if kind not in KINDS or not unit or kind in named:
            raise ValueError(
                f"{part!r} must be energy=…, length=…, forces=… or stress=…"
            )
        named[kind] = unit
    units = Units(**named)
    _ = units.factors
    return units


@lru_cache(maxsize=64)
def _factors(units: Units) -> Factors:
    energy = energy_factor(units.energy or "eV")
    length = length_factor(units.length or "Å")
    forces, stress = energy / length, energy / length**3
    if units.forces is not None:
        forces = forces_factor(units.forces)
    if units.stress is not None:
        stress = stress_factor(units.stress)
    return Factors(energy, length, forces, stress)


def energy_factor(name: str) -> float:
    """Electronvolts in one unit of energy; raises ValueError for an unknown name."""
    return _factor(name, _ENERGIES, "energy")


def length_factor(name: str) -> float:
    """Ångström in one unit of length; raises ValueError for an unknown name."""
    return _factor(name, _LENGTHS, "length")


def forces_factor(name: str) -> float:
    """Units of eV/Å in one unit of forces, such as ``Hartree/Bohr``.

    Raises
    ------
    ValueError
        It is not a known energy, a slash and a known length.
    """
    energy, slash, length = name.rpartition("/")
    if not slash:
        raise ValueError(f"{name!r} must be energy/length, such as Hartree/Bohr")
    return energy_factor(energy) / length_factor(length)


def stress_factor(name: str) -> float:
    """Units of eV/Å³ in one unit of stress, such as ``GPa`` or ``Hartree/Bohr³``.

    Raises
    ------
    ValueError
        It is neither a known pressure nor a known energy, a slash and a known length
        with its power of three.
    """
    energy, slash, volume = unicodedata.normalize("NFKC", name).rpartition("/")
    if not slash:
        return _factor(name, _PRESSURES, "stress")
    match = _CUBE.fullmatch(volume.strip())
    if match is None:
        raise ValueError(f"{name!r} must be energy/length³, such as eV/Å³, or GPa")
    return energy_factor(energy) / length_factor(match.group(1)) ** 3


def _factor(name: str, known: dict[str, float], kind: str) -> float:
    word = unicodedata.normalize("NFKC", name).strip()
    # Mega-electronvolts would pass for a thousandth of one.
    if word != "MeV":
        plain = {unit.lower(): value for unit, value in known.items()}
        alias = _ALIASES.get(word.lower(), word)
        if alias.lower() in plain:
            return plain[alias.lower()]
    raise ValueError(f"unknown unit of {kind} {name!r} (known: {', '.join(known)})")
