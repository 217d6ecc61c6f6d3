"""Runs that would leave energies or forces of a student random. A1."""

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from ase.data import chemical_symbols

from kd_train.cli.train import main
from kd_train.sweep.cli import main as sweep_main
from kd_train.trainer.trainer import Trainer
from kd_train.trainer.untrained import count_labels
from pipeline.datasets import open_dataset
from pipeline.errors import SpecError
from pipeline.store.reader import FeatureStore
from tests.commands import refusal, run_command
from tests.frames import collision_frames, frame, write_frames
from tests.kd_train.runs import make_run
from tests.stores import (
    FEATURES,
    FLOAT32,
    STUDENTS,
    build,
    save_gemnet,
    spec_document,
    train_config,
    write_spec,
)

PAINN, SCHNET, GEMNET = "painn-small-demo", "schnet-demo", "gemnet-oc-demo"
SPLITS = ("full", "bare", "energies", "forces")


def _frames(path: Path, kind: str, first: int) -> Path:
    """Six frames of the demo set with only some of their labels."""
    full = write_frames(path.with_suffix(".full"), collision_frames(6, first))
    found = []
    source = open_dataset("extxyz", str(full.rename(path)))
    for sample in map(source.__getitem__, range(len(source))):
        labels: dict[str, Any] = {}
        if kind in ("full", "energies"):
            labels["energy"] = sample.energy
        if kind in ("full", "forces"):
            labels["forces"] = sample.forces.tolist()
        symbols = [chemical_symbols[z] for z in sample.structure.atomic_numbers]
        places = sample.structure.positions.tolist()
        found.append(frame(sample.sample_id, symbols, places, **labels))
    return write_frames(path, found)


def _store(folder: Path, teacher: Path | None, **changes: Any) -> FeatureStore:
    """A store with a split for every kind of labels, each of other structures."""
    splits = {
        kind: _frames(folder / f"{kind}.extxyz", kind, 10 * number)
        for number, kind in enumerate(SPLITS)
    }
    features = changes.pop("features", FEATURES)
    document = spec_document(splits, folder / "s.zarr", teacher, features)
    if teacher is not None:
        document["teacher"] |= changes
    else:
        document["splits"].pop("bare")
    return build(write_spec(folder / "s.yaml", document))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path) -> FeatureStore:
    return _store(tmp_path_factory.mktemp("painn"), teacher_file)


@pytest.fixture(scope="module")
def edge_store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    folder = tmp_path_factory.mktemp("gemnet")
    features = {"edge_features": FLOAT32, "edge_to_node_features": FLOAT32}
    teacher = save_gemnet(folder / "teacher.safetensors")
    return _store(folder, teacher, model="gemnet_oc", features=features)


@pytest.fixture(scope="module")
def plain_store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return _store(tmp_path_factory.mktemp("plain"), None)


def _run(
    store: FeatureStore, folder: Path, split: str, student: str = PAINN, **changes: Any
) -> Trainer:
    settings = {"train_split": split, "val_split": "full", "steps": 2} | changes
    return make_run(store, folder, train_config(student, **settings))


def _arguments(
    store: FeatureStore, out: Path, strategy: str, student: str
) -> list[Any]:
    sizes = STUDENTS[student].items()
    settings = ["train_split=bare", "val_split=bare", "batch_size=4", "eval_every=2"]
    settings += [f"student.hyperparameters.{key}={value}" for key, value in sizes]
    flags = [part for setting in settings for part in ("--set", setting)]
    named = ["--strategy", strategy, "--student", student, "--out", out]
    return ["--cache", store.path, *named, "--steps", 2, "--device", "cpu", *flags]


NOTHING = (
    "train_split: 'bare' has no reference labels, {}; join a split with labels to "
    "train_split, set loss.pseudo_label_weight=1, add vanilla1 to the strategy, or, if "
    "the file has labels under other names, set energy_key and forces_key of the "
    "split."
)
NO_FORCES = (
    "train_split: 'bare' has no reference forces, and no term of the loss replaces "
    "them, so the forces of the student would stay random; set "
    "loss.pseudo_label_weight=1, add vanilla1 to the strategy, set "
    "student.hyperparameters.direct_forces=false to "
    "take forces as the gradient of the energy, or set loss.force_weight=0 if you do "
    "not need them."
)


def _features_alone(strategy: str) -> str:
    return NOTHING.format(
        f"and {strategy} does not train energies or forces, so both outputs of the "
        "student would stay random"
    )


