"""The comparison table, against numbers worked out by hand."""

import csv
import re
import shutil
import subprocess

import numpy as np
import pytest

from kd_train.report.grouping import make_cohorts
from kd_train.report.layouts import csv_table, escape_latex, latex_table, text_table
from kd_train.report.runs import read_runs
from kd_train.report.tables import Spread, make_table
from tests.kd_train.folders import HALF, NAMES, PLAIN, TEACHER, make_run


def words(text):
    return text.split()


def compare(runs):
    """The gap table in text, and the rows of the CSV by (student, strategy)."""
    table = make_table(make_cohorts(read_runs(runs)[0]))
    reader = csv.DictReader(csv_table(table).splitlines())
    rows = {
        (r["student"], f"{r['strategy']} {r['settings']}".strip()): r for r in reader
    }
    return text_table(table).split("\n\n")[0] + "\n", rows


@pytest.fixture
def three_seeds(tmp_path):
    """Baselines that differ between seeds, so that pairing by seed matters."""
    runs = []
    for seed, plain, distilled in ((0, 300, 200), (1, 200, 125), (2, 500, 100)):
        runs.append(make_run(tmp_path / "r", "none", seed, (plain, 50.0, 0.5, 1.0)))
        runs.append(make_run(tmp_path / "r", "n2n", seed, (distilled, 30.0, 0.7, 3.0)))
    return runs


def test_gap_is_taken_per_seed_and_then_averaged(three_seeds):
    _, rows = compare(three_seeds)
    plain, n2n = rows["painn-small", "none"], rows["painn-small", "n2n"]
    # Energies: gaps 100/200, 75/100, 400/400; of the means it would be 191.7/233.3.
    gaps = [50.0, 75.0, 100.0]
    assert float(n2n["energy_mae_gap_closed"]) == pytest.approx(75.0)
    assert float(n2n["energy_mae_gap_closed_sd"]) == pytest.approx(np.std(gaps, ddof=1))
    assert float(n2n["energy_mae"]) == pytest.approx(425 / 3)
    assert float(n2n["energy_mae_sd"]) == pytest.approx(52.04164998665332)
    assert float(plain["energy_mae"]) == pytest.approx(1000 / 3)
    assert plain["energy_mae_gap_closed"] == ""
    for name in NAMES[1:]:
        assert float(n2n[f"{name}_gap_closed"]) == pytest.approx(50.0)
        assert float(n2n[f"{name}_gap_closed_sd"]) == pytest.approx(0.0, abs=1e-9)
    assert n2n["seeds"] == "3"
    teacher = rows["", "teacher"]
    assert [float(teacher[name]) for name in NAMES] == list(TEACHER)
    assert teacher["seeds"] == teacher["energy_mae_sd"] == ""


def test_order_of_arguments_does_not_pair_wrong_seeds(three_seeds):
    assert compare(three_seeds) == compare(three_seeds[::-1])


def test_text_table_of_one_seed(tmp_path):
    runs = [make_run(tmp_path, "v2v", metrics=(340.0, 52.0, 0.46, 0.8))]
    runs += [make_run(tmp_path, "n2n", metrics=HALF), make_run(tmp_path)]
    text, _ = compare(runs)
    lines = [line for line in text.splitlines() if set(line) != {"-"}]
    assert lines[2] == "Baselines and teacher (100 steps, split val)"
    assert lines[3].split() == words("painn-small 1 300.0 50.00 0.500 1.00")
    assert lines[4].split() == words("teacher 100.0 10.00 0.900 5.00")
    assert lines[5] == "teacher → painn-small"
    assert lines[6].split() == words("n2n 1 200.0 50.0 30.00 50.0 0.700 50.0 3.00 50.0")
    assert lines[7].split() == words(
        "v2v 1 340.0 -20.0 52.00 -5.0 0.460 -10.0 0.80 -5.0"
    )
    assert "±" not in text


def test_text_columns_align(three_seeds, tmp_path):
    three_seeds.append(make_run(tmp_path / "r", "v2v", 0, (1234.5, 9.5, 0.1, 0.0)))
    lines = compare(three_seeds)[0].splitlines()
    rules = [i for i, line in enumerate(lines) if set(line) == {"-"}]
    table = lines[rules[0] - 2 : rules[-1]]
    assert max(map(len, table)) == len(lines[rules[0]])
    none, teacher, n2n, v2v = [line for line in table if line.startswith("  ")][2:]
    # Decimal points of a metric stand below each other in every row that has it.
    points = [[m.start() for m in re.finditer(r"\.", line)] for line in (none, n2n)]
    assert set(points[0]) <= set(points[1])
    assert {m.start() for m in re.finditer(r"\.", v2v)} <= set(points[1])
    assert {m.start() for m in re.finditer(r"\.", teacher)} <= set(points[0])
    signs = [{m.start() for m in re.finditer("±", line)} for line in (none, n2n)]
    assert len(signs[0]) == 4
    assert signs[0] < signs[1]
    assert not any(line.endswith(" ") for line in lines)


