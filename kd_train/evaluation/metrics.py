"""OC20's four metrics and that of stress, as sums and counts that add up exactly."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch_geometric.utils import scatter

ENERGY_THRESHOLD = 0.02  # eV
FORCE_THRESHOLD = 0.03  # eV/Å, largest component
METRICS = ("energy_mae", "forces_mae", "forces_cos", "efwt")
# It is there only if samples have it.
STRESS = "stress_mae"
SUMMED = (*METRICS, STRESS)
# Components of a symmetric tensor, by their rows and columns: xx yy zz yz xz xy.
_ROWS, _COLUMNS = [0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]


@dataclass
class MetricSums:
    """Sums over samples and free atoms seen so far.

    Metrics that need a missing energy or missing forces skip the sample.
    """

    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMMED, 0.0))
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SUMMED, 0))

    def add(
        self,
        energy: Tensor,
        forces: Tensor,
        energy_label: Tensor,
        force_label: Tensor,
        batch: Tensor,
        fixed: Tensor,
    ) -> None:
        """Take in a batch: energies (B,) in eV, forces (N, 3) in eV/Å."""
        energy_error = (energy - energy_label).abs()
        known = energy_label.isfinite()
        self._put("energy_mae", energy_error[known])
        usable = ~fixed & force_label.isfinite().all(dim=1)
        force_error = (forces - force_label).abs().double()
        self._put("forces_mae", force_error[usable].flatten())
        cosine = torch.cosine_similarity(forces, force_label, dim=1, eps=1e-8)
        self._put("forces_cos", cosine[usable])
        worst = torch.where(usable[:, None], force_error, 0).amax(dim=1)
        size = len(energy)
        largest = scatter(worst, batch, dim=0, dim_size=size, reduce="max")
        free = scatter(usable.long(), batch, dim=0, dim_size=size)
        within = (energy_error < ENERGY_THRESHOLD) & (largest < FORCE_THRESHOLD)
        self._put("efwt", within[known & (free > 0)].double())

    def add_virials(self, virial: Tensor, label: Tensor, volume: Tensor) -> None:
        """Take in virials (B, 3, 3) in eV of cells with ``volume`` (B,) in Å³.

        Samples without label, or with a volume of 0 for fewer than three periodic
        directions, do not count.
        """
        error = (virial - label).abs().double()[:, _ROWS, _COLUMNS]
        known = error.isfinite().all(dim=1) & (volume > 0)
        self._put(STRESS, (error[known] / volume[known, None]).flatten())

    def _put(self, name: str, values: Tensor) -> None:
        self.sums[name] += float(values.double().sum())
        self.counts[name] += values.numel()

    def row(self) -> Tensor:
        """Return sums, then counts, as a row (10,) float64 for :meth:`add_row`."""
        values = [*self.sums.values(), *self.counts.values()]
        return torch.tensor(values, dtype=torch.float64)

    def add_row(self, row: Tensor) -> None:
        """Take in what another one has summed."""
        values = row.tolist()
        for name, total, count in zip(
            SUMMED, values[: len(SUMMED)], values[len(SUMMED) :], strict=True
        ):
            self.sums[name] += total
            self.counts[name] += int(count)

    def result(self) -> dict[str, float]:
        """Return energy_mae (meV), forces_mae (meV/Å), forces_cos and efwt (%).

        A metric is NaN if no sample has its label. If some have virials, also
        stress_mae (meV/Å³), over the six components.
        """
        factor = {"energy_mae": 1e3, "forces_mae": 1e3, "efwt": 100.0, STRESS: 1e3}
        return {
            name: factor.get(name, 1.0) * total / self.counts[name]
            if self.counts[name]
            else float("nan")
            for name, total in self.sums.items()
            if name != STRESS or self.counts[name]
        }


def gap_closed(student: float, distilled: float, teacher: float) -> float:
    """Return the percentage of the gap from plain student to teacher that closed.

    Negative: moved away. Meaningful only while teacher and student differ.
    """
    return 100.0 * (distilled - student) / (teacher - student)


def without_nan(metrics: dict[str, float] | None) -> dict[str, float | None] | None:
    """Replace NaN by None in ``metrics``, because JSON has no NaN."""
    if metrics is None:
        return None
    return {k: v if math.isfinite(v) else None for k, v in metrics.items()}
