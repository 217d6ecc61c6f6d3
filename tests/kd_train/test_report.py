"""Reports of synthetic run folders: files, page, figures, refusals."""

import base64
import io
import json
import re
import runpy
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from kd_train.cli.evaluate import eval_main
from kd_train.cli.report import report_main
from kd_train.cli.train import main as train_main
from kd_train.config.recipe import apply_recipe
from kd_train.config.train_config import TrainConfig, load_config
from kd_train.report import figures
from kd_train.report.figures import row_styles
from kd_train.report.grouping import make_cohorts
from kd_train.report.parity import parity_files
from kd_train.report.plots import mean_curve, throughput_caption, throughput_points
from kd_train.report.report import write_report
from kd_train.report.runs import read_run, read_runs
from kd_train.report.summary import summarize, training_command
from kd_train.report.tables import make_table
from pipeline.errors import PipelineError, SpecError
from tests.kd_train.folders import (
    HALF,
    PLAIN,
    make_run,
    write_curve,
    write_throughput,
)

FILES = [
    "curves.pdf",
    "curves.png",
    "parity.pdf",
    "parity.png",
    "report.html",
    "table.csv",
    "table.tex",
    "table.txt",
    "training.tex",
]


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


class Page(HTMLParser):
    """Images, text and tag balance of a page; nothing may come from outside."""

    VOID = ("meta", "br", "img")

    def __init__(self):
        super().__init__()
        self.stack, self.images, self.words, self.titles = [], [], [], []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe", "object")
        for name, value in attrs:
            assert name not in ("href", "srcset", "style")
            assert not name.startswith("on")
            if name == "src":
                assert tag == "img"
                self.images.append(value)
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.stack and self.stack[-1] == "h2":
            self.titles.append(data)
        if self.stack and self.stack[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data


def parsed(path):
    """The page at ``path``, whole, with its images decoded."""
    page = Page()
    page.feed(path.read_text())
    page.close()
    assert page.stack == []
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in page.images)
    page.images = [
        base64.b64decode(source.removeprefix(prefix), validate=True)
        for source in page.images
    ]
    for image in page.images:
        with Image.open(io.BytesIO(image)) as opened:
            opened.load()
            assert opened.format == "PNG"
            assert 400 < opened.width < 4000
            assert 300 < opened.height < 4000
            # Something is drawn: a blank canvas has one colour.
            assert len(opened.convert("L").getcolors()) > 10
    return page


def test_page_is_whole_and_holds_figures_and_provenance(three_seeds, tmp_path):
    odd = make_run(tmp_path / "<b>&", "v2v", 7, HALF)
    header = yaml.safe_load((odd / "config.yaml").read_text())
    header["versions"] = {"kd-train": "0.0.9", "torch": "2.6.0"}
    (odd / "config.yaml").write_text(yaml.safe_dump(header))
    out = tmp_path / "out"
    text = write_report([*three_seeds, odd], out)
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert (out / "table.txt").read_text() == text
    page = parsed(out / "report.html")
    assert page.images == [
        (out / f"{n}.png").read_bytes() for n in ("curves", "parity")
    ]
    assert page.titles == [
        "Summary",
        "Gap closed",
        "Training data",
        "Learning curves",
        "Parity",
        "Provenance",
    ]
    for name in ("curves.pdf", "parity.pdf"):
        content = (out / name).read_bytes()
        assert content.startswith(b"%PDF-")
        assert content.rstrip().endswith(b"%%EOF")
    words = " ".join(page.words)
    assert "f" * 64 in words
    assert str(odd) in words
    assert "n2n=100" in words
    assert "Trained by kd-train 0.0.9, torch 2.6.0." in words
    assert "75.0 ± 25.0" in words
    assert page.words.count("yes") == 3  # n2n of seeds 0 to 2; v2v has no baseline
    source = (out / "report.html").read_text()
    assert re.search(r"<td>n2n</td><td>3</td><td><b>141.7 ± 52.0</b></td>", source)


