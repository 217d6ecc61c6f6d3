"""Node to node: projected student node features against the teacher's."""

from torch import Tensor, nn
from torch_geometric.data import Data

from kd_train.strategies.adapters import linear_adapter
from kd_train.strategies.base import Strategy, count_values, square_total
from pipeline.models.output import ModelOutput


class NodeToNode(Strategy):
    """Mean over N·C of ‖M(node_s) − node_t‖² (arXiv:2306.14818, section 3)."""

    name = "n2n"
    fields = ("node_features",)
    default_weight = 100.0
    student_field = "node_features"

    def build_adapter(self) -> nn.Module:
        """Build a linear map with bias from the student's width to the stored width."""
        return linear_adapter(
            self.setting.student_widths["node_features"],
            self.setting.teacher_widths[self.fields[0]],
            bias=True,
            seed=self.setting.seed,
        )

    def counts(self, batch: Data) -> Tensor:
        """Return N·C, shape (1,)."""
        return count_values(batch[self.fields[0]])

    def totals(self, output: ModelOutput, batch: Data) -> Tensor:
        """Return the feature error of the batch, shape (1,)."""
        assert self.adapter is not None
        return square_total(self.adapter(output.node_features) - batch[self.fields[0]])
