"""Freed memory of tensors is used again."""

import subprocess
import sys

import pytest

# Counts page faults per round of making and dropping ten tensors of 200 pages.
_PROGRAM = """
import resource, sys
import torch
from pipeline.parallel.memory import reuse_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def round_of_tensors():
    tensors = [torch.ones(200, 1024) for _ in range(10)]

can = reuse_freed_memory() if sys.argv[1] == "reuse" else None
round_of_tensors()
before = faults()
for _ in range(50):
    round_of_tensors()
print(can, (faults() - before) / 50)
"""


def _faults(mode: str) -> tuple[str, float]:
    command = [sys.executable, "-c", _PROGRAM, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    can, count = done.stdout.split()
    return can, float(count)


def test_tensors_take_pages_that_earlier_ones_had() -> None:
    can, faults = _faults("reuse")
    if can == "False":
        pytest.skip("the C library has no such options")
    assert faults < 50
    # The measure sees what the default costs.
    assert _faults("default")[1] > 500
