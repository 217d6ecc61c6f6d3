"""Recipes: the paper's values, and that what the user sets comes first."""

import math
import warnings
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.optim.lr_scheduler import LinearLR, MultiStepLR

from kd_train.config.recipe import apply_recipe, read_recipe
from kd_train.config.train_config import RECIPES, TrainConfig, load_config
from kd_train.trainer.schedule import learning_rate
from kd_train.trainer.setup import resolve_config, run_normalizer
from pipeline.errors import SpecError
from pipeline.models.normalizer import Normalizer
from pipeline.models.zoo import PRESETS
from pipeline.store.reader import FeatureStore
from tests.stores import build, spec_document, write_spec

# arXiv:2306.14818, Table 6, typed from the page: vanilla1, vanilla2, n2n, e2n, v2v.
TABLE_6 = {
    ("gemnet_oc", "painn-big-oc20"): (1.0, 500, 10000, 10, 50000),
    ("painn", "painn-small-oc20"): (1.0, 200, 100, None, 1000),
    ("painn", "schnet-oc20"): (0.1, 0.1, 1000, None, None),
    ("gemnet_oc", "painn-big"): (0.2, 100, 1000, 10, 100),
    ("painn", "painn-small"): (1.0, 100, 100, None, 10000),
    ("painn", "schnet"): (1.0, 100, 100, None, None),
}


# Tables 3 to 5 and the authors' files, typed from them.
COLL = {
    "recipe": "coll",
    "batch_size": 32,
    "steps": 500 * 120_000 // 32,  # epochs of 120 000 samples
    "eval_every": 120_000 // 32,
    "normalizer": "none",
    "optimizer.lr": 1e-3,
    "optimizer.weight_decay": 2e-6,
    "optimizer.weight_decay_on": "all",
    "optimizer.amsgrad": True,
    "optimizer.eps": 1e-7,
    "optimizer.clip_norm": 10,
    "schedule.kind": "exponential",
    "schedule.warmup_steps": 3750,
    "schedule.warmup_start": 0,
    "schedule.decay_rate": 0.01,
    "schedule.decay_steps": 4_000_000,
    "schedule.milestones": (),
    "loss.energy_weight": 1,
    "loss.force_weight": 100,
    "loss.force_loss": "l2",
    "ema_decay": 0.999,
    "precision": "float32",
}
OC20_PAINN = {
    "recipe": "oc20",
    "batch_size": 32,
    "steps": 1_000_000,
    "eval_every": 10_000,
    "normalizer": "store",
    "optimizer.lr": 1e-4,
    "optimizer.weight_decay": 0.01,
    "optimizer.weight_decay_on": "all",
    "optimizer.amsgrad": True,
    "optimizer.eps": 1e-8,  # torch's own
    "optimizer.clip_norm": 10,
    "schedule.kind": "milestones",
    "schedule.warmup_steps": 0,
    "schedule.decay_rate": 0.45,
    "schedule.milestones": (160_000, 320_000, 480_000, 640_000),
    "loss.energy_weight": 1,
    "loss.force_weight": 100,
    "loss.force_loss": "l2",
    "ema_decay": 0.999,
    "precision": "float32",
}
OC20_SCHNET = {
    "recipe": "oc20",
    "batch_size": 3 * 64,  # three GPUs
    "steps": 30 * 2_000_000 // 192,  # epochs of OC20-2M
    "eval_every": 10_417,  # an epoch, rounded up
    "normalizer": "store",
    "optimizer.lr": 1e-4,
    "optimizer.weight_decay": 0.01,
    "optimizer.weight_decay_on": "all",
    "optimizer.amsgrad": False,
    "optimizer.eps": 1e-8,
    "optimizer.clip_norm": None,
    "schedule.kind": "milestones",
    "schedule.warmup_steps": 31_250,
    "schedule.warmup_start": 0.1,
    "schedule.decay_rate": 0.1,
    "schedule.milestones": (52_083, 83_333, 104_166),
    "loss.energy_weight": 1,
    "loss.force_weight": 100,
    "loss.force_loss": "mae",
    "ema_decay": 0,
    "precision": "float32",
}
SETTINGS = {
    "gemnet-oc": COLL,
    "painn-big": COLL,
    "painn-small": COLL,
    "schnet": COLL,
    "painn-big-oc20": OC20_PAINN,
    "painn-small-oc20": OC20_PAINN,
    "schnet-oc20": OC20_SCHNET,
}


def _config(**values: Any) -> TrainConfig:
    student = values.pop("student")
    return TrainConfig.model_validate({"student": {"preset": student}, **values})


@pytest.mark.parametrize(("pair", "expected"), TABLE_6.items())
def test_weights_are_those_of_the_paper(
    pair: tuple[str, str], expected: tuple[float | None, ...]
) -> None:
    teacher, student = pair
    chosen = apply_recipe(_config(student=student, strategy="n2n"), teacher)
    names = ("vanilla1", "vanilla2", "n2n", "e2n", "v2v")
    for name, value in zip(names, expected, strict=True):
        if value is not None:
            assert getattr(chosen.distill, name) == value


