"""A sweep checked against its store: runs to train, and skipped runs with reasons."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kd_train.config.train_config import TrainConfig
from kd_train.loader.choose_split import choose_split, stored_widths
from kd_train.strategies import load_strategy
from kd_train.strategies.base import Setting
from kd_train.sweep.comparison import require_comparable, require_equal
from kd_train.sweep.grid import Sweep, SweepRun, load_sweep
from kd_train.trainer.labels import require_predictions
from kd_train.trainer.setup import (
    choose_fitting_split,
    has_direct_forces,
    required_fields,
    resolve_config,
    run_normalizer,
)
from kd_train.trainer.students import find_student
from kd_train.trainer.untrained import count_labels, require_trained_outputs
from pipeline.errors import SpecError
from pipeline.models.normalizer import Normalizer
from pipeline.models.zoo import build_model, student_names
from pipeline.spec.yaml_model import nearest
from pipeline.store.reader import FeatureStore


@dataclass(frozen=True)
class Plan:
    """A sweep with checked runs, and reasons for ``skipped`` runs by name."""

    sweep: Sweep
    fingerprint: str
    skipped: dict[str, str]

    @property
    def runs(self) -> list[SweepRun]:
        """Runs to be trained."""
        return [run for run in self.sweep.runs if run.name not in self.skipped]

    def identity(self, run: SweepRun) -> str:
        """Return everything that decides a run, as text.

        If the text changes, the run is trained again.
        """
        return json.dumps([self.fingerprint, run.document], sort_keys=True)


def make_plan(path: Path) -> Plan:
    """Read the sweep file at ``path`` and check every run before any is started.

    Raises
    ------
    SpecError
        The file is wrong, a student is unknown, the store lacks a field, a student
        has no such features and ``skip_impossible`` is false, or the report could not
        compare the runs.
    StoreError
        There is no such store.
    """
    sweep = load_sweep(path)
    for student in sweep.config.students:
        if student not in (known := student_names()):
            raise SpecError(
                f"{path}: students: unknown student {student!r}"
                f"{nearest(student, known)}."
            )
    store = FeatureStore.open(sweep.store)
    checks = _Checks(store)
    configs, skipped = {}, {}
    for run in sweep.runs:
        try:
            config = checks.resolve(run.config)
            reason = checks.reason(config)
        except SpecError as error:
            raise SpecError(f"{path}, run {run.name}: {error}") from None
        if reason is None:
            configs[run.name] = config
        else:
            skipped[run.name] = reason
    if skipped and not sweep.config.skip_impossible:
        name, reason = next(iter(skipped.items()))
        raise SpecError(f"{path}, run {name}: {reason}")
    if len(skipped) == len(sweep.runs):
        raise SpecError(
            f"{path}: every run is impossible, so there is nothing to train; choose "
            "other students or strategies."
        )
    require_comparable(configs, str(path))
    checks.require_equal_starts(configs, str(path))
    return Plan(sweep, store.fingerprint, skipped)


@dataclass(frozen=True)
class _Traits:
    """Widths of a student, whether it needs no fit before training, and its forces."""

    widths: dict[str, int]
    is_fitted: bool
    direct: bool


class _Checks:
    """Remembers what runs have in common, since building students takes time."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self._resolved: dict[str, TrainConfig] = {}
        self._networks: dict[str, _Traits] = {}
        self._reasons: dict[tuple[str, ...], str | None] = {}

    def resolve(self, config: TrainConfig) -> TrainConfig:
        """Return ``config`` with the values that recipe and store fill in.

        Raises
        ------
        SpecError
            The recipe knows no such student, or its values and those that are set do
            not go together.
        """
        # Seeds share an entry, so that a warning of the recipe appears once for them.
        key = config.model_dump_json(exclude={"seed"}, exclude_unset=True)
        if key not in self._resolved:
            self._resolved[key] = resolve_config(config, self.store)
        return self._resolved[key].model_copy(update={"seed": config.seed})

    def reason(self, config: TrainConfig) -> str | None:
        """Return why the student cannot have the strategy, None if it can.

        Raises
        ------
        SpecError
            The store lacks a split or a field, the network cannot be built, or there
            is nothing to learn from.
        """
        key = (
            config.student.model_dump_json(),
            config.strategy,
            config.loss.model_dump_json(),
            config.distill.model_dump_json(),
            config.normalizer,
            *(config.train_split, config.val_split, config.test_split or ""),
        )
        if key not in self._reasons:
            self._reasons[key] = self._find_reason(config)
        return self._reasons[key]

    def require_equal_starts(
        self, configs: Mapping[str, TrainConfig], where: str
    ) -> None:
        """Refuse other labelled splits for students that begin with a fit to them.

        The report compares runs of one seed only if they had equal initial weights.

        Raises
        ------
        SpecError
            Two runs of such a student differ in the labelled part of ``train_split``.
        """
        fitted: dict[str, dict[str, TrainConfig]] = {}
        for name, config in configs.items():
            if not self._network(config).is_fitted:
                fitted.setdefault(config.student.name, {})[name] = config
        for runs in fitted.values():
            require_equal(
                runs,
                where,
                "train_split",
                lambda c: choose_fitting_split(c, self.store).name,
            )

    def _find_reason(self, config: TrainConfig) -> str | None:
        split = choose_split(self.store, config.train_split, required_fields(config))
        for choice in (config.val_split, *(config.test_split or "").split("+")):
            if choice:
                choose_split(self.store, choice)
        if config.normalizer != "store":
            run_normalizer(config, self.store)
        teacher = stored_widths(split)
        if config.loss.pseudo_label_weight:
            require_predictions(split)
        known = count_labels(self.store, config.train_split)
        require_trained_outputs(config, known, self._network(config).direct)
        setting = Setting(
            student_name=config.student.name,
            student_widths=self._network(config).widths,
            teacher_widths=teacher,
            normalizer=Normalizer(),  # plays no part in what is checked
            loss=config.loss,
            seed=config.seed,
        )
        for name in config.strategies:
            try:
                load_strategy(name)(setting)
            except SpecError as error:
                if not teacher.keys() >= set(load_strategy(name).fields):
                    raise
                return str(error)
        return None

    def _network(self, config: TrainConfig) -> "_Traits":
        student = config.student.model_dump_json()
        if student not in self._networks:
            network = build_model(*find_student(config.student))
            self._networks[student] = _Traits(
                network.widths, network.is_fitted, has_direct_forces(network)
            )
        return self._networks[student]
