"""Reduced precision against float32, deterministic mode, compilation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kd_train.numerics import determinism, matmul_precision
from pipeline.errors import SpecError
from pipeline.store.reader import FeatureStore
from tests.kd_train.runs import distilling, make_run
from tests.stores import train_config

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
@pytest.mark.parametrize("student", ["painn-small-demo", "schnet-demo"])
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
