"""Units of energies, lengths and forces, by the names that people write."""

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


@dataclass(frozen=True)
class Factors:
    """What values of a file are multiplied with to be in eV, Å and eV/Å."""

    energy: float = 1.0
    length: float = 1.0
    forces: float = 1.0


@dataclass(frozen=True)
class Units:
    """Names of the units of a file; None where nothing is said of one."""

    energy: str | None = None
    length: str | None = None
    forces: str | None = None

    def over(self, others: "Units") -> "Units":
        """These units, and those of ``others`` where these say nothing.

        A unit of forces follows from energy and length if one of these is named here.
        """
        own = self.energy is not None or self.length is not None
        forces = self.forces if own else self.forces or others.forces
        return Units(self.energy or others.energy, self.length or others.length, forces)

    @property
    def factors(self) -> Factors:
        """Factors to eV, Å and eV/Å; what is not named is in these already.

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
        if kind not in ("energy", "length", "forces") or not unit or kind in named:
            raise ValueError(f"{part!r} must be energy=…, length=… or forces=…")
        named[kind] = unit
    units = Units(**named)
    _ = units.factors
    return units


@lru_cache(maxsize=64)
def _factors(units: Units) -> Factors:
    energy = energy_factor(units.energy or "eV")
    length = length_factor(units.length or "Å")
    if units.forces is None:
        return Factors(energy, length, energy / length)
    return Factors(energy, length, forces_factor(units.forces))


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


def _factor(name: str, known: dict[str, float], kind: str) -> float:
    word = unicodedata.normalize("NFKC", name).strip()
    # Mega-electronvolts would pass for a thousandth of one.
    if word != "MeV":
        plain = {unit.lower(): value for unit, value in known.items()}
        alias = _ALIASES.get(word.lower(), word)
        if alias.lower() in plain:
            return plain[alias.lower()]
    raise ValueError(f"unknown unit of {kind} {name!r} (known: {', '.join(known)})")
