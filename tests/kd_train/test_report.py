"""Reports of synthetic run folders, against numbers worked out by hand."""

import base64
import csv
import json
import re
import runpy
import struct
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from kd_train import plots
from kd_train.cli import report_main
from kd_train.report import write_report
from kd_train.runs import read_cohorts, read_run
from kd_train.tables import Spread, csv_table, make_table, text_table
from pipeline.errors import PipelineError, SpecError

NAMES = ("energy_mae", "forces_mae", "forces_cos", "efwt")
TEACHER = (100.0, 10.0, 0.9, 5.0)
PLAIN = (300.0, 50.0, 0.5, 1.0)
HALF = (200.0, 30.0, 0.7, 3.0)  # closes 50 % of every gap from PLAIN to TEACHER
FILES = ["curves.png", "parity.png", "report.html", "table.csv", "table.txt"]


def make_run(
    root,
    strategy="none",
    seed=0,
    metrics=PLAIN,
    *,
    teacher=TEACHER,
    student="painn-small",
    config=None,
    initial_weights=None,
    **summary,
):
    """A finished run folder as the training loop leaves it."""
    folder = root / f"{student}_{strategy}_s{seed}"
    folder.mkdir(parents=True)
    document = {
        "student": student,
        "strategy": strategy,
        "seed": seed,
        "steps": 100,
        "seconds": 90.0,
        "parameters": 1234567,
        "fingerprint": "f" * 64,
        "val_split": "val",
        "metrics": dict(zip(NAMES, metrics, strict=True)),
        "teacher_metrics": teacher and dict(zip(NAMES, teacher, strict=True)),
        **summary,
    }
    (folder / "metrics.json").write_text(json.dumps(document))
    header = {
        "config": {
            "strategy": strategy,
            "seed": seed,
            "optimizer": {"lr": 0.001},
            "distill": {"n2n": 100.0, "v2v": 10000.0},
            **(config or {}),
        },
        "initial_weights": initial_weights or f"{seed:064d}",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(header))
    lines = ["step,val_energy_mae,val_forces_mae", "50,400.0,90.0", "100,300.0,50.0"]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    random = np.random.default_rng(seed)
    n_atoms = np.array([2, 3, 4], dtype=np.int32)
    label = random.normal(size=(9, 3)).astype(np.float32)
    np.savez_compressed(
        folder / "predictions.npz",
        energy=np.array([-10.0, -15.5, -20.0]),
        energy_label=np.array([-10.1, -15.0, -20.0]),
        forces=label + 0.1,
        forces_label=label,
        n_atoms=n_atoms,
    )
    return folder


def words(text):
    return text.split()


def compare(runs):
    """The text table, and the rows of the CSV table by (student, strategy)."""
    table = make_table(read_cohorts(runs))
    reader = csv.DictReader(csv_table(table).splitlines())
    return text_table(table), {(r["student"], r["strategy"]): r for r in reader}


def refused(runs, out, *parts):
    with pytest.raises(SpecError) as caught:
        write_report(runs, out)
    message = str(caught.value)
    for part in parts:
        assert str(part) in message
    assert "\n" not in message
    assert message.endswith(".")
    assert not out.exists()


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
    teacher = rows["painn-small", "teacher"]
    assert [float(teacher[name]) for name in NAMES] == list(TEACHER)
    assert teacher["seeds"] == teacher["energy_mae_sd"] == ""


def test_order_of_arguments_does_not_pair_wrong_seeds(three_seeds):
    assert compare(three_seeds) == compare(three_seeds[::-1])


def test_text_table_of_one_seed(tmp_path):
    runs = [make_run(tmp_path, "v2v", metrics=(340.0, 52.0, 0.46, 0.8))]
    runs += [make_run(tmp_path, "n2n", metrics=HALF), make_run(tmp_path)]
    text, _ = compare(runs)
    lines = text.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line[:2] == "  "}
    assert rows["none"] == ["1", "300.0", "50.00", "0.500", "1.00"]
    assert rows["n2n"] == words("1 200.0 50.0 30.00 50.0 0.700 50.0 3.00 50.0")
    assert rows["v2v"] == words("1 340.0 -20.0 52.00 -5.0 0.460 -10.0 0.80 -5.0")
    assert rows["teacher"] == ["100.0", "10.00", "0.900", "5.00"]
    order = [name for name in rows if name in ("none", "n2n", "v2v", "teacher")]
    assert order == ["none", "n2n", "v2v", "teacher"]
    assert "painn-small (100 steps, split val)" in lines
    assert "±" not in text


