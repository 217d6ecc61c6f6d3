"""Hyperparameters of GemNet-OC under the names of released checkpoints."""

from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import SpecError
from pipeline.graphs.neighbors import ExtraGraph, NeighborSpec

_COUNT = {"least": 0}
# Choices that only one value of is known from released files.
_ONLY = {
    "rbf": "gaussian",
    "cbf": "spherical_harmonics",
    "sbf": "legendre_outer",
    "activation": "silu",
}


@dataclass(frozen=True)
class GemNetOCOptions:
    """Sizes default to the OC20 base model, switches to what released code assumes.

    Cutoffs in Å. Cutoffs and limits of a side graph left at None follow the main graph;
    those of the pair interaction the largest of the others. If ``max_neighbors`` is
    None, no graph has a limit.
    """

    num_spherical: int = 7
    num_radial: int = 128
    num_blocks: int = 4
    emb_size_atom: int = 256
    emb_size_edge: int = 512
    emb_size_trip_in: int = 64
    emb_size_trip_out: int = 64
    emb_size_quad_in: int = 32
    emb_size_quad_out: int = 32
    emb_size_aint_in: int = 64
    emb_size_aint_out: int = 64
    emb_size_rbf: int = 16
    emb_size_cbf: int = 16
    emb_size_sbf: int = 32
    num_before_skip: int = field(default=2, metadata=_COUNT)
    num_after_skip: int = field(default=2, metadata=_COUNT)
    num_concat: int = field(default=1, metadata=_COUNT)
    num_atom: int = field(default=3, metadata=_COUNT)
    num_output_afteratom: int = field(default=3, metadata=_COUNT)
    num_atom_emb_layers: int = field(default=0, metadata=_COUNT)
    num_global_out_layers: int = field(default=2, metadata=_COUNT)
    cutoff: float = 6.0
    cutoff_qint: float | None = None
    cutoff_aeaint: float | None = None
    cutoff_aint: float | None = None
    max_neighbors: int | None = 50
    max_neighbors_qint: int | None = None
    max_neighbors_aeaint: int | None = None
    max_neighbors_aint: int | None = None
    enforce_max_neighbors_strictly: bool = True
    rbf: dict[str, Any] = field(default_factory=lambda: {"name": "gaussian"})
    envelope: dict[str, Any] = field(
        default_factory=lambda: {"name": "polynomial", "exponent": 5}
    )
    cbf: dict[str, Any] = field(default_factory=lambda: {"name": "spherical_harmonics"})
    sbf: dict[str, Any] = field(default_factory=lambda: {"name": "legendre_outer"})
    activation: str = "silu"
    extensive: bool = True
    regress_forces: bool = True
    direct_forces: bool = False
    forces_coupled: bool = False
    use_pbc: bool = True
    quad_interaction: bool = False
    atom_edge_interaction: bool = False
    edge_atom_interaction: bool = False
    atom_interaction: bool = False
    qint_tags: list[int] = field(default_factory=lambda: [0, 1, 2])
    num_elements: int = 83

    def check(self) -> None:
        """Raise SpecError for choices that no released model makes."""
        for key, wanted in _ONLY.items():
            value = getattr(self, key)
            name = value.get("name") if isinstance(value, dict) else value
            if name != wanted:
                raise SpecError(f"gemnet_oc.{key} is {name!r}; supported is {wanted}.")
        if self.max_neighbors is None:
            self._check_no_limits()
        largest, _ = self.base_graph
        whole = "cutoff_aint" if self.has_base_graph else "cutoff"
        # Keys of interactions that are off do not count.
        used = {
            "cutoff": self.cutoff,
            "cutoff_qint": self.quad_graph[0],
            "cutoff_aeaint": self.atom_edge_graph[0],
        }
        for key, cutoff in used.items():
            if cutoff > largest:
                raise SpecError(
                    f"gemnet_oc.{key} is {cutoff} Å, more than {whole} = {largest} "
                    "Å, the cutoff of the graph that contains it."
                )

    def _check_no_limits(self) -> None:
        """Refuse limits of side graphs that are cut out of a graph without a limit."""
        for name in ("qint", "aeaint", "aint"):
            limit = getattr(self, f"max_neighbors_{name}")
            if limit is not None:
                raise SpecError(
                    f"gemnet_oc.max_neighbors_{name} is {limit}, but max_neighbors is "
                    "null, so no graph has a limit; set both to null or to numbers."
                )

    @property
    def has_base_graph(self) -> bool:
        """Whether the other graphs are cut out of one graph over all atoms."""
        return (
            self.atom_edge_interaction
            or self.edge_atom_interaction
            or self.atom_interaction
        )

    @property
    def atom_edge_graph(self) -> tuple[float, int | None]:
        """Cutoff and limit of the graph between atoms and edges."""
        used = self.atom_edge_interaction or self.edge_atom_interaction
        return self._side("aeaint") if used else self._main

    @property
    def quad_graph(self) -> tuple[float, int | None]:
        """Cutoff and limit of the middle edges of quadruplets."""
        return self._side("qint") if self.quad_interaction else self._main

    @property
    def base_graph(self) -> tuple[float, int | None]:
        """Cutoff and limit of the graph that all others are cut out of."""
        if not self.has_base_graph:
            return self._main
        graphs = (self._main, self.atom_edge_graph, self.quad_graph)
        cutoff, limit = self.cutoff_aint, self.max_neighbors_aint
        if cutoff is None or not self.atom_interaction:
            cutoff = max(graph[0] for graph in graphs)
        if limit is None or not self.atom_interaction:
            limits = [graph[1] for graph in graphs if graph[1] is not None]
            limit = max(limits, default=None)
        return cutoff, limit

    @property
    def graph_rule(self) -> NeighborSpec:
        """Main graph with the side graphs ``ae``, ``quad`` and ``aa`` in use."""
        extra_graphs = []
        if self.atom_edge_interaction or self.edge_atom_interaction:
            extra_graphs.append(ExtraGraph("ae", *self.atom_edge_graph))
        if self.quad_interaction:
            tags = tuple(self.qint_tags)
            extra_graphs.append(ExtraGraph("quad", *self.quad_graph, tags))
        if self.atom_interaction:
            extra_graphs.append(ExtraGraph("aa", *self.base_graph))
        return NeighborSpec(
            self.cutoff,
            self.max_neighbors,
            symmetric=True,
            periodic=self.use_pbc,
            strict=self.enforce_max_neighbors_strictly,
            base=self.base_graph if self.has_base_graph else None,
            extra_graphs=tuple(extra_graphs),
        )

    @property
    def _main(self) -> tuple[float, int | None]:
        return self.cutoff, self.max_neighbors

    def _side(self, name: str) -> tuple[float, int | None]:
        cutoff = getattr(self, f"cutoff_{name}")
        limit = getattr(self, f"max_neighbors_{name}")
        return (
            self.cutoff if cutoff is None else cutoff,
            self.max_neighbors if limit is None else limit,
        )
