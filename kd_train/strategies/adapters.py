"""Projections from student to teacher width, used in training alone."""

import torch
from torch import nn

# Keeps the adapters' random stream apart from the backbone's, so that a baseline and
# a KD student of one seed start from identical weights.
_STREAM = 7_919


def linear_adapter(student: int, teacher: int, *, bias: bool, seed: int) -> nn.Linear:
    """Build a linear map over the last axis, initialised as torch does from ``seed``.

    Without ``bias`` it commutes with rotations when applied to vector channels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + _STREAM)
        return nn.Linear(student, teacher, bias=bias)