def test_summary_names_the_best_row_of_every_metric(three_seeds, tmp_path):
    worse = make_run(tmp_path, "v2v", 0, (400.0, 60.0, 0.4, 0.5), student="schnet")
    plain = make_run(tmp_path, "none", 0, (300.0, 60.0, 0.5, 1.0), student="schnet")
    cohorts = make_cohorts(read_runs([*three_seeds, plain, worse])[0])
    assert summarize(make_table(cohorts), cohorts, [], []) == [
        "8 finished runs of 2 students with 3 seeds on one store, validated on split "
        "val.",
        "painn-small: energy MAE is best with n2n (141.7 ± 52.0 meV, 75.0 ± 25.0 % of "
        "the gap closed); force MAE is best with n2n (30.00 ± 0.00 meV/Å, 50.0 ± 0.0 % "
        "of the gap closed).",
        "schnet: no row beats the plain student in energy MAE (300.0 meV); force MAE "
        "is the same for all rows or missing.",
    ]


def test_commands_make_the_same_runs_again(tmp_path):
    config = {
        "student": {"preset": "painn-small", "hyperparameters": {"cutoff": 5.0}},
        "steps": 100,
        "train_split": "train+more",
        "distill": {"n2n": 12.5, "schedule": {"kind": "linear", "steps": 50}},
        "schedule": {"kind": "milestones", "milestones": [10, 20]},
    }
    run = make_run(tmp_path, "n2n", 3, HALF, config=config, name="it's")
    words = shlex.split(training_command(read_run(run)))
    assert words[:3] == ["kd-train", "--cache", "STORE"]
    assert words[-2:] == ["--out", str(run)]
    header = read_run(run).header.config
    told = {"strategy": "n2n", "seed": 3, "recipe": "none"}
    assert commanded(words) == TrainConfig.model_validate(header | told)


def commanded(words, teacher=None):
    """What kd-train makes of its options in ``words``, on a store of ``teacher``."""
    asked = train_main.make_context("kd-train", words[1:]).params
    flags = {key: asked[key] for key in ("strategy", "seed", "steps")}
    flags["student.preset"] = asked["student"]
    return apply_recipe(load_config(None, flags, asked["overrides"]), teacher)


ODD = {
    "batch_size": 32,
    "loss": {"force_loss": "l2", "pseudo_label_weight": 0.5},
    "optimizer": {"lr": 1e-3, "eps": 1e-7, "clip_norm": 10.0, "weight_decay": 2e-6},
    "schedule": {"kind": "cosine", "warmup_steps": 3750, "milestones": []},
    "distill": {"n2n": 100.0, "vanilla1": 1.0},
    "student": {"hyperparameters": {"cutoff": None, "eps": 1e-7, "act": "no"}},
    "train_split": "off",
    "recipe": "auto",
}


@pytest.mark.parametrize("changes", [{}, ODD], ids=["as the recipe", "overridden"])
@pytest.mark.parametrize("teacher", ["painn", "gemnet_oc", None])
@pytest.mark.parametrize(
    ("recipe", "student"),
    [
        ("oc20", "schnet-oc20"),
        ("oc20", "painn-small-oc20"),
        ("coll", "schnet"),
        ("coll", "painn-big"),
        ("none", "schnet"),
    ],
)
def test_commands_resolve_to_the_same_settings(
    tmp_path, recipe, student, teacher, changes
):
    """A command overrules the recipe also where a setting was back at its default."""
    own = changes.get("student", {}) | {"preset": student}
    asked = changes | {"student": own, "strategy": "n2n", "recipe": recipe, "seed": 4}
    trained = apply_recipe(TrainConfig.model_validate(asked), teacher)
    settings = trained.model_dump(mode="json")
    run = make_run(tmp_path, "n2n", 4, HALF, student=student, config=settings)
    words = shlex.split(training_command(read_run(run)))
    for store_teacher in ("painn", "gemnet_oc", None):
        assert commanded(words, store_teacher) == trained


def test_command_of_several_processes_starts_as_many(tmp_path):
    run = make_run(tmp_path, processes=4)
    words = shlex.split(training_command(read_run(run)))
    start = ["torchrun", "--nproc-per-node", "4", "-m", "kd_train"]
    assert words[:7] == [*start, "--cache", "STORE"]


def test_command_of_a_run_with_an_unknown_recipe_needs_none(tmp_path):
    run = make_run(tmp_path, config={"recipe": "md22", "batch_size": 7})
    found = commanded(shlex.split(training_command(read_run(run))))
    assert (found.recipe, found.batch_size, found.steps) == ("none", 7, 10_000)


