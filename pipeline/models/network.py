"""What every network offers beside its forward pass."""

from typing import Any

from torch import nn

from pipeline.graphs.neighbors import GraphRule


class Network(nn.Module):
    """A potential that reads the graphs of ``pipeline.graphs`` and gives ModelOutput.

    ``graph_rule`` says how its edges are built, ``hyperparameters`` (JSON-able) rebuild
    it, ``widths`` are the channels of the hidden states it offers by field name, and
    ``elements`` the atomic numbers it can embed.
    """

    graph_rule: GraphRule
    hyperparameters: dict[str, Any]
    widths: dict[str, int]
    elements: range