@pytest.mark.parametrize(("student", "expected"), SETTINGS.items())
def test_settings_are_those_of_the_paper(
    student: str, expected: dict[str, Any]
) -> None:
    chosen = apply_recipe(_config(student=student), None)
    found = {key: attrgetter(key)(chosen) for key in expected}
    assert found == expected


def test_no_student_and_no_setting_of_a_recipe_is_left_out() -> None:
    for name in RECIPES:
        for student, settings in read_recipe(name).students.items():
            given = {
                f"{key}.{part}" if part else key
                for key, value in settings.items()
                for part in (value if isinstance(value, dict) else [""])
            }
            assert given <= SETTINGS[student].keys()


def test_every_recipe_is_a_valid_configuration_of_a_known_student() -> None:
    for name in RECIPES:
        for student in read_recipe(name).students:
            assert student in PRESETS
            for teacher in (None, "gemnet_oc", "painn"):
                chosen = apply_recipe(_config(student=student), teacher)
                assert chosen.recipe == name
                assert chosen.steps > 100_000


def test_what_is_set_beats_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    document = {"optimizer": {"lr": 0.5}, "distill": {"n2n": 3}, "strategy": "n2n+v2v"}
    path.write_text(yaml.safe_dump(document))
    flags = {"student.preset": "painn-small", "steps": 7}
    chosen = apply_recipe(load_config(path, flags, ["ema_decay=0.5"]), "painn")
    assert (chosen.optimizer.lr, chosen.distill.n2n) == (0.5, 3)
    assert (chosen.steps, chosen.ema_decay) == (7, 0.5)
    # The rest of the same sections is the recipe's.
    assert (chosen.optimizer.eps, chosen.distill.v2v) == (1e-7, 10000)
    assert chosen.eval_every == 3750


def test_values_equal_to_the_default_are_kept_when_set() -> None:
    default = TrainConfig().optimizer.lr
    chosen = apply_recipe(
        _config(student="painn-big-oc20", optimizer={"lr": default}), None
    )
    assert chosen.optimizer.lr == default
    assert apply_recipe(_config(student="painn-big-oc20"), None).optimizer.lr == 1e-4


def test_resolving_again_changes_nothing() -> None:
    once = apply_recipe(_config(student="schnet-oc20", strategy="n2n"), "painn")
    saved = TrainConfig.model_validate(once.model_dump())
    assert apply_recipe(saved, "gemnet_oc") == once


def test_a_recipe_can_be_refused_and_chosen() -> None:
    plain = apply_recipe(_config(student="painn-small", recipe="none"), "painn")
    assert plain.steps == TrainConfig().steps
    assert apply_recipe(_config(student="painn-small-demo"), "painn").recipe == "none"
    with pytest.raises(SpecError, match=r"no student 'painn-small' \(known: painn-big"):
        apply_recipe(_config(student="painn-small", recipe="oc20"), "painn")


def test_a_pair_that_the_paper_lacks_is_told(caplog: pytest.LogCaptureFixture) -> None:
    chosen = apply_recipe(_config(student="painn-small", strategy="n2n"), "sevennet")
    assert chosen.distill.n2n == 100
    assert "no weights for sevennet to painn-small" in caplog.text
    caplog.clear()
    apply_recipe(_config(student="painn-small", strategy="n2n+e2e"), "painn")
    assert "no weight of e2e for painn-small" in caplog.text
    caplog.clear()
    apply_recipe(_config(student="painn-small", strategy="n2n"), "painn")
    assert caplog.text == ""


def test_weights_that_were_set_need_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = _config(student="painn-small", strategy="n2n", distill={"n2n": 3})
    assert apply_recipe(config, "sevennet").distill.n2n == 3
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("student", "processes", "accumulate", "share"),
    [
        ("schnet-oc20", 1, 1, 192),
        ("schnet-oc20", 3, 1, 64),
        ("schnet-oc20", 3, 4, 16),
        ("painn-big-oc20", 2, 1, 16),
        ("painn-small", 1, 4, 8),
    ],
)
def test_a_step_of_all_processes_takes_the_batch_of_the_paper(
    student: str, processes: int, accumulate: int, share: int
) -> None:
    config = _config(student=student, accumulate_steps=accumulate)
    once = apply_recipe(config, None, processes)
    assert once.batch_size == share
    assert apply_recipe(once, None, processes) == once


def test_batches_that_the_user_set_are_those_of_a_process() -> None:
    config = _config(student="schnet-oc20", batch_size=50)
    assert apply_recipe(config, None, 3).batch_size == 50
    # batch_atoms replaces batch_size, so that there is nothing to share.
    config = _config(student="painn-small", batch_atoms=500)
    assert apply_recipe(config, None, 3).batch_atoms == 500


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    message = "'coll' uses 32 samples per step.* 3 process.*accumulate_steps=2.*set"
    with pytest.raises(SpecError, match=message):
        apply_recipe(_config(student="painn-big", accumulate_steps=2), None, 3)


def _rates(config: TrainConfig, steps: list[int]) -> list[float]:
    return [learning_rate(config, step) for step in steps]


