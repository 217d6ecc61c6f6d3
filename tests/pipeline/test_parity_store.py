"""From a checkpoint of the original to a store: the numbers are the original's."""

import os
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms

from pipeline.cli.main import main
from pipeline.store.reader import FeatureStore
from tests.commands import run_command
from tests.stores import FLOAT32, write_spec

FIXTURES = ("gemnet_oc_base", "gemnet_oc_tiny", "gemnet_oc_grad", "painn", "schnet")
# Field of the store: key of the original's output and sign.
EDGE_FIELDS = {
    "edge_to_node_features": ("x_F_to_node", 1),
    "vector_features": ("x_F_to_vec", -1),
}


@pytest.fixture(scope="module")
def parity() -> Path:
    beside = Path(__file__).resolve().parents[3] / "shared" / "parity"
    folder = Path(os.environ.get("KD_PARITY", beside))
    if not (folder / "painn.io.npz").is_file():
        pytest.skip("needs the reference outputs; set KD_PARITY to their folder")
    return folder


def _write_structures(path: Path, reference: Any) -> None:
    frames = []
    for index, stop in enumerate(np.cumsum(reference["in/natoms"])):
        rows = slice(stop - reference["in/natoms"][index], stop)
        frames.append(
            Atoms(
                reference["in/atomic_numbers"][rows],
                reference["in/pos"][rows],
                cell=reference["in/cell"][index],
                pbc=reference["in/pbc"][index],
                tags=reference["in/tags"][rows],
                info={"sample_id": f"s{index}"},
            )
        )
    ase.io.write(
        path, frames, format="extxyz", columns=["symbols", "positions", "tags"]
    )


def _fields(name: str) -> dict[str, tuple[str, int]]:
    if name == "painn":
        return {"node_features": ("x", 1), "vector_features": ("vec", 1)}
    if name == "schnet":
        return {"node_features": ("h", 1)}
    own = {"node_features": ("x_E", 1)}
    return own if name == "gemnet_oc_grad" else own | EDGE_FIELDS


def _close(found: Any, expected: Any, relative: float) -> None:
    scale = np.sqrt(np.mean(np.square(expected, dtype=np.float64)))
    assert np.abs(found - expected).max() <= relative * scale


@pytest.mark.parametrize("name", FIXTURES)
def test_store_holds_what_the_original_computes(
    name: str, parity: Path, tmp_path: Path
) -> None:
    reference = np.load(parity / f"{name}.io.npz")
    _write_structures(tmp_path / "d.extxyz", reference)
    fields = _fields(name)
    with_edges = "vector_features" in fields and name != "painn"
    asked = [*fields, "per_atom_energy", *(["edge_features"] if with_edges else [])]
    document = {
        "teacher": {
            "model": name.rsplit("_", 1)[0] if name.startswith("gemnet") else name,
            "checkpoint": str(parity / f"{name}.ckpt.pt"),
        },
        "splits": {"train": {"format": "extxyz", "path": str(tmp_path / "d.extxyz")}},
        "features": dict.fromkeys(asked, FLOAT32),
        "store": {"path": str(tmp_path / "s.zarr")},
    }
    spec = write_spec(tmp_path / "s.yaml", document)
    result = run_command(main, ["build", spec, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    split = FeatureStore.open(tmp_path / "s.zarr").splits["train"]
    order = [split.position(f"s{i}") for i in range(len(reference["in/natoms"]))]
    read = split.read(order, list(split.arrays))
    _close(read["teacher/energy"], reference["phys/energy"], 1e-4)
    _close(read["teacher/forces"], reference["phys/forces"], 5e-4)
    for field, (key, sign) in fields.items():
        _close(read[f"features/{field}"], sign * reference[f"f32/{key}"], 5e-4)
    if with_edges:
        _compare_edges(read, reference, split.n_edges[order])


def _compare_edges(read: Any, reference: Any, n_edges: Any) -> None:
    natoms = reference["in/natoms"]
    first = np.repeat(np.cumsum(natoms) - natoms, n_edges)
    ends = read["edges/edge_index"].astype(int) + first[:, None]
    found = np.hstack((ends, read["edges/cell_offsets"].astype(int)))
    # The original stores the shift of the target image.
    shift = -reference["graph/main/cell_offset"].astype(int)
    wanted = np.hstack((reference["graph/main/edge_index"].T, shift))
    here, there = np.lexsort(found.T), np.lexsort(wanted.T)
    np.testing.assert_array_equal(found[here], wanted[there])
    _close(read["edges/edge_features"][here], reference["f32/x_F"][there], 5e-4)
