"""Energies and states from the written formulas, one edge at a time."""

import math

import pytest
import torch
from torch.nn.functional import layer_norm, silu, softplus


def edges_of(batch):
    """Source, target, distance and direction (target to source) of each edge."""
    for (s, t), n in zip(batch.edge_index.T.tolist(), batch.cell_offsets, strict=True):
        cell = batch.cell[batch.batch[t]]
        vector = batch.positions[s] + n @ cell - batch.positions[t]
        distance = math.sqrt(float(vector @ vector))
        yield s, t, distance, vector / distance


def gaussians(x, centres):
    width = float(centres[1] - centres[0])
    return torch.tensor(
        [math.exp(-0.5 * ((x - float(c)) / width) ** 2) for c in centres],
        dtype=torch.float64,
    )


def two_layers(w, name, x, activation):
    hidden = activation(w[f"{name}.0.weight"] @ x + w[f"{name}.0.bias"])
    return w[f"{name}.2.weight"] @ hidden + w[f"{name}.2.bias"]


def painn_states(model, batch):
    """States x (N, H), vec (N, 3, H) after the last update."""
    w, options = model.state_dict(), model.hyperparameters
    width, p = options["hidden_channels"], options["envelope"]["exponent"]
    centres = w["radial_basis.rbf.offset"]

    def act(x):
        return silu(x) / 0.6

    x = w["atom_emb.embeddings.weight"][batch.atomic_numbers - 1]
    vec = torch.zeros(len(x), 3, width, dtype=torch.float64)
    for i in range(options["num_layers"]):
        m, u = f"message_layers.{i}", f"update_layers.{i}"
        norm = (w[f"{m}.x_layernorm.weight"], w[f"{m}.x_layernorm.bias"])
        y = [
            two_layers(w, f"{m}.x_proj", layer_norm(r, (width,), *norm), act) for r in x
        ]
        dx, dvec = torch.zeros_like(x), torch.zeros_like(vec)
        for s, t, distance, direction in edges_of(batch):
            z = distance / options["cutoff"]
            envelope = (
                1
                - (p + 1) * (p + 2) / 2 * z**p
                + p * (p + 2) * z ** (p + 1)
                - p * (p + 1) / 2 * z ** (p + 2)
            )
            rbf = envelope * gaussians(z, centres)
            filters = w[f"{m}.rbf_proj.weight"] @ rbf + w[f"{m}.rbf_proj.bias"]
            a, b, c = (y[s] * filters).split(width)
            dx[t] += a
            dvec[t] += vec[s] * b / math.sqrt(3) + direction[:, None] * c
        x = (x + dx) / math.sqrt(2)
        vec = vec + dvec / math.sqrt(width)
        v1, v2 = (vec @ w[f"{u}.vec_proj.weight"].T).split(width, dim=2)
        dot = (v1 * v2).sum(1) / math.sqrt(width)
        length = torch.sqrt((v2**2).sum(1) + 1e-8)
        gates = [
            two_layers(w, f"{u}.xvec_proj", row, act)
            for row in torch.cat((x, length), 1)
        ]
        scalar, mix, gate = torch.stack(gates).split(width, dim=1)
        x = x + (scalar + mix * dot) / math.sqrt(2)
        vec = vec + gate[:, None] * v1
        x = x * w[f"upd_out_scalar_scale_{i}.scale_factor"]
    return x, vec


def painn_forces(w, x, vec):
    for g in range(2):
        name = f"out_forces.output_network.{g}"
        length = (vec @ w[f"{name}.vec1_proj.weight"].T).norm(dim=1)
        out = torch.stack(
            [
                two_layers(w, f"{name}.update_net", row, lambda v: silu(v) / 0.6)
                for row in torch.cat((x, length), 1)
            ]
        )
        x, gate = out.chunk(2, dim=1)
        x = silu(x) / 0.6
        vec = gate[:, None] * (vec @ w[f"{name}.vec2_proj.weight"].T)
    return vec[:, :, 0]


@torch.no_grad()
def test_painn(make_model, molecules, batch_of):
    model = make_model("painn")
    batch = batch_of(molecules, model.graph_rule)
    output, w = model(batch), model.state_dict()
    x, vec = painn_states(model, batch)
    torch.testing.assert_close(output.node_features, x)
    torch.testing.assert_close(output.vector_features, vec)
    per_atom = [two_layers(w, "out_energy", row, lambda v: silu(v) / 0.6) for row in x]
    torch.testing.assert_close(output.per_atom_energy, torch.cat(per_atom))
    torch.testing.assert_close(output.forces, painn_forces(w, x, vec))


@torch.no_grad()
def test_schnet(make_model, molecules, batch_of):
    model = make_model("schnet")
    batch = batch_of(molecules, model.graph_rule)
    w, cutoff = model.state_dict(), model.hyperparameters["cutoff"]

    def act(x):
        return softplus(x) - math.log(2)

    h = w["embedding.weight"][batch.atomic_numbers]
    for i in range(model.hyperparameters["num_interactions"]):
        name = f"interactions.{i}"
        y = h @ w[f"{name}.conv.lin1.weight"].T
        z = torch.zeros_like(y)
        for s, t, distance, _ in edges_of(batch):
            basis = gaussians(distance, w["distance_expansion.offset"])
            damping = (math.cos(math.pi * distance / cutoff) + 1) / 2
            z[t] += y[s] * two_layers(w, f"{name}.mlp", basis, act) * damping
        inner = act(z @ w[f"{name}.conv.lin2.weight"].T + w[f"{name}.conv.lin2.bias"])
        h = h + inner @ w[f"{name}.lin.weight"].T + w[f"{name}.lin.bias"]
    inner = act(h @ w["lin1.weight"].T + w["lin1.bias"])
    energy = (inner @ w["lin2.weight"].T + w["lin2.bias"])[:, 0]
    output = model(batch)
    # The released log 2 is rounded to single precision.
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(output.node_features, h, **tolerance)
    torch.testing.assert_close(output.per_atom_energy, energy, **tolerance)


def test_averaged_readout_divides_by_the_number_of_atoms(
    make_model, molecules, batch_of
):
    model = make_model("schnet")
    batch = batch_of(molecules, model.graph_rule)
    total = model(batch)
    mean = type(model)(**{**model.hyperparameters, "readout": "mean"}).double()
    mean.load_state_dict(model.state_dict())
    torch.testing.assert_close(mean(batch).energy, total.energy / batch.natoms)
    assert mean(batch).energy[0].item() != pytest.approx(total.energy[0].item())
