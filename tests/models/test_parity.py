"""Outputs of the original PaiNN and SchNet, in double and single precision."""

import numpy as np
import pytest
import torch

from pipeline.models.checkpoint import load_checkpoint
from pipeline.native.library import native_kernels
from tests.models.references import assert_close, predict, structures_in

NAMES = ("painn", "painn_grad", "schnet")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def reference(parity_folder, name):
    return np.load(parity_folder / f"{name}.io.npz")


@pytest.fixture
def load(parity_folder, name):
    def run(**options):
        return load_checkpoint(parity_folder / f"{name}.ckpt.pt", **options)

    return run


def keys_of(name):
    """Reference key of each output; the released gradient forces are a slip."""
    if name == "schnet":
        return {"node_features": "h", "forces": "forces"}
    forces = "minus_dE_dpos" if name == "painn_grad" else "forces"
    return {"node_features": "x", "vector_features": "vec", "forces": forces}


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    ("precision", "dtype", "energies", "others"),
    [("f64", torch.float64, 1e-9, 1e-9), ("f32", torch.float32, 1e-4, 5e-4)],
)
def test_outputs_and_features(
    reference, load, name, precision, dtype, energies, others, native
):
    with native_kernels(native):
        output, _ = predict(load().model, structures_in(reference), dtype)
    assert_close(output.energy, reference[f"{precision}/energy"], energies)
    assert_close(
        output.per_atom_energy, reference[f"{precision}/energy_atom"], energies
    )
    for attribute, key in keys_of(name).items():
        value = getattr(output, attribute)
        assert_close(value, reference[f"{precision}/{key}"], others)


def test_physical_units(reference, load, name):
    loaded = load()
    output, batch = predict(loaded.model, structures_in(reference), torch.float64)
    energy = loaded.normalizer.denormalize_energy(
        output.energy, batch.atomic_numbers, batch.batch
    )
    assert_close(energy, reference["phys/energy"], 1e-9)
    if name != "painn_grad":
        forces = loaded.normalizer.denormalize_forces(output.forces)
        assert_close(forces, reference["phys/forces"], 1e-9)


def test_edges(reference, load, name):
    _, batch = predict(load().model, structures_in(reference), torch.float64)
    columns = [batch.edge_index.numpy().T]
    expected = [reference["graph/main/edge_index"].T]
    if name == "schnet":
        # The file has no shifts; the source image then shows in the distance.
        source, target = batch.edge_index
        vectors = batch.positions[source] - batch.positions[target]
        cells = batch.cell[batch.batch[target]]
        vectors += torch.einsum("ek,ekx->ex", batch.cell_offsets, cells)
        columns.append(vectors.norm(dim=1, keepdim=True).numpy().round(3))
        expected.append(reference["graph/main/distance"][:, None].round(3))
    else:
        columns.append(batch.cell_offsets.numpy())
        expected.append(reference["graph/main/cell_offset"])
    actual, wanted = np.hstack(columns), np.hstack(expected)
    assert len(actual) == len(wanted)
    if name == "schnet":
        order = np.lexsort(actual.T[::-1]), np.lexsort(wanted.T[::-1])
        np.testing.assert_allclose(actual[order[0]], wanted[order[1]], atol=2e-3)
    else:
        assert set(map(tuple, actual.tolist())) == set(map(tuple, wanted.tolist()))


def test_raw_weights_are_available_beside_the_average(parity_folder):
    reference = np.load(parity_folder / "painn.io.npz")
    path = parity_folder / "painn.ckpt.pt"
    model = load_checkpoint(path, weights="raw").model
    raw, _ = predict(model, structures_in(reference), torch.float32)
    assert_close(raw.energy, reference["raw/energy"], 1e-4)
    assert_close(raw.forces, reference["raw/forces"], 5e-4)
    difference = np.abs(reference["raw/energy"] - reference["f32/energy"]).max()
    assert difference > 1e-2 * np.abs(reference["f32/energy"]).max()
