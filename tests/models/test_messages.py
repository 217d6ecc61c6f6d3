"""Message sums against their definition, finite differences and wider precision."""

from itertools import pairwise

import pytest
import torch
from torch_geometric.data import Data

from pipeline.models import messages
from pipeline.models.messages import EdgeTensors, Pairs, sum_messages

N, P, K, H = 5, 23, 4, 3
# Largest relative error of one rounding to bfloat16.
BFLOAT16 = 2**-8


def make_pairs(count: int, mirrored: int) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randint(N, (2, count), generator=generator)
    return Pairs(torch.arange(count), source, target, mirrored)


def inputs(with_vec: bool, count: int = P):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    edges = EdgeTensors(
        make_pairs(count, count * 2 // 3),
        basis=draw(count, K),
        direction=draw(count, 3),
    )
    parts = 3 if with_vec else 2
    y = draw(N, parts * H).requires_grad_()
    weight = draw(parts * H, K).requires_grad_()
    vec = draw(N, 3, H).requires_grad_() if with_vec else None
    return y, vec, weight, edges


def single_edges(edges):
    """Source, target, basis and direction of each edge, mirror images included."""
    pairs = edges.pairs
    for p in range(len(pairs.source)):
        s, t = int(pairs.source[p]), int(pairs.target[p])
        yield s, t, edges.basis[p], edges.direction[p]
        if p < pairs.mirrored:
            yield t, s, edges.basis[p], -edges.direction[p]


def one_edge_at_a_time(y, vec, weight, listed):
    """The sums as plain loops over edges and parts."""
    dx, dvec = torch.zeros(N, H).double(), torch.zeros(N, 3, H).double()
    for s, t, basis, direction in listed:
        message = y[s] * (weight @ basis)
        scalar, *middle, last = message.split(H)
        into = torch.arange(N) == t
        dx = dx + into[:, None] * scalar
        vector = direction[:, None] * last
        if vec is not None:
            vector = vector + vec[s] * middle[0]
        dvec = dvec + into[:, None, None] * vector
    return dx, dvec


@pytest.fixture(params=[1, 10**9], ids=["small-blocks", "one-block"])
def block_bytes(request, monkeypatch):
    # Blocks have at least 32 pairs, so more pairs than that are needed to cut.
    monkeypatch.setitem(messages._BLOCK_BYTES, "cpu", request.param)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("with_vec", [True, False])
@pytest.mark.parametrize("count", [0, 1, P, 70])
def test_sums_equal_loops(with_vec, count):
    y, vec, weight, edges = inputs(with_vec, count)
    expected = one_edge_at_a_time(y, vec, weight, single_edges(edges))
    torch.testing.assert_close(sum_messages(y, vec, weight, edges), expected)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("with_vec", [True, False])
def test_gradients_equal_finite_differences(with_vec):
    y, vec, weight, edges = inputs(with_vec, 40)
    tracked = (y, weight) if vec is None else (y, weight, vec)

    def run(y, weight, vec=None):
        return sum_messages(y, vec, weight, edges)

    assert torch.autograd.gradcheck(run, tracked)


@pytest.mark.parametrize("with_vec", [True, False])
def test_tracked_edges_take_the_differentiable_form(with_vec):
    y, vec, weight, edges = inputs(with_vec)
    expected = sum_messages(y, vec, weight, edges)
    edges.basis.requires_grad_()
    edges.direction.requires_grad_()
    sums = sum_messages(y, vec, weight, edges)
    torch.testing.assert_close(sums, expected)
    total = sum(part.square().sum() for part in sums)
    (slope,) = torch.autograd.grad(total, edges.basis, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), edges.direction)
    assert second.abs().max() > 0


