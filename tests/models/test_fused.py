"""PaiNN's fused layers against the plain ones and against finite differences."""

import logging

import pytest
import torch

from pipeline.models import fused, messages
from pipeline.models.fused import FusedMessage, FusedUpdate
from pipeline.models.messages import EdgeTensors
from pipeline.models.painn import PaiNNMessage, PaiNNUpdate
from pipeline.native.library import find_library, native_kernels
from tests.models.test_messages import make_pairs

N, H, K = 5, 3, 4
FIELDS = ("energy", "forces", "per_atom_energy", "node_features", "vector_features")


@pytest.fixture(scope="module")
def library():
    found = find_library("painn", torch.float64)
    if found is None:
        pytest.skip("there is no C compiler")
    return found


@pytest.fixture(params=["kept", "computed-again"])
def filters(request, monkeypatch):
    """Filters of one block, or of several blocks that are computed again."""
    if request.param == "computed-again":
        monkeypatch.setattr(fused, "_KEPT_BYTES", 0)
        monkeypatch.setitem(messages._BLOCK_BYTES, "cpu", 1)


def make_edges(count, draw):
    basis = torch.cat((draw(count, K), torch.ones(count, 1).double()), dim=1)
    return EdgeTensors(make_pairs(count, count * 2 // 3), basis, draw(count, 3))


def make_draw():
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, generator=generator).double()


def results(layer, library, inputs, *edges):
    """Outputs of a layer and the gradients of a weighted sum of them."""
    layer.zero_grad()
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = layer(*inputs, *edges, library)
    draw = make_draw()
    sum((draw(*output.shape) * output).sum() for output in outputs).backward()
    gradients = [x.grad for x in inputs if x is not None]
    return [*outputs, *gradients, *(p.grad for p in layer.parameters())]


@pytest.mark.usefixtures("filters")
@pytest.mark.parametrize("with_vec", [True, False])
@pytest.mark.parametrize("count", [0, 1, 23, 70])
def test_fused_message_is_the_plain_one(library, with_vec, count):
    draw = make_draw()
    layer = PaiNNMessage(H, K).double()
    inputs = (draw(N, H), draw(N, 3, H) if with_vec else None)
    edges = make_edges(count, draw)
    expected = results(layer, None, inputs, edges)
    torch.testing.assert_close(results(layer, library, inputs, edges), expected)


@pytest.mark.parametrize("count", [1, N])
def test_fused_update_is_the_plain_one(library, count):
    draw = make_draw()
    layer = PaiNNUpdate(H).double()
    inputs = (draw(count, H), draw(count, 3, H))
    expected = results(layer, None, inputs)
    torch.testing.assert_close(results(layer, library, inputs), expected)


@pytest.mark.usefixtures("filters")
@pytest.mark.parametrize("with_vec", [True, False])
def test_gradients_of_fused_message(library, with_vec):
    draw = make_draw()
    edges = make_edges(40, draw)
    shapes = [(H,), (H,), (H, H), (H,), (3 * H, H), (3 * H,), (3 * H, K), (3 * H,)]
    weights = [draw(*shape).requires_grad_() for shape in shapes]
    x = draw(N, H).requires_grad_()
    vec = draw(N, 3, H).requires_grad_() if with_vec else None

    def layer(x, vec, *weights):
        return FusedMessage.apply(library, edges, 1e-5, x, vec, *weights)

    torch.autograd.gradcheck(layer, (x, vec, *weights))


def test_gradients_of_fused_update(library):
    draw = make_draw()
    shapes = [(N, H), (N, 3, H), (2 * H, H), (H, 2 * H), (H,), (3 * H, H), (3 * H,)]
    inputs = [draw(*shape).requires_grad_() for shape in shapes]
    torch.autograd.gradcheck(lambda *i: FusedUpdate.apply(library, *i), inputs)


@pytest.mark.parametrize("real", [torch.float32, torch.float64])
def test_fused_network_is_the_plain_one(library, make_model, molecules, batch_of, real):
    model = make_model("painn").to(real)
    batch = batch_of(molecules, model.graph_rule, dtype=real)
    found = []
    for wanted in (False, True):
        model.zero_grad()
        with native_kernels(wanted):
            output = model(batch)
        names = {type(node).__name__ for node in nodes(output.forces.grad_fn)}
        assert ("FusedMessageBackward" in names) == wanted
        (output.energy.sum() + output.forces.square().sum()).backward()
        values = {name: getattr(output, name).detach() for name in FIELDS}
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append(values | gradients)
    tolerance = 1e-4 if real == torch.float32 else 1e-10
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


def nodes(root):
    """All operations that lead to ``root``."""
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return seen


def test_gradient_forces_and_autocast_use_the_plain_layers(
    library, make_model, molecules, batch_of, monkeypatch
):
    monkeypatch.setattr(FusedUpdate, "apply", None)
    model = make_model("painn-gradient")
    with native_kernels(True):
        model(batch_of(molecules, model.graph_rule))
        model = make_model("painn").float()
        batch = batch_of(molecules, model.graph_rule, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            model(batch)


def test_without_a_compiler_the_plain_layers_run(
    make_model, molecules, batch_of, monkeypatch, caplog
):
    model = make_model("painn")
    batch = batch_of(molecules, model.graph_rule)
    monkeypatch.setenv("CC", "no-such-compiler -x")
    find_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING), native_kernels(True):
            forces = [model(batch).forces for _ in range(2)]
    finally:
        find_library.cache_clear()
    assert torch.equal(forces[0], model(batch).forces)
    (warning,) = caplog.messages
    assert "the C compiler 'no-such-compiler -x' failed" in warning
    assert "set CC" in warning
