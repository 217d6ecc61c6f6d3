"""What planning finds in data: counts, gaps, close atoms, forces of another kind."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.build.build import make_build_plan
from pipeline.build.contents import Contents, Gap
from pipeline.build.preflight import ForceMatch, likely_cause, match_forces
from pipeline.cli.main import main
from pipeline.errors import DataError
from pipeline.spec.cache_spec import load_spec
from pipeline.structure import Sample, Structure
from tests.commands import refusal, run_command
from tests.frames import collision_frames, frame, write_frames
from tests.stores import spec_document, write_spec

COLUMNS = ("split", "frames", "energy", "forces", "periodic", "elements")
WATER = [[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]]
PUSH = [[0.1, 0.2, 0.0], [-0.1, 0.0, 0.0], [0.0, -0.2, 0.0]]


def _water(name: str, shift: float = 0.0, **more: Any) -> str:
    """A water molecule; ``shift`` in Å makes it another structure."""
    moved = [[x + shift, y, z] for x, y, z in WATER[:1]] + WATER[1:]
    return frame(name, ["O", "H", "H"], moved, **more)


def _labelled(name: str, shift: float = 0.0) -> str:
    return _water(name, shift, energy=-14.2, forces=PUSH)


def _renamed(text: str) -> str:
    return text.replace("energy=", "REF_energy=").replace(":forces:", ":REF_forces:")


def _spec(
    folder: Path, teacher: Path | None = None, **splits: dict[str, Any] | Sequence[str]
) -> Path:
    """Spec of splits, each its frames or its whole section with ``frames``."""
    sections = {}
    for name, given in splits.items():
        section = dict(given) if isinstance(given, dict) else {"frames": given}
        data = write_frames(folder / f"{name}.extxyz", section.pop("frames"))
        sections[name] = {"format": "extxyz", "path": str(data), **section}
    document = spec_document(sections, folder / "s.zarr", teacher)
    return write_spec(folder / "s.yaml", document)


def _warnings(text: str) -> list[str]:
    lines = text.replace("\r", "\n").splitlines()
    return [s.removeprefix("Warning: ") for s in lines if s.startswith("Warning: ")]


def _warned_in_log(store: Path) -> list[str]:
    lines = store.with_name(f"{store.name}.log").read_text().splitlines()
    return [s.split(" WARNING ", 1)[1] for s in lines if " WARNING " in s]


@pytest.mark.parametrize("command", ["plan", "build"])
def test_commands_end_with_a_table_of_what_was_read(
    command: str, tmp_path: Path
) -> None:
    crystal = _water("w", 0.1, header='Lattice="9 0 0 0 9 0 0 0 9" pbc="T T F"')
    spec = _spec(
        tmp_path,
        a=[_labelled("0"), crystal],
        b=[frame("1", "CC", [[0] * 3, [1.3] * 3])],
    )
    said = run_command(main, [command, spec, "--device", "cpu"])
    assert said.exit_code == 0, said.output
    rows = list(map(str.split, said.stdout.splitlines()))
    assert rows[0] == [*COLUMNS, "left", "out"]
    assert rows[1] == ["a", *"211", "1", "of", "2", *"HO0"]
    assert rows[2] == ["b", *"100", "none", *"C0"]
    info = run_command(main, ["info", tmp_path / "s.zarr"]).stdout
    assert all(line in info for line in said.stdout.splitlines()[:3])
    told = json.loads(run_command(main, ["info", tmp_path / "s.zarr", "--json"]).stdout)
    assert told["contents"]["a"]["elements"] == ["H", "O"]
    assert told["contents"]["a"]["gaps"]["energy"]["sample_id"] == "w"


def test_labels_under_other_names_are_named_with_the_key(tmp_path: Path) -> None:
    """A2: isolated atoms with `energy` come first, the rest has other names."""
    alone = frame("h", ["H"], [[0, 0, 0]], energy=-13.6, forces=[[0, 0, 0]])
    rest = [_renamed(_labelled(f"w{i}", i / 50)) for i in range(3)]
    spec = _spec(tmp_path, train=[alone, *rest])
    expected = [
        f"splits.train: 3 of 4 samples have no {label}, the first is 'w0'; it has "
        f"'REF_{label}', so set {keys} to the right name"
        for label, keys in (
            ("energy", "splits.train.energy_key"),
            ("forces", "splits.train.forces_key or splits.train.gradient_key"),
        )
    ]
    said = run_command(main, ["plan", spec, "--device", "cpu"])
    assert said.exit_code == 0
    assert _warnings(said.stderr) == expected
    assert _warned_in_log(tmp_path / "s.zarr") == expected
    # The sidecar knows the data now, and the warning with them.
    again = run_command(main, ["build", spec, "--device", "cpu"])
    assert _warnings(again.stderr) == expected
    assert _warned_in_log(tmp_path / "s.zarr") == 2 * expected


def test_no_label_at_all_is_a_warning_unless_it_is_meant(
    tmp_path: Path, teacher_file: Path
) -> None:
    bare = [_water(f"w{i}", i / 50) for i in range(3)]
    spec = _spec(
        tmp_path,
        teacher_file,
        train={"frames": bare},
        pool={"frames": [_labelled("x", 0.3)], "labels": "none"},
    )
    said = run_command(main, ["plan", spec, "--device", "cpu"])
    told = _warnings(said.stderr)
    assert told[0] == (
        "splits.train: none of the 3 samples has an energy, the first is 'w0'; "
        "nothing else in it has a name like energy, so set splits.train.energy_key if "
        "the label has another one, or splits.train.labels: none"
    )
    assert len(told) == 2
    assert not any("pool" in line for line in told)


def test_a_key_that_no_sample_has_is_refused(tmp_path: Path) -> None:
    spec = _spec(
        tmp_path,
        train={"frames": [_renamed(_labelled("w"))], "energy_key": "DFT_energy"},
    )
    assert refusal(main, ["plan", spec]) == (
        "splits.train: no sample has the energy under 'DFT_energy', which "
        "splits.train.energy_key names; of the first, 'w': it has 'REF_energy', so set "
        "splits.train.energy_key to the right name."
    )


def test_counts_of_parts_are_those_of_all() -> None:
    def sample(name: str, energy: float, number: int) -> Sample:
        structure = Structure(
            np.full(2, number, np.uint8),
            np.zeros((2, 3)),
            np.zeros((3, 3)),
            np.full(3, number == 8),
            np.zeros(2, np.int8),
            np.zeros(2, np.bool_),
        )
        forces = np.full((2, 3), energy, np.float32)
        virial = np.full((3, 3), 1.0 if number == 8 else np.nan)
        return Sample(name, structure, energy, forces, virial)

    samples = [sample("a", 1, 1), sample("b", 2, 8), sample("c", np.nan, 6)]
    whole = Contents.of(samples)
    parts = [Contents.of(samples[i : i + 1], i) for i in range(3)]
    assert parts[0] + parts[1] + parts[2] == whole
    assert whole.labelled == {"energy": 2, "forces": 2, "virial": 1}
    assert whole.gaps["energy"] == Gap(2)
    assert Contents.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole
    # Stores of earlier versions say nothing of virials.
    assert "virial" not in json.dumps(Contents.of(samples[:1]).to_dict())


def test_structures_in_two_splits_are_counted_and_named(tmp_path: Path) -> None:
    """C: validation holds training structures, under other ids."""
    texts = collision_frames(12)
    again = [re.sub(r"sample_id=\S+", "sample_id=copy", texts[4]), *texts[5:7]]
    spec = _spec(tmp_path, a=texts[:10], b=[*texts[10:], *again], c=texts[11:])
    told = _warnings(run_command(main, ["plan", spec, "--device", "cpu"]).stderr)
    assert len(told) == 2
    assert told[0].startswith(
        "splits.b: 3 of 5 samples have structures that splits.a also has ('copy', "
    )
    assert told[1].startswith(
        "splits.c: 1 of 1 samples have structures that splits.b also has"
    )


CLOSE = {
    "one place": (["C", "H", "O"], [[0, 0, 0], [0, 0, 0], [1.2, 0, 0]], "0 \\(C\\)"),
    "at the origin": (["C"] * 4, [[0] * 3, [1.4, 0, 0], [0] * 3, [0] * 3], "0 \\(C\\)"),
    "in nm": (["O", "H", "H"], [[x / 10 for x in p] for p in WATER], "0 \\(O\\)"),
}


@pytest.mark.parametrize("kind", CLOSE)
def test_atoms_too_close_are_a_bad_sample(
    kind: str, tmp_path: Path, teacher_file: Path
) -> None:
    """A12: with a teacher or without one, refused, left out or allowed."""
    symbols, places, atom = CLOSE[kind]
    bad = frame(
        "bad", symbols, places, energy=-14.0, forces=[[0.1, 0, 0]] * len(places)
    )
    frames = [_labelled("0"), bad, _labelled("1", 0.02)]
    for teacher in (None, teacher_file):
        spec = _spec(tmp_path, teacher, train=frames)
        said = refusal(main, ["plan", spec, "--device", "cpu"])
        assert re.match(
            rf"Sample 'bad': atoms {atom} and \d \(\w\), counted from 0, are \S+ Å "
            r"apart, less than 0.4 times the sum of their covalent radii \(\S+ Å\); "
            r"check the positions and their unit \(Å\), or set "
            r"splits.train.on_bad_sample: skip, or splits.train.min_pair_distance: 0 "
            r"if they are meant",
            said,
        ), said
    skip = ["--set", "splits.train.on_bad_sample=skip"]
    spec = _spec(tmp_path, train=frames)
    left = run_command(main, ["build", spec, "--device", "cpu", *skip])
    assert "1 of 3 samples are skipped: 'bad'" in _warnings(left.stderr)[0]
    assert left.stdout.splitlines()[1].split() == ["train", *"222", "none", *"HO1"]
    for allowed in ("0", "null"):
        more = ["--set", f"splits.train.min_pair_distance={allowed}"]
        out = ["--out", tmp_path / f"{allowed}.zarr"]
        said = run_command(main, ["build", spec, "--device", "cpu", *more, *out])
        assert said.exit_code == 0, said.output


def test_periodic_images_count_as_atoms(tmp_path: Path) -> None:
    """A12: across the border of a cell, and an atom with its own image."""
    header = 'Lattice="{} 0 0 0 8 0 0 0 8" pbc="T T T"'
    across = frame("x", "CC", [[0.1] * 3, [7.9, 0.1, 0.1]], header=header.format(8))
    narrow = frame("n", "C", [[0.0] * 3], header=header.format(0.55))
    apart = frame("x", "CC", [[0.1] * 3, [7.9, 0.1, 0.1]], header='pbc="F F F"')
    with pytest.raises(DataError, match=r"'x': atoms 0 \(C\) and 1 \(C\).* 0\.2 Å"):
        make_build_plan(load_spec(_spec(tmp_path, train=[across])))
    with pytest.raises(DataError, match=r"'n': atom 0 \(C\).*its periodic image"):
        make_build_plan(load_spec(_spec(tmp_path, train=[narrow])))
    make_build_plan(load_spec(_spec(tmp_path, train=[apart])))


@pytest.mark.parametrize("label", ["energy", "forces", "position"])
def test_numbers_that_are_not_finite_are_found_at_planning(
    label: str, tmp_path: Path
) -> None:
    """B3: refused before blocks; skip works, and leaves the sound samples."""
    sound = [_labelled(f"w{i}", i / 50) for i in range(3)]
    bad = _labelled("bad", 0.3)
    wrong = {
        "energy": bad.replace("energy=-14.2", "energy=inf"),
        "forces": bad.replace("0.20000000", "inf"),
        "position": bad.replace("0.93000000", "nan"),
    }[label]
    assert wrong != bad
    spec = _spec(tmp_path, train=[*sound, wrong])
    assert "'bad' has" in refusal(main, ["plan", spec])
    assert not (tmp_path / "s.zarr").exists()
    skip = ["--set", "splits.train.on_bad_sample=skip"]
    said = run_command(main, ["build", spec, "--device", "cpu", *skip])
    assert said.exit_code == 0, said.output
    assert "1 of 4 samples are skipped: 'bad'" in _warnings(said.stderr)[0]
    assert said.stdout.splitlines()[1].split() == ["train", *"333", "none", *"HO1"]


def test_lonely_atoms_are_skipped_without_a_teacher(tmp_path: Path) -> None:
    """C: nobody could learn from them; without skip they are kept as they are."""
    alone = frame("h", ["H"], [[0, 0, 0]], energy=-13.6, forces=[[0, 0, 0]])
    far = frame("f", "HH", [[0, 0, 0], [0, 0, 30]], energy=-27.0, forces=[[0] * 3] * 2)
    frames = [alone, _labelled("w"), far]
    spec = _spec(tmp_path, train={"frames": frames, "on_bad_sample": "skip"})
    job = make_build_plan(load_spec(spec))
    bad = job.attributes["provenance"]["bad_samples"]["train"]
    assert [name for name, _ in bad] == ["h", "f"]
    assert "no neighbours" in bad[0][1]
    kept = make_build_plan(load_spec(_spec(tmp_path, train=frames)))
    assert kept.scans["train"].contents.frames == 3


def _samples(scale: float, noise: float = 0.0) -> tuple[list[Sample], dict[str, Any]]:
    """Eight samples, and a teacher's forces: ``scale`` times theirs, and noise."""
    random = np.random.default_rng(3)
    samples = []
    given = []
    for number in range(8):
        forces = random.standard_normal((6, 3))
        structure = Structure(
            np.ones(6, np.uint8),
            random.standard_normal((6, 3)),
            np.zeros((3, 3)),
            np.zeros(3, np.bool_),
            np.zeros(6, np.int8),
            np.arange(6) == 0,
        )
        labels = forces.astype(np.float32)
        given.append(forces / scale + noise * random.standard_normal((6, 3)))
        given[-1][0] = 1e6  # of a fixed atom
        samples.append(Sample(str(number), structure, -1.0, labels))
    return samples, {"teacher_forces": np.concatenate(given)}


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (1.0, None),
        (2.5, None),
        (-1.0, "gradients.*splits.a.gradient_key$"),
        (
            1 / 51.422,
            r"Hartree/Bohr \(× 51.42\).*splits.a.units: {forces: Hartree/Bohr}",
        ),
        (23.06, r"kcal/mol/Å \(/ 23.06\); set splits.a.units"),
        (1000.0, r"meV/Å \(/ 1000\)"),
        (-1 / 51.422, "gradient_key, and the labels may be in Hartree/Bohr"),
        (1e7, "another unit; set splits.a.units"),
    ],
)
def test_forces_of_another_kind_name_the_cause(scale: float, words: str | None) -> None:
    """A6: labels are ``scale`` times the forces in eV/Å."""
    samples, given = _samples(scale)
    found = match_forces(samples, given)
    assert found is not None
    assert found.samples == 8
    assert abs(found.cosine) == pytest.approx(1)
    assert found.ratio == pytest.approx(abs(scale), rel=1e-5)
    cause = likely_cause("a", found)
    assert (cause is None) == (words is None), cause
    assert words is None or re.search(words, str(cause)), cause