def sums_and_gradients(run, y, vec, weight):
    """Both sums, and the gradients of the sum of all their entries."""
    leaves = [x.detach().requires_grad_() for x in (y, weight, vec) if x is not None]
    sums = run(leaves[0], None if vec is None else leaves[2], leaves[1])
    return *sums, *torch.autograd.grad(sum(part.sum() for part in sums), leaves)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("with_vec", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_reduced_precision_errs_by_at_most_two_roundings_of_all_terms(
    with_vec, tracked
):
    y, vec, weight, edges = inputs(with_vec, 40)
    listed = list(single_edges(edges))
    sizes = [(s, t, b.abs(), d.abs()) for s, t, b, d in listed]
    exact = sums_and_gradients(
        lambda y, vec, weight: one_edge_at_a_time(y, vec, weight, listed),
        y,
        vec,
        weight,
    )
    # The same with absolute values everywhere: the sum of the sizes of all terms.
    size = sums_and_gradients(
        lambda y, vec, weight: one_edge_at_a_time(y, vec, weight, sizes),
        y.abs(),
        None if vec is None else vec.abs(),
        weight.abs(),
    )
    single = edges.to(torch.float32)
    single.basis.requires_grad_(tracked)

    def reduced(y, vec, weight):
        # As in a model: the linear layer before the sum gives bfloat16, and the
        # residual stream stays single.
        with torch.autocast("cpu", torch.bfloat16):
            return sum_messages(y.bfloat16(), vec, weight, single)

    actual = sums_and_gradients(
        reduced, y.float(), None if vec is None else vec.float(), weight.float()
    )
    for got, expected, terms in zip(actual, exact, size, strict=True):
        assert got.dtype == torch.float32
        assert ((got - expected).abs() <= 2 * BFLOAT16 * terms).all()


def test_reduced_precision_sums_many_messages_in_single():
    # One hundred thousand messages of 1: in bfloat16 the sum would stop at 256.
    count = 100_000
    zeros = torch.zeros(count, dtype=torch.int64)
    pairs = Pairs(zeros, zeros, zeros, 0)
    edges = EdgeTensors(pairs, torch.ones(count, 1), torch.ones(count, 3))
    y = torch.ones(1, 2 * H, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(2 * H, 1, requires_grad=True)
    dx, dvec = sum_messages(y, None, weight, edges)
    assert (dx == count).all()
    assert (dvec == count).all()
    (dx.sum() + dvec.sum()).backward()
    expected = torch.tensor([count] * H + [3 * count] * H).float()
    torch.testing.assert_close(y.grad[0].float(), expected, rtol=BFLOAT16, atol=0)
    torch.testing.assert_close(weight.grad[:, 0], expected, rtol=2 * BFLOAT16, atol=0)
    filters = torch.ones(count, 1, dtype=torch.bfloat16)
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    assert pairs.sum_messages(x, filters).item() == count


@pytest.mark.parametrize("variant", ["painn", "painn-gradient", "schnet"])
def test_models_under_autocast_give_single_precision_outputs(
    variant, make_model, batch_of, molecules
):
    model = make_model(variant).float()
    batch = batch_of(molecules, model.graph_rule, torch.float32)
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
    for name, bound in (("energy", 0.03), ("forces", 0.06), ("node_features", 0.02)):
        got, expected = getattr(output, name), getattr(exact, name)
        assert got.dtype == torch.float32
        error = (got - expected).square().mean() / expected.square().mean()
        assert 0 < error.sqrt() < bound


def graph(source, target, shifts):
    return Data(
        edge_index=torch.tensor([source, target]),
        cell_offsets=torch.tensor(shifts).float().view(-1, 3),
        num_nodes=3,
    )


def test_pairs_of_mirror_images():
    x, y, none = [1, 0, 0], [0, 1, 0], [0, 0, 0]
    back = [-1, 0, 0]
    listed = [
        (1, 0, none),  # 0
        (1, 0, x),  # 1: mirror image of 5
        (2, 0, x),  # 2: no mirror image; 6 has another shift
        (0, 0, x),  # 3: mirror image of 4
        (0, 0, back),  # 4
        (0, 1, back),  # 5
        (0, 2, x),  # 6
        (0, 1, none),  # 7: mirror image of 0
        (2, 2, y),  # 8
    ]
    pairs = Pairs.of(graph(*map(list, zip(*listed, strict=True))))
    assert pairs.mirrored == 3
    assert set(pairs.edge[:3].tolist()) == {0, 1, 3}
    assert pairs.edge[3:].tolist() == [2, 6, 8]
    ends = list(zip(pairs.source.tolist(), pairs.target.tolist(), strict=True))
    assert ends == [listed[e][:2] for e in pairs.edge.tolist()]


def test_pairs_without_edges():
    pairs = Pairs.of(graph([], [], []).apply(lambda x: x.long(), "edge_index"))
    assert len(pairs) == pairs.mirrored == 0


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_parts_of_pairs_have_the_same_edges(size):
    pairs = make_pairs(7, 4)

    def edges_of(some):
        return [
            (int(edge), int(s), int(t), sign)
            for rows, source, target, sign in some.directions()
            for edge, s, t in zip(some.edge[rows], source, target, strict=True)
        ]

    cuts = [*range(0, 7, size), 7]
    parts = [pairs[slice(a, b)] for a, b in pairwise(cuts)]
    found = [edge for part in parts for edge in edges_of(part)]
    assert sorted(found) == sorted(edges_of(pairs))
    assert len(found) == 7 + 4


@pytest.mark.parametrize("variant", ["painn", "schnet"])
def test_pairs_share_length_and_cover_every_edge(
    variant, make_model, batch_of, molecules
):
    batch = batch_of(molecules, make_model(variant).graph_rule)
    pairs = Pairs.of(batch)
    listed = {
        (*ends, *shift)
        for ends, shift in zip(
            batch.edge_index.t().tolist(), batch.cell_offsets.tolist(), strict=True
        )
    }
    found = []
    for rows, source, target, sign in pairs.directions():
        shifts = sign * batch.cell_offsets[pairs.edge[rows]]
        columns = (source[:, None], target[:, None], shifts + 0.0)
        found += [tuple(row) for row in torch.cat(columns, dim=1).tolist()]
    assert len(found) == len(listed)
    assert set(found) == listed
