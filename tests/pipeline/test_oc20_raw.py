"""Raw OC20 chunks: frames beside ids and reference energies; folders of frames."""

import gzip
import io
import logging
import lzma
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest

from pipeline.datasets import frames, open_dataset
from pipeline.datasets.frames import TextCache
from pipeline.errors import DataError
from tests.frames import frame, write_frames
from tests.pipeline.oc20_files import Slab, atoms_of, data_folder, slabs

REFERENCES = [-255.27, -100.5, 3.25, 0.0, -1e3, -7.125]


def _text(slab: Slab, reference: float = 0.0) -> str:
    """The slab's frame as OC20 has it, with the total energy and a move_mask."""
    stream = io.StringIO()
    atoms = atoms_of(slab)
    atoms.calc = None
    atoms.info["energy"] = slab.energy + reference
    atoms.new_array("forces", slab.forces.astype(np.float64))
    columns = ["symbols", "positions", "move_mask", "tags", "forces"]
    ase.io.write(stream, atoms, format="extxyz", columns=columns)
    return stream.getvalue()


def _lines(made: list[Slab], references: list[float]) -> str:
    return "".join(
        f"random{slab.sid},frame{slab.fid},{reference}\n"
        for slab, reference in zip(made, references, strict=True)
    )


def _packed(path: Path, text: str) -> Path:
    raw = text.encode()
    if path.suffix == ".xz":
        raw = lzma.compress(raw)
    elif path.suffix == ".gz":
        raw = gzip.compress(raw)
    path.write_bytes(raw)
    return path


def _write_chunks(
    folder: Path, packed: str = ".xz", sizes: tuple[int, ...] = (4, 2)
) -> list[Slab]:
    """Chunks 0, 1, ... of the sizes told, with their text files."""
    made = slabs(sum(sizes))
    first = 0
    for number, size in enumerate(sizes):
        part = range(first, first + size)
        text = "".join(_text(made[i], REFERENCES[i]) for i in part)
        _packed(folder / f"{number}.extxyz{packed}", text)
        lines = _lines([made[i] for i in part], [REFERENCES[i] for i in part])
        _packed(folder / f"{number}.txt{packed}", lines)
        first += size
    return made


def _open(path: Path, **options: Any) -> Any:
    return open_dataset("oc20_raw", str(path), **options)


@pytest.mark.parametrize("packed", ["", ".xz", ".gz"])
def test_chunks_give_adsorption_energies_and_ids(packed: str, tmp_path: Path) -> None:
    made = _write_chunks(tmp_path, packed)
    dataset = _open(tmp_path)
    assert list(dataset.sample_ids) == [f"{s.sid}_{s.fid}" for s in made]
    assert dataset.n_atoms.tolist() == [len(s.numbers) for s in made]
    for i, slab in enumerate(made):
        sample = dataset[i]
        assert sample.sample_id == dataset.sample_ids[i]
        assert sample.energy == pytest.approx(slab.energy, abs=1e-7)
        assert sample.forces == pytest.approx(slab.forces, abs=1e-7)
        assert sample.forces[slab.fixed].all()
        structure = sample.structure
        assert np.array_equal(structure.atomic_numbers, slab.numbers)
        assert structure.positions == pytest.approx(slab.positions, abs=1e-7)
        assert structure.cell == pytest.approx(slab.cell, abs=1e-7)
        assert np.array_equal(structure.tags, slab.tags)
        assert np.array_equal(structure.fixed, slab.fixed)
        assert structure.pbc.all()


def test_total_energies_on_request_or_without_references(tmp_path: Path) -> None:
    made = _write_chunks(tmp_path)
    totals = [s.energy + r for s, r in zip(made, REFERENCES, strict=True)]
    dataset = _open(tmp_path, energy="total")
    assert [dataset[i].energy for i in range(6)] == pytest.approx(totals)
    assert dataset.sample_ids[5] == f"{made[5].sid}_{made[5].fid}"
    for file in tmp_path.glob("*.txt.xz"):
        file.unlink()
    bare = _open(tmp_path)
    assert [bare[i].energy for i in range(6)] == pytest.approx(totals)
    assert list(bare.sample_ids) == [str(i) for i in range(6)]


def test_adsorption_energies_need_every_text_file(tmp_path: Path) -> None:
    _write_chunks(tmp_path)
    (tmp_path / "1.txt.xz").unlink()
    for options in ({}, {"energy": "adsorption"}):
        with pytest.raises(DataError, match=r"1\.extxyz\.xz has no \.txt.*total"):
            _open(tmp_path, **options)
    assert len(_open(tmp_path, energy="total")) == 6
    (tmp_path / "0.txt.xz").unlink()
    with pytest.raises(DataError, match=r"0\.extxyz\.xz has no \.txt"):
        _open(tmp_path, energy="adsorption")


