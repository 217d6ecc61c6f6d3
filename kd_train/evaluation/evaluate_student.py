"""Metrics of a student on the splits of a store, from Python."""

from collections.abc import Sequence
from pathlib import Path

from kd_train.evaluation.load_student import known_elements, load_student
from kd_train.evaluation.score import make_eval_batches, score, store_eval_set
from kd_train.loader.choose_split import choose_split
from pipeline.parallel.device_choice import choose_device
from pipeline.store.reader import FeatureStore

BATCH_ATOMS = 2048


def evaluate_student(
    student: Path | str,
    store: FeatureStore,
    splits: Sequence[str] = (),
    device: str | None = None,
) -> dict[str, dict[str, float]]:
    """Return the metrics of a student for every split, as ``kd-eval`` prints them.

    Parameters
    ----------
    student
        Run folder, or the file ``student.safetensors`` in it.
    store
        Store with structures and labels; the student reads no features.
    splits
        Names of splits; by default all splits of the store.
    device
        Name of a device; by default a GPU if there is one.

    Returns
    -------
    dict
        By split: ``energy_mae`` (meV), ``forces_mae`` (meV/Å), ``forces_cos`` and
        ``efwt`` (%), and ``stress_mae`` (meV/Å³) if samples have a virial and three
        periodic directions. A metric is NaN if no sample has its label.

    Raises
    ------
    CheckpointError
        The file of the student is missing or damaged.
    SpecError
        The store has no such split, or the student predicts no forces.
    DataError
        A sample has an element that the training data lacked; names it.
    """
    place = choose_device(device)
    loaded = load_student(Path(student), place)
    elements = known_elements(loaded, "any_element", False)
    results = {}
    for name in splits or store.splits:
        part = store_eval_set(choose_split(store, name), loaded, elements, None, 1)
        batches = make_eval_batches(part, None, BATCH_ATOMS)
        results[name] = dict(score(loaded, part, batches, place).metrics)
    return results
