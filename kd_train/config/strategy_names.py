"""Names of the strategies: the built-in ones and those of plug-ins; imports none."""

from pipeline.plugins import PlugIns

BASELINE = "none"
# Class of every built-in strategy, in the documented order.
BUILT_IN = {
    "n2n": "kd_train.strategies.n2n:NodeToNode",
    "e2n": "kd_train.strategies.e2n:EdgeToNode",
    "e2e": "kd_train.strategies.e2e:EdgeToEdge",
    "v2v": "kd_train.strategies.v2v:VectorToVector",
    "vanilla1": "kd_train.strategies.vanilla1:Vanilla1",
    "vanilla2": "kd_train.strategies.vanilla2:Vanilla2",
    "jacobian": "kd_train.strategies.jacobian:ForceJacobian",
}
STRATEGIES = PlugIns("kd_train.strategies", "strategy", (BASELINE, *BUILT_IN))


def term_names() -> tuple[str, ...]:
    """Names of all distillation terms, which are the strategies but the baseline."""
    return tuple(name for name in STRATEGIES.names() if name != BASELINE)