WITHOUT_A_LABEL = [
    ("none", NOTHING.format("so the strategy 'none' has nothing to learn from")),
    ("n2n", _features_alone("n2n")),
    ("v2v", _features_alone("v2v")),
    ("n2n+v2v", _features_alone("n2n+v2v")),
    ("vanilla2", NO_FORCES),
    ("n2n+vanilla2", NO_FORCES),
    ("vanilla1", ""),
    ("vanilla1+n2n", ""),
]
WITHOUT_A_LABEL_ON_EDGES = [
    ("e2n", _features_alone("e2n")),
    ("e2e", _features_alone("e2e")),
    ("e2n+e2e", _features_alone("e2n+e2e")),
    ("vanilla1+e2n", ""),
]


@pytest.mark.parametrize(("strategy", "sentence"), WITHOUT_A_LABEL)
def test_every_strategy_on_a_store_without_a_label(
    strategy: str, sentence: str, store: FeatureStore, tmp_path: Path
) -> None:
    """A1: students of random energies came out, with exit code 0."""
    _train(_arguments(store, tmp_path / "run", strategy, PAINN), sentence)
    assert (tmp_path / "run").exists() is not bool(sentence)


@pytest.mark.parametrize(("strategy", "sentence"), WITHOUT_A_LABEL_ON_EDGES)
def test_every_strategy_of_edges_on_a_store_without_a_label(
    strategy: str, sentence: str, edge_store: FeatureStore, tmp_path: Path
) -> None:
    _train(_arguments(edge_store, tmp_path / "run", strategy, GEMNET), sentence)


def _train(arguments: list[Any], sentence: str) -> None:
    if sentence:
        assert refusal(main, arguments) == sentence
    else:
        done = run_command(main, arguments)
        assert done.exit_code == 0
        assert "Warning: val_split: 'bare' has no reference labels" in done.stderr


