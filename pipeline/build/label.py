"""Writes a spec's structures again with the teacher's results as labels."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols

from pipeline.build.filter_samples import Demands, sound_samples
from pipeline.datasets import open_split, warn_of_missing_labels
from pipeline.errors import SpecError
from pipeline.fields import TEACHER_VIRIAL
from pipeline.files.atomic import write_atomically
from pipeline.spec.cache_spec import CacheSpec
from pipeline.structure import Sample
from pipeline.teachers.runner import Arrays, TeacherRunner

# Samples that the teacher is given at a time; it cuts them into passes that fit.
_SAMPLES = 256


def label_splits(
    spec: CacheSpec,
    folder: Path,
    device: str = "cpu",
    report: Callable[[str, int], None] = lambda split, samples: None,
) -> list[Path]:
    """Files ``<split>.extxyz`` of all splits, with the teacher's labels in eV and Å.

    Energies and forces; of teachers with virials also these, and of structures with
    three periodic directions the stress, positive in tension.

    Ids, tags and fixed atoms are kept; labels that the source has are left out. A
    warning names what looks like a label but is none by the keys of the split.

    Raises
    ------
    SpecError
        The spec has no teacher.
    DataError
        A sample is bad and not to be skipped.
    """
    if spec.teacher is None:
        raise SpecError("The spec has no teacher: section; add one to compute labels.")
    teacher = TeacherRunner.load(spec.teacher, device)
    files = []
    for name, split in spec.splits.items():
        demands = Demands.of(name, split, teacher)
        skip = split.on_bad_sample == "skip"
        dataset = sound_samples(name, open_split(split), demands, skip)
        warn_of_missing_labels(f"splits.{name}", dataset, only_named=True)
        frames: list[str] = []
        for begin in range(0, len(dataset), _SAMPLES):
            chosen = range(begin, min(begin + _SAMPLES, len(dataset)))
            samples = [dataset[number] for number in chosen]
            frames += _label_samples(
                samples, teacher.predict(samples, teacher.virial_fields)
            )
            report(name, len(samples))
        files.append(folder / f"{name}.extxyz")
        write_atomically(files[-1], "".join(frames).encode())
    return files


def _label_samples(samples: list[Sample], labels: Arrays) -> Iterable[str]:
    ends = np.cumsum([len(sample.structure) for sample in samples])[:-1]
    forces = np.split(labels["teacher_forces"], ends)
    virials = labels.get(TEACHER_VIRIAL, [None] * len(samples))
    return map(_frame, samples, labels["teacher_energy"].tolist(), forces, virials)


def _frame(
    sample: Sample, energy: float, forces: np.ndarray, virial: np.ndarray | None
) -> str:
    """One frame of extended XYZ; numbers with all of their digits."""
    structure = sample.structure
    pbc = " ".join("T" if flag else "F" for flag in structure.pbc)
    cell = " ".join(repr(x) for x in structure.cell.ravel().tolist())
    name = sample.sample_id.replace('"', '\\"')
    header = (
        f'Lattice="{cell}" pbc="{pbc}" sample_id="{name}" '
        f"energy={energy!r} {_strain_words(sample, virial)}"
        "Properties=species:S:1:pos:R:3:forces:R:3:tags:I:1:fixed:I:1"
    )
    rows = [
        " ".join(
            (chemical_symbols[z], *map(repr, (*place, *force)), str(tag), str(held))
        )
        for z, place, force, tag, held in zip(
            structure.atomic_numbers.tolist(),
            structure.positions.tolist(),
            forces.astype(np.float64).tolist(),
            structure.tags.tolist(),
            structure.fixed.astype(int).tolist(),
            strict=True,
        )
    ]
    return "\n".join((str(len(rows)), header, *rows)) + "\n"


def _strain_words(sample: Sample, virial: np.ndarray | None) -> str:
    """Virial and stress as words of a header, each with a blank after it."""
    if virial is None:
        return ""
    words = {"virial": virial}
    if sample.structure.pbc.all():
        words["stress"] = -virial / abs(np.linalg.det(sample.structure.cell))
    return "".join(
        f'{name}="{" ".join(map(repr, values.ravel().tolist()))}" '
        for name, values in words.items()
    )
