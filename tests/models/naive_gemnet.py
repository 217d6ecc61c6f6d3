"""One interaction block of GemNet-OC as loops over triplets and quadruplets.

Written from the formulas, edge by edge in double precision, without anything that the
package computes but the lists of edges.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import legendre


@dataclass(frozen=True)
class Edge:
    """Edge source -> target; ``shift`` is that of the source, ``unit`` points along."""

    source: int
    target: int
    shift: tuple[int, int, int]
    distance: float
    unit: np.ndarray


def edges_of(structure, edges):
    """Edges one by one, in their order."""
    found = []
    for (source, target), shift in zip(
        edges.edge_index.T.tolist(), edges.cell_offsets.tolist(), strict=True
    ):
        start = structure.positions[source] + np.array(shift) @ structure.cell
        vector = structure.positions[target] - start
        distance = math.sqrt(vector @ vector)
        found.append(Edge(source, target, tuple(shift), distance, vector / distance))
    return found


def act(x):
    return x / (1 + np.exp(-x)) / 0.6


def added(*shifts):
    return tuple(sum(axis) for axis in zip(*shifts, strict=True))


def angular(cosine, count):
    """Y_0 .. Y_(count - 1) at m = 0."""
    cosine = min(max(cosine, -1.0), 1.0)
    return np.array(
        [
            math.sqrt((2 * k + 1) / (4 * math.pi))
            * legendre.legval(cosine, np.eye(count)[k])
            for k in range(count)
        ]
    )


def dihedral(outer, middle, inner):
    """Unsigned angle between the planes (outer, middle) and (inner, middle)."""
    p, w = np.cross(outer, middle), np.cross(inner, middle)
    return math.atan2(max(np.linalg.norm(np.cross(p, w)), 1e-9), p @ w)


class NaiveBlock:
    """Block 0 of a model with ``state`` on the graphs of one structure."""

    def __init__(self, state, options, main, ae, quad, aa):
        self.state, self.options = state, options
        self.main, self.ae, self.quad, self.aa = main, ae, quad, aa
        self.into = defaultdict(list)
        for number, edge in enumerate(main):
            self.into[edge.target].append(number)
        place = {(e.source, e.target, e.shift): k for k, e in enumerate(main)}
        self.swap = [
            place[e.target, e.source, tuple(-n for n in e.shift)] for e in main
        ]

    def __call__(self, h, m):
        """New states; all interactions see the old ones."""
        edges = self.edge_to_edge(m) + self.quadruplets(m) + self.atom_to_edge(h)
        edges = (act(m @ self.weight("dense_ca").T) + edges) / math.sqrt(4)
        atoms = (h + self.edge_to_atom(m, len(h)) + self.pairs(h)) / math.sqrt(3)
        edges = self.residuals("layers_before_skip", edges)
        m = self.residuals("layers_after_skip", (m + edges) / math.sqrt(2))
        atoms = self.residuals("atom_emb_layers", atoms)
        h = (atoms + self.update(m, len(h))) / math.sqrt(2)
        joined = [np.hstack((h[e.source], h[e.target], m[k])) for k, e in self.edges()]
        fresh = act(np.array(joined) @ self.weight("concat_layer.dense").T)
        return h, (m + self.residuals("residual_m", fresh)) / math.sqrt(2)

    def edges(self):
        return enumerate(self.main)

    def weight(self, name):
        return self.state[f"int_blocks.0.{name}.linear.weight"]

    def factor(self, name):
        return self.state[f"int_blocks.0.{name}.scale_factor"]

    def residuals(self, name, x):
        for k in range(getattr(self.options, f"num_{_COUNTS[name]}")):
            x = self.residual(f"{name}.{k}", x)
        return x

    def residual(self, name, x):
        first, second = (self.weight(f"{name}.dense_mlp.{i}") for i in (0, 1))
        return (x + act(act(x @ first.T) @ second.T)) / math.sqrt(2)

    def radial(self, distance, cutoff):
        """Gaussians under the polynomial envelope of exponent 5."""
        count, x = self.options.num_radial, distance / cutoff
        centres = self.state["radial_basis.rbf.offset"]
        envelope = 1 - 21 * x**5 + 35 * x**6 - 15 * x**7 if x < 1 else 0.0
        return envelope * np.exp(-((count - 1) ** 2) * (x - centres) ** 2 / 2)

    def projected(self, name, distance, cutoff):
        weight = self.state[f"mlp_rbf_{name}.linear.weight"]
        return weight @ self.radial(distance, cutoff)

    def matrix(self, name, distance, cutoff):
        """B (channels, functions); the stored memory is read in another shape."""
        weight = self.state[name]
        _, functions, channels = weight.shape
        flat = weight.reshape(len(weight), -1)
        return (self.radial(distance, cutoff) @ flat).reshape(channels, functions)

    def narrow(self, kind, x, radial):
        """Messages before they meet angles; ``x`` has passed its first layer."""
        x = x * (self.weight(f"{kind}.mlp_rbf") @ radial)
        x = self.factor(f"{kind}.scale_rbf") * x
        return act(self.weight(f"{kind}.down_projection") @ x)

    def spread(self, kind, y):
        """Both directions of every edge."""
        own, mirrored = (
            act(y @ self.weight(f"{kind}.up_projection_{way}").T)
            for way in ("ca", "ac")
        )
        other = mirrored[self.swap]
        return (own + other) / math.sqrt(2)

    def angles(self, kind, outs, ins, messages, basis):
        """Values per edge of ``outs``, summed over the other edges into its target.

        ``messages`` of the edges ``ins`` before the bilinear layer.
        """
        count, result = self.options.num_spherical, []
        for k, e in enumerate(outs):
            total = np.zeros((count, messages.shape[1]))
            for j, f in enumerate(ins):
                same = e.source == f.source and e.shift == f.shift
                same = k == j if outs is ins else same
                if f.target == e.target and not same:
                    total += np.outer(angular(e.unit @ f.unit, count), messages[j])
            result.append((basis(e) @ total).ravel())
        weight = self.weight(f"{kind}.mlp_cbf.bilinear")
        return self.factor(f"{kind}.scale_cbf_sum") * np.array(result) @ weight.T

    def edge_to_edge(self, m):
        kind, cutoff = "trip_interaction", self.options.cutoff
        x = act(m @ self.weight(f"{kind}.dense_ba").T)
        messages = [
            self.narrow(kind, x[k], self.projected("tint", e.distance, cutoff))
            for k, e in self.edges()
        ]
        y = self.angles(
            kind,
            self.main,
            self.main,
            np.array(messages),
            lambda e: self.matrix("mlp_cbf_tint.weight", e.distance, cutoff),
        )
        return self.spread(kind, y)

    def atom_to_edge(self, h):
        kind, o = "atom_edge_interaction", self.options
        x = act(h @ self.weight(f"{kind}.dense_ba").T)
        messages = [
            self.narrow(
                kind,
                x[f.source],
                self.projected("aeint", f.distance, o.cutoff_aeaint),
            )
            for f in self.ae
        ]
        y = self.angles(
            kind,
            self.main,
            self.ae,
            np.array(messages),
            lambda e: self.matrix("mlp_cbf_aeint.weight", e.distance, o.cutoff),
        )
        return self.spread(kind, y)

    def edge_to_atom(self, m, count):
        kind, o = "edge_atom_interaction", self.options
        x = act(m @ self.weight(f"{kind}.dense_ba").T)
        messages = [
            self.narrow(kind, x[k], self.projected("eaint", f.distance, o.cutoff))
            for k, f in self.edges()
        ]
        per_edge = self.angles(
            kind,
            self.ae,
            self.main,
            np.array(messages),
            lambda e: self.matrix("mlp_cbf_eaint.weight", e.distance, o.cutoff_aeaint),
        )
        y = np.zeros((count, per_edge.shape[1]))
        for value, e in zip(per_edge, self.ae, strict=True):
            y[e.target] += value
        return act(y @ self.weight(f"{kind}.up_projection_ca").T)

    def quadruplets(self, m):
        """Paths d -> b -> a <- c over a middle edge i of the quadruplet graph."""
        kind, o = "quad_interaction", self.options
        x = act(m @ self.weight(f"{kind}.dense_db").T)
        messages = [
            self.narrow(kind, x[k], self.projected("qint", f.distance, o.cutoff))
            for k, f in self.edges()
        ]
        functions = o.num_spherical**2
        sums = np.zeros((len(m), functions, o.emb_size_quad_in))
        for i in self.quad:
            circular = self.matrix("mlp_cbf_qint.weight", i.distance, o.cutoff_qint)
            for j in self.into[i.source]:
                f = self.main[j]
                if f.source == i.target and added(f.shift, i.shift) == (0, 0, 0):
                    continue
                inner = circular @ angular(i.unit @ f.unit, o.num_spherical)
                gate = self.weight(f"{kind}.mlp_cbf") @ inner
                entering = self.factor(f"{kind}.scale_cbf") * messages[j] * gate
                for k in self.into[i.target]:
                    sums[k] += self.path(self.main[k], i, f, entering)
        result = [
            (self.matrix("mlp_sbf_qint.weight", e.distance, o.cutoff) @ sums[k]).ravel()
            for k, e in self.edges()
        ]
        y = np.array(result) @ self.weight(f"{kind}.mlp_sbf.bilinear").T
        return self.spread(kind, self.factor(f"{kind}.scale_sbf_sum") * y)

    def path(self, e, i, f, entering):
        """What one quadruplet adds to the sum of edge ``e``."""
        back = e.source == i.source and e.shift == i.shift
        closed = e.source == f.source and added(f.shift, i.shift) == e.shift
        if back or closed:
            return 0.0
        count = self.options.num_spherical
        theta = dihedral(e.unit, i.unit, f.unit)
        first = angular(e.unit @ i.unit, count)
        product = np.outer(first, angular(math.cos(theta), count))
        return np.outer(product.ravel(), entering)

    def pairs(self, h):
        kind, o = "atom_interaction", self.options
        v = act(h @ self.weight(f"{kind}.down_projection").T)
        z = np.zeros((len(h), o.emb_size_rbf, o.emb_size_aint_in))
        for e in self.aa:
            basis = self.radial(e.distance, o.cutoff_aint)
            radial = self.state["mlp_rbf_aint.weight"] @ basis
            z[e.target] += np.outer(radial, v[e.source])
        y = z.reshape(len(h), -1) @ self.weight(f"{kind}.bilinear").T
        y = self.factor(f"{kind}.scale_rbf_sum") * y
        return act(y @ self.weight(f"{kind}.up_projection").T)

    def update(self, m, count):
        total = np.zeros((count, m.shape[1]))
        for k, e in self.edges():
            radial = self.projected("h", e.distance, self.options.cutoff)
            total[e.target] += m[k] * (self.weight("atom_update.dense_rbf") @ radial)
        x = self.factor("atom_update.scale_sum") * total
        first = 0
        if self.options.emb_size_edge != self.options.emb_size_atom:
            x, first = act(x @ self.weight("atom_update.layers.0").T), 1
        for k in range(first, first + self.options.num_atom):
            x = self.residual(f"atom_update.layers.{k}", x)
        return x


_COUNTS = {
    "layers_before_skip": "before_skip",
    "layers_after_skip": "after_skip",
    "atom_emb_layers": "atom_emb_layers",
    "residual_m": "concat",
}