def test_partial_lists_what_has_no_results(tmp_path):
    states = {}
    for name in ("failed", "long", "running", "fresh", "odd"):
        states[name] = make_run(tmp_path, name=name)
        (states[name] / "metrics.json").unlink()
    reason = {"error": "sample 'a<b>' has\nno neighbours", "step": 70}
    (states["failed"] / "failure.json").write_text(json.dumps(reason))
    (states["long"] / "failure.json").write_text(json.dumps({"error": "x" * 9999}))
    (states["fresh"] / "metrics.csv").unlink()
    (states["odd"] / "failure.json").write_text("[")
    states["damaged"] = make_run(tmp_path, name="damaged")
    (states["damaged"] / "metrics.json").write_text("{")
    states["gone"] = tmp_path / "gone"
    good = make_run(tmp_path)
    (good / "failure.json").write_text(json.dumps(reason))  # of an earlier attempt
    out = tmp_path / "out"
    text = write_report([good, *states.values()], out, partial=True)
    lines = {
        line.split(":")[0].strip().rsplit("/")[-1]: line.split(": ", 1)[1]
        for line in text.split("Runs without results:\n")[1].splitlines()
    }
    assert lines.pop("damaged").startswith("damaged: ")
    assert lines.pop("odd").startswith("failed: ")
    assert lines.pop("long") == f"failed: {'x' * 299}…"
    assert lines == {
        "failed": "failed at step 70: sample 'a<b>' has no neighbours",
        "running": "unfinished at step 100",
        "fresh": "unfinished before its first validation",
        "gone": "not started",
    }
    page = parsed(out / "report.html")
    assert "Runs without results" in page.titles
    assert "painn-small, none, seed 0" in page.words
    assert "failed at step 70: sample 'a<b>' has no neighbours" in page.words
    assert "7 runs without results: see below." in page.words


def test_partial_without_any_finished_run_still_tells(tmp_path):
    run, out = make_run(tmp_path), tmp_path / "out"
    (run / "metrics.json").unlink()
    text = write_report([run], out, partial=True)
    assert text.startswith("No run is finished.")
    assert "unfinished at step 100" in text
    assert parsed(out / "report.html").images == []
    assert sorted(path.name for path in out.iterdir()) == FILES[4:]


def test_a_failed_run_is_refused_with_the_way_out(tmp_path):
    run = make_run(tmp_path)
    (run / "metrics.json").unlink()
    (run / "failure.json").write_text("{}")
    refused([run], tmp_path / "out", run, "failed", "--resume", "--partial")


def test_mean_curve_is_over_common_steps_and_mean_times(tmp_path):
    runs = [make_run(tmp_path, seed=0), make_run(tmp_path, seed=1)]
    write_curve(runs[0], [(10, 1.0, 8.0, 1.0), (20, 2.0, 4.0, 2.0), (30, 3, 1, 1)])
    write_curve(runs[1], [(10, 3.0, 6.0, 3.0), (30, 9.0, "nan", 2.0)])
    found = mean_curve([read_run(run) for run in runs], "val_energy_mae")
    np.testing.assert_allclose(
        found, [[10, 2.0, 7.0, 2**0.5], [30, 6.0, np.nan, np.nan]]
    )
    single = mean_curve([read_run(runs[0])], "val_forces_mae")
    np.testing.assert_allclose(
        single, [[10, 1.0, 1.0, 0.0], [20, 2.0, 2.0, 0.0], [30, 3.0, 1.0, 0.0]]
    )


def test_throughput_is_drawn_where_it_was_measured(three_seeds, tmp_path):
    out = tmp_path / "out"
    for run in three_seeds[:4]:
        write_throughput(run)
    write_report(three_seeds, out)
    assert {"throughput.png", "throughput.pdf"} <= {p.name for p in out.iterdir()}
    page = parsed(out / "report.html")
    assert "Accuracy against throughput" in page.titles
    assert len(page.images) == 3
    (caption,) = [word for word in page.words if word.startswith("Error of exported")]
    assert caption.endswith("Measured on cpu, 2 threads.")
    assert "batch size 32, 12.5 atoms" in caption
    # An earlier figure must not stay beside a report that has none.
    for run in three_seeds[:4]:
        (run / "throughput.json").unlink()
    write_report(three_seeds, out)
    assert sorted(path.name for path in out.iterdir()) == FILES


