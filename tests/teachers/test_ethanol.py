"""The teacher of docs/unlabelled.md, found as a package and measured against DFT."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.datasets import open_dataset
from pipeline.errors import SpecError
from pipeline.spec.sections import TeacherSpec
from pipeline.teachers.checks import Subject, check_potential
from pipeline.teachers.registry import load_potential
from pipeline.teachers.runner import TeacherRunner
from tests.teachers.shared_data import shared_file

PACKAGE = Path(__file__).parents[2] / "benchmarks" / "teachers"
FOLDER = "teachers/painn_rmd17_ethanol"


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PACKAGE))


def test_weights_must_be_named() -> None:
    with pytest.raises(SpecError, match=r"teacher\.checkpoint is missing"):
        load_potential(TeacherSpec(model="schnetpack_painn"))


def test_it_keeps_the_contract_and_predicts_dft() -> None:
    """Its authors' weights err by 6.9 meV/Å and 1.7 meV on such frames."""
    file = shared_file(f"{FOLDER}/painn_rmd17_ethanol_seed1.safetensors")
    data = shared_file("ethanol_rmd17/train.xyz.gz")
    dataset = open_dataset("extxyz", str(data), every=25)
    samples = [dataset[index] for index in range(len(dataset))]
    spec = TeacherSpec(model="schnetpack_painn", checkpoint=str(file))
    potential = load_potential(spec)
    potential.to(torch.device("cpu"))
    kept = [name for name, _ in check_potential(Subject(potential, samples[:3]))]
    assert {"sum_of_atoms", "gradient_forces", "reflections"} <= set(kept)
    found = TeacherRunner.load(spec).predict(samples, ())
    forces = np.concatenate([sample.forces for sample in samples])
    energies = np.array([sample.energy for sample in samples])
    assert np.abs(found["teacher_forces"] - forces).mean() < 0.009
    assert np.abs(found["teacher_energy"] - energies).mean() < 0.004
