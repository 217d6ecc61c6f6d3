"""Edge to edge: the student's edges against the teacher's edge features."""

from torch import Tensor, nn
from torch_geometric.data import Data

from kd_train.strategies.adapters import linear_adapter
from kd_train.strategies.base import Setting, Strategy, count_values, square_total
from pipeline.errors import DataError
from pipeline.models.output import ModelOutput


class EdgeToEdge(Strategy):
    """Mean over E·C of ‖M(edge_s,ji) − edge_t,ji‖² on the teacher's edges.

    For a student with edge states, edge_s,ji is its edge state. Its graph must be the
    teacher's: the same edges by source, target and shift. For other students, edge_s,ji
    is vector_i · vector_j, which any graph allows. The batch has the stored edges as
    ``teacher_edge_index`` (2, E), with the source in row 0.
    """

    name = "e2e"
    fields = ("edge_features",)
    default_weight = 10.0

    def __init__(self, setting: Setting) -> None:
        own = "edge_features" in setting.student_widths
        self.student_field = "edge_features" if own else "vector_features"
        super().__init__(setting)

    def build_adapter(self) -> nn.Module:
        """Build a linear map with bias from the student's edge states or invariants."""
        assert self.student_field is not None
        return linear_adapter(
            self.setting.student_widths[self.student_field],
            self.setting.teacher_widths["edge_features"],
            bias=True,
            seed=self.setting.seed,
        )

    def counts(self, batch: Data) -> Tensor:
        """Return E·C, shape (1,)."""
        return count_values(batch.edge_features)

    def totals(self, output: ModelOutput, batch: Data) -> Tensor:
        """Return the feature error of the batch, shape (1,).

        Raises
        ------
        DataError
            The student has edge states, but on other edges than those stored.
        """
        assert self.adapter is not None
        edges = self._edge_states(output, batch)
        return square_total(self.adapter(edges) - batch.edge_features)

    def _edge_states(self, output: ModelOutput, batch: Data) -> Tensor:
        if self.student_field == "edge_features":
            if batch.edge_mismatch:
                raise DataError(
                    f"Strategy 'e2e' compares {self.setting.student_name!r} with the "
                    "teacher edge by edge, but their graphs of sample "
                    f"{batch.edge_mismatch!r} differ; set the teacher's cutoff and "
                    "neighbour limit for the student, or choose e2n."
                )
            assert output.edge_features is not None
            return output.edge_features
        assert output.vector_features is not None
        source, target = batch.teacher_edge_index
        vectors = output.vector_features
        return (vectors[source] * vectors[target]).sum(dim=1)  # (E, H)
