"""Weights of the distillation terms: schedules by hand, balance by its effect."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_train.config.sections import DistillConfig, LambdaSchedule
from kd_train.trainer.weighting import Weighting, schedule_factor
from pipeline.store.reader import FeatureStore
from tests.kd_train.runs import distilling, make_run, metric_rows
from tests.stores import train_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"kind": "constant", "start": 0.5}, [0.5, 0.5, 0.5, 0.5]),
        ({"kind": "linear"}, [1.0, 0.75, 0.5, 0.0]),
        ({"kind": "linear", "start": 0.0, "end": 2.0}, [0.0, 0.5, 1.0, 2.0]),
        ({"kind": "linear", "first_step": 50, "steps": 10}, [1.0, 1.0, 1.0, 0.0]),
        ({"kind": "linear", "first_step": 20, "steps": 60}, [1.0, 11 / 12, 0.5, 0.0]),
        ({"kind": "cosine"}, [1.0, 0.5 + 0.25 * math.sqrt(2), 0.5, 0.0]),
    ],
)
def test_factor_goes_from_start_to_end(
    schedule: dict[str, Any], expected: list[float]
) -> None:
    chosen = LambdaSchedule.model_validate(schedule)
    found = [schedule_factor(chosen, step, 100) for step in (0, 25, 50, 100)]
    assert found == pytest.approx(expected)
    assert schedule_factor(chosen, 10_000, 100) == pytest.approx(expected[-1])


def test_schedule_weighs_the_terms_of_a_run(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    schedule = {"kind": "linear", "steps": 6, "end": 0.5}
    config = distilling(distill={"n2n": 3.0, "v2v": 7.0, "schedule": schedule})
    run = make_run(small_store, tmp_path, config)
    run.train(resume=False)
    rows = metric_rows(tmp_path)
    # Of the last step before a validation; steps count from 0.
    expected = [1 - 0.5 * min(step - 1, 6) / 6 for step in (3, 6, 9, 12)]
    for name, weight in (("n2n", 3.0), ("v2v", 7.0)):
        found = [float(row[f"weight_{name}"]) for row in rows]
        assert found == pytest.approx([weight * factor for factor in expected])
    run.progress.step = 3
    losses = run.losses(run.train_samples.batch(range(4)))
    total = losses["l0"] + 0.75 * (3 * losses["n2n"] + 7 * losses["v2v"])
    assert losses["loss"].item() == pytest.approx(total.item(), rel=1e-6)


def test_features_fade_and_other_terms_stay() -> None:
    config = train_config(
        strategy="n2n+vanilla2", distill={"n2n": 4.0, "vanilla2": 3.0}, steps=100
    )
    settings = {**config.distill.model_dump(), "schedule": "fade"}
    distill = DistillConfig.model_validate(settings)
    weighting = Weighting(config.model_copy(update={"distill": distill}), CPU)
    found = [weighting.weights(step) for step in (0, 25, 50, 99)]
    assert [float(w["n2n"]) for w in found] == [4.0, 2.0, 0.0, 0.0]
    assert [float(w["vanilla2"]) for w in found] == [3.0] * 4
    with pytest.raises(ValueError, match="kind fade has no key end"):
        DistillConfig.model_validate({"schedule": {"kind": "fade", "end": 0.5}})


def test_balance_follows_the_running_means() -> None:
    config = train_config(strategy="n2n+v2v", distill={"n2n": 2.0, "v2v": 10.0})
    distill = config.distill.model_copy(update={"target_ratio": 0.4})
    weighting = Weighting(config.model_copy(update={"distill": distill}), CPU)
    assert {float(w) for w in weighting.weights(0).values()} == {0.0}
    generator = torch.Generator().manual_seed(0)
    means = {"l0": 0.0, "n2n": 0.0, "v2v": 0.0}
    for _ in range(30):
        noise = torch.rand(3, generator=generator)
        values = dict(zip(means, torch.tensor([5.0, 0.1, 3.0]) + noise, strict=True))
        weighting.note(values)
        means = {k: 0.98 * means[k] + 0.02 * float(v) for k, v in values.items()}
    found = {name: float(w) for name, w in weighting.weights(30).items()}
    assert found["v2v"] / found["n2n"] == pytest.approx(5.0)
    together = found["n2n"] * means["n2n"] + found["v2v"] * means["v2v"]
    assert together == pytest.approx(0.4 * means["l0"], rel=1e-5)


def test_balance_of_a_term_that_vanishes_is_no_weight() -> None:
    weighting = Weighting(
        train_config(strategy="n2n", distill={"target_ratio": 1.0}), CPU
    )
    weighting.note({"l0": torch.tensor(3.0), "n2n": torch.tensor(0.0)})
    assert float(weighting.weights(1)["n2n"]) == 0


def test_balanced_terms_are_the_wished_fraction_of_l0(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    """With weights that would make the terms a thousand times as large."""
    config = distilling(
        steps=60,
        eval_every=20,
        distill={"n2n": 1e5, "v2v": 1e6, "target_ratio": 0.3},
        optimizer={"lr": 1e-4},
    )
    run = make_run(small_store, tmp_path, config)
    run.train(resume=False)
    last = {name: float(value) for name, value in metric_rows(tmp_path)[-1].items()}
    share = last["train_loss"] / last["train_l0"] - 1
    assert share == pytest.approx(0.3, rel=0.15)
    assert last["weight_v2v"] / last["weight_n2n"] == pytest.approx(10)
