"""Write a model with weights of our own making in the layout of released OCP files.

    python benchmarks/make_released.py gemnet-oc-oc20 gemnet_oc_base.pt

Nothing is learned in it: it has the size, entries, scale factors (fitted on slabs) and
configuration of a released checkpoint, to run the pipeline at full size without one.
"""

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from models import slabs

from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import neighbor_edges
from pipeline.models.gemnet.model import GemNetOC
from pipeline.models.network import Network
from pipeline.models.scale_factors import SUFFIX
from pipeline.models.zoo import PRESETS, build_model

# Normaliser of the released OC20 models, eV and eV/Å.
MEAN, STD = -0.7554450631141663, 2.887317180633545
PREFIX = "module.module."
# Bases that share the cutoff of the main graph; files hold their centres once more.
COPIES = ("cbf_basis_tint", "cbf_basis_aeint", "sbf_basis_qint")


def released(preset: str, seed: int) -> dict[str, Any]:
    """Content of a 2022 file from distributed training, scale factors on their own."""
    name, hyperparameters = PRESETS[preset]
    torch.manual_seed(seed)
    model = build_model(name, hyperparameters)
    _fit(model)
    state = model.state_dict()
    factors = {
        key.removesuffix(SUFFIX): value
        for key, value in state.items()
        if key.endswith(SUFFIX)
    }
    entries = {k: v for k, v in state.items() if not k.endswith(SUFFIX)}
    if isinstance(model, GemNetOC):
        entries |= _aliases(entries)
    return {
        "state_dict": {PREFIX + key: value for key, value in entries.items()},
        "scale_dict": factors,
        "config": {
            "model": name,
            "model_attributes": {**hyperparameters, "otf_graph": True},
        },
        "normalizers": {
            "target": {"mean": torch.tensor(MEAN), "std": torch.tensor(STD)},
            "grad_target": {"mean": torch.tensor(0.0), "std": torch.tensor(STD)},
        },
    }


def _fit(model: Network) -> None:
    structures = slabs(2)
    edges = [neighbor_edges(s, model.graph_rule) for s in structures]
    model.fit(collate(structures, edges))


def _aliases(entries: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Second names under which released GemNet-OC files hold some entries."""
    aliases = {
        key.replace(".layers.", ".seq_energy_pre."): value
        for key, value in entries.items()
        if key.startswith("out_blocks.") and ".layers." in key
    }
    centres = entries["radial_basis.rbf.offset"]
    return aliases | {f"{name}.radial_basis.rbf.offset": centres for name in COPIES}


@click.command()
@click.argument("preset", type=click.Choice(sorted(PRESETS)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
def main(preset: str, out: Path, seed: int) -> None:
    """Write the model PRESET to the file OUT."""
    content = released(preset, seed)
    torch.save(content, out)
    numbers = [value.numel() for value in content["state_dict"].values()]
    click.echo(f"{out}: {int(np.sum(numbers))} numbers in {len(numbers)} entries")


if __name__ == "__main__":
    main()
