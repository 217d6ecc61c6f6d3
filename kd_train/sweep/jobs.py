"""One run of a sweep in a separate process, and the record of how it ended."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

from kd_train.sweep.gpus import free_gpu
from kd_train.sweep.grid import Sweep
from pipeline.files.atomic import write_atomically
from pipeline.spec.plain_yaml import yaml_text
from pipeline.spec.yaml_model import ClosedModel

# Of a process that was killed, as by a machine without memory.
_ATTEMPTS = 3
_NO_GPU = (
    "The sweep reserves a GPU for every run (gpus: 1), but this machine has none; "
    "set gpus: 0 to train on the CPU, or device: cuda to let CUDA choose one."
)
_PROGRAM = "from kd_train.cli.train import main; main()"


class JobResult(ClosedModel):
    """End of a run, with the ``step`` of its last checkpoint, if any."""

    state: Literal["done", "failed"]
    error: str | None = None
    step: int | None = None
    attempt: int = 1


def outcome_path(sweep: Sweep, name: str) -> Path:
    """Return the file with the outcome of a run."""
    return sweep.folder(name) / "outcome.json"


def read_outcome(sweep: Sweep, name: str) -> JobResult | None:
    """Read how run ``name`` ended, None if it has not or the file is damaged."""
    try:
        return JobResult.model_validate_json(outcome_path(sweep, name).read_bytes())
    except (OSError, ValueError):
        return None


def saved_step(folder: Path) -> int | None:
    """Return the step of the last validation in ``folder``, None before the first."""
    try:
        with (folder / "metrics.csv").open(newline="") as stream:
            return int([row["step"] for row in csv.DictReader(stream)][-1])
    except (OSError, ValueError, KeyError, IndexError, csv.Error):
        return None


def run_job(sweep: Sweep, name: str, attempt: int = 1) -> JobResult:
    """Train run ``name`` to its end, from its last checkpoint, and record the outcome.

    A failure is an outcome and no error. Only one process trains a run: a second waits,
    also for one whose parent was killed.
    """
    run = sweep.run(name)
    folder, log = sweep.folder(name), sweep.out / "logs" / f"{name}.log"
    settings = sweep.out / "configs" / f"{name}.yaml"
    for place in (folder, log.parent):
        place.mkdir(parents=True, exist_ok=True)
    with (log.parent / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = yaml_text(run.document)
        write_atomically(settings, text.encode())
        error = _train_once(
            _command(sweep, settings, folder), log, sweep, lock.fileno()
        )
        if error is not None:
            error = error.removeprefix(f"{folder}: ")
        outcome = JobResult(
            state="done" if error is None else "failed",
            error=error,
            step=saved_step(folder),
            attempt=attempt,
        )
        record(sweep, name, outcome)
    return outcome


def _command(sweep: Sweep, settings: Path, folder: Path) -> list[str]:
    command = [sys.executable, "-c", _PROGRAM, "--cache", sweep.store]
    command += ["--config", str(settings), "--out", str(folder), "--resume", "auto"]
    command += ["--threads", str(sweep.config.threads)]
    return [*command, "--device", sweep.device]


def _train_once(command: list[str], log: Path, sweep: Sweep, lock: int) -> str | None:
    """Run ``command``, on its own GPU if the sweep reserves one."""
    environment = {"OMP_NUM_THREADS": str(sweep.config.threads)}
    if not sweep.config.gpus or sweep.device == "cpu":
        return run_to_its_end(command, log, environment, (lock,))
    with free_gpu(waiting=partial(_log_waiting, log)) as gpu:
        if gpu is None and sweep.config.device is None:
            return _NO_GPU
        if gpu is None:  # none by the names of NVIDIA's devices, but the user insists
            return run_to_its_end(command, log, environment, (lock,))
        name, hold = gpu
        environment["CUDA_VISIBLE_DEVICES"] = name
        return run_to_its_end(command, log, environment, (lock, hold))


def _log_waiting(log: Path, names: Sequence[str]) -> None:
    with log.open("a") as stream:
        stream.write(f"waiting: other runs use all GPUs ({', '.join(names)})\n")


def run_to_its_end(
    command: list[str],
    log: Path,
    environment: Mapping[str, str],
    locks: tuple[int, ...],
) -> str | None:
    """Run ``command`` to its end; return None, or one sentence on its error.

    Its output is appended to ``log``. A killed command is started again and continues
    from its last checkpoint. It gets the environment of this process, updated by
    ``environment``, and holds ``locks``.
    """
    for _ in range(_ATTEMPTS):
        with log.open("ab") as stream:
            begin = stream.tell()
            code = _wait(
                subprocess.Popen(
                    command,
                    stdout=stream,
                    stderr=stream,
                    env={**os.environ, **environment},
                    # The training holds the locks even if this process ends.
                    pass_fds=locks,
                )
            )
        if code >= 0:
            return None if code == 0 else _last_words(log, begin, code)
    cause = signal.Signals(-code).name
    return (
        f"{cause} killed the training {_ATTEMPTS} times; if memory ran out, run "
        "fewer runs at a time or lower batch_size."
    )


def _wait(process: "subprocess.Popen[bytes]") -> int:
    """Wait for ``process`` and return its exit code.

    If this process is ended, ``process`` is ended too.
    """
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _last_words(log: Path, begin: int, code: int) -> str:
    """Return the error sentence of kd-train, or its last line."""
    with log.open("rb") as stream:
        stream.seek(begin)
        text = stream.read().decode(errors="replace")
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    sentences = [line for line in lines if line.startswith("Error: ")]
    if sentences:
        return sentences[-1].removeprefix("Error: ")
    last = lines[-1].strip() if lines else "it printed nothing"
    return f"kd-train ended with exit code {code}: {last}"


def record(sweep: Sweep, name: str, outcome: JobResult) -> None:
    """Write the outcome, and ``failure.json`` if the run failed."""
    failure = sweep.folder(name) / "failure.json"
    if outcome.state == "failed":
        _write(failure, {"error": outcome.error, "step": outcome.step})
    else:
        failure.unlink(missing_ok=True)
    _write(outcome_path(sweep, name), outcome.model_dump())


def _write(path: Path, document: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(document, indent=2).encode() + b"\n")