@pytest.mark.parametrize(
    ("split", "changes", "words"),
    [
        ("full", {}, ""),
        ("bare", {"loss": {"pseudo_label_weight": 1}}, ""),
        ("bare", {"strategy": "n2n", "loss": {"pseudo_label_weight": 0.1}}, ""),
        (
            "bare",
            {"strategy": "vanilla1", "distill": {"vanilla1": 0}},
            "train energies",
        ),
        ("bare", {"strategy": "vanilla1", "loss": {"force_weight": 0}}, ""),
        ("bare", {"strategy": "vanilla2", "loss": {"force_weight": 0}}, ""),
        (
            "bare",
            {"strategy": "vanilla1", "distill": {"target_ratio": 0.1}},
            "target_ratio",
        ),
        ("energies", {}, "no reference forces"),
        ("energies", {"strategy": "n2n+v2v"}, "no reference forces"),
        ("energies", {"strategy": "vanilla1"}, ""),
        ("energies", {"loss": {"force_weight": 0}}, ""),
        ("energies", {"loss": {"energy_weight": 0}}, "6 energies and 0 forces"),
        ("energies+bare", {}, "'energies\\+bare' has no reference forces"),
        ("energies+full", {}, ""),
        ("forces", {}, "no reference energies"),
        ("forces", {"strategy": "vanilla2"}, ""),
        ("forces", {"loss": {"energy_weight": 0}}, ""),
        ("forces+energies", {}, ""),
        ("full", {"loss": {"energy_weight": 0, "force_weight": 0}}, "are 0 and 0"),
    ],
)
def test_what_labels_and_terms_train(
    split: str,
    changes: dict[str, Any],
    words: str,
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    if not words:
        _run(store, tmp_path, split, **changes)
        return
    with pytest.raises(SpecError, match=words):
        _run(store, tmp_path, split, **changes)


@pytest.mark.parametrize(
    ("student", "hyperparameters"), [(SCHNET, {}), (PAINN, {"direct_forces": False})]
)
def test_forces_that_are_gradients_need_no_labels_of_their_own(
    student: str,
    hyperparameters: dict[str, Any],
    store: FeatureStore,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(STUDENTS, student, STUDENTS[student] | hyperparameters)
    _run(store, tmp_path, "energies", student)
    assert "no reference forces; the student's forces follow from its" in caplog.text
    _run(store, tmp_path, "forces", student)
    assert "known only up to a constant" in caplog.text
    with pytest.raises(SpecError, match="n2n does not train energies"):
        _run(store, tmp_path, "bare", student, strategy="n2n")


def test_samples_that_l0_leaves_out_are_counted(
    store: FeatureStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _run(store, tmp_path, "full+energies+bare", strategy="n2n")
    assert (
        "train_split: of the 18 samples of 'full+energies+bare', 6 have no reference "
        "energy and 12 have no reference forces; L0 skips these samples"
    ) in caplog.text
    caplog.clear()
    _run(store, tmp_path, "full+bare", loss={"pseudo_label_weight": 1})
    _run(store, tmp_path, "full")
    assert "no reference" not in caplog.text
    _run(store, tmp_path, "energies", loss={"force_weight": 0})
    assert "loss.force_weight is 0, so the forces of the student" in caplog.text


def test_stores_that_do_not_count_are_looked_into(store: FeatureStore) -> None:
    counted = [count_labels(store, name) for name in SPLITS]
    assert [(k.energy, k.forces) for k in counted] == [(6, 6), (0, 0), (6, 0), (0, 6)]
    labelled = store.attributes["provenance"].pop("labelled")
    try:
        seen = [count_labels(store, name) for name in SPLITS]
    finally:
        store.attributes["provenance"]["labelled"] = labelled
    assert [(k.energy, k.forces) for k in seen] == [
        (k.energy, k.forces) for k in counted
    ]
    assert not any(known.exact for known in seen)


def test_stores_without_a_teacher_are_told_how(
    plain_store: FeatureStore, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="no reference forces"):
        _run(plain_store, tmp_path, "energies")
    _run(plain_store, tmp_path, "energies+full")


def test_a_sweep_refuses_before_it_starts(store: FeatureStore, tmp_path: Path) -> None:
    document = {
        "store": str(store.path),
        "out": "out",
        "students": [PAINN],
        "strategies": ["none", "vanilla2"],
        "settings": {"train_split": "energies", "val_split": "full"},
    }
    path = write_spec(tmp_path / "sweep.yaml", document)
    told = refusal(sweep_main, ["list", path])
    assert "run painn-small-demo-none-s0: train_split: 'energies' has no refer" in told
    document["settings"]["student.hyperparameters.direct_forces"] = False
    path.write_text(yaml.safe_dump(document))
    assert run_command(sweep_main, ["list", path]).exit_code == 0


def test_structures_of_training_in_validation_are_told(
    store: FeatureStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """C: a warning when validation holds training structures."""
    with caplog.at_level(logging.WARNING):
        _run(store, tmp_path, "full", val_split="forces", test_split="energies+bare")
        assert "have structures that" not in caplog.text
        _run(store, tmp_path, "full+energies", test_split="bare+energies")
    first = store.splits["full"].sample_ids[0]
    assert (
        "val_split: 6 of the 6 samples of 'full' have structures that are also in "
        f"train_split 'full+energies' (first: '{first}'); errors on them are too low"
    ) in caplog.text
    assert "test_split: 6 of the 6 samples of 'energies'" in caplog.text
    assert "'bare' have" not in caplog.text


@pytest.mark.parametrize(
    ("split", "strategy", "changes", "remedy"),
    [
        (
            "bare",
            "vanilla1",
            {"distill": {"schedule": {"start": 0}}},
            "set distill.schedule.start above 0",
        ),
        (
            "bare",
            "n2n+vanilla1",
            {"distill": {"schedule": {"kind": "linear", "start": 0}}},
            "set distill.schedule.start above 0",
        ),
        (
            "bare",
            "vanilla2",
            {"distill": {"vanilla2": 0}},
            "set distill.vanilla2 above 0",
        ),
        (
            "full",
            "none",
            {"loss": {"energy_weight": 0, "force_weight": 0}},
            "set loss.energy_weight or loss.force_weight above 0",
        ),
        (
            "energies",
            "none",
            {"loss": {"energy_weight": 0}},
            "set loss.energy_weight above 0, join a split",
        ),
    ],
)
def test_what_a_weight_of_zero_switches_off(
    split: str,
    strategy: str,
    changes: dict[str, Any],
    remedy: str,
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    """A1: a factor of 0 trained nothing, and remedies were those of other causes."""
    with pytest.raises(SpecError, match=remedy):
        _run(store, tmp_path, split, strategy=strategy, **changes)


def test_gradients_of_labels_that_have_no_weight(
    store: FeatureStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The labels are there, so no warning denies that."""
    _run(store, tmp_path, "full", SCHNET, loss={"energy_weight": 0})
    assert caplog.messages[0] == (
        "loss.energy_weight is 0, so reference energies are not used; the student's "
        "energies are known only up to a constant"
    )