def test_painn_on_oc20_falls_at_its_milestones() -> None:
    config = apply_recipe(_config(student="painn-big-oc20"), None)
    steps = [0, 159_999, 160_000, 319_999, 320_000, 480_000, 640_000, 999_999]
    expected = [1e-4 * 0.45**k for k in (0, 0, 1, 1, 2, 3, 4, 4)]
    assert _rates(config, steps) == pytest.approx(expected)


def test_painn_on_coll_decays_as_its_formula() -> None:
    config = apply_recipe(_config(student="painn-small"), None)
    steps = [0, 3748, 3749, 100_000, 1_874_999]
    expected = [
        1e-3 * min((1 + s) / 3750, 1) * math.pow(0.01, s / 4_000_000) for s in steps
    ]
    assert _rates(config, steps) == pytest.approx(expected)


def test_warm_up_and_milestones_agree_with_torch() -> None:
    schedule = {
        "kind": "milestones",
        "warmup_steps": 10,
        "warmup_start": 0.1,
        "milestones": [20, 30],
        "decay_rate": 0.1,
    }
    config = TrainConfig.model_validate({"schedule": schedule})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    # Torch's warm-up has its first rate at step 0, ours after one step of ten.
    warmup = LinearLR(optimizer, 0.1, total_iters=10)
    steps = MultiStepLR(optimizer, [21, 31], 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for step in range(40):
            warmup.step()
            steps.step()
            rate = optimizer.param_groups[0]["lr"]
            assert learning_rate(config, step) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"kind": "cosine", "milestones": [3]}, "milestones belong to kind milestones"),
        ({"kind": "milestones"}, "kind milestones needs milestones"),
        ({"milestones": [3]}, "milestones belong to kind milestones"),
        ({"kind": "milestones", "milestones": [3, 3]}, "milestones must ascend"),
    ],
)
def test_impossible_schedules_are_refused(
    tmp_path: Path, schedule: dict[str, Any], message: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"schedule": schedule}))
    with pytest.raises(SpecError, match=message):
        apply_recipe(load_config(path, {}, ()), None)


@pytest.mark.parametrize("student", ["painn-big-oc20", "schnet-oc20", "schnet"])
@pytest.mark.parametrize("kind", ["cosine", "constant", "exponential"])
def test_another_kind_of_schedule_beats_the_recipe(student: str, kind: str) -> None:
    config = _config(student=student, schedule={"kind": kind})
    chosen = apply_recipe(config, None)
    known = read_recipe(chosen.recipe).students[student]["schedule"]
    assert chosen.schedule.kind == kind
    assert chosen.schedule.milestones == ()
    # Every kind has a warm-up.
    assert chosen.schedule.warmup_steps == known["warmup_steps"]
    # Rates of another kind would be a different fall under the same name.
    expected = known if kind == known["kind"] else dict(TrainConfig().schedule)
    assert chosen.schedule.decay_rate == expected["decay_rate"]
    assert apply_recipe(chosen, None) == chosen


def test_milestones_alone_beat_those_of_the_recipe() -> None:
    config = load_config(
        None, {"student.preset": "painn-big-oc20"}, ["schedule.milestones=[5, 9]"]
    )
    schedule = apply_recipe(config, None).schedule
    assert (schedule.kind, schedule.milestones) == ("milestones", (5, 9))
    assert schedule.decay_rate == 0.45
    config = _config(student="painn-big", schedule={"milestones": (5, 9)})
    with pytest.raises(SpecError, match="milestones belong to kind milestones"):
        apply_recipe(config, None)


def test_coll_has_no_normalisation_unless_the_store_has_units(
    small_store: FeatureStore,
    labels_store: FeatureStore,
    datasets: dict[str, Path],
    tmp_path: Path,
) -> None:
    splits = {
        name: {"format": "extxyz", "path": str(path), "reference_energies": "none"}
        for name, path in datasets.items()
    }
    document = spec_document(splits, tmp_path / "s.zarr")
    plain_store = build(write_spec(tmp_path / "s.yaml", document))
    for store, student, expected in (
        (plain_store, "gemnet-oc", "none"),
        (plain_store, "painn-big", "none"),
        (plain_store, "painn-big-oc20", "store"),
        # Of a teacher with units of its own, and of total energies.
        (small_store, "painn-small", "store"),
        (labels_store, "painn-big", "store"),
    ):
        chosen = resolve_config(_config(student=student), store)
        assert chosen.normalizer == expected
        assert resolve_config(chosen, store) == chosen
        run_normalizer(chosen, store)
    set_by_user = _config(student="painn-big", normalizer="store")
    assert resolve_config(set_by_user, plain_store).normalizer == "store"


def test_labels_as_they_are_need_a_teacher_in_the_same_units(
    small_store: FeatureStore, labels_store: FeatureStore
) -> None:
    unit = TrainConfig.model_validate({"normalizer": "none"})
    assert run_normalizer(unit, labels_store) == Normalizer()
    assert run_normalizer(TrainConfig(), labels_store) != Normalizer()
    with pytest.raises(SpecError, match="teacher that works in eV"):
        run_normalizer(unit, small_store)
