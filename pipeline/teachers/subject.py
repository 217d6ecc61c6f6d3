"""A potential and the samples that checks try it on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import ContractError
from pipeline.fields import PREDICTION_FIELDS, TEACHER_VIRIAL
from pipeline.structure import Sample
from pipeline.teachers.potential import Potential, SampleGraph

Floats = npt.NDArray[np.float64]
Outputs = dict[str, Floats]
# Deviations allowed by default, relative to the root mean square of a field.
TOLERANCE = 1e-3
# Energies may deviate by the tolerance times this, per atom (eV).
ENERGY_SCALE = 0.1
# Forces of relaxed structures are compared to this instead of to themselves (eV/Å).
FORCE_SCALE = 0.1


@dataclass(frozen=True)
class Subject:
    """A potential and the samples that it is tried on; ``tolerance`` is relative."""

    potential: Potential
    samples: Sequence[Sample]
    tolerance: float = TOLERANCE

    def outputs(
        self,
        samples: Sequence[Sample] | None = None,
        graphs: Sequence[SampleGraph] | None = None,
    ) -> Outputs:
        """Everything the potential gives for ``samples`` in one batch, in float64.

        Names are those of fields, with ``@layer`` for other layers than the default.
        ``graphs`` replace those of the samples.
        """
        if graphs is None:
            graphs = [self.potential.graph(s) for s in samples or self.samples]
        found: Outputs = {}
        for fields, layers in _list_requests(self.potential):
            with torch.no_grad():
                values = self.potential.forward(graphs, fields, layers)
            virials = (TEACHER_VIRIAL,) if self.potential.has_virial else ()
            for name in (*PREDICTION_FIELDS, *virials, *fields):
                key = f"{name}@{layers[name]}" if name in layers else name
                if name not in values:
                    raise ContractError(f"The potential returned no {key}.")
                found[key] = values[name].detach().cpu().double().numpy()
        return found

    def worst(self, what: str, found: Outputs, wanted: Outputs) -> float:
        """Largest deviation of ``found``; ContractError, by ``what``, if too large."""
        deviations = {k: _deviation(k, found[k], wanted[k], self) for k in wanted}
        name = max(deviations, key=lambda key: deviations[key])
        if not deviations[name] <= self.tolerance:
            raise ContractError(
                f"{what} changes {name} by {deviations[name]:.2g} of its scale, more "
                f"than {self.tolerance:g}."
            )
        return deviations[name]

    @property
    def n_atoms(self) -> npt.NDArray[np.int64]:
        """Atoms of every sample."""
        return np.array([len(sample.structure) for sample in self.samples])


def _list_requests(
    potential: Potential,
) -> list[tuple[tuple[str, ...], dict[str, str]]]:
    """Fields and layers of every forward pass that is needed to see them all."""
    available_fields = potential.available_fields
    default = tuple(
        name for name, offer in available_fields.items() if offer.width is not None
    )
    names = dict.fromkeys(
        layer for offer in available_fields.values() for layer in offer.layers
    )
    askings: list[tuple[tuple[str, ...], dict[str, str]]] = [(default, {})]
    for layer in names:
        fields = tuple(
            name for name, offer in available_fields.items() if layer in offer.layers
        )
        askings.append((fields, dict.fromkeys(fields, layer)))
    return askings


def _deviation(key: str, found: Floats, wanted: Floats, subject: Subject) -> float:
    """Largest difference in units of the field's scale."""
    difference = float(np.abs(found - wanted).max(initial=0.0))
    energies = ENERGY_SCALE * float(subject.n_atoms.min())
    if key == "teacher_energy":
        return difference / energies
    scale = float(np.sqrt(np.mean(np.square(wanted)))) if wanted.size else 0.0
    floors = {"teacher_forces": FORCE_SCALE, TEACHER_VIRIAL: energies}
    return difference / max(scale, floors.get(key, 1e-12))


def turn_and_move(sample: Sample, turn: Floats, move: Floats) -> Sample:
    """Return the sample with positions and cell times ``turn`` (3, 3), then moved."""
    structure = sample.structure
    placed = replace(
        structure,
        positions=structure.positions @ turn + move,
        cell=structure.cell @ turn,
    )
    return replace(sample, structure=placed)
