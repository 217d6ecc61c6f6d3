"""Reduced precision against float32, deterministic mode, compilation."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kd_train.trainer.checkpoint import read_checkpoint
from kd_train.trainer.numerics import compiler_errors, determinism, matmul_precision
from pipeline.errors import PipelineError, SpecError
from pipeline.store.reader import FeatureStore
from tests.kd_train.runs import distilling, make_run
from tests.stores import STUDENTS, train_config

CPU = torch.device("cpu")


def _losses_and_gradients(
    store: FeatureStore, folder: Path, student: str, precision: str
) -> tuple[dict[str, float], torch.Tensor, set[torch.dtype]]:
    strategy = "n2n+vanilla1+vanilla2" + ("+v2v" if "painn" in student else "")
    config = train_config(
        student, strategy=strategy, precision=precision, optimizer={"clip_norm": None}
    )
    run = make_run(store, folder, config)
    batch = run.on_device(run.train_samples.batch(np.arange(16)))
    seen: set[torch.dtype] = set()

    def note(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        seen.add(output.dtype)

    for module in run.learner.student.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(note)
    values = {name: value.item() for name, value in run.step(batch).items()}
    gradients = [p.grad.flatten() for p in run.modules.parameters() if p.requires_grad]
    return values, torch.cat(gradients), seen


# Rounding of bfloat16 is 0.4 %, that of TF32 0.05 %; through some layers.
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("bfloat16", 2e-2), ("tf32", 1e-3)]
)
@pytest.mark.parametrize("student", list(STUDENTS))
def test_reduced_precision_gives_the_losses_and_gradients_of_float32(
    student: str,
    precision: str,
    tolerance: float,
    small_store: FeatureStore,
    tmp_path: Path,
) -> None:
    exact, wanted, _ = _losses_and_gradients(small_store, tmp_path, student, "float32")
    found, gradient, dtypes = _losses_and_gradients(
        small_store, tmp_path, student, precision
    )
    for name, value in exact.items():
        assert found[name] == pytest.approx(value, rel=tolerance), name
    assert gradient.dtype == torch.float32
    off = (gradient - wanted).norm() / wanted.norm()
    assert off < 2 * tolerance
    assert (torch.bfloat16 in dtypes) == (precision == "bfloat16")
    if precision == "bfloat16":
        assert any(found[name] != value for name, value in exact.items())


def test_precision_of_matrix_products_is_put_back() -> None:
    before = torch.get_float32_matmul_precision()
    with matmul_precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
        with matmul_precision("float32"):
            assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before


def test_deterministic_runs_train(small_store: FeatureStore, tmp_path: Path) -> None:
    for name in ("a", "b"):
        config = distilling(steps=2, eval_every=2, deterministic=True)
        make_run(small_store, tmp_path / name, config).train(resume=False)
    assert not torch.are_deterministic_algorithms_enabled()
    first, second = (
        (tmp_path / name / "student.safetensors").read_bytes() for name in "ab"
    )
    assert first == second


def test_an_operation_without_a_deterministic_form_is_named() -> None:
    source = torch.zeros(4)
    with (
        pytest.raises(SpecError, match=r"deterministic: put_ has no .* on cpu"),
        determinism(True, CPU),
    ):
        source.put_(torch.tensor([1, 1]), torch.ones(2), accumulate=False)
    assert not torch.are_deterministic_algorithms_enabled()
    with (
        pytest.raises(RuntimeError, match="something else"),
        determinism(True, CPU),
    ):
        raise RuntimeError("something else")


def test_a_workspace_of_cublas_that_is_not_deterministic_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with (
        pytest.raises(SpecError, match=r"CUBLAS_WORKSPACE_CONFIG is ':0:0'"),
        determinism(True, torch.device("cuda")),
    ):
        pass


def test_compiled_student_keeps_its_names(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    """Run as it stands instead of compiled, which would take a minute."""
    states, exports = [], []
    with torch.compiler.set_stance("force_eager"):
        for compiled in (False, True):
            folder = tmp_path / str(compiled)
            config = distilling(steps=2, eval_every=2, compile=compiled)
            make_run(small_store, folder, config).train(resume=False)
            states.append(read_checkpoint(folder / "last.pt"))
            exports.append(load_file(folder / "student.safetensors"))
    for key in ("modules", "average"):
        plain, other = (state[key] for state in states)
        assert list(plain) == list(other)
        assert all(torch.equal(plain[name], other[name]) for name in plain)
    assert list(exports[0]) == list(exports[1])


@pytest.mark.skipif("KD_TRAIN_COMPILE" not in os.environ, reason="takes minutes")
def test_compiled_student_gives_the_losses_of_the_plain_one(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    losses = []
    for compiled in (False, True):
        run = make_run(small_store, tmp_path, distilling(compile=compiled))
        for first in (0, 9, 20):
            batch = run.train_samples.batch(np.arange(first, first + 4 + first))
            found = run.step(run.on_device(batch))
            losses.append({name: value.item() for name, value in found.items()})
    for plain, other in zip(losses[:3], losses[3:], strict=True):
        assert other == pytest.approx(plain, rel=1e-4)


def test_forces_that_are_gradients_cannot_be_compiled(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    config = train_config("schnet-demo", compile=True)
    with pytest.raises(SpecError, match=r"compile: .* gradients .* compile=false"):
        make_run(small_store, tmp_path, config)


def test_errors_of_the_compiler_are_one_sentence() -> None:
    from torch._dynamo.exc import TorchDynamoException

    with (
        pytest.raises(PipelineError, match=r"\(No working compiler\); install a C\+\+"),
        compiler_errors(True),
    ):
        raise TorchDynamoException("No working compiler.\n\nFrom user code: ...")
