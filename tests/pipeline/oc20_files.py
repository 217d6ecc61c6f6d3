"""OC20's file formats in small, written with the real libraries."""

import copyreg
import io
import json
import os
import pickle
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase
import ase.io
import lmdb
import numpy as np
import numpy.typing as npt
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from torch_geometric.data import Data


@dataclass(frozen=True)
class Slab:
    """One adsorbate on a slab; float32 where OC20's LMDBs have it."""

    numbers: npt.NDArray[np.int64]
    positions: npt.NDArray[np.float32]
    cell: npt.NDArray[np.float32]
    tags: npt.NDArray[np.int64]
    fixed: npt.NDArray[np.bool_]
    energy: float
    forces: npt.NDArray[np.float32]
    sid: int
    fid: int


def _places(n: int) -> npt.NDArray[np.float64]:
    """Places (n, 3) in Å that are as far apart as atoms are."""
    k = np.arange(n)
    return np.stack((2.5 * (k % 2), 2.8 * (k // 2 % 2), 2.6 * (k // 4)), axis=1)


def slabs(count: int) -> list[Slab]:
    """``count`` slabs of 5 to 9 atoms; sids vary, fids count within one."""
    rng = np.random.default_rng(7)
    made = []
    for i in range(count):
        n = 5 + i % 5
        tags = np.sort(rng.integers(0, 3, n))
        made.append(
            Slab(
                rng.choice([1, 6, 8, 29, 78], n),
                (_places(n) + 0.1 * rng.normal(size=(n, 3))).astype(np.float32),
                (np.diag([5.0, 6.0, 30.0]) + 0.25).astype(np.float32),
                tags,
                tags == 0,
                float(rng.normal()),
                rng.normal(size=(n, 3)).astype(np.float32),
                500 + i // 3,
                i % 3,
            )
        )
    return made


def pyg_fields(slab: Slab) -> dict[str, Any]:
    """Attributes of the PyG sample that OC20's preprocessing makes of a slab."""
    return {
        "cell": torch.tensor(slab.cell).view(1, 3, 3),
        "pos": torch.tensor(slab.positions),
        "atomic_numbers": torch.tensor(slab.numbers, dtype=torch.float32),
        "natoms": len(slab.numbers),
        "tags": torch.tensor(slab.tags, dtype=torch.float32),
        "y": slab.energy,
        "force": torch.tensor(slab.forces),
        "fixed": torch.tensor(slab.fixed, dtype=torch.float32),
        "sid": slab.sid,
        "fid": slab.fid,
    }


def pyg2(fields: Mapping[str, Any], protocol: int = 5) -> bytes:
    """Pickle of a PyG 2 sample."""
    return pickle.dumps(Data(**fields), protocol=protocol)


class _PlainPickler(pickle.Pickler):
    """Pickles PyG samples as PyG 1 did: attributes in the object's own dictionary."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Data):
            return NotImplemented
        unset = dict.fromkeys(("x", "edge_index", "edge_attr", "norm", "face"))
        return copyreg.__newobj__, (Data,), unset | value.to_dict()


def pyg1(fields: Mapping[str, Any], protocol: int = 4) -> bytes:
    """Pickle of a PyG 1 sample."""
    stream = io.BytesIO()
    _PlainPickler(stream, protocol).dump(Data(**fields))
    return stream.getvalue()


def write_lmdb(
    path: Path, values: Mapping[str, bytes], *, length: int | None = None
) -> Path:
    """An LMDB file, or a folder unless ``path`` has a suffix, with these entries."""
    environment = lmdb.open(
        str(path), map_size=1 << 24, subdir=not path.suffix, lock=False
    )
    with environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)
        if length is not None:
            transaction.put(b"length", pickle.dumps(length, protocol=-1))
    environment.close()
    return path


def write_oc20(path: Path, count: int = 6) -> list[Slab]:
    """An OC20 LMDB of ``count`` slabs at ``path``; returns the slabs."""
    made = slabs(count)
    values = {str(i): pyg2(pyg_fields(slab)) for i, slab in enumerate(made)}
    write_lmdb(path, values, length=count)
    return made


def atoms_of(slab: Slab) -> ase.Atoms:
    """The slab as ASE atoms with labels; ids are left out."""
    atoms = ase.Atoms(
        slab.numbers, slab.positions, cell=slab.cell, pbc=True, tags=slab.tags
    )
    atoms.set_constraint(FixAtoms(mask=slab.fixed))
    atoms.calc = SinglePointCalculator(
        atoms, energy=slab.energy, forces=slab.forces.astype(np.float64)
    )
    return atoms


def aselmdb_row(slab: Slab) -> dict[str, Any]:
    """The row that an .aselmdb file has of a slab."""

    def array(values: Any, name: str) -> dict[str, Any]:
        flat = np.asarray(values)
        return {"__ndarray__": [list(flat.shape), name, flat.ravel().tolist()]}

    return {
        "numbers": array(slab.numbers, "int64"),
        "positions": array(slab.positions, "float64"),
        "cell": array(slab.cell, "float64"),
        "pbc": array([True, True, True], "bool"),
        "tags": array(slab.tags, "int32"),
        "energy": slab.energy,
        "forces": array(slab.forces, "float64"),
        "data": {"sid": f"random{slab.sid}", "fid": slab.fid},
        "constraints": [
            {
                "name": "FixAtoms",
                "kwargs": {"indices": np.flatnonzero(slab.fixed).tolist()},
            }
        ],
    }


def packed_json(row: Any) -> bytes:
    """Value of an .aselmdb entry."""
    return zlib.compress(json.dumps(row).encode())


def data_folder(name: str) -> Path:
    """Folder ``name`` of the shared real data; skips the test without it."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("KD_DATA", beside)) / name
    if not folder.is_dir():
        pytest.skip("needs the real data sets; set KD_DATA to their folder")
    return folder
