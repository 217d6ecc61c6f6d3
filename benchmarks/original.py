"""Times the models of fairchem-core 1.x on request; started by models.py, not by hand.

    PYTHON original.py FOLDER THREADS FLUSH

Runs in an environment of its own, so it imports nothing of this project. FOLDER holds
``job.pt``: model name, hyperparameters, weights and batches. Requests are words on
standard input, answers JSON on one line each.
"""

import importlib
import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

CLASSES = {
    "painn": ("fairchem.core.models.painn.painn", "PaiNN"),
    "schnet": ("fairchem.core.models.schnet", "SchNetWrap"),
    "gemnet_oc": ("fairchem.core.models.gemnet_oc.gemnet_oc", "GemNetOC"),
}
# Names under which the original keeps a weight or constant a second time.
ALIASES = (".conv.nn.", "atomic_mass", ".seq_energy_pre.", ".radial_basis.rbf.")


def original_model(job: dict[str, Any]) -> nn.Module:
    """The original with our hyperparameters and weights."""
    module, name = CLASSES[job["model"]]
    kind = getattr(importlib.import_module(module), name)
    known = inspect.signature(kind.__init__).parameters
    chosen = {k: v for k, v in job["hyperparameters"].items() if k in known}
    if chosen.get("readout") == "add":
        chosen["readout"] = "sum"  # the same; its own default no longer works
    model = kind(**chosen, otf_graph=True)
    loaded = model.load_state_dict(job["weights"], strict=False)
    missing = [
        key for key in loaded.missing_keys if not any(alias in key for alias in ALIASES)
    ]
    if missing or loaded.unexpected_keys:
        sys.exit(f"missing {missing}, unexpected {loaded.unexpected_keys}")
    return model


def batch_of(frames: list[dict[str, Tensor]]) -> Batch:
    """Structures as the original's loaders hand them to a model, without edges."""
    return Batch.from_data_list([Data(**frame) for frame in frames])


def predict(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Energies (B,) and forces (N, 3)."""
    output = model(batch)
    return output["energy"].flatten(), output["forces"]


def forward(model: nn.Module, frames: Batch) -> tuple[Tensor, Tensor]:
    """Inference, graph included."""
    with torch.no_grad():
        energy, forces = predict(model.eval(), frames.clone())
    return energy.detach(), forces.detach()


def train_step(model: nn.Module, frames: Batch) -> None:
    """Forward, loss and backward, graph included."""
    energy, forces = predict(model.train(), frames.clone())
    loss = energy.abs().mean() + torch.linalg.vector_norm(forces, dim=1).mean()
    model.zero_grad(set_to_none=True)
    loss.backward()


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Processor and wall time of one call, in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def main() -> None:
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    torch.set_flush_denormal(sys.argv[3] == "True")
    job = torch.load(folder / "job.pt", weights_only=True)
    model = original_model(job)
    batches = {kind: batch_of(frames) for kind, frames in job["frames"].items()}
    for word in map(str.strip, sys.stdin):
        answer: dict[str, Any]
        if word == "predict":
            energy, forces = forward(model, batches["forward"])
            answer = {"energy": energy.tolist(), "forces": forces.tolist()}
        elif word == "forward":
            answer = timed(lambda: forward(model, batches["forward"]))
        else:
            answer = timed(lambda: train_step(model, batches["train"]))
        print("answer " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
