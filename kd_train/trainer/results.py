"""Results of a run: the student's file, predictions, metrics."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_train.config.train_config import TrainConfig
from kd_train.evaluation.evaluate import teacher_metrics
from kd_train.evaluation.load_student import STUDENT_FILE
from kd_train.evaluation.metrics import without_nan
from kd_train.trainer.progress import TrainingState
from kd_train.trainer.setup import Learner
from kd_train.trainer.training_facts import teacher_train_metrics, training_facts
from kd_train.trainer.validate import Validator
from pipeline.files.atomic import write_atomically
from pipeline.models.checkpoint import load_checkpoint, save_model
from pipeline.models.elements import TRAINING_DATA
from pipeline.models.network import Network
from pipeline.store.reader import FeatureStore

_METRICS, _PREDICTIONS = "metrics.json", "predictions.npz"


def save_student(
    folder: Path, learner: Learner, student: Network, provenance: dict[str, Any]
) -> None:
    """Write the plain ``student``, without adapters."""
    about = {**provenance, TRAINING_DATA: learner.training_data}
    save_model(
        folder / STUDENT_FILE, learner.model_name, student, learner.normalizer, about
    )


def write_results(
    folder: Path,
    config: TrainConfig,
    store: FeatureStore,
    progress: TrainingState,
    validators: Sequence[Validator],
) -> dict[str, Any]:
    """Evaluate the exported student and return the content of ``metrics.json``.

    Metrics are plain means over the splits of ``validators``, as the paper has them.
    All processes evaluate, the first one writes.
    """
    student = load_checkpoint(folder / STUDENT_FILE).model
    results = [v(student.to(v.device)) for v in validators]
    of_teacher = [teacher_metrics(v.samples.split) for v in validators]
    summary = {
        "student": config.student.name,
        "teacher": (store.attributes["teacher"] or {}).get("model"),
        "strategy": config.strategy,
        "seed": config.seed,
        "steps": progress.step,
        "stopped_early": progress.step < config.steps,
        "seconds": progress.seconds,
        "parameters": sum(p.numel() for p in student.parameters()),
        "fingerprint": store.fingerprint,
        "val_split": config.test_split or config.val_split,
        "metrics": without_nan(plain_mean([r.metrics for r in results])),
        "teacher_metrics": without_nan(
            plain_mean([metrics for metrics in of_teacher if metrics is not None])
            if None not in of_teacher
            else None
        ),
        "test_splits": {
            v.samples.split.name: {
                "metrics": without_nan(result.metrics),
                "teacher_metrics": without_nan(teacher),
            }
            for v, result, teacher in zip(validators, results, of_teacher, strict=True)
        },
        "teacher_train_metrics": without_nan(teacher_train_metrics(config, store)),
        "training": training_facts(config, store),
    }
    if validators[0].world.is_first:
        buffer = io.BytesIO()
        predictions = {
            name: np.concatenate([r.predictions[name] for r in results])
            for name in results[0].predictions
            if all(name in r.predictions for r in results)
        }
        np.savez_compressed(buffer, allow_pickle=False, **predictions)
        write_atomically(folder / _PREDICTIONS, buffer.getvalue())
        text = json.dumps(summary, indent=2, sort_keys=True)
        write_atomically(folder / _METRICS, text.encode() + b"\n")
    return summary


def drop_results(folder: Path) -> None:
    """Remove results of a continued run, which would look like final results.

    The end of the run writes new results.
    """
    for name in (_METRICS, _PREDICTIONS):
        (folder / name).unlink(missing_ok=True)


def plain_mean(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average metrics over splits with equal weights, NaN if a split has no value."""
    names = dict.fromkeys(name for split in metrics for name in split)
    return {
        name: sum(split.get(name, math.nan) for split in metrics) / len(metrics)
        for name in names
    }
