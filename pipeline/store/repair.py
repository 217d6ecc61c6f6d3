"""Repairs that `kd-cache verify --repair` makes."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.files.atomic import write_atomically
from pipeline.store.verify import Problem
from pipeline.store.writer import StoreWriter


def discard_damaged(path: Path | str, problems: Sequence[Problem]) -> str:
    """Discard the blocks and clean the files that ``problems`` name.

    Returns a sentence on what was done and what is next.

    Raises
    ------
    StoreError
        The store is no folder, so nothing in it can be changed.
    """
    if not Path(path).is_dir():
        raise StoreError(
            f"{path} is not a folder on this machine; repair the original."
        )
    blocks = {
        (problem.split, problem.block)
        for problem in problems
        if problem.split is not None and problem.block is not None
    }
    cleaned = [problem for problem in problems if problem.cleaned is not None]
    for problem in cleaned:
        assert problem.cleaned is not None
        write_atomically(Path(path) / problem.file, problem.cleaned)
    if len(cleaned) == len(problems):
        return f"{len(cleaned)} metadata file(s) cleaned; the store needs no more work."
    if not blocks:
        return "The damage is not in a block; build the store again from its spec."
    writer = StoreWriter(path)
    for split, block in sorted(blocks):
        writer.discard_block(split, block)
    return (
        f"{len(blocks)} damaged block(s) discarded; `kd-cache build SPEC` writes "
        "them again."
    )
