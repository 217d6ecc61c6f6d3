"""Teachers: the interface of plug-ins, its checks, our networks and known potentials.

A plug-in imports what it needs from here. Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.graphs.neighbors import NeighborSpec
    from pipeline.teachers.batch import (
        GraphBatch,
        collate_graphs,
        structure_edge_vectors,
    )
    from pipeline.teachers.capture import capture_outputs
    from pipeline.teachers.checks import Subject, check_potential
    from pipeline.teachers.potential import (
        FieldInfo,
        Guarantees,
        Potential,
        SampleGraph,
    )
    from pipeline.teachers.trust import weights_sha256

__all__ = [
    "FieldInfo",
    "GraphBatch",
    "Guarantees",
    "NeighborSpec",
    "Potential",
    "SampleGraph",
    "Subject",
    "capture_outputs",
    "check_potential",
    "collate_graphs",
    "structure_edge_vectors",
    "weights_sha256",
]

_MODULES = {
    "FieldInfo": "pipeline.teachers.potential",
    "GraphBatch": "pipeline.teachers.batch",
    "Guarantees": "pipeline.teachers.potential",
    "NeighborSpec": "pipeline.graphs.neighbors",
    "Potential": "pipeline.teachers.potential",
    "SampleGraph": "pipeline.teachers.potential",
    "Subject": "pipeline.teachers.checks",
    "capture_outputs": "pipeline.teachers.capture",
    "check_potential": "pipeline.teachers.checks",
    "collate_graphs": "pipeline.teachers.batch",
    "structure_edge_vectors": "pipeline.teachers.batch",
    "weights_sha256": "pipeline.teachers.trust",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'pipeline.teachers' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