def test_text_columns_align(three_seeds, tmp_path):
    three_seeds.append(make_run(tmp_path / "r", "v2v", 0, (1234.5, 9.5, 0.1, 0.0)))
    lines = compare(three_seeds)[0].splitlines()
    rules = [i for i, line in enumerate(lines) if set(line) == {"-"}]
    table = lines[rules[0] - 2 : rules[-1]]
    assert max(map(len, table)) == len(lines[rules[0]])
    none, n2n, v2v, teacher = [line for line in table if line.startswith("  ")][2:]
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
    assert text.index("schnet (7 steps") < text.index("painn-small (100 steps")


def test_differing_settings_are_said(tmp_path):
    runs = [make_run(tmp_path), make_run(tmp_path, "n2n", 0, HALF)]
    runs.append(
        make_run(
            tmp_path,
            "n2n",
            1,
            HALF,
            config={"optimizer": {"lr": 0.01}, "distill": {"n2n": 5.0}},
        )
    )
    text, _ = compare(runs)
    assert "painn-small: runs differ in optimizer.lr (0.001; 0.01)." in text
    assert "the distillation weights of n2n (n2n=100; n2n=5)." in text
    assert "runs differ in seed" not in text
    assert "runs differ in distill" not in text


class Page(HTMLParser):
    """Images, text and tag balance of a page."""

    VOID = ("meta", "br", "img")

    def __init__(self):
        super().__init__()
        self.stack, self.images, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_page_is_whole_and_holds_figures_and_provenance(three_seeds, tmp_path):
    odd = make_run(tmp_path / "<b>&", "v2v", 7, HALF)
    out = tmp_path / "out"
    text = write_report([*three_seeds, odd], out)
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert (out / "table.txt").read_text() == text
    page = Page()
    page.feed((out / "report.html").read_text())
    page.close()
    assert page.stack == []
    prefix = "data:image/png;base64,"
    images = [base64.b64decode(src.removeprefix(prefix)) for src in page.images]
    assert images == [(out / name).read_bytes() for name in FILES[:2]]
    for image in images:
        assert image[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", image[16:24])
        assert 600 < width < 4000
        assert 400 < height < 4000
    words = " ".join(page.words)
    assert "f" * 64 in words
    assert str(odd) in words
    assert "n2n=100" in words
    assert "75.0 ± 25.0" in words
    assert page.words.count("yes") == 3  # n2n of seeds 0 to 2; v2v has no baseline
    source = (out / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", source)
    assert re.search(r"<td>n2n</td><td>3</td><td><b>141.7 ± 52.0</b></td>", source)


def test_figures_bear_unlabelled_and_diverged_runs(tmp_path):
    nan = float("nan")
    run = make_run(tmp_path, metrics=(nan, nan, nan, nan), teacher=None)
    (run / "metrics.csv").write_text(
        "step,val_energy_mae,val_forces_mae\n50,nan,inf\n100,nan,0.0\n"
    )
    missing = np.full(3, nan), np.full((9, 3), nan)
    np.savez(
        run / "predictions.npz",
        energy=missing[0],
        energy_label=missing[0],
        forces=missing[1],
        forces_label=missing[1],
        n_atoms=np.array([2, 3, 4]),
    )
    write_report([run], tmp_path / "out")
    assert (tmp_path / "out" / "parity.png").stat().st_size > 1000


def test_parity_leaves_out_fixed_atoms_where_they_are_known(tmp_path):
    run = make_run(tmp_path)
    with np.load(run / "predictions.npz") as file:
        arrays = dict(file)
    assert read_run(run).predictions()["forces"].shape == (27,)
    fixed = np.array([1, 0, 0, 1, 0, 0, 0, 0, 1], dtype=np.uint8)
    np.savez(run / "predictions.npz", **arrays, fixed=fixed)
    free = [1, 2, 4, 5, 6, 7]
    found = read_run(run).predictions()["forces_label"]
    np.testing.assert_array_equal(found, arrays["forces_label"][free].reshape(-1))


def test_spread_of_known_values():
    assert Spread.of([1.0, 3.0]) == Spread(2.0, pytest.approx(2**0.5))
    assert np.isnan(Spread.of([4.0]).deviation)
    assert np.isnan(Spread.of([]).mean)
    assert Spread(-0.04).parts(1) == ("0.0", "")
    assert Spread(float("inf")).parts(1) == ("–", "")


def test_refuses_no_runs_and_missing_folders(tmp_path):
    out = tmp_path / "out"
    refused([], out, "at least one")
    refused([tmp_path / "gone"], out, tmp_path / "gone", "config.yaml")


def test_refuses_an_unfinished_run(tmp_path):
    run = make_run(tmp_path)
    (run / "metrics.json").unlink()
    refused([run], tmp_path / "out", run, "not finished", "kd-train", "--resume")


def test_refuses_runs_of_different_stores(tmp_path):
    runs = [make_run(tmp_path), make_run(tmp_path, "n2n", fingerprint="a" * 64)]
    refused(runs, tmp_path / "out", *runs, "f" * 12, "a" * 12)


@pytest.mark.parametrize(("key", "value"), [("steps", 99), ("val_split", "test")])
def test_refuses_unequal_training_within_a_student(tmp_path, key, value):
    runs = [make_run(tmp_path), make_run(tmp_path, "n2n", **{key: value})]
    refused(runs, tmp_path / "out", *runs, f"different {key}", value)


def test_refuses_different_initial_weights_of_one_seed(tmp_path):
    runs = [make_run(tmp_path), make_run(tmp_path, "n2n", initial_weights="other")]
    refused(runs, tmp_path / "out", *runs, "seed 0", "weights")


def test_refuses_the_same_run_twice(tmp_path):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    refused(
        [first, second], tmp_path / "out", first, second, "strategy none and seed 0"
    )
    refused([first, first], tmp_path / "out", first)


@pytest.mark.parametrize("text", ["{", "[1]", "", "\x00"])
def test_refuses_damaged_json(tmp_path, text):
    run = make_run(tmp_path)
    (run / "metrics.json").write_text(text)
    refused([run], tmp_path / "out", run / "metrics.json", "damaged")


def test_refuses_json_without_a_metric(tmp_path):
    run = make_run(tmp_path, metrics=PLAIN)
    document = json.loads((run / "metrics.json").read_text())
    del document["metrics"]["efwt"]
    (run / "metrics.json").write_text(json.dumps(document))
    refused([run], tmp_path / "out", run / "metrics.json", "metrics.efwt")


@pytest.mark.parametrize("name", ["metrics.csv", "predictions.npz"])
@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 torn", b"step\n1\n"])
def test_refuses_damaged_curves_and_predictions(tmp_path, name, content):
    folder = make_run(tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    run = read_run(folder)
    with pytest.raises(SpecError, match=f"{name} is missing or damaged.*--resume"):
        run.predictions() if name.endswith("npz") else run.curve("val_energy_mae")


@pytest.mark.parametrize("start", [0, 40, 80, 120, 300, 900])
def test_refuses_predictions_torn_in_the_middle(tmp_path, start):
    run = make_run(tmp_path)
    path = run / "predictions.npz"
    content = bytearray(path.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(bytes(content))
    with pytest.raises(SpecError, match="damaged"):
        read_run(run).predictions()


def test_damaged_predictions_leave_no_half_report(tmp_path):
    run = make_run(tmp_path)
    (run / "predictions.npz").write_bytes(b"")
    refused([run], tmp_path / "out", run / "predictions.npz", "damaged")


def test_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PipelineError, match=r"pip install 'kd-train\[report\]'"):
        write_report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plots_can_be_imported_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "parity_png" in runpy.run_path(plots.__file__)


def test_command_prints_the_table_or_one_sentence(tmp_path):
    run, out = make_run(tmp_path), tmp_path / "out"
    done = CliRunner().invoke(report_main, [str(run), "--out", str(out)])
    assert done.exit_code == 0
    assert done.output.rstrip() == (out / "table.txt").read_text().rstrip()
    (run / "metrics.json").unlink()
    done = CliRunner().invoke(report_main, [str(run), "--out", str(out)])
    assert done.exit_code == 2
    assert done.output.startswith("Error: ")
    assert Path(out / "table.txt").exists()
