"""Reading what the original models computed, and comparing with it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import neighbor_edges
from pipeline.structure import Structure

FIXTURES = Path(__file__).parents[1] / "fixtures"
GRAPHS = {"main": "", "aeaint": "ae", "qint": "quad"}


def structures_in(
    reference: Mapping[str, Any], prefix: str = ""
) -> Iterator[Structure]:
    """Structures of a reference file; single precision there is exact here."""
    count = reference[f"{prefix}in/natoms"]
    for index, stop in enumerate(np.cumsum(count)):
        atoms = slice(stop - count[index], stop)
        yield Structure(
            reference[f"{prefix}in/atomic_numbers"][atoms].astype(np.uint8),
            reference[f"{prefix}in/pos"][atoms].astype(np.float64),
            reference[f"{prefix}in/cell"][index].astype(np.float64),
            reference[f"{prefix}in/pbc"][index],
            reference[f"{prefix}in/tags"][atoms].astype(np.int8),
            np.zeros(count[index], bool),
        )


def batch_for(model, structures, dtype):
    """Structures with the edges that ``model`` wants."""
    edges = [neighbor_edges(structure, model.graph_rule) for structure in structures]
    return collate(structures, edges, dtype)


def predict(model, structures, dtype, layers=None):
    """Output in ``dtype`` without gradients, and the batch."""
    batch = batch_for(model, list(structures), dtype)
    with torch.no_grad():
        return model.to(dtype)(batch, layers), batch


def assert_close(actual, expected, relative):
    """Nowhere farther apart than ``relative`` times the root mean square."""
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    scale = np.sqrt(np.mean(np.square(expected, dtype=np.float64)))
    assert scale > 0
    assert np.abs(actual.numpy() - expected).max() <= relative * scale


def edge_rows(edge_index, shift):
    """Rows (E, 5) target, source, shift, that no two edges share."""
    source, target = np.asarray(edge_index).astype(int)
    return np.column_stack((target, source, np.asarray(shift).astype(int)))


def order_of(rows):
    """Order that sorts rows by their columns."""
    return np.lexsort(rows.T[::-1])


class Original:
    """One file of this repository: an original model and what it computed."""

    def __init__(self, name: str) -> None:
        self.arrays = dict(np.load(FIXTURES / f"{name}.npz"))
        meta = json.loads(str(self.arrays["meta"]))
        self.model: str = meta["model"]
        self.attributes: dict[str, Any] = meta["attributes"]
        self.aliases: dict[str, str] = meta["aliases"]
        self.state = {
            key.removeprefix("state/"): torch.from_numpy(value)
            for key, value in self.arrays.items()
            if key.startswith("state/")
        }

    def structures(self) -> list[Structure]:
        """The structures that outputs are for."""
        return list(structures_in(self.arrays))

    def full_state(self) -> dict[str, torch.Tensor]:
        """The state with the second names of its tensors, as files hold it."""
        second = {key: self.state[name] for key, name in self.aliases.items()}
        return self.state | second

    def assert_predicted_by(self, model) -> None:
        """All outputs and features of ``model`` are those of the original."""
        output, batch = predict(model, self.structures(), torch.float64)
        found = self.arrays
        assert_close(output.energy, found["energy"], 1e-9)
        assert_close(output.per_atom_energy, found["energy_atom"].squeeze(1), 1e-9)
        assert_close(output.forces, found["forces"], 1e-9)
        node = {"gemnet_oc": "x_E", "painn": "x", "schnet": "h"}[self.model]
        assert_close(output.node_features, found[node], 1e-9)
        if self.model == "painn":
            assert_close(output.vector_features, found["vec"], 1e-9)
        if "graph/edge_index" in found:
            mine = edge_rows(batch.edge_index, batch.cell_offsets)
            index, shift = found["graph/edge_index"].T, -found["graph/cell_offset"]
            theirs = edge_rows(index, shift)
            order, other = order_of(mine), order_of(theirs)
            np.testing.assert_array_equal(mine[order], theirs[other])
        if "x_F" in found:
            assert_close(output.edge_features[order], found["x_F"][other], 1e-9)
