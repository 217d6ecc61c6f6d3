"""A sweep held against its store: what can be trained, what is left out and why."""

import json
from dataclasses import dataclass
from pathlib import Path

from kd_train.config import TrainConfig
from kd_train.strategies import REGISTRY
from kd_train.strategies.base import Setting
from kd_train.sweep.grid import Sweep, SweepRun, load_sweep
from kd_train.trainer.setup import chosen_split, resolved, stored_widths
from pipeline.documents import nearest
from pipeline.errors import SpecError
from pipeline.models.normalizer import Normalizer
from pipeline.models.zoo import PRESETS, build_model
from pipeline.store.reader import FeatureStore


@dataclass(frozen=True)
class Plan:
    """A sweep whose every run has been checked; ``skipped`` gives reasons by name."""

    sweep: Sweep
    fingerprint: str
    skipped: dict[str, str]

    @property
    def runs(self) -> list[SweepRun]:
        """Those to be trained."""
        return [run for run in self.sweep.runs if run.name not in self.skipped]

    def identity(self, run: SweepRun) -> str:
        """Everything that decides a run, as text; where it changes the run is due."""
        return json.dumps([self.fingerprint, run.document], sort_keys=True)


def plan(path: Path) -> Plan:
    """Read the sweep file at ``path`` and check every run before any is started.

    Raises
    ------
    SpecError
        The file is wrong, a student is unknown, the store lacks a field, or a student
        has no such features and ``skip_impossible`` is false.
    StoreError
        There is no such store.
    """
    sweep = load_sweep(path)
    for student in sweep.config.students:
        if student not in PRESETS:
            raise SpecError(
                f"{path}: students: unknown student {student!r}"
                f"{nearest(student, PRESETS)}."
            )
    store = FeatureStore.open(sweep.store)
    checks = _Checks(store)
    skipped = {}
    for run in sweep.runs:
        try:
            reason = checks.reason(run.config)
        except SpecError as error:
            raise SpecError(f"{path}, run {run.name}: {error}") from None
        if reason is not None:
            skipped[run.name] = reason
    if skipped and not sweep.config.skip_impossible:
        name, reason = next(iter(skipped.items()))
        raise SpecError(f"{path}, run {name}: {reason}")
    if len(skipped) == len(sweep.runs):
        raise SpecError(
            f"{path}: every run is impossible, so nothing would be trained."
        )
    return Plan(sweep, store.fingerprint, skipped)


class _Checks:
    """Remembers what runs have in common, since building students takes time."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self._widths: dict[str, dict[str, int]] = {}
        self._reasons: dict[tuple[str, ...], str | None] = {}

    def reason(self, config: TrainConfig) -> str | None:
        """Why the student cannot have the strategy; None where all is well.

        Raises
        ------
        SpecError
            The store lacks a split or a field, the network cannot be built, or the
            recipe knows no such student.
        """
        student = config.student.model_dump_json()
        splits = config.train_split, config.val_split, config.test_split or ""
        key = (student, config.recipe, config.strategy, *splits)
        if key not in self._reasons:
            self._reasons[key] = self._find_reason(resolved(config, self.store))
        return self._reasons[key]

    def _find_reason(self, config: TrainConfig) -> str | None:
        fields = [field for s in config.strategies for field in REGISTRY[s].fields]
        split = chosen_split(self.store, config.train_split, fields)
        for choice in (config.val_split, *(config.test_split or "").split("+")):
            if choice:
                chosen_split(self.store, choice)
        student = config.student.model_dump_json()
        if student not in self._widths:
            model, preset = PRESETS[config.student.preset]
            network = build_model(model, preset | config.student.hyperparameters)
            self._widths[student] = network.widths
        teacher = stored_widths(split)
        setting = Setting(
            student_name=config.student.preset,
            student_widths=self._widths[student],
            teacher_widths=teacher,
            normalizer=Normalizer(),  # plays no part in what is checked
            loss=config.loss,
            seed=config.seed,
        )
        for name in config.strategies:
            try:
                REGISTRY[name](setting)
            except SpecError as error:
                if not teacher.keys() >= set(REGISTRY[name].fields):
                    raise
                return str(error)
        return None
