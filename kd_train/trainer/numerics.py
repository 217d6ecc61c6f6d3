"""How exactly a run computes: precision, determinism, compilation."""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace

import torch

from kd_train.config.train_config import TrainConfig
from pipeline.errors import PipelineError, SpecError
from pipeline.models.network import Network
from pipeline.models.output import ModelOutput
from pipeline.native.library import native_kernels

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")


@contextmanager
def training_numerics(config: TrainConfig) -> Iterator[None]:
    """Set precision and kernels of a step, and translate errors of the compiler."""
    with (
        matmul_precision(config.precision),
        native_kernels(config.native_kernels),
        compiler_errors(config.compile),
    ):
        yield


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Use TF32 for matrix products of float32 if ``tf32``, else full precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def forward_precision(
    precision: str, device: torch.device
) -> AbstractContextManager[object]:
    """Return the context of a student's forward pass: autocast for ``bfloat16``."""
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def in_float32(output: ModelOutput) -> ModelOutput:
    """Convert all tensors of ``output`` to single precision."""
    values = {field.name: getattr(output, field.name) for field in fields(output)}
    present = {name: v.float() for name, v in values.items() if v is not None}
    return replace(output, **present)


@contextmanager
def determinism(wanted: bool, device: torch.device) -> Iterator[None]:
    """Refuse operations that may differ between two runs, if ``wanted``.

    Raises
    ------
    SpecError
        An operation has no deterministic form, or the environment asks cuBLAS for a
        workspace that is not deterministic.
    """
    if not wanted:
        yield
        return
    if device.type == "cuda":
        found = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
        if found not in _WORKSPACES:
            raise SpecError(
                f"deterministic: {_WORKSPACE} is {found!r}; unset it or set it to "
                f"{' or '.join(_WORKSPACES)}."
            )
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        first, found, _ = str(error).partition(" does not have a deterministic")
        if not found:
            raise
        raise SpecError(
            f"deterministic: {first} has no deterministic implementation on "
            f"{device.type}; set deterministic=false or train on another device."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)


def compile_student(student: Network) -> None:
    """Compile the forward pass of ``student`` in place, and keep names of its state.

    Raises
    ------
    SpecError
        Its forces are gradients, whose training needs second derivatives.
    """
    if not student.hyperparameters.get("direct_forces"):
        raise SpecError(
            "compile: the student's forces are gradients of its energy, but the "
            "compiler does not support second derivatives; set compile=false or "
            "choose a student with direct forces."
        )
    # It would log every place where a network reads a number from the device.
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    student.compile(dynamic=True)


@contextmanager
def compiler_errors(wanted: bool) -> Iterator[None]:
    """Turn an error of the compiler into one sentence, if ``wanted``.

    The compiler runs, and fails, in the first step.

    Raises
    ------
    PipelineError
        The student cannot be compiled on this machine.
    """
    if not wanted:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise PipelineError(
            f"compile: the student cannot be compiled ({lines[0].rstrip('.')}); "
            "install a C++ compiler (on a GPU also Triton), or set compile=false."
        ) from error