def test_nan_metric_is_a_dash_and_has_no_gap(tmp_path):
    nan = float("nan")
    runs = [
        make_run(tmp_path, metrics=(nan, 50.0, 0.5, nan)),
        make_run(tmp_path, "n2n", metrics=(nan, 30.0, 0.7, nan)),
    ]
    text, rows = compare(runs)
    (row,) = (line for line in text.splitlines() if line.startswith("  n2n"))
    assert row.split() == words("n2n 1 – – 30.00 50.0 0.700 50.0 – –")
    assert rows["painn-small", "n2n"]["energy_mae"] == ""
    assert "not better" not in text


def test_one_diverged_seed_is_not_averaged_away(tmp_path):
    nan = float("nan")
    runs = [make_run(tmp_path, seed=0), make_run(tmp_path, seed=1)]
    runs.append(make_run(tmp_path, "n2n", 0, HALF))
    runs.append(make_run(tmp_path, "n2n", 1, (nan, 30.0, 0.7, 3.0)))
    row = compare(runs)[1]["painn-small", "n2n"]
    assert row["energy_mae"] == row["energy_mae_gap_closed"] == ""
    assert float(row["forces_mae_gap_closed"]) == pytest.approx(50.0)


@pytest.mark.parametrize("efwt", [1.0, 0.5])
def test_no_gap_where_the_teacher_is_no_better(tmp_path, efwt):
    teacher = (*TEACHER[:3], efwt)
    runs = [make_run(tmp_path, teacher=teacher)]
    runs.append(make_run(tmp_path, "n2n", metrics=HALF, teacher=teacher))
    text, _ = compare(runs)
    (row,) = (line for line in text.splitlines() if line.startswith("  n2n"))
    assert row.split() == words("n2n 1 200.0 50.0 30.00 50.0 0.700 50.0 3.00 –")
    assert "painn-small, EFwT: the teacher is not better than the plain" in text


def test_no_gap_where_the_teacher_loses_to_the_baseline_of_one_seed(tmp_path):
    teacher = (PLAIN[0], *TEACHER[1:])
    runs = []
    for seed, energy in ((0, PLAIN[0]), (1, 400.0)):
        plain = (energy, *PLAIN[1:])
        runs.append(make_run(tmp_path, "none", seed, plain, teacher=teacher))
        runs.append(make_run(tmp_path, "n2n", seed, HALF, teacher=teacher))
    text, rows = compare(runs)
    assert "painn-small, energy MAE: the teacher is not better" in text
    assert rows["painn-small", "n2n"]["energy_mae_gap_closed"] == ""
    assert rows["painn-small", "n2n"]["forces_mae_gap_closed"] != ""


def test_store_without_teacher_has_no_gap_columns(tmp_path):
    runs = [make_run(tmp_path, seed=seed, teacher=None) for seed in (0, 1)]
    text, rows = compare(runs)
    assert "gap closed" not in text
    assert "  teacher" not in text
    assert "no teacher predictions" in text
    assert not any("gap" in key for key in rows.popitem()[1])


def test_strategy_without_baseline_has_dashes_and_a_note(tmp_path):
    text, _ = compare([make_run(tmp_path, "n2n", metrics=HALF)])
    (row,) = (line for line in text.splitlines() if line.startswith("  n2n"))
    assert row.split() == words("n2n 1 200.0 – 30.00 – 0.700 – 3.00 –")
    assert "painn-small has no run with strategy none" in text


def test_gap_leaves_out_seeds_without_baseline(tmp_path):
    runs = [make_run(tmp_path), make_run(tmp_path, "n2n", 0, HALF)]
    runs.append(make_run(tmp_path, "n2n", 1, (100.0, 10.0, 0.9, 5.0)))
    text, rows = compare(runs)
    row = rows["painn-small", "n2n"]
    assert float(row["energy_mae"]) == pytest.approx(150.0)
    assert float(row["energy_mae_gap_closed"]) == pytest.approx(50.0)
    assert row["energy_mae_gap_closed_sd"] == ""
    assert "painn-small n2n: 1 of 2 seeds have a baseline" in text