def test_machines_are_not_mixed_silently(tmp_path):
    runs = [make_run(tmp_path, seed=seed) for seed in (0, 1, 2)]
    write_throughput(runs[0], 100.0)
    write_throughput(runs[1], 300.0)
    write_throughput(runs[2], 9000.0, "cuda", None, device_name="NVIDIA H100")
    points = throughput_points(make_cohorts([read_run(run) for run in runs]))
    assert [(point.machine, point.rate("samples_per_second")) for point in points] == [
        ("cpu, 2 threads", 200.0),
        ("NVIDIA H100", 9000.0),
    ]
    caption = throughput_caption(points)
    assert "circles: cpu, 2 threads; squares: NVIDIA H100" in caption
    assert "compare speeds only between markers of one kind" in caption


@pytest.mark.parametrize("text", ["[", "{}", '{"samples_per_second": "fast"}'])
def test_a_damaged_throughput_is_named(tmp_path, text):
    run = make_run(tmp_path)
    (run / "throughput.json").write_text(text)
    with pytest.raises(SpecError, match=r"throughput\.json"):
        read_run(run).throughput()


def test_many_rows_keep_distinct_looks_and_a_sensible_size(tmp_path):
    runs = [make_run(tmp_path)]
    for i in range(6):
        config = {"distill": {"v2v": 10.0**i}}
        runs.append(make_run(tmp_path, "v2v", 0, HALF, config=config, name=f"v{i}"))
    cohorts = make_cohorts(read_runs(runs)[0])
    found = row_styles(cohorts)
    assert len(set(found.values())) == len(found) == 7
    with Image.open(io.BytesIO(parity_files(cohorts)["parity.png"])) as image:
        assert image.width < 1.3 * image.height < 2 * image.width


def test_figures_bear_unlabelled_and_diverged_runs(tmp_path):
    nan = float("nan")
    run = make_run(tmp_path, metrics=(nan, nan, nan, nan), teacher=None)
    (run / "metrics.csv").write_text(
        "step,seconds,val_energy_mae,val_forces_mae\n50,1,nan,inf\n100,2,nan,0.0\n"
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


def test_refuses_no_runs_and_missing_folders(tmp_path):
    out = tmp_path / "out"
    refused([], out, "at least one")
    refused([tmp_path / "gone"], out, tmp_path / "gone", "config.yaml")


def test_refuses_an_unfinished_run(tmp_path):
    run = make_run(tmp_path)
    (run / "metrics.json").unlink()
    refused([run], tmp_path / "out", run, "not finished", "kd-train", "--resume")


def typed(message):
    """Options and arguments of the command in ``message``, read by the command."""
    (command,) = re.findall("`([^`]*)`", message)
    name, *words = shlex.split(command)
    return (
        {"kd-train": train_main, "kd-eval": eval_main}[name]
        .make_context(name, words)
        .params
    )


def message_of(act, *arguments):
    with pytest.raises(SpecError) as caught:
        act(*arguments)
    return str(caught.value)


def test_commands_in_refusals_can_be_typed(tmp_path):
    run = make_run(tmp_path, name="it's mine")
    finished = read_run(run)
    (run / "throughput.json").write_text("[")
    measured = typed(message_of(finished.throughput))
    assert (measured["run"], measured["data"]) == (run, "STORE")
    assert measured["throughput"]
    (run / "metrics.csv").unlink()
    messages = [message_of(finished.curve, "val_energy_mae")]
    (run / "metrics.json").write_text("[")
    messages.append(message_of(read_run, run))
    (run / "metrics.json").unlink()
    messages.append(message_of(read_run, run))
    (run / "failure.json").write_text("{}")
    messages.append(message_of(read_run, run))
    for message in messages:
        asked = typed(message)
        assert (asked["cache"], asked["out"], asked["resume"]) == (
            "STORE",
            run,
            "always",
        )
        assert "the original settings of the run" in message


def test_refuses_runs_of_different_stores(tmp_path):
    runs = [make_run(tmp_path), make_run(tmp_path, "n2n", fingerprint="a" * 64)]
    refused(runs, tmp_path / "out", *runs, "f" * 12, "a" * 12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 99}, "different steps (99 and 100)"),
        (
            {"val_split": "test"},
            "different splits for the metrics, test_split or else val_split",
        ),
        ({"config": {"val_split": "more"}}, "different val_split (more and val)"),
    ],
)
def test_refuses_unequal_training_within_a_student(tmp_path, changes, words):
    runs = [make_run(tmp_path), make_run(tmp_path, "n2n", **changes)]
    refused(runs, tmp_path / "out", *runs, words)