@pytest.mark.parametrize(
    ("match", "warned"),
    [
        # Relaxed structures: whatever a sound teacher has left may point anywhere.
        (ForceMatch(8, -0.05, 0.01, 0.09), False),
        (ForceMatch(8, -0.8, 0.002, 0.02), False),
        (ForceMatch(8, 0.1, 0.02, 0.4), False),
        (ForceMatch(8, 0.1, 0.5, 0.6), True),
        (ForceMatch(8, 0.9, 0.02, 1.0), True),
    ],
)
def test_small_forces_are_no_reason_to_warn(match: ForceMatch, warned: bool) -> None:
    """A6: no false alarm where forces nearly vanish."""
    assert (likely_cause("a", match) is not None) == warned


def test_without_labels_nothing_is_compared() -> None:
    """A6: labels that are missing, on fixed atoms only, or all zero."""
    samples, given = _samples(1.0)
    bare = [Sample.without_labels(s.sample_id, s.structure) for s in samples]
    assert match_forces(bare, given) is None
    still = [Sample(s.sample_id, s.structure, 0.0, 0 * s.forces) for s in samples]
    assert match_forces(still, given) is None


def test_planning_prints_how_forces_agree(
    tmp_path: Path, teacher_file: Path, collisions: Callable[..., Path]
) -> None:
    """A6: in the table of `plan`, with a warning for a teacher that knows nothing."""
    spec = _spec(tmp_path, teacher_file, train=collision_frames(10))
    said = run_command(main, ["plan", spec, "--device", "cpu"])
    pattern = r"labels against the teacher's, 8 samples of train: cosine -?0\.\d\d, RMS"
    assert re.search(pattern, said.stdout)
    assert any("they differ" in line for line in _warnings(said.stderr))