def test_two_students_keep_to_their_own_baselines(tmp_path):
    runs = [
        make_run(tmp_path, student="schnet", metrics=(500.0, 90.0, 0.1, 0.0), steps=7),
        make_run(tmp_path, "n2n", student="schnet", metrics=HALF, steps=7),
        make_run(tmp_path),
        make_run(tmp_path, "n2n", metrics=HALF),
    ]
    text, rows = compare(runs)
    assert float(rows["schnet", "n2n"]["energy_mae_gap_closed"]) == pytest.approx(75.0)
    assert float(rows["painn-small", "n2n"]["energy_mae_gap_closed"]) == 50.0
    order = [
        "Baselines and teacher (split val)",
        "  schnet (7 steps)",
        "  painn-small (100 steps)",
        "  teacher ",
        "teacher → schnet (7 steps)",
        "teacher → painn-small (100 steps)",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def weighted(root, weight, seed=0, metrics=HALF, **changes):
    """A v2v run of some weight."""
    config = {"distill": {"v2v": weight}}
    name = f"v2v_{weight}_s{seed}"
    return make_run(root, "v2v", seed, metrics, config=config, name=name, **changes)


def test_runs_of_a_plugin_are_reported_without_its_package(tmp_path):
    runs = [make_run(tmp_path)]
    for weight in (5.0, 50.0):
        config = {"distill": {"weights": {"absent": weight}}}
        name = f"absent_{weight}"
        runs.append(make_run(tmp_path, "absent", 0, HALF, config=config, name=name))
    _, rows = compare(runs)
    assert {"absent λ=5", "absent λ=50"} <= {label for _, label in rows}


def test_two_weights_of_a_strategy_are_two_rows(tmp_path):
    runs = [make_run(tmp_path, seed=seed) for seed in (0, 1)]
    runs += [weighted(tmp_path, 1000.0, seed) for seed in (0, 1)]
    runs += [weighted(tmp_path, 100.0, 0, (250.0, 50.0, 0.5, 1.0))]
    runs += [weighted(tmp_path, 100.0, 1, (280.0, 50.0, 0.5, 1.0))]
    text, rows = compare(runs)
    low, high = rows["painn-small", "v2v λ=100"], rows["painn-small", "v2v λ=1000"]
    assert text.index("v2v λ=100 ") < text.index("v2v λ=1000 ")
    assert float(low["energy_mae"]) == pytest.approx(265.0)
    assert float(low["energy_mae_gap_closed"]) == pytest.approx((25 + 10) / 2)
    assert float(high["energy_mae_gap_closed"]) == pytest.approx(50.0)
    assert low["seeds"] == high["seeds"] == "2"
    assert low["strategy"] == "v2v"
    assert low["settings"] == "λ=100"


def test_weights_of_unused_strategies_are_no_variants(tmp_path):
    runs = [make_run(tmp_path)]
    for seed, other in ((0, 5.0), (1, 7.0)):
        config = {"distill": {"n2n": other, "v2v": 100.0}}
        runs.append(make_run(tmp_path, "v2v", seed, HALF, config=config))
    _, rows = compare(runs)
    assert rows["painn-small", "v2v"]["seeds"] == "2"


def test_joined_strategies_name_the_weight_that_differs(tmp_path):
    runs = [make_run(tmp_path)]
    for i, weight in enumerate((10.0, 2e6)):
        config = {"distill": {"n2n": 100.0, "v2v": weight}}
        name = f"joined{i}"
        runs.append(make_run(tmp_path, "n2n+v2v", 0, HALF, config=config, name=name))
    _, rows = compare(runs)
    labels = [label for _, label in rows]
    assert labels[2:] == ["n2n+v2v λ(v2v)=10", "n2n+v2v λ(v2v)=2e+06"]


def test_balance_and_schedule_make_rows_where_they_differ(tmp_path):
    falling = {"kind": "linear", "start": 1.0, "end": 0.0, "steps": 50}
    constant = {"kind": "constant", "start": 1.0, "end": 0.25}  # the end plays no part
    sections = {
        "plain": {"n2n": 100.0},
        "same": {"n2n": 100.0, "target_ratio": None, "schedule": constant},
        "half": {"n2n": 100.0, "target_ratio": 0.5},
        "falling": {"n2n": 100.0, "schedule": falling},
    }
    runs = [make_run(tmp_path)]
    for i, (name, distill) in enumerate(sections.items()):
        config, seed = {"distill": distill}, int(i == 1)
        runs.append(make_run(tmp_path, "n2n", seed, HALF, config=config, name=name))
    _, rows = compare(runs)
    found = {label: row["seeds"] for (_, label), row in rows.items()}
    assert found == {
        "none": "1",
        "teacher": "",
        "n2n": "2",
        "n2n λ schedule linear 1→0 within 50": "1",
        "n2n target_ratio=0.5": "1",
    }


def on_splits(root, strategy, splits, metrics, teacher_labels=0.0, seed=0):
    """A run on some splits."""
    config = {"train_split": splits, "loss": {"pseudo_label_weight": teacher_labels}}
    name = f"{strategy}_{splits}_{teacher_labels}_s{seed}"
    return make_run(root, strategy, seed, metrics, config=config, name=name)


def test_rows_by_splits_pair_with_the_baseline_of_their_splits(tmp_path):
    runs = [
        on_splits(tmp_path, "none", "train", (300.0, 50.0, 0.5, 1.0)),
        on_splits(tmp_path, "none", "train+more", (200.0, 50.0, 0.5, 1.0)),
        on_splits(tmp_path, "n2n", "train", (250.0, 30.0, 0.7, 3.0)),
        on_splits(tmp_path, "n2n", "train+more", (150.0, 30.0, 0.7, 3.0)),
    ]
    text, rows = compare(runs)
    gaps = {
        label: row["energy_mae_gap_closed"] and float(row["energy_mae_gap_closed"])
        for (_, label), row in rows.items()
    }
    assert gaps == {
        "none on train": "",
        "none on train+more": "",
        "teacher": "",
        "n2n on train": pytest.approx(25.0),
        "n2n on train+more": pytest.approx(50.0),
    }
    assert "  painn-small on train " in text
    assert "  painn-small on train+more " in text


def test_more_splits_and_teacher_labels_count_from_the_plain_student(tmp_path):
    runs = [
        on_splits(tmp_path, "none", "train", PLAIN),
        on_splits(tmp_path, "none", "train+more", HALF, teacher_labels=0.5),
        on_splits(tmp_path, "n2n", "train+more", HALF, teacher_labels=0.5),
        on_splits(tmp_path, "n2n", "more", HALF),
    ]
    text, rows = compare(runs)
    labels = rows["painn-small", "none pseudo_label_weight=0.5 on train+more"]
    both = rows["painn-small", "n2n pseudo_label_weight=0.5 on train+more"]
    assert float(labels["energy_mae_gap_closed"]) == pytest.approx(50.0)
    assert float(both["energy_mae_gap_closed"]) == pytest.approx(50.0)
    # Its splits hold none of the baseline's, so there is nothing to count from.
    assert rows["painn-small", "n2n on more"]["energy_mae_gap_closed"] == ""
    assert "n2n on more: 0 of 1 seeds have a baseline" in text
    assert text.index("teacher → painn-small") < text.index(
        "none pseudo_label_weight=0.5"
    )


def test_other_settings_make_rows_that_pair_with_their_own_baseline(tmp_path):
    runs = []
    for rate, plain, distilled in ((0.001, 300, 200), (0.01, 500, 200)):
        config = {"optimizer": {"lr": rate, "clip_norm": None}}
        for strategy, energy in (("none", plain), ("n2n", distilled)):
            metrics = (energy, 50.0, 0.5, 1.0)
            name = f"{strategy}_{rate}"
            run = make_run(tmp_path, strategy, 0, metrics, config=config, name=name)
            runs.append(run)
    _, rows = compare(runs)
    gaps = {
        label: row["energy_mae_gap_closed"]
        for (_, label), row in rows.items()
        if label.startswith("n2n")
    }
    assert gaps == {"n2n optimizer.lr=0.001": "50.0", "n2n optimizer.lr=0.01": "75.0"}


def test_no_gap_without_a_baseline_of_equal_settings(tmp_path):
    slow = {"optimizer": {"lr": 0.01}}
    runs = [make_run(tmp_path, "none", 0), make_run(tmp_path, "n2n", 0, HALF)]
    runs += [make_run(tmp_path, "v2v", 0, HALF, config=slow)]
    text, rows = compare(runs)
    known = rows["painn-small", "n2n optimizer.lr=0.001"]
    lonely = rows["painn-small", "v2v optimizer.lr=0.01"]
    assert known["energy_mae_gap_closed"] == "50.0"
    assert lonely["energy_mae_gap_closed"] == ""
    assert "v2v optimizer.lr=0.01: 0 of 1 seeds have a baseline with the same" in text


def test_one_batch_may_be_shared_out(tmp_path):
    """32 samples a step, at once or as 4 × 2 × 4, are equal training."""
    runs = [make_run(tmp_path)]
    parts = {"batch_size": 4, "accumulate_steps": 2}
    runs += [make_run(tmp_path, "n2n", 0, HALF, config=parts, processes=4)]
    _, rows = compare(runs)
    assert float(rows["painn-small", "n2n"]["energy_mae_gap_closed"]) == 50.0


def test_threads_of_the_loader_change_nothing(tmp_path):
    runs = [make_run(tmp_path)]
    runs += [make_run(tmp_path, "n2n", 0, HALF, config={"loader_threads": 7})]
    _, rows = compare(runs)
    assert float(rows["painn-small", "n2n"]["energy_mae_gap_closed"]) == 50.0


def test_name_of_the_teacher_where_runs_know_it(tmp_path):
    runs = [make_run(tmp_path, teacher_name="gemnet_oc")]
    runs += [make_run(tmp_path, "n2n", 0, HALF, teacher_name="gemnet_oc")]
    text, rows = compare(runs)
    assert "gemnet_oc → painn-small" in text
    assert rows["", "teacher"]["energy_mae"] == "100.0"


def test_best_of_a_student_is_marked_once_and_only_if_others_are_worse(tmp_path):
    runs = [make_run(tmp_path, metrics=(300.0, 50.0, 0.5, 0.0))]
    runs += [make_run(tmp_path, "n2n", metrics=(200.0, 60.0, 0.5, 0.0))]
    runs += [make_run(tmp_path, "v2v", metrics=(250.0, 70.0, float("nan"), 0.0))]
    table = make_table(make_cohorts(read_runs(runs)[0]))
    best = {row.strategy: row.best for row in table.rows}
    assert best == {
        "none": {"forces_mae"},
        "n2n": {"energy_mae"},
        "v2v": set(),
        "teacher": set(),
    }


LATEX_RUNS = (("none", PLAIN), ("n2n", (340.0, 30.0, 0.7, float("nan"))))


def odd_latex(root):
    """A LaTeX table of two seeds with characters that LaTeX takes for its own."""
    runs = []
    for seed in (0, 1):
        for strategy, metrics in LATEX_RUNS:
            student, split = r"painn_{50%}~$^\&#", "val_<more>"
            name = f"{strategy}{seed}"
            run = make_run(
                root,
                strategy,
                seed,
                metrics,
                student=student,
                val_split=split,
                name=name,
            )
            runs.append(run)
    return latex_table(make_table(make_cohorts(read_runs(runs)[0])))


def test_latex_has_equal_columns_and_escapes(tmp_path):
    text = odd_latex(tmp_path)
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    (columns,) = re.findall(r"begin\{tabular\}\{(l?r*)\}", text)
    rows = [line for line in lines if line.endswith(r" \\")]
    assert len(rows) == 7  # two header lines, two titles, student, teacher, n2n
    for row in rows:
        cells = len(re.findall(r"(?<!\\)&", row)) + 1
        spanned = re.match(r"\\multicolumn\{(\d+)\}", row)
        assert (int(spanned[1]) if spanned else cells) == len(columns) == 10
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    escaped = (
        r"painn\_\{50\%\}\textasciitilde{}\$\textasciicircum{}"
        r"\textbackslash{}\&\#"
    )
    assert escaped in text
    assert r"340.0 $\pm$ 0.0 & $-$20.0 $\pm$ 0.0" in text
    assert r"\textbf{300.0 $\pm$ 0.0}" in text
    assert r"\textbf{30.00 $\pm$ 0.00}" in text
    assert "".join(lines).isascii()


def has_latex():
    """Whether pdflatex and the package booktabs are there."""
    if shutil.which("pdflatex") is None or shutil.which("kpsewhich") is None:
        return False
    found = subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True)
    return found.returncode == 0


@pytest.mark.skipif(not has_latex(), reason="needs pdflatex with booktabs")
def test_latex_compiles(tmp_path):
    (tmp_path / "table.tex").write_text(odd_latex(tmp_path / "runs"))
    (tmp_path / "page.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs}"
        r"\begin{document}\input{table}\end{document}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"],
        cwd=tmp_path,
        capture_output=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    assert (tmp_path / "page.pdf").stat().st_size > 5000


def test_no_runs_are_a_sentence():
    table = make_table([])
    assert text_table(table) == "No run is finished.\n"
    assert csv_table(table).count("\n") == 1
    assert escape_latex("a_b") == r"a\_b"


def test_spread_of_known_values():
    assert Spread.of([1.0, 3.0]) == Spread(2.0, pytest.approx(2**0.5))
    assert np.isnan(Spread.of([4.0]).deviation)
    assert np.isnan(Spread.of([]).mean)
    assert Spread(-0.04).parts(1) == ("0.0", "")
    assert Spread(float("inf")).parts(1) == ("–", "")