MISFITS = {
    "steps": {"steps": 99},
    "split": {"val_split": "test"},
    "curves": {"config": {"val_split": "more"}},
    "store": {"fingerprint": "a" * 64},
    "batch": {"processes": 2},
    "start": {"initial_weights": "other"},
    "twice": {},
}


def test_partial_lists_what_cannot_be_compared(tmp_path):
    """The table is that of the rest alone, wherever the others stand."""
    rest = [make_run(tmp_path, seed=seed) for seed in (0, 1)]
    rest += [make_run(tmp_path, "n2n", seed, HALF) for seed in (0, 1)]
    others = {
        name: make_run(tmp_path, "n2n", 0, PLAIN, name=name, **changes)
        for name, changes in MISFITS.items()
    }
    early = [folder for name, folder in others.items() if name != "twice"]
    out = tmp_path / "out"
    text = write_report([*early, *rest, others["twice"]], out, partial=True)
    alone = write_report(rest, tmp_path / "alone")
    table, listed = text.split(
        "\nFinished runs that are not comparable with the other runs:"
    )
    assert table == alone
    said = dict(
        line.strip().removeprefix(f"{tmp_path}/").split(": ", 1)
        for line in listed.splitlines()
        if line
    )
    assert said.keys() == MISFITS.keys()
    assert said["steps"] == f"unlike {rest[0]}: different steps (99 and 100)"
    assert "(64 samples and 32 samples" in said["batch"]
    assert "fingerprints aaaaaaaaaaaa… and ffffffffffff…" in said["store"]
    assert "different splits for the metrics" in said["split"]
    assert "different val_split (more and val)" in said["curves"]
    assert "different initial weights" in said["start"]
    assert said["twice"].startswith(f"unlike {rest[2]}: both are painn-small with")
    page = parsed(out / "report.html")
    assert (
        page.titles[-2] == "Finished runs that are not comparable with the other runs"
    )
    assert (
        "7 finished runs not comparable with the other runs: see below." in page.words
    )


@pytest.mark.parametrize("order", [1, -1])
def test_partial_keeps_the_plain_student_where_all_runs_differ(tmp_path, order):
    runs = [make_run(tmp_path, "v2v", 0, HALF, steps=70), make_run(tmp_path)]
    runs += [make_run(tmp_path, "n2n", 0, HALF, steps=80)]
    text = write_report(runs[::order], tmp_path / "out", partial=True)
    assert "Baselines and teacher (100 steps, split val)" in text
    assert f"  {runs[0]}: unlike {runs[1]}: different steps (70 and 100)\n" in text
    assert f"  {runs[2]}: unlike {runs[1]}: different steps (80 and 100)\n" in text


@pytest.mark.parametrize(
    ("processes", "config", "batch"),
    [
        (4, {}, "128 samples"),
        (None, {"accumulate_steps": 2}, "64 samples"),
        (2, {"batch_size": 8, "accumulate_steps": 3}, "48 samples"),
        (3, {"batch_atoms": 1000}, "3000 atoms"),
    ],
)
def test_refuses_unequal_batches_of_all_processes(tmp_path, processes, config, batch):
    # The baseline's folder does not say of how many processes: one.
    runs = [make_run(tmp_path)]
    runs += [make_run(tmp_path, "n2n", 0, HALF, config=config, processes=processes)]
    out = tmp_path / "out"
    refused(runs, out, *runs, "32 samples", batch, "batch_size", "processes")


def test_a_damaged_batch_size_is_named(tmp_path):
    run = make_run(tmp_path, config={"batch_size": [3]})
    refused([run], tmp_path / "out", run / "config.yaml", "batch_size")


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
    assert "new_figure" in runpy.run_path(figures.__file__)


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
