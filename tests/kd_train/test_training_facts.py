"""What a run records of its training data, and reports that compare by it."""

import copy
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_train.evaluation.metrics import gap_closed
from kd_train.report.grouping import is_plain, make_cohorts
from kd_train.report.report import write_report
from kd_train.report.runs import read_run, read_runs
from kd_train.report.tables import make_table
from kd_train.strategies.registry import load_strategy
from kd_train.sweep.cli import main as sweep_main
from kd_train.trainer.setup import make_learner
from kd_train.trainer.training_facts import teacher_train_metrics, training_facts
from pipeline.store import teacher_error
from pipeline.store.reader import FeatureStore
from tests.commands import refusal, run_command
from tests.frames import collision_frames, write_frames
from tests.kd_train.runs import make_run
from tests.stores import STUDENTS, build, spec_document, train_config, write_spec

LABELLED, BARE, COPIES = 12, 16, 24
PSEUDO = {"pseudo_label_weight": 1.0}


def _section(path: Path, **changes: Any) -> dict[str, Any]:
    return {"format": "extxyz", "path": str(path)} | changes


def _build(folder: Path, teacher: Path, splits: dict[str, Any]) -> FeatureStore:
    document = spec_document(splits, folder / "s.zarr", teacher)
    return build(write_spec(folder / "s.yaml", document))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path) -> FeatureStore:
    """Labelled samples, samples without labels, rattled copies, a validation split."""
    folder = tmp_path_factory.mktemp("facts")
    data = write_frames(folder / "d.extxyz", collision_frames(40))
    splits = {
        "train": _section(data, limit=LABELLED),
        "bare": _section(data, offset=LABELLED, limit=BARE, labels="none"),
        "copies": _section(data, limit=12, rattle={"copies": 2, "sigma": 0.05}),
        "val": _section(data, offset=LABELLED + BARE),
    }
    return _build(folder, teacher_file, splits)


@pytest.fixture
def counted(store: FeatureStore) -> Iterator[FeatureStore]:
    """The store as one that records the teacher's passes."""
    before = store.attributes
    store.attributes = copy.deepcopy(before)
    store.attributes["provenance"]["teacher_passes"] = {
        "train": {"labels": 12, "generation": 0, "force_jacobian": 96},
        "bare": {"labels": 16, "generation": 0, "force_jacobian": 0},
        "copies": {"labels": 24, "generation": 700, "force_jacobian": 0},
    }
    yield store
    store.attributes = before


def _old(store: FeatureStore) -> FeatureStore:
    """The store as an earlier version left it, which records no passes."""
    attributes = copy.deepcopy(store.attributes)
    attributes["provenance"].pop("teacher_passes", None)
    old = FeatureStore.open(store.path)
    old.attributes = attributes
    return old


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({"train_split": "train"}, 0),
        ({"train_split": "train", "loss": PSEUDO}, 0),
        ({"train_split": "train", "strategy": "n2n"}, 12),
        ({"train_split": "train+bare"}, 0),
        ({"train_split": "train+bare", "loss": PSEUDO}, 16),
        ({"train_split": "train+bare", "strategy": "v2v"}, 28),
        ({"train_split": "train+copies"}, 700),
        ({"train_split": "train+copies", "loss": PSEUDO}, 724),
        ({"train_split": "train+copies", "strategy": "n2n", "loss": PSEUDO}, 736),
    ],
)
def test_passes_are_those_that_the_run_uses(
    counted: FeatureStore, changes: dict[str, Any], passes: int
) -> None:
    assert training_facts(train_config(**changes), counted)["teacher_passes"] == passes


