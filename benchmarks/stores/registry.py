"""All stores of the comparison."""

from stores.case import Case
from stores.flat import Memmap
from stores.hdf5 import Hdf5
from stores.lmdb_records import Lmdb
from stores.ours import Ours, ZarrOnOurs, q8
from stores.safetensors_file import Safetensors

MEMMAP = Memmap("np.memmap", plain=False)
OURS = Ours("ours")

# Another profile of our store is one more `Ours(name, plan)` here.
PROFILES: tuple[Ours, ...] = (OURS, Ours("ours-q8", q8))


def all_cases() -> list[Case]:
    """Every store whose package is installed, the yardstick first."""
    hdf5 = [Hdf5()] if Hdf5.available else []
    return [
        MEMMAP,
        Memmap("np.memmap as bare arrays", plain=True),
        *PROFILES,
        Lmdb("LMDB, readahead on", readahead=True),
        Lmdb("LMDB, readahead off", readahead=False),
        *hdf5,
        Safetensors(),
        ZarrOnOurs(OURS),
    ]


def chosen_cases(names: str | None) -> list[Case]:
    """The yardstick and the cases whose name begins with one of ``names``.

    ``names`` are separated by commas; None stands for all.
    """
    if names is None:
        return all_cases()
    wanted = tuple(names.split(","))
    first, *others = all_cases()
    return [first, *(case for case in others if case.name.startswith(wanted))]
