"""Names of the dataset formats: the built-in ones and those of plug-ins."""

from pipeline.plugins import PlugIns

# Reader of every built-in format.
BUILT_IN = {
    "oc20_lmdb": "pipeline.datasets.oc20_lmdb:Oc20LmdbDataset",
    "oc20_raw": "pipeline.datasets.oc20_raw:Oc20RawDataset",
    "extxyz": "pipeline.datasets.extxyz:ExtxyzDataset",
    "ase_db": "pipeline.datasets.ase_db:AseDbDataset",
    "aselmdb": "pipeline.datasets.aselmdb:AselmdbDataset",
    "traj": "pipeline.datasets.traj:TrajDataset",
    "npz": "pipeline.datasets.npz:NpzDataset",
    "hdf5": "pipeline.datasets.hdf5:Hdf5Dataset",
}
FORMATS = PlugIns("pipeline.datasets", "dataset format", tuple(BUILT_IN))
