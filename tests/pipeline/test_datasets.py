"""Extended-XYZ files as datasets, and the statistics of their labels."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from pipeline.datasets import ReadOptions, open_dataset, warn_of_missing_labels
from pipeline.errors import DataError
from pipeline.spec.units import Units
from pipeline.structure import Sample
from tests.frames import collision_frames, frame, write_frames
from tests.labels import label_statistics


def _one(tmp_path: Path, text: str) -> Sample:
    dataset = open_dataset("extxyz", str(write_frames(tmp_path / "d.extxyz", [text])))
    assert len(dataset) == 1
    return dataset[0]


def test_samples_are_what_the_text_says(tmp_path: Path) -> None:
    positions = [[0.5, -1.25, 3.0], [1.0, 2.0, 0.125]]
    forces = [[0.1, -0.2, 0.3], [-0.1, 0.2, -0.3]]
    sample = _one(
        tmp_path,
        frame(
            "mine",
            ["Cu", "O"],
            positions,
            energy=-12.5,
            forces=forces,
            columns={"tags": ("I", [0, 2]), "fixed": ("I", [1, 0])},
            header='pbc="T F T" Lattice="3 0 0 0.5 4 0 0 0 20"',
        ),
    )
    structure = sample.structure
    assert sample.sample_id == "mine"
    assert sample.energy == -12.5
    assert np.array_equal(sample.forces, np.array(forces, np.float32))
    assert np.array_equal(structure.positions, positions)
    assert structure.positions.dtype == np.float64
    assert structure.atomic_numbers.tolist() == [29, 8]
    assert structure.atomic_numbers.dtype == np.uint8
    assert structure.tags.tolist() == [0, 2]
    assert structure.fixed.tolist() == [True, False]
    assert structure.pbc.tolist() == [True, False, True]
    assert structure.cell.tolist() == [[3, 0, 0], [0.5, 4, 0], [0, 0, 20]]


def test_missing_parts_have_their_defaults(tmp_path: Path) -> None:
    sample = _one(tmp_path, "2\n\nH 0 0 0\nO 0 0 1\n")
    assert sample.sample_id == "0"
    assert np.isnan(sample.energy)
    assert sample.forces.shape == (2, 3)
    assert np.isnan(sample.forces).all()
    assert sample.structure.tags.tolist() == [2, 2]
    assert not sample.structure.fixed.any()
    assert not sample.structure.pbc.any()
    assert not sample.structure.cell.any()


@pytest.mark.parametrize("suffix", [".extxyz", ".extxyz.gz", ".extxyz.xz"])
def test_packed_files_give_the_same_samples(suffix: str, tmp_path: Path) -> None:
    frames = collision_frames(6)
    dataset = open_dataset(
        "extxyz", str(write_frames(tmp_path / f"data{suffix}", frames))
    )
    assert [len(dataset[i].structure) for i in range(6)] == [
        int(text.split()[0]) for text in frames
    ]
    assert dataset.n_atoms.dtype == np.int32
    energies = [float(text.split("energy=")[1].split()[0]) for text in frames]
    assert [dataset[i].energy for i in range(6)] == energies


def test_frames_that_ase_writes_are_read_back(tmp_path: Path) -> None:
    atoms = ase.Atoms("Pt3CO", np.random.default_rng(0).normal(size=(5, 3)) * 3)
    atoms.set_cell([4, 5, 30])
    atoms.pbc = (True, True, False)
    atoms.set_constraint(FixAtoms([0, 2]))
    forces = np.random.default_rng(1).normal(size=(5, 3))
    atoms.calc = SinglePointCalculator(atoms, energy=-3.5, forces=forces)
    atoms.info |= {"sid": 12, "fid": 7}
    path, masked = tmp_path / "ase.extxyz", tmp_path / "masked.extxyz"
    ase.io.write(path, atoms, format="extxyz")
    sample = open_dataset("extxyz", str(path))[0]
    assert sample.sample_id == "12_7"
    assert sample.energy == -3.5
    assert sample.forces == pytest.approx(forces, abs=1e-6)
    assert sample.structure.pbc.tolist() == [True, True, False]
    columns = ["symbols", "positions", "move_mask"]
    ase.io.write(masked, atoms, format="extxyz", columns=columns)
    fixed = open_dataset("extxyz", str(masked))[0].structure.fixed
    assert fixed.tolist() == [True, False, True, False, False]


def test_an_atom_held_on_all_axes_is_fixed(tmp_path: Path) -> None:
    text = (
        "2\nProperties=species:S:1:pos:R:3:move_mask:L:3\n"
        "H 0 0 0 F F F\nH 0 0 1 T T T\n"
    )
    assert _one(tmp_path, text).structure.fixed.tolist() == [True, False]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, range(10)),
        ({"limit": 3}, range(3)),
        ({"offset": 4}, range(4, 10)),
        ({"every": 4}, [0, 4, 8]),
        ({"offset": 1, "every": 3, "limit": 2}, [1, 4]),
        ({"limit": 99}, range(10)),
    ],
)
def test_offset_every_and_limit_choose_samples(
    options: dict[str, int], expected: Any, tmp_path: Path
) -> None:
    frames = [frame(None, ["H"], [[0, 0, i]]) for i in range(10)]
    path = write_frames(tmp_path / "d.extxyz", frames)
    dataset = open_dataset("extxyz", str(path), **options)
    assert [dataset[i].structure.positions[0, 2] for i in range(len(dataset))] == list(
        expected
    )
    # Running numbers count in the file, so a subset keeps its ids.
    assert list(dataset.sample_ids) == [str(i) for i in expected]


def test_ids_are_kept_as_they_are_written(tmp_path: Path) -> None:
    """Ids that look like numbers are still names: 007 is not 7."""
    names = ["007", "7", "1e3", "T", "1_000", "a-b"]
    frames = [frame(name, ["H"], [[0, 0, 0]]) for name in names]
    path = write_frames(tmp_path / "d.extxyz", frames)
    assert list(open_dataset("extxyz", str(path)).sample_ids) == names


def test_datasets_can_be_sent_to_other_processes(
    collisions: Callable[..., Path],
) -> None:
    dataset = open_dataset("extxyz", str(collisions(4)))
    again = pickle.loads(pickle.dumps(dataset))
    assert list(again.sample_ids) == list(dataset.sample_ids)
    for i in range(4):
        assert again[i].structure.checksum == dataset[i].structure.checksum


def test_checksum_sees_numbers_positions_cell_and_order(tmp_path: Path) -> None:
    def checksum(
        symbols: list[str], z: float, lattice: str = "9 0 0 0 9 0 0 0 9"
    ) -> int:
        header = f'pbc="T T T" Lattice="{lattice}"'
        text = frame("a", symbols, [[0, 0, 0], [0, 0, z]], header=header)
        return _one(tmp_path, text).structure.checksum

    first = checksum(["H", "O"], 1.0)
    assert first == checksum(["H", "O"], 1.0)
    others = {
        checksum(["O", "H"], 1.0),
        checksum(["H", "O"], 1.0 + 1e-8),
        checksum(["H", "O"], 1.0, "9 0 0 0 9 0 0 0 8"),
    }
    assert len(others - {first}) == 3


BROKEN: dict[str, tuple[bytes, str]] = {
    "cut.extxyz": ("".join(collision_frames(2)).encode()[:-200], "damaged"),
    "words.extxyz": (b"this is no dataset\n", "damaged"),
    "binary.extxyz": (bytes(range(256)), "looks like a binary file"),
    "empty.extxyz": (b"", "holds no samples"),
    "twice.extxyz": (
        frame("same", ["H"], [[0, 0, 0]]).encode() * 2,
        "samples 0 and 1 share the id 'same'",
    ),
    "nan.extxyz": (b"1\nsample_id=odd\nH nan 0 0\n", "'odd' has positions"),
    "noatoms.extxyz": (b"0\nsample_id=odd\n", "'odd' has no atoms"),
    "gap.extxyz": (
        (
            frame("a", ["H"], [[0, 0, 0]]) + "\n" + frame("b", ["H"], [[0, 0, 1]])
        ).encode(),
        "gap",
    ),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_broken_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    content, words = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        open_dataset("extxyz", str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
def test_truncated_archives_are_refused(suffix: str, tmp_path: Path) -> None:
    path = write_frames(tmp_path / f"d.extxyz{suffix}", collision_frames(5))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="damaged"):
        open_dataset("extxyz", str(path))


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_dataset("extxyz", str(tmp_path / "absent.extxyz"))


def test_folders_are_read_in_counting_order(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        frames = [frame(None, ["H"], [[0, 0, number + i / 10]]) for i in range(2)]
        write_frames(tmp_path / f"part{number}.extxyz.xz", frames)
    (tmp_path / "notes.txt").write_text("no frames")
    dataset = open_dataset("extxyz", str(tmp_path))
    heights = [dataset[i].structure.positions[0, 2] for i in range(6)]
    assert heights == [1, 1.1, 9, 9.1, 10, 10.1]
    assert list(dataset.sample_ids) == [str(i) for i in range(6)]
    chosen = open_dataset("extxyz", str(tmp_path), offset=1, every=2, limit=2)
    assert list(chosen.sample_ids) == ["1", "3"]
    (tmp_path / "part10.extxyz.xz").write_bytes(b"broken")
    assert len(open_dataset("extxyz", str(tmp_path), limit=4)) == 4
    with pytest.raises(DataError, match=r"part10\.extxyz\.xz .* damaged"):
        open_dataset("extxyz", str(tmp_path))


def test_cut_archives_name_the_sample_where_they_end(tmp_path: Path) -> None:
    path = write_frames(tmp_path / "d.extxyz.xz", collision_frames(40))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"breaks off in sample 3\d, counted from 0"):
        open_dataset("extxyz", str(path))


def test_archives_in_several_pieces_are_one(tmp_path: Path) -> None:
    path = tmp_path / "d.extxyz.xz"
    parts = [write_frames(path, [text]).read_bytes() for text in collision_frames(3)]
    path.write_bytes(b"".join(parts))
    assert len(open_dataset("extxyz", str(path))) == 3


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("REF_energy=-3.5", ["REF_energy", "REF_forces"]),
        ("free_energy=-3.5", ["REF_forces", "free_energy"]),
        ("energy=-1 free_energy=-3.5", ["REF_forces", "free_energy"]),
        ("pbc=F", ["REF_forces"]),
    ],
)
def test_labels_of_other_names_are_not_taken_but_warned_of(
    names: str, found: list[str], tmp_path: Path, caplog: Any
) -> None:
    """A2: names like labels are listed for every sample, wherever it stands."""
    columns: Any = {"REF_forces": ("R", [1.0])}
    texts = [
        frame("a", ["H"], [[0, 0, 0]], energy=-1.0, forces=[[0, 0, 0]]),
        frame("b", ["H"], [[0, 0, 0]], columns=columns, header=names),
    ]
    dataset = open_dataset("extxyz", str(write_frames(tmp_path / "d.extxyz", texts)))
    samples = [dataset[0], dataset[1]]
    energy = samples[1].energy
    assert energy == -1 if "energy=-1" in names else np.isnan(energy)
    assert np.isnan(samples[1].forces).all()
    assert dataset.label_names(0) == []
    assert dataset.label_names(1) == found
    with caplog.at_level("WARNING"):
        warn_of_missing_labels("splits.train", dataset)
    messages = [r.getMessage() for r in caplog.records]
    listed = ", ".join(map(repr, found))
    expected = (
        "splits.train: 1 of 2 samples have no {}; the first is 'b' and has "
        + listed
        + "; set splits.train.{}_key"
    )
    missing = ["forces"] if "energy=-1" in names else ["energy", "forces"]
    assert messages == [expected.format(label, label) for label in missing]


def test_labels_have_the_names_and_units_that_are_given(tmp_path: Path) -> None:
    """C: energy_key, forces_key, gradient_key and units, cell and positions too."""
    text = frame(
        "a",
        ["H"],
        [[1.0, 2.0, 0.0]],
        energy=-7.0,
        forces=[[1.0, 0.0, -2.0]],
        header='REF_energy=-0.5 Lattice="4 0 0 0 4 0 0 0 4" pbc="T T T"',
    )
    path = str(write_frames(tmp_path / "d.extxyz", [text]))
    units = Units("ha", "bohr")
    options = ReadOptions(energy_key="REF_energy", gradient_key="forces", units=units)
    sample = open_dataset("extxyz", path, options=options)[0]
    hartree, bohr = 27.211386, 0.52917721
    assert sample.energy == pytest.approx(-0.5 * hartree)
    assert sample.forces == pytest.approx(np.array([[-1, 0, 2]]) * hartree / bohr)
    assert sample.structure.positions == pytest.approx(np.array([[1, 2, 0]]) * bohr)
    assert sample.structure.cell == pytest.approx(np.eye(3) * 4 * bohr)
    wrong = ReadOptions(energy_key="E0")
    dataset = open_dataset("extxyz", path, options=wrong)
    assert np.isnan(dataset[0].energy)
    with pytest.raises(DataError, match=r"no sample has 'E0', which energy_key names"):
        warn_of_missing_labels("splits.train", dataset)


def test_blank_lines_at_the_end_are_nothing(tmp_path: Path) -> None:
    assert _one(tmp_path, frame("a", ["H"], [[0, 0, 0]]) + "\n\n").sample_id == "a"


def _statistics(tmp_path: Path, *frames: str, fit: str = "per_element") -> Any:
    path = write_frames(tmp_path / "s.extxyz", frames)
    return label_statistics(open_dataset("extxyz", str(path)), fit)


def _line(sample_id: str, symbols: str, energy: float | None, **more: Any) -> str:
    positions = [[0, 0, i] for i in range(len(symbols))]
    return frame(sample_id, list(symbols), positions, energy=energy, **more)


def test_reference_energies_solve_least_squares_by_hand(tmp_path: Path) -> None:
    """E = a H + b O for HHO, HO, HH; normal equations solved on paper."""
    # counts (H, O) and energies: (2, 1) -> -5, (1, 1) -> -4, (2, 0) -> -3
    # normal matrix [[9, 3], [3, 2]], right side [-20, -9]; determinant 9
    a, b = (-20 * 2 + 9 * 3) / 9, (-9 * 9 + 20 * 3) / 9
    frames = [_line("x", "HHO", -5.0), _line("y", "HO", -4.0), _line("z", "HH", -3.0)]
    found = _statistics(tmp_path, *frames)
    references = np.array(found.element_references)
    assert references[[1, 8]] == pytest.approx([a, b])
    assert not np.delete(references, [1, 8]).any()
    left = [-5 - 2 * a - b, -4 - a - b, -3 - 2 * a]
    assert found.energy_mean == pytest.approx(float(np.mean(left)))
    assert found.energy_std == found.force_std == 1.0


def test_undetermined_compositions_share_the_energy(tmp_path: Path) -> None:
    """With H2O alone only 2a + b is known; the smallest solution is chosen."""
    found = _statistics(tmp_path, _line("x", "HHO", -10.0), _line("y", "HHO", -12.0))
    references = np.array(found.element_references)
    assert references[[1, 8]] == pytest.approx([-11 * 2 / 5, -11 / 5])
    assert found.energy_mean == pytest.approx(0.0, abs=1e-12)


def test_without_references_the_mean_holds_the_energy(tmp_path: Path) -> None:
    frames = [_line("x", "HHO", -10.0), _line("y", "HO", -13.0)]
    found = _statistics(tmp_path, *frames, fit="none")
    assert not any(found.element_references)
    assert found.energy_mean == -11.5


def test_scale_is_the_root_mean_square_of_free_force_components(
    tmp_path: Path,
) -> None:
    forces = [[3.0, 0.0, 4.0], [100.0, 100.0, 100.0]]
    held = {"columns": {"fixed": ("I", [0, 1])}}
    found = _statistics(
        tmp_path,
        _line("x", "HO", -1.0, forces=forces, **held),
        _line("y", "HO", None, forces=[[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]),
        _line("z", "HO", None),
    )
    components = [3, 0, 4, 1, 2, 2, 0, 0, 0]
    expected = np.sqrt(np.mean(np.square(components)))
    assert found.force_std == pytest.approx(expected)
    assert found.energy_std == found.force_std
    # Only x has an energy.
    total = (
        found.energy_mean + found.element_references[1] + found.element_references[8]
    )
    assert total == pytest.approx(-1.0)


def test_no_labels_leave_the_unit_scale(tmp_path: Path) -> None:
    found = _statistics(tmp_path, _line("x", "HO", None))
    assert (found.energy_mean, found.energy_std, found.force_std) == (0.0, 1.0, 1.0)
    assert not any(found.element_references)


def test_forces_that_all_vanish_leave_the_unit_scale(tmp_path: Path) -> None:
    found = _statistics(tmp_path, _line("x", "HO", -1.0, forces=np.zeros((2, 3))))
    assert found.force_std == 1.0
