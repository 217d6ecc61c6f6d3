"""Catches what layers of any network put out, without touching its code."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def capture_outputs(
    modules: Mapping[str, nn.Module], take: Callable[[Any], Tensor] = lambda out: out
) -> Iterator[dict[str, Tensor]]:
    """What each module of ``modules`` gives in a forward pass inside the ``with``.

    Filled as the modules run, by their names; a module that runs twice keeps its last
    output. ``take`` picks the tensor out of a module's output.
    """
    caught: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            caught[name] = take(output)

        return hook

    handles = [m.register_forward_hook(note(name)) for name, m in modules.items()]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
