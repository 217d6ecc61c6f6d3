"""The formats of data sets, in one list, and the endings of their files."""

from typing import Literal, get_args

Format = Literal[
    "oc20_lmdb",
    "oc20_raw",
    "extxyz",
    "ase_db",
    "aselmdb",
    "traj",
    "npz",
    "hdf5",
]
FORMATS: tuple[Format, ...] = get_args(Format)
# Frames of oc20_raw end in .extxyz, too; what lies beside them tells.
BY_SUFFIX: dict[str, Format] = {
    ".extxyz": "extxyz",
    ".xyz": "extxyz",
    ".lmdb": "oc20_lmdb",
    ".db": "ase_db",
    ".json": "ase_db",
    ".aselmdb": "aselmdb",
    ".traj": "traj",
    ".npz": "npz",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".hdf": "hdf5",
}