def test_columns_count_for_the_strategy_that_reads_them(
    counted: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any strategy counts by the fields that it reads."""
    config = train_config(train_split="train", strategy="n2n")
    columns = ("force_jacobian", "force_jacobian_column")
    monkeypatch.setattr(load_strategy("n2n"), "fields", columns)
    assert training_facts(config, counted)["teacher_passes"] == 96
    monkeypatch.setattr(load_strategy("n2n"), "fields", (*columns, "node_features"))
    assert training_facts(config, counted)["teacher_passes"] == 12 + 96


def test_facts_of_every_split_and_their_sums(counted: FeatureStore) -> None:
    config = train_config(train_split="train+copies", loss=PSEUDO)
    assert training_facts(config, counted) == {
        "splits": {
            "train": {
                "samples": 12,
                "labelled": 12,
                "pseudo_labelled": 0,
                "teacher_passes": 0,
            },
            "copies": {
                "samples": COPIES,
                "labelled": 0,
                "pseudo_labelled": COPIES,
                "teacher_passes": 724,
            },
        },
        "samples": 36,
        "labelled": 12,
        "teacher_passes": 724,
    }


def test_stores_of_earlier_versions_do_not_know_their_passes(
    store: FeatureStore,
) -> None:
    old = _old(store)
    plain = train_config(train_split="train")
    assert training_facts(plain, old)["teacher_passes"] == 0
    distilled = train_config(train_split="train", strategy="n2n")
    assert training_facts(distilled, old)["teacher_passes"] is None
    del old.attributes["provenance"]["labelled"]
    facts = training_facts(train_config(train_split="train+bare", loss=PSEUDO), old)
    assert [one["labelled"] for one in facts["splits"].values()] == [None, 0]
    assert facts["splits"]["bare"]["pseudo_labelled"] == BARE
    assert facts["labelled"] is facts["teacher_passes"] is None


def _mean_errors(store: FeatureStore, split: str, rows: slice) -> tuple[float, float]:
    """Energy and force MAE of the teacher in meV and meV/Å, sample by sample."""
    energies, components = [], []
    part = store.splits[split]
    for position in range(len(part))[rows]:
        paths = ["labels/energy", "labels/forces", "teacher/energy", "teacher/forces"]
        found = part.read([position], paths)
        label, forces, energy, predicted = (found[path] for path in paths)
        energies.append(abs(float(energy[0] - label[0])))
        components += np.abs(predicted.astype(float) - forces).ravel().tolist()
    return 1e3 * float(np.mean(energies)), 1e3 * float(np.mean(components))


def test_teacher_is_measured_on_labelled_training_samples(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _mean_errors(store, "train", slice(None))
    for choice in ("train", "train+bare", "bare+train"):
        found = teacher_train_metrics(train_config(train_split=choice), store)
        assert found is not None
        assert (found["energy_mae"], found["forces_mae"]) == pytest.approx(expected)
    assert teacher_train_metrics(train_config(train_split="bare"), store) is None
    # Four of the twelve samples are every third one.
    monkeypatch.setattr(teacher_error.spread_labelled, "__defaults__", (4,))
    found = teacher_train_metrics(train_config(train_split="train"), store)
    some = _mean_errors(store, "train", slice(0, None, 3))
    assert some != pytest.approx(expected)
    assert found is not None
    assert (found["energy_mae"], found["forces_mae"]) == pytest.approx(some)


def test_without_a_teacher_nothing_is_measured(labels_store: FeatureStore) -> None:
    config = train_config()
    assert teacher_train_metrics(config, labels_store) is None
    assert training_facts(config, labels_store)["teacher_passes"] == 0


def test_fitted_students_start_alike_on_more_unlabelled_samples(
    store: FeatureStore, tmp_path: Path
) -> None:
    """GemNet-OC fits scale factors to training samples, 32 of them, or all of fewer."""

    def start(split: str) -> str:
        return make_learner(
            train_config("gemnet-oc-demo", train_split=split), store
        ).initial_digest

    assert start("train") == start("train+bare") == start("copies+train")
    assert start("train") != start("val")
    document = {
        "store": str(store.path),
        "out": "out",
        "students": ["gemnet-oc-demo"],
        "strategies": ["none"],
        "settings": {"student.hyperparameters": STUDENTS["gemnet-oc-demo"]},
        "variants": {"a": {}, "b": {"train_split": "train+bare"}},
    }
    path = write_spec(tmp_path / "sweep.yaml", document)
    assert run_command(sweep_main, ["list", path]).exit_code == 0
    document["variants"] = {"a": {}, "b": {"train_split": "train+val"}}
    sentence = refusal(sweep_main, ["list", write_spec(path, document)])
    assert "differ in 'train_split' (train and train+val)" in sentence


ROWS = {
    "plain": {"train_split": "train"},
    "n2n": {"train_split": "train", "strategy": "n2n"},
    "labels": {"train_split": "train+copies", "loss": PSEUDO},
    "both": {"train_split": "train+copies", "loss": PSEUDO, "strategy": "n2n"},
    "idle": {"train_split": "train+copies", "loss": {"pseudo_label_weight": 0.0}},
}


@pytest.fixture(scope="module")
def runs(
    store: FeatureStore, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Real runs of few steps, by the name of the row."""
    folder = tmp_path_factory.mktemp("rows")
    for name, changes in ROWS.items():
        config = train_config(steps=4, batch_size=6, **changes)
        make_run(store, folder / name, config).train()
    return {name: folder / name for name in ROWS}


def _summary(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return document


def test_only_reference_labels_make_a_baseline(runs: dict[str, Path]) -> None:
    """A student on copies is no baseline: their structures are stage one's work."""
    plain = {name for name, folder in runs.items() if is_plain(read_run(folder))}
    assert plain == {"plain"}


def test_gaps_are_taken_from_the_student_on_the_labelled_split(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    cohorts = make_cohorts(read_runs(list(runs.values()))[0])
    goal, start = (_summary(runs["plain"])[k] for k in ("teacher_metrics", "metrics"))
    for run in cohorts[0].runs:
        baseline = cohorts[0].baseline_of(run)
        assert baseline is not None
        assert baseline.folder == runs["plain"]
    table = make_table(cohorts)
    assert [group.title for group in table.groups] == [
        "Baselines and teacher (4 steps, split val)",
        "painn → painn-small-demo",
    ]
    rows = {row.label: row for row in table.groups[1].rows}
    assert list(rows) == [
        "none on train+copies",
        "none pseudo_label_weight=0 on train+copies",
        "n2n on train",
        "n2n on train+copies",
    ]
    for label, name in zip(rows, ("labels", "idle", "n2n", "both"), strict=True):
        gaps = rows[label].gaps
        assert gaps is not None
        own = _summary(runs[name])["metrics"]
        for metric in ("energy_mae", "forces_mae"):
            if goal[metric] >= start[metric]:
                continue
            expected = gap_closed(start[metric], own[metric], goal[metric])
            assert gaps[metric].mean == pytest.approx(expected)
    text = write_report(list(runs.values()), tmp_path / "out")
    assert "  painn-small-demo on train " in text


def _bases(text: str) -> dict[str, list[str]]:
    """The lines of the table of training data by their labels, cut into columns."""
    lines = text.split("\n\n")[2].splitlines()
    width = lines[0].index("trained on")
    return {
        line[:width].strip(): line[width:].split()
        for line in lines[1:]
        if line.startswith("  ")
    }


def test_every_row_says_what_it_was_trained_on(
    counted: FeatureStore, runs: dict[str, Path], tmp_path: Path
) -> None:
    folders = []
    for name in ("plain", "labels", "both"):
        config = train_config(steps=4, batch_size=6, **ROWS[name])
        make_run(counted, tmp_path / name, config).train()
        document = _summary(tmp_path / name)
        document["seconds"] = {"plain": 2.0, "labels": 2.1, "both": 3.0}[name]
        (tmp_path / name / "metrics.json").write_text(json.dumps(document))
        folders.append(tmp_path / name)
    text = write_report(folders, tmp_path / "out")
    assert _bases(text) == {
        "painn-small-demo on train": ["train", "12", "12", "0", "1.00"],
        "none on train+copies": [*("train+copies", "36", "12", "724", "1.05")],
        "n2n on train+copies": [*("train+copies", "36", "12", "736", "1.50")],
    }
    with (tmp_path / "out" / "table.csv").open(newline="") as stream:
        rows = {
            row["settings"] + row["strategy"]: row for row in csv.DictReader(stream)
        }
    found = rows["on train+copiesn2n"]
    keys = ("train_split", "train_samples", "train_labelled", "teacher_passes")
    assert [found[key] for key in keys] == ["train+copies", "36", "12", "736"]
    assert float(found["cost_per_step"]) == pytest.approx(1.5)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<td>train+copies</td><td>36</td><td>12</td><td>736</td><td>1.50" in page
    tex = (tmp_path / "out" / "training.tex").read_text()
    assert "train+copies & 36 & 12 & 736 & 1.50 \\\\" in tex
    assert tex.count("\\begin{tabular}{llrrrr}") == tex.count("\\end{tabular}") == 1


def _without_facts(folder: Path) -> None:
    document = _summary(folder)
    del document["training"], document["teacher_train_metrics"]
    (folder / "metrics.json").write_text(json.dumps(document))


def test_runs_of_earlier_versions_are_still_compared(
    store: FeatureStore, tmp_path: Path
) -> None:
    folders = []
    for name in ("plain", "n2n", "both"):
        config = train_config(steps=4, batch_size=6, **ROWS[name])
        make_run(store, tmp_path / name, config).train()
        _without_facts(tmp_path / name)
        folders.append(tmp_path / name)
    cohorts = make_cohorts(read_runs(folders)[0])
    for run in cohorts[0].runs:
        baseline = cohorts[0].baseline_of(run)
        assert baseline is not None
        assert baseline.folder == tmp_path / "plain"
    text = write_report(folders, tmp_path / "out")
    assert "painn on train" not in text
    row = _bases(text)["n2n on train"]
    assert row[:4] == ["train", "–", "–", "–"]
    make_run(store, tmp_path / "n2n", read_config(tmp_path / "n2n")).train(resume=True)
    assert _summary(tmp_path / "n2n")["training"]["labelled"] == LABELLED


def read_config(folder: Path) -> Any:
    """The configuration of a run, as a new run would have it."""
    return type(train_config()).model_validate(read_run(folder).header.config)


def test_a_student_on_copies_alone_leaves_no_gap(runs: dict[str, Path]) -> None:
    cohorts = make_cohorts(read_runs([runs["idle"], runs["both"]])[0])
    notes = make_table(cohorts).notes
    assert (
        "painn-small-demo has no run with strategy none on splits with reference "
        "labels alone, without pseudo-labels, so the table shows no gap."
    ) in notes


def test_a_teacher_that_knows_the_training_labels_is_warned_of(
    memorised: FeatureStore, tmp_path: Path
) -> None:
    make_run(memorised, tmp_path / "run", train_config(steps=2)).train()
    document = _summary(tmp_path / "run")
    train, test = (
        document[key]["forces_mae"]
        for key in ("teacher_train_metrics", "teacher_metrics")
    )
    assert train < 0.1 < test
    text = write_report([tmp_path / "run"], tmp_path / "out")
    (row,) = (line for line in text.splitlines() if line.startswith("  painn on train"))
    assert row.split()[-4:-2] == [
        f"{document['teacher_train_metrics'][key]:.{digits}f}"
        for key, digits in (("energy_mae", 1), ("forces_mae", 2))
    ]
    warning = (
        f"The teacher's force error is {train:.3g} meV/Å on train and {test:.3g} on "
        "val. Distilling on frames that a teacher has memorised says little."
    )
    assert warning in text.splitlines()
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count(warning.replace("'", "&#x27;")) == 2


def test_a_teacher_that_errs_alike_is_not(runs: dict[str, Path]) -> None:
    table = make_table(make_cohorts(read_runs([runs["plain"]])[0]))
    assert "painn on train" in [row.label for row in table.rows]
    assert not any("force error" in note for note in table.notes)
