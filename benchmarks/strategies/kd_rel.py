"""A distillation term on relations between neighbours (after ARK, 2026)."""

import torch
from torch.nn.functional import cross_entropy, normalize

from kd_train.strategies import Strategy
from kd_train.strategies.adapters import linear_adapter

# Similarities are divided by this; a small number makes the closest negatives count.
TEMPERATURE = 0.15
# All pairs of edges are compared, so that memory grows with the square of this.
MAX_EDGES = 4096


class Relations(Strategy):
    """InfoNCE between the student's and the teacher's relations of an edge.

    The relation of an edge from j to i is the direction of the difference of features,
    r = (f_i - f_j)/|f_i - f_j|, of the student after a linear map. The term is the mean
    over edges e of -log softmax_e'(r_s(e) · r_t(e') / τ) at e' = e: the other edges of
    the batch are the negatives.
    """

    name = "rel"
    fields = ("node_features",)
    default_weight = 1.0
    student_field = "node_features"

    def build_adapter(self):
        """Return a linear map from the student's width to the teacher's."""
        student = self.setting.student_widths["node_features"]
        teacher = self.setting.teacher_widths["node_features"]
        return linear_adapter(student, teacher, bias=False, seed=self.setting.seed)

    def counts(self, batch):
        """(1,) number of edges that are compared."""
        edges = batch.edge_index[:, self._chosen(batch)].shape[1]
        device = batch.edge_index.device
        return torch.full((1,), edges, dtype=torch.float64, device=device)

    def totals(self, output, batch):
        """(1,) sum over the edges that are compared."""
        source, target = batch.edge_index[:, self._chosen(batch)]
        mapped = self.adapter(output.node_features)
        own = normalize(mapped[target] - mapped[source], dim=1)
        known = batch.node_features
        wanted = normalize(known[target] - known[source], dim=1)
        similarity = own @ wanted.T / TEMPERATURE
        places = torch.arange(len(similarity), device=similarity.device)
        return cross_entropy(similarity, places, reduction="sum").reshape(1)

    def _chosen(self, batch):
        """Edges at even distances, at most MAX_EDGES of each batch."""
        step = -(-batch.edge_index.shape[1] // MAX_EDGES)
        return slice(None, None, max(step, 1))
