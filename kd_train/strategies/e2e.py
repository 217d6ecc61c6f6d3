"""Edge to edge: student edge invariants against the teacher's edge features."""

from torch import Tensor, nn
from torch_geometric.data import Data

from kd_train.adapters import linear_adapter
from kd_train.strategies.base import Strategy, mean_square
from pipeline.models.output import ModelOutput


class EdgeToEdge(Strategy):
    """Mean over E·C of ‖M(vector_i · vector_j) − edge_t,ji‖² on the teacher's edges.

    The batch carries those edges as ``teacher_edge_index`` (2, E), row 0 the source.
    """

    name = "e2e"
    fields = ("edge_features",)
    student_field = "vector_features"

    def build_adapter(self) -> nn.Module:
        """Linear with bias from the student's edge invariants."""
        return linear_adapter(
            self.setting.student_widths["vector_features"],
            self.setting.teacher_widths["edge_features"],
            bias=True,
            seed=self.setting.seed,
        )

    def loss(self, output: ModelOutput, batch: Data) -> Tensor:
        """Feature error of the batch."""
        assert self.adapter is not None
        assert output.vector_features is not None
        source, target = batch.teacher_edge_index
        vectors = output.vector_features
        invariants = (vectors[source] * vectors[target]).sum(dim=1)  # (E, H)
        return mean_square(self.adapter(invariants) - batch.edge_features)
