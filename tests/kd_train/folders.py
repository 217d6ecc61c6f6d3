"""Run folders as the training loop leaves them, made by hand."""

import json

import numpy as np
import yaml

NAMES = ("energy_mae", "forces_mae", "forces_cos", "efwt")
TEACHER = (100.0, 10.0, 0.9, 5.0)
PLAIN = (300.0, 50.0, 0.5, 1.0)
HALF = (200.0, 30.0, 0.7, 3.0)  # closes 50 % of every gap from PLAIN to TEACHER


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
    name=None,
    teacher_name=None,
    processes=None,
    **summary,
):
    """A finished run folder as the training loop leaves it."""
    folder = root / (name or f"{student}_{strategy}_s{seed}")
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
        **({"teacher": teacher_name} if teacher_name else {}),
        "teacher_metrics": teacher and dict(zip(NAMES, teacher, strict=True)),
        **summary,
    }
    (folder / "metrics.json").write_text(json.dumps(document))
    header = {
        "config": {
            "strategy": strategy,
            "student": {"preset": student},
            "seed": seed,
            "optimizer": {"lr": 0.001},
            "distill": {"n2n": 100.0, "v2v": 10000.0},
            **(config or {}),
        },
        "initial_weights": initial_weights or f"{seed:064d}",
        **({"processes": processes} if processes else {}),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(header))
    write_curve(folder, [(50, 40.0, 400.0, 90.0), (100, 90.0, 300.0, 50.0)])
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


def write_curve(folder, rows):
    """metrics.csv with step, seconds, energy and force MAE."""
    lines = ["step,seconds,val_energy_mae,val_forces_mae"]
    lines += [",".join(map(str, row)) for row in rows]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def write_throughput(folder, rate=100.0, device="cpu", threads=2, **more):
    """throughput.json as kd-eval writes it."""
    document = {
        "samples_per_second": rate,
        "samples_per_second_with_graphs": rate / 2,
        "batch_size": 32,
        "device": device,
        "threads": threads,
        "mean_atoms": 12.5,
        **more,
    }
    (folder / "throughput.json").write_text(json.dumps(document))