def test_the_published_archive_is_a_folder_in_a_folder(tmp_path: Path) -> None:
    """B1: the outer folder of OC20's tar is read as its inner one."""
    inner = tmp_path / "s2ef_train_2M" / "s2ef_train_2M"
    inner.mkdir(parents=True)
    (inner.parent / "README.txt").touch()
    made = _write_chunks(inner)
    dataset = _open(inner.parent)
    assert list(dataset.sample_ids) == [f"{s.sid}_{s.fid}" for s in made]
    assert dataset[5].energy == pytest.approx(made[5].energy, abs=1e-7)
    assert len(open_dataset("extxyz", str(inner.parent))) == 6
    with pytest.raises(DataError, match=r"holds no \.extxyz or \.xyz files\."):
        _open(tmp_path)
    other = inner.with_name("s2ef_val_id")
    other.mkdir()
    _write_chunks(other)
    words = r"several of its folders do \(s2ef_train_2M, s2ef_val_id\); name the one"
    with pytest.raises(DataError, match=words):
        _open(inner.parent)


def _write_systems(folder: Path, text: str) -> list[Slab]:
    """Two trajectories without ids in them, and a ``system.txt``."""
    made = slabs(4)
    for name, part in (("random71", made[:3]), ("random9", made[3:])):
        frames = "".join(_text(slab, 2.5) for slab in part)
        _packed(folder / f"{name}.extxyz.xz", frames)
    (folder / "system.txt").write_text(text)
    return made


def test_sets_of_one_adsorbate_have_a_reference_for_each_system(
    tmp_path: Path,
) -> None:
    """C: ``system.txt`` gives the reference energy of every trajectory."""
    made = _write_systems(tmp_path, "random9,2.5\nrandom71, -1.5\nrandom1,0\n\n")
    dataset = _open(tmp_path)
    assert list(dataset.sample_ids) == ["9_0", "71_0", "71_1", "71_2"]
    energies = [dataset[i].energy for i in range(4)]
    expected = [made[3].energy, *(slab.energy + 4.0 for slab in made[:3])]
    assert energies == pytest.approx(expected, abs=1e-7)
    total = _open(tmp_path, energy="total")
    assert total[0].energy == pytest.approx(made[3].energy + 2.5, abs=1e-7)


def test_systems_without_a_reference_are_named(tmp_path: Path, caplog: Any) -> None:
    """C: no system loses its reference in silence."""
    _write_systems(tmp_path, "random71,1.5\nrandom9\n")
    words = r"random9\.extxyz\.xz has no reference energy in system\.txt"
    with pytest.raises(DataError, match=words):
        _open(tmp_path)
    assert "system.txt: 1 of 2 lines are not system,energy" in caplog.text
    (tmp_path / "system.txt").write_text("a list of systems\n")
    for energy in (None, "adsorption"):
        with pytest.raises(DataError, match="no reference energy.*set energy: total"):
            _open(tmp_path, energy=energy)
    assert _open(tmp_path, energy="total").sample_ids[0] == "0"


def test_one_chunk_alone(tmp_path: Path) -> None:
    made = _write_chunks(tmp_path)
    dataset = _open(tmp_path / "1.extxyz.xz")
    assert [dataset[i].energy for i in range(2)] == pytest.approx(
        [made[4].energy, made[5].energy]
    )


def test_chunks_are_read_in_counting_order(tmp_path: Path) -> None:
    for number in (0, 2, 10):
        frame_text = frame(f"n{number}", ["H"], [[0, 0, number]])
        write_frames(tmp_path / f"{number}.extxyz", [frame_text])
    assert list(_open(tmp_path).sample_ids) == ["n0", "n2", "n10"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"limit": 2}, [0, 1]),
        ({"offset": 3}, [3, 4, 5]),
        ({"offset": 1, "every": 2}, [1, 3, 5]),
        ({"offset": 5, "limit": 9}, [5]),
    ],
)
def test_offset_every_and_limit_choose_samples(
    options: dict[str, int], expected: list[int], tmp_path: Path
) -> None:
    made = _write_chunks(tmp_path, sizes=(1, 3, 2))
    dataset = _open(tmp_path, **options)
    found = [dataset[i].energy for i in range(len(dataset))]
    assert found == pytest.approx([made[i].energy for i in expected], abs=1e-7)
    assert list(dataset.sample_ids) == [
        f"{made[i].sid}_{made[i].fid}" for i in expected
    ]


def test_a_limit_spares_the_files_behind_it(tmp_path: Path) -> None:
    _write_chunks(tmp_path)
    (tmp_path / "1.extxyz.xz").write_bytes(b"broken")
    assert len(_open(tmp_path, limit=4)) == 4
    with pytest.raises(DataError, match=r"1\.extxyz\.xz"):
        _open(tmp_path, limit=5)


def test_numbers_of_frames_and_lines_must_agree(tmp_path: Path) -> None:
    made = _write_chunks(tmp_path)
    _packed(tmp_path / "0.txt.xz", _lines(made[:3], REFERENCES[:3]))
    with pytest.raises(DataError, match=r"txt\.xz has 3 lines.*extxyz\.xz has 4"):
        _open(tmp_path)


