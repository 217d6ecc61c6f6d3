"""Vector to vector: equivariant student states against the teacher's."""

from torch import Tensor, nn
from torch_geometric.data import Data

from kd_train.strategies.adapters import linear_adapter
from kd_train.strategies.base import Strategy, count_values, square_total
from pipeline.models.output import ModelOutput


class VectorToVector(Strategy):
    """Mean over N·3·C of ‖M(vector_s) − vector_t‖² (arXiv:2306.14818, Eq. 6)."""

    name = "v2v"
    fields = ("vector_features",)
    default_weight = 10000.0
    student_field = "vector_features"

    def build_adapter(self) -> nn.Module:
        """Build a linear map of channels without bias, which keeps equivariance."""
        return linear_adapter(
            self.setting.student_widths["vector_features"],
            self.setting.teacher_widths["vector_features"],
            bias=False,
            seed=self.setting.seed,
        )

    def counts(self, batch: Data) -> Tensor:
        """Return N·3·C, shape (1,)."""
        return count_values(batch.vector_features)

    def totals(self, output: ModelOutput, batch: Data) -> Tensor:
        """Return the feature error of the batch, shape (1,)."""
        assert self.adapter is not None
        mapped = self.adapter(output.vector_features)
        return square_total(mapped - batch.vector_features)
