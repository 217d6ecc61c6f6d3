"""Edge to node: student node features against the teacher's summed edge features."""

from kd_train.strategies.n2n import NodeToNode


class EdgeToNode(NodeToNode):
    """Mean over N·C of ‖M(node_s) − Σ_j edge_t,ji‖² (arXiv:2306.14818, Eq. 5)."""

    name = "e2n"
    fields = ("edge_to_node_features",)
    default_weight = 10.0
