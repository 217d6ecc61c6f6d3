"""A sweep file stands for exactly the runs of its grid, or is refused as a whole."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from kd_train.sweep.cli import main
from kd_train.sweep.grid import load_sweep
from pipeline.store.reader import FeatureStore
from tests.commands import refusal, run_command

SHIPPED = sorted((Path(__file__).parents[2] / "cache_specs" / "sweeps").glob("*.yaml"))
GRID: dict[str, Any] = {
    "store": "store.zarr",
    "out": "out",
    "config": "shared.yaml",
    "settings": {"steps": 7, "optimizer.lr": 0.5, "distill.vanilla2": 3},
    "students": ["painn-small-demo", "schnet-demo"],
    "strategies": ["none", "n2n", "v2v+n2n", "vanilla2"],
    "weights": {"v2v": [100, 0.25], "n2n": [1, 2, 3]},
    "seeds": [0, 4],
    "variants": {
        "paper": {},
        "balanced": {"distill": {"target_ratio": 0.3}},
        "slow": {"optimizer.lr": 0.1, "distill.target_ratio": 0.2},
    },
}


def _write(folder: Path, changes: dict[str, Any]) -> Path:
    """A sweep file in ``folder``; None leaves a key out."""
    (folder / "shared.yaml").write_text(
        "batch_size: 5\noptimizer: {lr: 2, eps: 1e-4}\n"
    )
    document = {k: v for k, v in (GRID | changes).items() if v is not None}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_the_grid_is_the_product(tmp_path: Path) -> None:
    expected = set()
    for student, strategy, seed, variant, v2v, n2n in itertools.product(
        *(GRID[key] for key in ("students", "strategies", "seeds", "variants")),
        *(GRID["weights"][term] for term in ("v2v", "n2n")),
    ):
        # A baseline has no weights and, unless its learning rate differs, no variant.
        if strategy == "none" and variant != "slow":
            variant = None
        balance = {"balanced": 0.3, "slow": 0.2}.get(variant)
        rate = 0.1 if variant == "slow" else 0.5
        # Weights of terms that the run has not are the defaults.
        v2v = v2v if "v2v" in strategy else 10000
        n2n = n2n if "n2n" in strategy else 100
        expected.add((student, strategy, seed, variant, v2v, n2n, balance, rate))
    sweep = load_sweep(_write(tmp_path, {}))
    found = [
        (
            run.config.student.preset,
            run.config.strategy,
            run.config.seed,
            run.variant,
            run.config.distill.v2v,
            run.config.distill.n2n,
            run.config.distill.target_ratio,
            run.config.optimizer.lr,
        )
        for run in sweep.runs
    ]
    assert len(found) == len(expected)
    assert set(found) == expected
    assert len({run.name for run in sweep.runs}) == len(found)
    for run in sweep.runs:
        assert (run.config.steps, run.config.batch_size) == (7, 5)
        assert (run.config.optimizer.eps, run.config.distill.vanilla2) == (1e-4, 3)
    assert Path(sweep.store) == tmp_path / "store.zarr"
    assert sweep.out == tmp_path / "out"


def test_names_are_readable_and_survive_a_larger_grid(tmp_path: Path) -> None:
    names = {run.name for run in load_sweep(_write(tmp_path, {})).runs}
    assert "painn-small-demo-none-s0" in names
    assert "painn-small-demo-none-slow-s4" in names
    assert "schnet-demo-v2v=0.25+n2n=3-balanced-s0" in names
    assert "schnet-demo-vanilla2-paper-s4" in names
    larger = {
        "seeds": [4, 7, 0],
        "students": ["gemnet-oc-demo", *GRID["students"]],
        "weights": {"v2v": [0.25, 100, 7], "n2n": [3, 2, 1]},
    }
    more = {run.name for run in load_sweep(_write(tmp_path, larger)).runs}
    assert names < more


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_expand(path: Path) -> None:
    sweep = load_sweep(path)
    student = sweep.config.students[0]
    assert f"{student}-none-s0" in {run.name for run in sweep.runs}
    assert sweep.store.endswith(f"caches/{path.stem}.zarr")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"students": None}, ["'students' is missing"]),
        ({"studens": ["schnet"]}, ["'studens'", "'students'"]),
        ({"students": []}, ["students"]),
        ({"students": ["schnet", "schnet"]}, ["'schnet' occurs twice"]),
        ({"seeds": [1, 1]}, ["1 occurs twice"]),
        ({"seeds": [-1]}, ["seeds.0"]),
        ({"strategies": ["n2n+v2v", "v2v+n2n"]}, ["'n2n+v2v' and 'v2v+n2n'"]),
        ({"strategies": ["v2w"], "weights": None}, ["'v2w'", "known: none, n2n"]),
        ({"weights": {"v2w": [1]}}, ["'v2w'", "'v2v'"]),
        ({"weights": {"n2n": []}}, ["'n2n' has no values"]),
        ({"weights": {"n2n": [1, 1.0]}}, ["1.0 occurs twice"]),
        ({"weights": {"n2n": [-1]}}, ["weights.n2n.0"]),
        ({"weights": {"e2n": [1]}}, ["no strategy", "'e2n'"]),
        ({"variants": {"a b": {}}}, ["'a b'", "hyphens"]),
        ({"variants": {"x": {"sead": 1}}}, ["'sead'", "'seed'", "-x-"]),
        ({"variants": {"x": {"seed": 1}}}, ["variants.x", "'seed'", "seeds sets"]),
        ({"variants": {"x": {}, "y": {}}}, ["are the same run"]),
        ({"settings": {"distill": {"n2n": 1}}}, ["settings", "'distill.n2n'"]),
        (
            {"settings": {"distill.weights": {"n2n": 1}}},
            ["settings", "'distill.weights.n2n'", "which weights sets"],
        ),
        ({"settings": {"optimizer": 3}}, ["optimizer"]),
        (
            {"settings": {"distill.target_rato": 3}},
            ["distill.target_rato", "'target_ratio'"],
        ),
        ({"config": "absent.yaml"}, ["absent.yaml does not exist"]),
        ({"store": "${NOT_SET}/a.zarr"}, ["NOT_SET"]),
        ({"gpus": 2}, ["gpus"]),
        ({"threads": 0}, ["threads"]),
    ],
)
def test_mistakes_are_one_sentence(
    changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    path = _write(tmp_path, changes)
    sentence = refusal(main, ["run", path, "painn-small-demo-none-s0"])
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "out").exists()


def _on_store(store: FeatureStore, changes: dict[str, Any]) -> dict[str, Any]:
    small = {"weights": None, "variants": None, "seeds": [0], "store": str(store.path)}
    return small | {"strategies": ["none", "v2v"]} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"students": ["schnet-dem"]}, ["'schnet-dem'", "'schnet-demo'"]),
        ({"strategies": ["e2n"]}, ["edge_to_node_features", "this store lacks"]),
        ({"skip_impossible": False}, ["schnet-demo-v2v-s0", "vector_features"]),
        ({"students": ["schnet-demo"], "strategies": ["v2v"]}, ["every run"]),
        ({"settings": {"val_split": "test"}}, ["no split 'test'"]),
        ({"settings": {"student.hyperparameters": {"layers": 2}}}, ["'layers'"]),
        ({"store": "absent.zarr"}, ["absent.zarr is not a feature store"]),
    ],
)
def test_what_the_store_does_not_allow_is_one_sentence(
    changes: dict[str, Any],
    words: list[str],
    small_store: FeatureStore,
    tmp_path: Path,
) -> None:
    path = _write(tmp_path, _on_store(small_store, changes))
    for command in ("list", "report"):
        sentence = refusal(main, [command, path])
        assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variants", "key"),
    [
        ({"a": {}, "b": {"steps": 8}}, "'steps' (7 and 8)"),
        ({"a": {}, "b": {"val_split": "train"}}, "'val_split' (val and train)"),
        ({"a": {}, "b": {"test_split": "train"}}, "'test_split' (val and train)"),
        (
            {"a": {}, "b": {"student.hyperparameters.cutoff": 4.0}},
            '({} and {"cutoff": 4.0})',
        ),
        ({"a": {}, "b": {"batch_size": 6}}, "'batch_size' (5 and 6)"),
        ({"a": {}, "b": {"accumulate_steps": 2}}, "'accumulate_steps' (1 and 2)"),
        ({"a": {}, "b": {"batch_atoms": 99}}, "'batch_atoms' (None and 99)"),
        ({"a": {}, "b": {"patience": 3}}, "'patience'"),
        # The recipes' steps and batches differ, though the file names neither.
        ({"a": {"recipe": "none"}, "b": {"recipe": "coll"}}, "'steps'"),
    ],
)
def test_what_the_report_could_not_compare_is_refused(
    variants: dict[str, Any], key: str, small_store: FeatureStore, tmp_path: Path
) -> None:
    changes = {"students": ["painn-small"], "variants": variants, "settings": {}}
    if "steps" in str(variants):
        changes["settings"] = {"steps": 7}
    path = _write(tmp_path, _on_store(small_store, changes))
    sentence = refusal(main, ["list", path])
    assert key in sentence
    assert "painn-small-none-b-s0" in sentence
    assert "report cannot compare" in sentence


def test_what_the_report_compares_is_no_reason_to_refuse(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    variants = {
        "a": {"batch_size": 6, "accumulate_steps": 2},
        "b": {"batch_size": 4, "accumulate_steps": 3, "export_weights": "last"},
        "c": {"batch_size": 12, "test_split": "val", "optimizer.lr": 0.1},
    }
    path = _write(tmp_path, _on_store(small_store, {"variants": variants}))
    assert run_command(main, ["list", path]).exit_code == 0


def test_students_may_differ_in_steps(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    """As those of the recipe for OC20 do."""
    changes = {"students": ["painn-small-oc20", "schnet-oc20"], "config": None}
    changes |= {"settings": {}}
    path = _write(tmp_path, _on_store(small_store, changes))
    assert run_command(main, ["list", path]).exit_code == 0


@pytest.mark.parametrize(
    ("student", "variant", "words"),
    [
        (
            "painn-small-oc20",
            {"schedule.kind": "cosine", "schedule.milestones": [5]},
            ["milestones belong to kind milestones"],
        ),
        (
            "painn-small",
            {"normalizer": "unit"},
            ["normalizer: none", "the teacher of this store has its own scale"],
        ),
        ("painn-small", {"recipe": "oc20"}, ["'oc20' has no student 'painn-small'"]),
        ("painn-small", {"train_split": "tain"}, ["no split 'tain'"]),
    ],
)
def test_every_variant_is_resolved_and_checked(
    student: str,
    variant: dict[str, Any],
    words: list[str],
    small_store: FeatureStore,
    tmp_path: Path,
) -> None:
    variants = {"a": {}, "b": variant}
    changes = {"students": [student], "variants": variants, "settings": {}}
    path = _write(tmp_path, _on_store(small_store, changes))
    sentence = refusal(main, ["list", path])
    assert f"run {student}-none-b-s0: " in sentence
    assert all(word in sentence for word in words), sentence


def test_variants_by_training_split_need_students_that_no_data_shapes(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    """GemNet-OC begins with a fit to training samples, so its weights would differ."""
    variants = {"a": {}, "b": {"train_split": "val"}}
    changes = {"strategies": ["none", "vanilla2"], "variants": variants}
    path = _write(tmp_path, _on_store(small_store, changes))
    assert run_command(main, ["list", path]).exit_code == 0
    changes["students"] = ["painn-small-demo", "gemnet-oc-demo"]
    sentence = refusal(
        main, ["list", _write(tmp_path, _on_store(small_store, changes))]
    )
    assert (
        "gemnet-oc-demo-none-b-s0 differ in 'train_split' (train and val)" in sentence
    )


def test_labels_of_a_teacher_that_never_ran_are_refused(
    labels_store: FeatureStore, tmp_path: Path
) -> None:
    variants = {"a": {}, "b": {"loss.pseudo_label_weight": 0.5}}
    changes = {"strategies": ["none"], "variants": variants}
    path = _write(tmp_path, _on_store(labels_store, changes))
    sentence = refusal(main, ["list", path])
    assert "run painn-small-demo-none-b-s0: loss.pseudo_label_weight needs" in sentence


def test_the_list_tells_what_is_skipped_and_why(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    path = _write(tmp_path, _on_store(small_store, {}))
    done = run_command(main, ["list", path])
    assert done.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["painn-small-demo-v2v-s0"] == "waiting"
    assert lines["schnet-demo-none-s0"] == "waiting"
    assert "'vector_features' of the student" in lines["schnet-demo-v2v-s0"]
    assert len(lines) == 4
    unknown = refusal(main, ["run", path, "schnet-demo-non-s0"])
    assert "'schnet-demo-none-s0'" in unknown
