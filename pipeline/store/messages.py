"""Samples and blocks in words, for error messages."""

from collections.abc import Sequence


def name_samples(ids: Sequence[str], split: str) -> str:
    """Few of ``ids`` in words."""
    if not ids:
        return f"no sample of split {split!r}"
    shown = ", ".join(repr(name) for name in ids[:5])
    more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
    return f"samples {shown}{more} of split {split!r}"


def name_blocks(blocks: Sequence[int]) -> str:
    """Block numbers in words, at most ten of them."""
    shown = ", ".join(str(block) for block in blocks[:10])
    more = f" and {len(blocks) - 10} more" if len(blocks) > 10 else ""
    return f"block{'s' if len(blocks) > 1 else ''} {shown}{more}"
