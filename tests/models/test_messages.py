"""The blocked message sum against its definition and finite differences."""

import pytest
import torch

from pipeline.models import messages
from pipeline.models.messages import EdgeTensors, sum_messages

N, E, K, H = 5, 23, 4, 3


def inputs(with_vec: bool, count: int = E):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    edges = EdgeTensors(
        source=torch.randint(N, (count,), generator=generator),
        target=torch.randint(N, (count,), generator=generator),
        basis=draw(count, K),
        direction=draw(count, 3),
    )
    parts = 3 if with_vec else 2
    y = draw(N, parts * H).requires_grad_()
    weight = draw(parts * H, K).requires_grad_()
    vec = draw(N, 3, H).requires_grad_() if with_vec else None
    return y, vec, weight, edges


def one_edge_at_a_time(y, vec, weight, edges):
    """The sums as plain loops over edges, axes and channels."""
    dx = torch.zeros(N, H, dtype=torch.float64)
    dvec = torch.zeros(N, 3, H, dtype=torch.float64)
    for e in range(len(edges.source)):
        s, t = int(edges.source[e]), int(edges.target[e])
        for h in range(H):
            filters = [
                weight[k * H + h] @ edges.basis[e] for k in range(len(y[0]) // H)
            ]
            dx[t, h] += y[s, h] * filters[0]
            for axis in range(3):
                c = y[s, -H + h] * filters[-1]
                dvec[t, axis, h] += edges.direction[e, axis] * c
                if vec is not None:
                    dvec[t, axis, h] += vec[s, axis, h] * y[s, H + h] * filters[1]
    return dx, dvec


@pytest.fixture(params=[1, 10**9], ids=["small-blocks", "one-block"])
def block_bytes(request, monkeypatch):
    # Blocks have at least 32 edges, so more edges than that are needed to cut.
    monkeypatch.setitem(messages._BLOCK_BYTES, "cpu", request.param)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("with_vec", [True, False])
@pytest.mark.parametrize("count", [0, 1, E, 70])
def test_sums_equal_loops(with_vec, count):
    y, vec, weight, edges = inputs(with_vec, count)
    expected = one_edge_at_a_time(y, vec, weight, edges)
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
