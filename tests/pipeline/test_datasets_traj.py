"""ASE trajectories as datasets, against files that ASE writes."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixedPlane
from ase.io.trajectory import Trajectory
from ase.io.ulm import ulmopen

from pipeline.datasets import ReadOptions, open_dataset
from pipeline.errors import DataError
from pipeline.spec.units import Units

HARTREE = 27.211386024367243
N_ATOMS = [2, 3, 4, 5, 6]


def _images(**info: Any) -> list[ase.Atoms]:
    """Images of two to six atoms; ``info`` maps a name to its values."""
    rng = np.random.default_rng(3)
    images = []
    for i, n in enumerate(N_ATOMS):
        positions = rng.normal(size=(n, 3)) * 4
        image = ase.Atoms("H" + "O" * (n - 1), positions, tags=np.arange(n) % 3)
        image.set_cell([[4, 0, 0], [1, 5, 0], [0, 0, 20 + i]])
        image.pbc = (True, True, i % 2 == 0)
        image.set_constraint(FixAtoms([0, n - 1]))
        image.info |= {name: values[i] for name, values in info.items()}
        forces = rng.normal(size=(n, 3))
        image.calc = SinglePointCalculator(
            image, energy=-1.5 * i, free_energy=-1.5 * i - 7, forces=forces
        )
        images.append(image)
    return images


def _write(path: Path, images: list[ase.Atoms]) -> list[ase.Atoms]:
    with Trajectory(path, "w") as trajectory:
        for image in images:
            trajectory.write(image)
    return images


def _open(path: Path, **options: Any) -> Any:
    return open_dataset("traj", str(path), **options)


def _assert_is(sample: Any, image: ase.Atoms) -> None:
    structure = sample.structure
    assert sample.energy == image.calc.results["energy"]
    # The forces of the file, also on atoms that are held.
    assert np.array_equal(sample.forces, image.calc.results["forces"].astype("f4"))
    assert np.array_equal(structure.atomic_numbers, image.numbers)
    assert np.array_equal(structure.positions, image.positions)
    assert np.array_equal(structure.cell, image.cell.array)
    assert np.array_equal(structure.pbc, image.pbc)
    assert np.array_equal(structure.tags, image.get_tags())
    held = np.isin(np.arange(len(image)), image.constraints[0].index)
    assert np.array_equal(structure.fixed, held)


def test_images_are_what_ase_wrote(tmp_path: Path) -> None:
    """C: a reader for .traj."""
    path = tmp_path / "a.traj"
    images = _write(path, _images())
    dataset = pickle.loads(pickle.dumps(_open(path)))
    assert list(dataset.sample_ids) == ["0", "1", "2", "3", "4"]
    assert dataset.n_atoms.tolist() == N_ATOMS
    for i, image in enumerate(images):
        _assert_is(dataset[i], image)


def test_images_of_one_system_may_share_a_header(tmp_path: Path) -> None:
    """Older files have elements and constraints in the first image only."""
    path = tmp_path / "a.traj"
    with ulmopen(path, "w", tag="ASE-Trajectory") as writer:
        held = [{"name": "FixAtoms", "kwargs": {"indices": [1]}}]
        writer.write(numbers=np.array([6, 8]), pbc=np.array([1, 1, 0], bool))
        writer.write(version=1, constraints=json.dumps(held))
        for i in range(2):
            writer.write(positions=np.full((2, 3), 1.0 + i), cell=np.eye(3))
            writer.sync()
    dataset = _open(path)
    assert dataset.n_atoms.tolist() == [2, 2]
    structure = dataset[1].structure
    assert structure.atomic_numbers.tolist() == [6, 8]
    assert structure.positions.tolist() == [[2.0] * 3] * 2
    assert structure.pbc.tolist() == [True, True, False]
    assert structure.fixed.tolist() == [False, True]


@pytest.mark.parametrize(
    ("info", "ids"),
    [
        ({"sid": [7] * 5, "fid": range(5)}, ["7_0", "7_1", "7_2", "7_3", "7_4"]),
        ({"sample_id": list("abcde")}, list("abcde")),
        ({"sid": [f"random{i}" for i in range(5)]}, list("01234")),
    ],
)
def test_ids_come_from_info(info: Any, ids: list[str], tmp_path: Path) -> None:
    _write(tmp_path / "a.traj", _images(**info))
    assert list(_open(tmp_path / "a.traj").sample_ids) == ids


def test_several_trajectories_are_one_split(tmp_path: Path) -> None:
    """C: a folder, one folder further down, a list, a glob."""
    folder = tmp_path / "outer" / "inner"
    folder.mkdir(parents=True)
    images = _images()
    _write(folder / "b.traj", images[2:])
    _write(folder / "a.traj", images[:2])
    paths = [folder.parent, folder, f"{folder}/*.traj"]
    ids = ["a_0", "a_1", "b_0", "b_1", "b_2"]
    for path in paths:
        dataset = open_dataset("traj", str(path))
        assert list(dataset.sample_ids) == ids
        for i, image in enumerate(images):
            _assert_is(dataset[i], image)
    for options in ({"offset": 1, "every": 2}, {"offset": 3}, {"limit": 3}):
        part = open_dataset("traj", str(folder), **options)  # type: ignore[arg-type]
        first, step = options.get("offset", 0), options.get("every", 1)
        chosen = ids[first::step][: options.get("limit")]
        assert list(part.sample_ids) == chosen
        _assert_is(part[-1 + len(chosen)], images[ids.index(chosen[-1])])
    (folder / "c.traj").symlink_to(folder / "a.traj")
    with pytest.raises(DataError, match="the same file twice"):
        open_dataset("traj", str(folder))


def test_keys_units_and_where(tmp_path: Path) -> None:
    path = tmp_path / "a.traj"
    images = _write(path, _images(kind=["x", "y", "x", "y", "x"]))
    options = ReadOptions(
        energy_key="free_energy",
        units=Units(energy="Hartree"),
        where=(("kind", ("y",)),),
    )
    dataset = _open(path, options=options)
    assert list(dataset.sample_ids) == ["1", "3"]
    assert dataset[1].energy == pytest.approx((-4.5 - 7) * HARTREE)
    forces = images[3].calc.results["forces"] * HARTREE
    assert dataset[1].forces == pytest.approx(forces, rel=1e-6)


def test_images_without_labels_or_cell(tmp_path: Path) -> None:
    path = tmp_path / "a.traj"
    _write(path, [ase.Atoms("CO", [[0, 0, 0], [0, 0, 1.1]])])
    sample = _open(path)[0]
    assert np.isnan(sample.energy)
    assert np.isnan(sample.forces).all()
    assert not sample.structure.cell.any()
    assert sample.structure.tags.tolist() == [2, 2] or not sample.structure.tags.any()


def test_constraints_that_are_lost_are_named(tmp_path: Path, caplog: Any) -> None:
    images = _images()
    images[2].set_constraint([FixAtoms([0, 3]), FixedPlane(1, (0, 0, 1))])
    dataset = _open_written(tmp_path / "a.traj", images)
    _assert_is(dataset[2], images[2])
    assert caplog.messages == [
        f"{tmp_path / 'a.traj'}: 1 of 5 samples have constraints that are not kept: "
        "FixedPlane (1); a store only knows atoms held on all axes, as FixAtoms and "
        "the columns fixed and move_mask hold them"
    ]


def _open_written(path: Path, images: list[ase.Atoms]) -> Any:
    _write(path, images)
    return _open(path)


def test_threads_read_the_same(tmp_path: Path) -> None:
    images = _images()
    dataset = _open_written(tmp_path / "a.traj", images)
    with ThreadPoolExecutor(4) as pool:
        for i, sample in enumerate(pool.map(dataset.__getitem__, [*range(5)] * 10)):
            _assert_is(sample, images[i % 5])


def test_cut_files_end_in_one_sentence(tmp_path: Path) -> None:
    """Wherever a file breaks off, it is refused or what is there is right."""
    path, cut = tmp_path / "a.traj", tmp_path / "cut.traj"
    images = _write(path, _images())
    raw = path.read_bytes()
    messages = []
    for end in range(0, len(raw), 61):
        cut.write_bytes(raw[:end])
        try:
            dataset = _open(cut)
            for i, image in enumerate(images):
                _assert_is(dataset[i], image)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 50
    for message in messages:
        assert message.startswith(str(cut))
        assert "cannot be read as an ASE trajectory" in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"float64"', b'"object" ', "not numbers"),
        (b"ASE-Trajectory", b"GPAW-calculat ", "it is a file of"),
        (b"[2, 3]", b"[9999999999, 3]"[:6], "cannot be read as an ASE trajectory"),
    ],
)
def test_hostile_files_are_refused(
    old: bytes, new: bytes, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.traj"
    _write(path, _images())
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new.ljust(len(old))[: len(old)]))
    with pytest.raises(DataError, match=words):
        dataset = _open(path)
        _ = [dataset[i] for i in range(5)]


def test_other_files_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"no trajectory" * 99, pickle.dumps({"x": 1})):
        path = tmp_path / "a.traj"
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as an ASE trajectory"):
            _open(path)
    with pytest.raises(DataError, match="does not exist"):
        _open(tmp_path / "absent.traj")
    path.unlink()
    with pytest.raises(DataError, match=r"holds no \.traj files"):
        _open(tmp_path)
    with Trajectory(path, "w"):
        pass
    with pytest.raises(DataError, match="holds no samples"):
        _open(path)
