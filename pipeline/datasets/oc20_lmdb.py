"""OC20's LMDB files: pickled PyG samples under the keys 0, 1, 2, ... or others."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.datasets.base import Listing, RecordDataset, Selection, split_pieces
from pipeline.datasets.labels import ReadOptions, Record
from pipeline.datasets.lmdb_files import LmdbFile, key_text, lmdb_files
from pipeline.datasets.pyg_pickles import (
    Tensor,
    as_array,
    plain_integer,
    sample_fields,
)
from pipeline.datasets.samples import id_text, pair_id
from pipeline.datasets.unpickling import UnsafePickle
from pipeline.errors import DataError
from pipeline.parallel.ordered_map import OrderedMap

log = logging.getLogger("pipeline.datasets")
# Samples that one process lists at a time.
PIECE = 4096


class Oc20LmdbDataset(RecordDataset):
    """Samples of one LMDB or a folder of them, read when they are asked for.

    Every key but ``length`` and its kin is a sample. Ids: ``{sid}_{fid}``, else
    ``sid``, else the running number over all files. Samples without ``pbc`` are
    periodic in three directions, as all of OC20 is.
    """

    format: ClassVar[str] = "oc20_lmdb"
    suffixes: ClassVar[tuple[str, ...]] = (".lmdb",)
    columns: ClassVar[dict[str, str]] = {"file": "int32", "key": "int64"}

    def __init__(
        self, paths: Sequence[Path], selection: Selection, options: ReadOptions
    ) -> None:
        super().__init__(paths, selection, options)
        self._files = lmdb_files(paths, self.suffixes[0])

    def files(self) -> list[Path]:
        """All files with samples."""
        return [file.data for file in self._files]

    def list_frames(self, run: OrderedMap = map) -> Listing:
        """Ids and atom counts; reads every sample without decoding its arrays."""
        keys = [_codes(file) for file in self._files]
        owner = np.repeat(np.arange(len(keys), dtype=np.int32), [len(k) for k in keys])
        chosen = self._selection.of(len(owner))
        part = slice(chosen.start, chosen.stop, chosen.step)
        files, codes = owner[part], np.concatenate(keys)[part]
        pieces = zip(
            split_pieces(chosen, PIECE),
            split_pieces(files, PIECE),
            split_pieces(codes, PIECE),
            strict=True,
        )
        ids: list[str] = []
        sizes: list[int] = []
        for found in run(self._scan_piece, pieces):
            ids += found[0]
            sizes += found[1]
        return Listing(ids, np.array(sizes, np.int32), {"file": files, "key": codes})

    def use(self, listing: Listing) -> None:
        """Take ``listing`` for that of this dataset."""
        super().use(listing)
        self._places = listing.places

    def record(self, index: int) -> Record:
        """The sample as it is in the file; what cannot be decoded is left out."""
        file, key = self._place(index)
        where = _where(file, key)
        values, properties = {}, {}
        try:
            for name, part in _fields(file, key).items():
                if name in _STRUCTURE:
                    values[name] = as_array(part)
                else:
                    properties[name] = _decode(part)
        except UnsafePickle as refusal:
            raise DataError(f"{where} is refused: {refusal}.") from None
        return _as_record(values, properties, where)

    def place(self, index: int) -> str:
        """File and key of the sample."""
        return _where(*self._place(index))

    def _place(self, index: int) -> tuple[LmdbFile, bytes]:
        file = self._files[int(self._places["file"][index])]
        return file, file.key(int(self._places["key"][index]))

    def _scan_piece(
        self, piece: tuple[range, npt.NDArray[np.int32], npt.NDArray[np.int64]]
    ) -> tuple[list[str], list[int]]:
        """Ids and atom counts; the piece has running numbers, files and keys."""
        ids, sizes = [], []
        for number, which, code in zip(*piece, strict=True):
            file = self._files[int(which)]
            try:
                sample_id, size = _scan(file, file.key(int(code)))
            except DataError:
                if not self.options.keep_bad:
                    raise
                sample_id, size = None, 0
            ids.append(sample_id or str(number))
            sizes.append(size)
        return ids, sizes

    def relist(self, index: int) -> None:
        """Raise DataError again if the sample could not be listed."""
        _scan(*self._place(index))


def _scan(file: LmdbFile, key: bytes) -> tuple[str | None, int]:
    """Id, if there is one, and atom count, without decoding more than that takes."""
    where = _where(file, key)
    try:
        fields = _fields(file, key)
        if "pos" not in fields:
            raise DataError(f"{where} has no pos.")
        sid, fid = (_label(fields, name, where) for name in ("sid", "fid"))
        pos = fields["pos"]
        shape = pos.size if isinstance(pos, Tensor) else as_array(pos).shape
    except UnsafePickle as refusal:
        raise DataError(f"{where} is refused: {refusal}.") from None
    return pair_id(sid, fid), shape[0] if shape else 0


_STRUCTURE = {"pos", "atomic_numbers", "cell", "tags", "fixed", "pbc"}


def _decode(part: Any) -> Any:
    """A value as numbers or text; as it is where it is neither."""
    if isinstance(part, str):
        return part
    try:
        return as_array(part)
    except UnsafePickle:
        return part


def _codes(file: LmdbFile) -> npt.NDArray[np.int64]:
    """Codes of the keys of a file's samples; warns where ``length`` disagrees."""
    codes = file.codes()
    raw = file.get("length")
    if raw is not None:
        try:
            length = plain_integer(raw)
        except UnsafePickle as refusal:
            raise DataError(f"{file.path}: 'length' is refused: {refusal}.") from None
        if length != len(codes):
            log.warning(
                "%s holds %d samples, but its length is %d; %s",
                file.path,
                len(codes),
                length,
                "samples may be missing" if length > len(codes) else "all are read",
            )
    return codes


def _fields(file: LmdbFile, key: bytes) -> dict[str, Any]:
    raw = file.get(key)
    if raw is None:
        raise DataError(f"{_where(file, key)} is missing; fetch the file again.")
    return sample_fields(raw)


def _where(file: LmdbFile, key: bytes) -> str:
    return f"{file.path}: sample {key_text(key)!r}"


def _label(fields: dict[str, Any], name: str, where: str) -> str | None:
    """A sid or fid as text."""
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not str:
        value = as_array(value)
        if value.size != 1:
            raise UnsafePickle(f"its {name} has {value.size} values")
    return id_text(value, name, where)


def _as_record(
    values: dict[str, Any], properties: dict[str, Any], where: str
) -> Record:
    for name in ("atomic_numbers", "cell"):
        if name not in values:
            raise DataError(f"{where} has no {name}.")
    stated = np.ravel(properties.get("natoms", ()))
    counted = np.size(values["atomic_numbers"])
    if counted and stated.size == 1 and stated[0] != counted:
        raise DataError(
            f"{where} has {counted} atomic numbers, but natoms={stated[0]}."
        )
    return Record(
        atomic_numbers=values["atomic_numbers"],
        positions=values.get("pos"),
        cell=values["cell"],
        pbc=values.get("pbc", (True, True, True)),
        tags=values.get("tags"),
        fixed=values.get("fixed"),
        properties=properties,
        energy_names=("y", "energy"),
        forces_names=("force", "forces"),
    )
