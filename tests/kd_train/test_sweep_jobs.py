"""How a run's process ends is told in one sentence, and killed ones go on."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from kd_train.sweep import gpus
from kd_train.sweep.gpus import free_gpu
from kd_train.sweep.grid import load_sweep
from kd_train.sweep.jobs import (
    JobResult,
    read_outcome,
    record,
    run_job,
    run_to_its_end,
)

KILL = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


def _run(program: str, folder: Path, *arguments: str) -> str | None:
    command = [sys.executable, "-c", program, *arguments]
    with (folder / "lock").open("w") as lock:
        return run_to_its_end(command, folder / "log", {"MORE": "3"}, (lock.fileno(),))


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("", None),
        ("import os; assert os.environ['MORE'] == '3'", None),
        ("import sys; print('x'); sys.exit('a\\rError: It broke.')", "It broke."),
        ("import sys; sys.exit(7)", "exit code 7: it printed nothing"),
        ("1 / 0", "exit code 1: ZeroDivisionError: division by zero"),
    ],
)
def test_the_end_is_told(program: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("Error: Of an earlier time.\n")
    said = _run(program, tmp_path)
    assert (said is None) == (expected is None)
    assert expected is None or (said is not None and said.endswith(expected))


def test_a_killed_process_is_started_again(tmp_path: Path) -> None:
    """It adds a line each time and is killed in its first two lives."""
    lives = tmp_path / "lives"
    program = (
        f"import pathlib; p = pathlib.Path({str(lives)!r}); p.open('a').write('x');\n"
        f"if len(p.read_text()) < 3: {KILL}"
    )
    assert _run(program, tmp_path) is None
    assert lives.read_text() == "xxx"


def test_one_that_is_always_killed_is_given_up(tmp_path: Path) -> None:
    said = _run(KILL, tmp_path)
    assert said is not None
    assert "SIGKILL killed the training 3 times" in said


def test_the_training_holds_the_lock_itself(tmp_path: Path) -> None:
    """So a run whose parent was killed cannot be trained by two at the same time."""
    program = (
        "import os; mine = [os.readlink(f'/proc/self/fd/{n}') "
        "for n in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{n}')];"
        f"assert {str(tmp_path / 'lock')!r} in mine, mine"
    )
    assert _run(program, tmp_path) is None


def test_a_terminated_job_takes_its_training_along(tmp_path: Path) -> None:
    training = "import os, time; print(os.getpid(), flush=True); time.sleep(3600)"
    program = (
        "import sys; from pathlib import Path; "
        "from kd_train.sweep.jobs import run_to_its_end; "
        f"log = Path({str(tmp_path / 'log')!r}); lock = log.open('a'); "
        f"command = [sys.executable, '-c', {training!r}]; "
        "run_to_its_end(command, log, {}, (lock.fileno(),))"
    )
    job = subprocess.Popen([sys.executable, "-c", program])
    while not (tmp_path / "log").exists() or not (tmp_path / "log").read_text():
        assert job.poll() is None
    number = int((tmp_path / "log").read_text())
    job.terminate()
    assert job.wait() == 128 + 15
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_a_failure_is_kept_beside_the_run_until_it_is_overcome(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("{store: s, out: o, students: [schnet], strategies: [none]}")
    sweep, name = load_sweep(path), "schnet-none-s0"
    failure = sweep.folder(name) / "failure.json"
    failed = JobResult(state="failed", error="It broke.", step=3, attempt=2)
    record(sweep, name, failed)
    assert read_outcome(sweep, name) == failed
    assert json.loads(failure.read_text()) == {"error": "It broke.", "step": 3}
    record(sweep, name, JobResult(state="done"))
    assert not failure.exists()
    (sweep.folder(name) / "outcome.json").write_text("torn")
    assert read_outcome(sweep, name) is None


def test_every_run_has_a_gpu_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5, -1, 7")
    monkeypatch.setattr(gpus, "_PAUSE", 0.001)
    with free_gpu(tmp_path) as first:
        assert first is not None
        # Whoever was given the descriptor keeps the GPU when this process has gone.
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[first[1]])
    with free_gpu(tmp_path) as second:
        assert second is not None
        assert (first[0], second[0]) == ("3", "5")
        # A third waits, here until it has said so.
        said: list[Sequence[str]] = []

        def end(names: Sequence[str]) -> None:
            said.append(names)
            child.communicate()

        with free_gpu(tmp_path, end) as third:
            assert third is not None
            assert (third[0], said) == ("3", [["3", "5"]])


@pytest.mark.parametrize("listed", ["", "-1", "NoDevFiles", "-1,0"])
def test_no_gpu_is_no_reason_to_train_on_the_cpu(
    listed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    path = tmp_path / "sweep.yaml"
    path.write_text("{store: s, out: o, students: [schnet], strategies: [none]}")
    assert load_sweep(path).device == "cpu"
    path.write_text(path.read_text().replace("}", ", gpus: 1}"))
    sweep, name = load_sweep(path), "schnet-none-s0"
    # A GPU that is told and not there must not be replaced by the CPU either.
    assert sweep.device == "cuda"
    outcome = run_job(sweep, name)
    assert outcome.state == "failed"
    assert "(gpus: 1), but this machine has none" in str(outcome.error)
    assert read_outcome(sweep, name) == outcome
    assert not (sweep.out / "logs" / f"{name}.log").exists()


def test_jobs_of_slurm_number_their_gpus_each_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the GPU 0 of one is not that of another, and none waits for it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with ExitStack() as held:
        for job in ("11", "12"):
            monkeypatch.setenv("SLURM_JOB_ID", job)
            gpu = held.enter_context(free_gpu(tmp_path, pytest.fail))
            assert gpu is not None
            assert gpu[0] == "0"
