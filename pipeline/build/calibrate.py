"""Encodings of the fields of a split, chosen from features of a sample of it."""

import logging

import numpy as np

from pipeline.datasets import Dataset
from pipeline.spec.sections import FeatureSpec
from pipeline.store.calibration import CALIBRATION_ROWS, Calibration, calibrate
from pipeline.store.quantization import Profile
from pipeline.teachers.runner import TeacherRunner

log = logging.getLogger("pipeline.build.calibrate")


def calibrate_fields(
    dataset: Dataset, teacher: TeacherRunner, wanted: dict[str, FeatureSpec]
) -> dict[str, Calibration]:
    """Calibration by field name of every wanted field that is not stored faithfully.

    Runs the teacher on samples from all over the dataset, about 8192 atoms together.
    """
    profiles: dict[str, Profile] = {
        name: part.profile
        for name, part in wanted.items()
        if part.profile != "faithful"
    }
    if not profiles:
        return {}
    mean_atoms = float(np.mean(dataset.n_atoms))
    count = min(len(dataset), -(-CALIBRATION_ROWS // max(1, int(mean_atoms))))
    chosen = np.linspace(0, len(dataset) - 1, count, dtype=np.int64)
    features = teacher.predict([dataset[int(i)] for i in chosen], tuple(profiles))
    found = {}
    for name, profile in profiles.items():
        rows = features[name][:: -(-len(features[name]) // CALIBRATION_ROWS)]
        found[name] = calibrate(rows, profile, wanted[name].stated_error or 0.0)
        log.info("%s: %s, calibrated on %d rows", name, profile, len(rows))
    return found