@pytest.mark.parametrize(
    "line",
    ["random1,frame2", "random1,frame2,x", "random1,frame2,nan", "", "a,b,1,2", "\xff"],
)
def test_lines_that_are_none_are_named(line: str, tmp_path: Path) -> None:
    made = _write_chunks(tmp_path)
    lines = _lines(made[:4], REFERENCES[:4]).splitlines()
    lines[1] = line
    (tmp_path / "0.txt.xz").write_bytes(
        lzma.compress("\n".join(lines).encode("latin1"))
    )
    with pytest.raises(DataError, match=r"0\.txt\.xz: line 2 is .*expected"):
        _open(tmp_path)


@pytest.mark.parametrize("packed", [".xz", ".gz"])
def test_cut_files_name_the_sample_where_they_end(packed: str, tmp_path: Path) -> None:
    _write_chunks(tmp_path, packed)
    path = tmp_path / f"0.extxyz{packed}"
    whole = path.read_bytes()
    named = set()
    for share in (0.05, 0.3, 0.5, 0.7, 0.9, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(DataError) as error:
            _open(tmp_path)
        message = str(error.value)
        assert str(path) in message
        assert "breaks off in sample" in message
        named.add(int(message.split("sample ")[1].split(",")[0]))
    assert named <= {0, 1, 2, 3, 4}
    assert len(named) > 2


def test_cut_text_names_the_sample_where_it_ends(tmp_path: Path) -> None:
    _write_chunks(tmp_path, "")
    path = tmp_path / "0.extxyz"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))
    with pytest.raises(DataError, match=r"0\.extxyz is damaged.*in sample 3"):
        _open(tmp_path)


def test_damaged_archives_and_frames_are_named(tmp_path: Path) -> None:
    _write_chunks(tmp_path)
    path = tmp_path / "1.extxyz.xz"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"1\.extxyz\.xz is damaged"):
        _open(tmp_path)
    _write_chunks(tmp_path, "")
    plain = tmp_path / "0.extxyz"
    plain.write_text(plain.read_text().replace(" T ", " ", 1))
    path.unlink()
    dataset = _open(plain)
    with pytest.raises(DataError, match=r"0\.extxyz: sample \d cannot be read"):
        [dataset[i] for i in range(4)]


def test_absent_and_empty_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        _open(tmp_path / "absent")
    with pytest.raises(DataError, match=r"holds no \.extxyz or \.xyz files"):
        _open(tmp_path)
    made = slabs(2)
    _packed(tmp_path / "0.extxyz", _text(made[0]) * 2)
    _packed(tmp_path / "0.txt", _lines([made[0]] * 2, [0.0, 0.0]))
    with pytest.raises(DataError, match="share the id '500_0'"):
        _open(tmp_path)


def test_datasets_can_be_sent_and_read_by_threads(tmp_path: Path) -> None:
    made = _write_chunks(tmp_path)
    dataset = pickle.loads(pickle.dumps(_open(tmp_path)))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(dataset.__getitem__, [*range(6)] * 5))
    expected = [slab.energy for slab in made] * 5
    assert [sample.energy for sample in found] == pytest.approx(expected, abs=1e-7)


def test_unpacked_texts_are_dropped_beyond_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (tmp_path / f"{name}.xz").write_bytes(lzma.compress(name.encode() * 100))
    unpacked = []
    original = frames.read_unpacked

    def counted(path: Path) -> bytes:
        unpacked.append(path.stem)
        return original(path)

    monkeypatch.setattr(frames, "read_unpacked", counted)
    cache = TextCache(budget=250)
    for name in "abababcbca":
        assert cache.piece(tmp_path / f"{name}.xz", 3, 6) == name.encode() * 3
    assert "".join(unpacked) == "abca"
    (tmp_path / "a.xz").write_bytes(lzma.compress(b"new" * 100))
    assert cache.piece(tmp_path / "a.xz", 0, 3) == b"new"


def test_large_packed_sets_come_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    _write_chunks(tmp_path)
    monkeypatch.setattr("pipeline.datasets.oc20_raw.UNPACKED_BYTES", 1000)
    with caplog.at_level(logging.WARNING):
        _open(tmp_path)
    assert "decompress its files first" in caplog.text


def test_real_trajectories_without_references(tmp_path: Path) -> None:
    """Every second system of the real set, as frames and as a folder."""
    folder = data_folder("oc20_s2ef_debug")
    for number in ("100", "142"):
        name = f"random1000{number}.extxyz.xz"
        (tmp_path / name).symlink_to(folder / name)
    raw = _open(tmp_path, every=5)
    plain = open_dataset("extxyz", str(tmp_path), every=5)
    assert list(raw.sample_ids) == list(plain.sample_ids)
    assert raw.sample_ids[0] == "1000100_0"
    assert {i.split("_")[0] for i in raw.sample_ids} == {"1000100", "1000142"}
    for i in range(0, len(raw), 4):
        one, other = raw[i], plain[i]
        assert one.energy == other.energy < -50
        assert np.array_equal(one.forces, other.forces)
        assert one.structure.checksum == other.structure.checksum
        assert np.array_equal(one.structure.fixed, other.structure.fixed)
        assert one.forces[one.structure.fixed].any()
    with pytest.raises(DataError, match="has no .txt file"):
        _open(tmp_path, energy="adsorption")
