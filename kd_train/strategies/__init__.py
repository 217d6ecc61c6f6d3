"""Distillation strategies, one file each; ``REGISTRY`` finds them by name."""

from kd_train.strategies.base import Strategy
from kd_train.strategies.e2e import EdgeToEdge
from kd_train.strategies.e2n import EdgeToNode
from kd_train.strategies.n2n import NodeToNode
from kd_train.strategies.v2v import VectorToVector
from kd_train.strategies.vanilla1 import Vanilla1
from kd_train.strategies.vanilla2 import Vanilla2

__all__ = ["REGISTRY", "Strategy"]

REGISTRY: dict[str, type[Strategy]] = {
    "n2n": NodeToNode,
    "e2n": EdgeToNode,
    "e2e": EdgeToEdge,
    "v2v": VectorToVector,
    "vanilla1": Vanilla1,
    "vanilla2": Vanilla2,
}
